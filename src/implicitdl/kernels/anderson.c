/* Anderson acceleration of large states, where a step is the traffic of its memory: a pass reads every vector once.

   The memory is the last residuals and values themselves, newest first, and their differences, of which the method is
   made, are taken in registers: d_0 = r − r_1, d_1 = r_1 − r_2, and so on. */

#include "vectors.h"

/* A block of a state stays in cache while the memory passes by; a sum of its products in REAL is added up in double. */
enum { BLOCK = 256, MOST = 32, SPAN = 4 };

typedef struct {
    ptrdiff_t batch, d, room, held; /* m, the side of the Gram matrices; how many earlier vectors there are, ≤ m */
    const REAL *x;                       /* (batch, d) */
    REAL *const *r, *const *f;           /* (held + 1, batch)  where each sample's vectors are, the present ones first */
    REAL *next;                          /* (batch, d)  x, as `step` leaves it; `look` writes the present r */
    double *gram, *along;                /* (batch, m, m)  d_i · d_j;  (batch, m)  r · d_j */
    double *sizes, *best;                /* (2, batch)  ‖r‖ and ‖f(x)‖;  (batch,)  smallest ‖r‖ since the last restart */
    int64_t *depth;                      /* (batch,)  how many differences there are since then */
    double growth, damping, ridge;
    int32_t threads;
} Memory;

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* For `width` neighbours in the memory at once, so that each is read once: adds up u · (r_j − r_j+1) and v · the same.
   With a constant width the sums stay in registers. */
static inline __attribute__((always_inline)) void products_of(
    int width, const REAL *u, const REAL *v, REAL *const r[], ptrdiff_t n, double *ud, double *vd) {
    Vector with_u[SPAN] = {{0}}, with_v[SPAN] = {{0}};
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector here = AT(r[0] + i);
        for (int j = 0; j < width; j++) {
            Vector next = AT(r[j + 1] + i), d = here - next;
            with_u[j] += AT(u + i) * d;
            with_v[j] += AT(v + i) * d;
            here = next;
        }
    }
    for (int j = 0; j < width; j++) {
        REAL u_rest = 0, v_rest = 0;
        for (ptrdiff_t l = i; l < n; l++) {
            u_rest += u[l] * (r[j][l] - r[j + 1][l]);
            v_rest += v[l] * (r[j][l] - r[j + 1][l]);
        }
        ud[j] += (double)sum(with_u[j]) + u_rest;
        vd[j] += (double)sum(with_v[j]) + v_rest;
    }
}

static void products(int width, const REAL *u, const REAL *v, REAL *const r[], ptrdiff_t n, double *ud, double *vd) {
    if (width == 4) products_of(4, u, v, r, n, ud, vd);
    else if (width == 3) products_of(3, u, v, r, n, ud, vd);
    else if (width == 2) products_of(2, u, v, r, n, ud, vd);
    else products_of(1, u, v, r, n, ud, vd);
}

/* x ← x − Σ γ_j (a_j − a_j+1). */
static inline __attribute__((always_inline)) void subtract_of(
    int width, REAL *x, const REAL *gamma, REAL *const a[], ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++) {
        REAL rest = x[i], here = a[0][i];
        for (int j = 0; j < width; j++) {
            rest -= gamma[j] * (here - a[j + 1][i]);
            here = a[j + 1][i];
        }
        x[i] = rest;
    }
}

static void subtract(int width, REAL *x, const REAL *gamma, REAL *const a[], ptrdiff_t n) {
    if (width == 4) subtract_of(4, x, gamma, a, n);
    else if (width == 3) subtract_of(3, x, gamma, a, n);
    else if (width == 2) subtract_of(2, x, gamma, a, n);
    else subtract_of(1, x, gamma, a, n);
}

/* Where the block that begins at ``start`` is in up to SPAN + 1 of a sample's vectors, from number j on. */
static int block_of(const Memory *p, REAL *const *vectors, ptrdiff_t j, ptrdiff_t end, ptrdiff_t start, REAL **block) {
    int width = (int)least(SPAN, end - j);
    for (int i = 0; i <= width; i++) block[i] = vectors[(j + i) * p->batch] + start;
    return width;
}

/* r = f(x) − x of a sample, the norms, and what is new in the Gram matrix of the differences and in their products
   with r. */
static void look_at(const Memory *p, ptrdiff_t sample) {
    ptrdiff_t m = p->room;
    REAL *const *r = p->r + sample, *const *f = p->f + sample;
    double *gram = p->gram + sample * m * m, *along = p->along + sample * m, newest[MOST] = {0}, change = 0, size = 0;
    for (ptrdiff_t j = 0; j < p->held; j++) along[j] = 0;
    for (ptrdiff_t start = 0; start < p->d; start += BLOCK) {
        ptrdiff_t n = least(BLOCK, p->d - start), i = 0;
        const REAL *x = p->x + sample * p->d + start, *fx = f[0] + start, *last = p->held ? r[p->batch] + start : x;
        REAL *present = r[0] + start, newest_difference[BLOCK], *block[SPAN + 1];
        Vector changes = {0}, sizes = {0};
        for (; i + LANES <= n; i += LANES) {
            Vector fx_i = AT(fx + i), r_i = fx_i - AT(x + i);
            AT(present + i) = r_i;
            AT(newest_difference + i) = r_i - AT(last + i);
            changes += r_i * r_i;
            sizes += fx_i * fx_i;
        }
        change += sum(changes);
        size += sum(sizes);
        for (; i < n; i++) {
            present[i] = fx[i] - x[i];
            newest_difference[i] = present[i] - last[i];
            change += present[i] * present[i];
            size += fx[i] * fx[i];
        }
        for (ptrdiff_t j = 0; j < p->held; j += SPAN) {
            int width = block_of(p, r, j, p->held, start, block);
            products(width, newest_difference, present, block, n, &newest[j], &along[j]);
        }
    }
    p->sizes[sample] = sqrt(change);
    p->sizes[p->batch + sample] = sqrt(size);
    for (ptrdiff_t i = p->held - 1; i > 0; i--)
        for (ptrdiff_t j = p->held - 1; j > 0; j--) gram[i * m + j] = gram[(i - 1) * m + j - 1];
    for (ptrdiff_t j = 0; j < p->held; j++) gram[j] = gram[j * m] = newest[j];
}

/* γ of argmin ‖r − Σ γ_j d_j‖ over the newest k differences, in columns of length 1 with a ridge; 0 where they are
   degenerate beyond it, which is the plain step. */
static void least_squares(const Memory *p, const double *gram, const double *along, ptrdiff_t k, double *gamma) {
    double L[MOST][MOST], scale[MOST];
    for (ptrdiff_t i = 0; i < k; i++) scale[i] = gram[i * p->room + i] > 0 ? 1 / sqrt(gram[i * p->room + i]) : 0;
    for (ptrdiff_t i = 0; i < k; i++) {
        gamma[i] = along[i] * scale[i];
        for (ptrdiff_t j = 0; j <= i; j++) {
            double entry = j < i ? gram[i * p->room + j] * scale[i] * scale[j] : 1 + p->ridge;
            for (ptrdiff_t l = 0; l < j; l++) entry -= L[i][l] * L[j][l];
            if (j == i && !(entry > 0)) {
                memset(gamma, 0, k * sizeof *gamma);
                return;
            }
            L[i][j] = j < i ? entry / L[j][j] : sqrt(entry);
        }
        for (ptrdiff_t l = 0; l < i; l++) gamma[i] -= L[i][l] * gamma[l];
        gamma[i] /= L[i][i];
    }
    for (ptrdiff_t i = k - 1; i >= 0; i--) {
        for (ptrdiff_t l = i + 1; l < k; l++) gamma[i] -= L[l][i] * gamma[l];
        gamma[i] /= L[i][i];
    }
    for (ptrdiff_t i = 0; i < k; i++) gamma[i] *= scale[i];
}

/* x ← f(x) − (1 − β) r − Σ γ_j (Δf_j − (1 − β) d_j). */
static void step_from(const Memory *p, ptrdiff_t sample) {
    double size = p->sizes[sample], solution[MOST];
    /* A residual that has grown, or is NaN: the memory is dropped, and the difference to it with it. */
    int restart = !(size <= p->growth * p->best[sample]);
    ptrdiff_t k = p->depth[sample] = restart ? 0 : least(p->depth[sample] + 1, p->held);
    p->best[sample] = restart ? size : fmin(size, p->best[sample]);
    least_squares(p, p->gram + sample * p->room * p->room, p->along + sample * p->room, k, solution);
    REAL *const *r = p->r + sample, *const *f = p->f + sample, undamped = 1 - p->damping, gamma[MOST], damped[MOST];
    for (ptrdiff_t j = 0; j < k; j++) gamma[j] = solution[j], damped[j] = -gamma[j] * undamped;
    for (ptrdiff_t start = 0; start < p->d; start += BLOCK) {
        ptrdiff_t n = least(BLOCK, p->d - start);
        REAL *x = p->next + sample * p->d + start, *block[SPAN + 1];
        memcpy(x, f[0] + start, n * sizeof(REAL));
        if (undamped != 0)
            for (ptrdiff_t i = 0; i < n; i++) x[i] -= undamped * r[0][start + i];
        for (ptrdiff_t j = 0; j < k; j += SPAN) {
            int width = block_of(p, f, j, k, start, block);
            subtract(width, x, &gamma[j], block, n);
            if (undamped == 0) continue;
            block_of(p, r, j, k, start, block);
            subtract(width, x, &damped[j], block, n);
        }
    }
}

void look(const Memory *p) {
#pragma omp parallel for num_threads(p->threads) schedule(dynamic)
    for (ptrdiff_t sample = 0; sample < p->batch; sample++) look_at(p, sample);
}

void step(const Memory *p) {
#pragma omp parallel for num_threads(p->threads) schedule(dynamic)
    for (ptrdiff_t sample = 0; sample < p->batch; sample++) step_from(p, sample);
}
