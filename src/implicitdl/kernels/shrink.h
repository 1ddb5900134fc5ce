/* One row v shrunk onto the ℓ1 ball: a = s v with s = min(1, r/‖v‖₁). */

#include "vectors.h"

/* Returns s. */
static inline REAL shrink(const REAL *v, REAL *a, ptrdiff_t columns, double radius) {
    REAL total, s;
    Vector sizes = {0};
    ptrdiff_t j = 0;
    for (; j + LANES <= columns; j += LANES) sizes += magnitude(AT(v + j));
    for (total = sum(sizes); j < columns; j++) total += v[j] < 0 ? -v[j] : v[j];
    s = radius / total;
    s = s > 1 ? 1 : s; /* NaN stays, so that nobody takes the row for a good one */
    for (j = 0; j < columns; j++) a[j] = s * v[j];
    return s;
}
