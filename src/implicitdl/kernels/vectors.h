/* The vectors of this processor.  Compiled for each REAL, with the INT of its size. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { LANES = BYTES / sizeof(REAL) };

typedef REAL Vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef INT Mask __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define AT(p) (*(Vector *)(p))

static inline Vector choose(Mask which, Vector yes, Vector no) {
    return (Vector)(((Mask)yes & which) | ((Mask)no & ~which));
}

/* By halves: a chain of additions would take longer than the sweep that it follows. */
static inline double sum(Vector v) {
    REAL part[LANES];
    memcpy(part, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}
