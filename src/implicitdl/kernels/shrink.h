#pragma once
/* One row v shrunk onto the ℓ1 ball: a = s v with s = min(1, r/‖v‖₁); and its vector-Jacobian product with g, which is
   g inside and s g − s² sign(v) (vᵀg)/r outside. */

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

static inline void shrink_vjp(const REAL *v, REAL s, const REAL *g, REAL *out, ptrdiff_t columns, double radius) {
    REAL along = 0;
    if (s != 1) {
        Vector products = {0};
        ptrdiff_t j = 0;
        for (; j + LANES <= columns; j += LANES) products += AT(v + j) * AT(g + j);
        for (along = sum(products); j < columns; j++) along += v[j] * g[j];
        along *= s * s / radius;
    }
    for (ptrdiff_t j = 0; j < columns; j++) out[j] = s * g[j] - along * ((v[j] > 0) - (v[j] < 0));
}
