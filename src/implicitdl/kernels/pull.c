/* What a cotangent v of x = φ(xAᵀ + b) makes of b and A: w = v ∘ φ' and Σ w ⊗ x over the batch, and of the rows that A
   was shrunk from, in one pass.  Of a small model the product takes ten microseconds, and the five operations of torch's
   that say the same take fifty. */

#include "shrink.h"

enum { TALL = 3, STEP = (int)LANES > (int)ROWS ? (int)LANES : (int)ROWS };

/* ROWS rows of Σ w ⊗ x, a few vectors wide; w and x are padded with zeros. */
static inline __attribute__((always_inline)) void outer(
    int width, const REAL *w, const REAL *x, ptrdiff_t batch, ptrdiff_t stride, REAL *g) {
    Vector sums[ROWS][TALL] = {0};
    for (ptrdiff_t b = 0; b < batch; b++, w += stride, x += stride) {
        Vector a[TALL];
        for (int k = 0; k < width; k++) a[k] = AT(x + k * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int k = 0; k < width; k++) sums[r][k] += w[r] * a[k];
    }
    for (int r = 0; r < ROWS; r++)
        for (int k = 0; k < width; k++) AT(g + r * stride + k * LANES) = sums[r][k];
}


static void widen(REAL *to, const REAL *from, ptrdiff_t n, ptrdiff_t stride) {
    memcpy(to, from, n * sizeof(REAL));
    memset(to + n, 0, (stride - n) * sizeof(REAL));
}

/* v, slope, x, w: (batch, n).  out: (n, n), of A, or of ``source`` where the rows of A are scale · source.  Returns
   whether there was memory. */
int pull(const REAL *v, const REAL *slope, const REAL *x, const REAL *source, const REAL *scale, REAL *w, REAL *out,
         ptrdiff_t batch, ptrdiff_t n, double radius, int threads) {
    ptrdiff_t stride = (n + STEP - 1) / STEP * STEP;
    REAL *memory = malloc((2 * batch + threads * ROWS) * stride * sizeof(REAL)), *wide_x = memory;
    if (!memory) return 0;
    REAL *wide_w = memory + batch * stride, *groups = wide_w + batch * stride;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (ptrdiff_t b = 0; b < batch; b++) {
            REAL *restrict wb = w + b * n;
            for (ptrdiff_t i = 0; i < n; i++) wb[i] = v[b * n + i] * slope[b * n + i];
            widen(wide_w + b * stride, wb, n, stride);
            widen(wide_x + b * stride, x + b * n, n, stride);
        }
#pragma omp for schedule(static)
        for (int part = 0; part < threads; part++) {
            REAL *g = groups + part * ROWS * stride;
            for (ptrdiff_t i = part * ROWS; i < n; i += threads * ROWS) {
                ptrdiff_t at = 0;
                for (; at + TALL * LANES <= stride; at += TALL * LANES)
                    outer(TALL, wide_w + i, wide_x + at, batch, stride, g + at);
                if (at + 2 * LANES <= stride) outer(2, wide_w + i, wide_x + at, batch, stride, g + at), at += 2 * LANES;
                if (at < stride) outer(1, wide_w + i, wide_x + at, batch, stride, g + at);
                for (ptrdiff_t r = i; r < n && r < i + ROWS; r++) {
                    const REAL *row = g + (r - i) * stride;
                    if (source) shrink_vjp(source + r * n, scale[r], row, out + r * n, n, radius);
                    else memcpy(out + r * n, row, n * sizeof(REAL));
                }
            }
        }
    }
    free(memory);
    return 1;
}
