/* All compiled loops, as one library for each precision. */
#include "rows.c"
#include "pull.c"
#include "sweeps.c"
#include "anderson.c"
