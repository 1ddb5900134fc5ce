/* What is done by rows in one pass where torch makes several: rows shrunk onto the ℓ1 ball, with the derivative of that;
   their norms; whether all numbers are finite. */

#include "shrink.h"

/* Rows are dealt to threads; each is (columns,) long. */
void scale_rows(const REAL *v, REAL *a, REAL *scale, ptrdiff_t rows, ptrdiff_t columns, double radius, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < rows; i++) {
        scale[i] = shrink(v + i * columns, a + i * columns, columns, radius);
    }
}

void scale_rows_vjp(const REAL *v, const REAL *scale, const REAL *g, REAL *out, ptrdiff_t rows, ptrdiff_t columns,
                    double radius, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < rows; i++)
        shrink_vjp(v + i * columns, scale[i], g + i * columns, out + i * columns, columns, radius);
}

/* A number minus itself is 0 unless it is infinite or NaN. */
int all_finite(const REAL *x, ptrdiff_t count) {
    ptrdiff_t i = 0;
    Vector total = {0};
    REAL rest = 0;
    for (; i + LANES <= count; i += LANES) total += AT(x + i) - AT(x + i);
    for (; i < count; i++) rest += x[i] - x[i];
    return sum(total) + rest == 0;
}

/* ‖f(x) − x‖ and ‖f(x)‖ of every row, in one pass; sums of a few numbers in REAL are added up in double. */
void norms(const REAL *x, const REAL *fx, double *change, double *size, ptrdiff_t rows, ptrdiff_t columns, int threads) {
    const ptrdiff_t block = 64 * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *from = x + i * columns, *to = fx + i * columns;
        double changes = 0, sizes = 0;
        ptrdiff_t j = 0;
        while (j + LANES <= columns) {
            Vector r2 = {0}, f2 = {0};
            for (ptrdiff_t end = j + block; j < end && j + LANES <= columns; j += LANES) {
                Vector f = AT(to + j), r = f - AT(from + j);
                r2 += r * r;
                f2 += f * f;
            }
            changes += sum(r2);
            sizes += sum(f2);
        }
        for (; j < columns; j++) {
            REAL r = to[j] - from[j];
            changes += r * r;
            sizes += to[j] * to[j];
        }
        change[i] = sqrt(changes);
        size[i] = sqrt(sizes);
    }
}

/* The Aitken step f(x) − γ r of every row, with r = f(x) − x, d = r − before and γ = d · r / d · d; a plain one where
   the products say nothing. */
void aitken(const REAL *x, const REAL *fx, const REAL *before, REAL *next, ptrdiff_t rows, ptrdiff_t columns,
            double tiny, double longest, int threads) {
    const ptrdiff_t block = 64 * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (ptrdiff_t i = 0; i < rows; i++) {
        const REAL *from = x + i * columns, *to = fx + i * columns, *last = before + i * columns;
        REAL *out = next + i * columns;
        double dd = 0, dr = 0;
        ptrdiff_t j = 0;
        while (j + LANES <= columns) {
            Vector dd_part = {0}, dr_part = {0};
            for (ptrdiff_t end = j + block; j < end && j + LANES <= columns; j += LANES) {
                Vector r = AT(to + j) - AT(from + j), d = r - AT(last + j);
                dd_part += d * d;
                dr_part += d * r;
            }
            dd += sum(dd_part);
            dr += sum(dr_part);
        }
        for (; j < columns; j++) {
            REAL r = to[j] - from[j], d = r - last[j];
            dd += d * d;
            dr += d * r;
        }
        double ratio = dr / fmax(dd, tiny);
        REAL gamma = ratio != ratio ? 0 : fmin(fmax(ratio, -longest), longest);
        for (j = 0; j < columns; j++) out[j] = to[j] - gamma * (to[j] - from[j]);
    }
}
