/* The loop of Picard with Aitken steps on x ← φ(xAᵀ + b), every row to its own tolerance.

   A sweep of a small model takes ten microseconds, and an operation of torch's beside it half as long.  Here a sweep is
   a matrix product with the rest of the step behind it, while the row is in cache.  Rows are dealt to the threads in
   chunks; one that is done leaves its chunk, and the chunk's last row takes its place.  What is computed for a row
   depends on nothing but the row. */

#include "phi.h"
#include "shrink.h"

enum { WIDE = 3, CHUNK = 32 };

/* What became of a row: too slow to go on with, done, or with numbers that this loop does not judge. */
enum Status { SLOW, DONE, STRANGE, GOES_ON };

typedef struct {
    double rtol, atol, smallest, longest; /* smallest norm to judge, longest Aitken step */
    double fast;                          /* what a period leaves of the residual of rows that are never slow */
    int32_t budget, period, patience;     /* most evaluations; of an Aitken step; sweeps that a slow row may take */
} Settings;

typedef struct {
    ptrdiff_t n, batch, row, column;  /* a_ij is at A[i * row + j * column] */
    const REAL *A, *b, *x0;           /* b, x0: (batch, n); where x0 is NULL, the start is f(0) */
    REAL *scaled, *scale;             /* where wanted, the rows of A, contiguous, are shrunk first: A, and (n,) factors */
    const REAL *slope;                /* (batch, n), of x ← b + (x ∘ slope)Aᵀ, which is linear in b: see `load` */
    REAL *x, *slope_at, *residual;    /* the last iterate (f of it, if slow); φ' there, if wanted; its residual */
    int64_t *steps;                   /* evaluations of f */
    uint8_t *status;
    const Settings *set;
    double radius;
    int32_t phi, threads;
} Problem;

typedef struct {
    ptrdiff_t id;
    REAL unit;
    double first_size, largest, best, previous, residual;
    double change, reach; /* ‖f(x) − x‖ of the sweep before; ‖s‖ / ‖y‖ of the last step s, on which f(x) − x changed by y */
} Row;

/* The vectors of the rows of a chunk, which move together; INNER is what is multiplied by A. */
enum { X, Z, FX, B, BEFORE, SLOPES, INNER, PARTS };

/* How many of the vectors that are left the next panel of A has: three, but never one where two and two do. */
static ptrdiff_t panel_width(ptrdiff_t left) { return left == 4 ? 2 : left < WIDE ? left : WIDE; }

/* One vector of every row of Aᵀ, which are ``gap`` apart; with constants for the strides and the lanes, without a loop. */
static inline __attribute__((always_inline)) void copy_lanes(
    const REAL *from, ptrdiff_t row, ptrdiff_t column, ptrdiff_t n, int lanes, REAL *to, ptrdiff_t gap) {
    for (ptrdiff_t j = 0; j < n; j++)
        for (int lane = 0; lane < lanes; lane++) to[j * gap + lane] = from[lane * row + j * column];
}

/* The v-th vector of columns of Aᵀ, where `sweep` reads it; zeros beyond n. */
static void pack(const Problem *p, REAL *packed, ptrdiff_t v, ptrdiff_t vectors) {
    ptrdiff_t first = 0, width = panel_width(vectors), n = p->n, row = p->row, column = p->column;
    while (v >= first + width) first += width, width = panel_width(vectors - first);
    REAL *to = packed + (first * n + v - first) * LANES;
    const REAL *from = p->A + v * LANES * row;
    int lanes = n - v * LANES < LANES ? n - v * LANES : LANES;
    if (p->scaled) {
        for (ptrdiff_t i = v * LANES; i < v * LANES + lanes; i++)
            p->scale[i] = shrink(p->A + i * n, p->scaled + i * n, n, p->radius);
        from = p->scaled + v * LANES * n;
    }
    if (lanes == LANES && column == 1) return copy_lanes(from, row, 1, n, LANES, to, width * LANES);
    if (lanes == LANES && row == 1) return copy_lanes(from, 1, column, n, LANES, to, width * LANES);
    for (ptrdiff_t j = 0; j < n; j++) AT(to + j * width * LANES) = (Vector){0};
    copy_lanes(from, row, column, n, lanes, to, width * LANES);
}

/* z = b + x · panel for a few rows; with constants for their number and the width, all sums stay in registers. */
static inline __attribute__((always_inline)) void product(
    int rows, int width, const REAL *panel, ptrdiff_t n, ptrdiff_t stride, const REAL *x, const REAL *b, REAL *z) {
    Vector sums[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) sums[r][w] = AT(b + r * stride + w * LANES);
    for (ptrdiff_t j = 0; j < n; j++) {
        Vector a[WIDE];
        for (int w = 0; w < width; w++) a[w] = AT(panel + (j * width + w) * LANES);
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < width; w++) sums[r][w] += x[r * stride + j] * a[w];
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < width; w++) AT(z + r * stride + w * LANES) = sums[r][w];
}

#define PANEL(WIDTH) \
    static void panel##WIDTH(const REAL *panel, ptrdiff_t n, ptrdiff_t stride, ptrdiff_t rows, const REAL *x, \
                             const REAL *b, REAL *z) { \
        ptrdiff_t r = 0; \
        for (; r + ROWS / 2 < rows; r += ROWS) \
            product(ROWS, WIDTH, panel, n, stride, x + r * stride, b + r * stride, z + r * stride); \
        for (; r < rows; r += 2) product(2, WIDTH, panel, n, stride, x + r * stride, b + r * stride, z + r * stride); \
    }
PANEL(1)
PANEL(2)
PANEL(3)

/* z = b + xAᵀ for the first rows of a chunk; panels outside, so that one is read while it is in cache. */
static void sweep(const Problem *p, const REAL *packed, REAL *const part[PARTS], ptrdiff_t stride, ptrdiff_t rows) {
    const REAL *panel = packed;
    ptrdiff_t width, at = 0;
    for (ptrdiff_t left = stride / LANES; left; left -= width, at += width * LANES) {
        width = panel_width(left);
        (width == 3 ? panel3 : width == 2 ? panel2 : panel1)(
            panel, p->n, stride, rows, part[INNER], part[B] + at, part[Z] + at);
        panel += p->n * width * LANES;
    }
}

/* Whether it takes too long from here: the rate of a whole period says how many sweeps are left. */
static int is_slow(const Settings *p, double residual, double previous, int left) {
    if (residual <= p->fast * previous) return 0;
    double remaining = p->period * log(p->rtol / residual) / log(residual / previous);
    return !(remaining >= 0 && remaining <= (p->patience < left ? p->patience : left));
}

/* What becomes of a row after evaluation k, from ‖f(x)‖ and ‖f(x) − x‖; `residual.py` and `stage.py` have the reasons. */
static int judge(const Settings *p, Row *row, double size, double change, int k) {
    double floor = p->atol / p->rtol, residual = row->residual = change / (size + floor);
    if (!(size > p->smallest && size < DBL_MAX && change < DBL_MAX)) return STRANGE;
    if (k == 1) row->first_size = size;
    row->largest = fmax(row->largest, change);
    if (residual <= p->rtol) {
        double eps = sizeof(REAL) == 4 ? FLT_EPSILON : DBL_EPSILON;
        int standing = p->rtol * (size + floor) > row->largest && change + 4 * eps * size > 0.5 * row->largest;
        int far = (change + eps * size) * row->reach > sqrt(p->rtol) * (size + floor);
        return size > 2 * row->first_size && (standing || far) ? STRANGE : DONE;
    }
    int given_up = k >= p->budget;
    if (k % p->period == 1) { /* right behind an extrapolation, like all that are compared */
        if (k > 1) given_up |= is_slow(p, residual, row->previous, p->budget - k);
        row->previous = residual;
    }
    /* The next method starts from here only where this is the best point so far. */
    if (given_up) return residual < row->best ? SLOW : STRANGE;
    row->best = fmin(row->best, residual);
    return GOES_ON;
}

static void put(REAL *to, const REAL *from, ptrdiff_t n) { memcpy(to, from, n * sizeof(REAL)); }

/* x and what else is asked for at it. */
static void store(const Problem *p, const Row *row, const REAL *x, const REAL *z) {
    REAL *to = p->x + row->id * p->n;
    put(to, x, p->n);
    if (row->unit != 1)
        for (ptrdiff_t i = 0; i < p->n; i++) to[i] *= row->unit;
    if (!p->slope_at) return;
    for (ptrdiff_t i = 0; i < p->n; i += LANES) {
        Vector s = slope_of(p->phi, AT(z + i));
        put(p->slope_at + row->id * p->n + i, (REAL *)&s, p->n - i < LANES ? p->n - i : LANES);
    }
}

/* Whether x and f(x) are 0 in every entry, and not only in the square of their norm. */
static int is_zero(const Problem *p, const REAL *x, const REAL *value) {
    for (ptrdiff_t i = 0; i < p->n; i++)
        if (x[i] != 0 || value[i] != 0) return 0;
    return 1;
}

/* Evaluation k of a row, of which z has just been computed: look, and step or store. */
static int finish_step(const Problem *p, Row *row, REAL *const part[PARTS], ptrdiff_t at, ptrdiff_t stride, int k) {
    REAL *x = part[X] + at, *z = part[Z] + at, *value = part[FX] + at, *before = part[BEFORE] + at;
    int phi = p->phi, period = p->set->period, remember = k % period == period - 1, extrapolate = k % period == 0;
    Vector size = {0}, change = {0}, dd = {0}, dr = {0};
    for (ptrdiff_t i = 0; i < stride; i += LANES) {
        Vector fx = AT(value + i) = activate(phi, AT(z + i)), r = fx - AT(x + i);
        size += fx * fx;
        change += r * r;
        if (extrapolate) {
            Vector d = r - AT(before + i);
            dd += d * d;
            dr += d * r;
        }
        if (remember) AT(before + i) = r;
    }
    double fx2 = sum(size), eps = sizeof(REAL) == 4 ? FLT_EPSILON : DBL_EPSILON;
    if (extrapolate && row->change > 4 * eps * sqrt(fx2)) row->reach = row->change / sqrt(sum(dd));
    row->change = sqrt(sum(change));
    int status = judge(p->set, row, sqrt(fx2), row->change, k);
    if (fx2 == 0 && is_zero(p, x, value)) status = DONE, row->residual = 0;
    if (status == DONE) store(p, row, x, z);
    if (status == DONE || status == STRANGE) return status;
    double gamma = 0;
    if (extrapolate && status == GOES_ON && sum(dd) > 0)
        /* A residual that all but repeats itself differs by rounding: half the digits' worth is the longest step. */
        gamma = fmin(fmax(sum(dr) / sum(dd), -p->set->longest), p->set->longest);
    REAL step = gamma, *inner = part[INNER] + at, *slopes = part[SLOPES] + at;
    for (ptrdiff_t i = 0; i < stride; i += LANES) {
        Vector fx = AT(value + i), next = fx - step * (fx - AT(x + i));
        AT(x + i) = next;
        if (phi == SLOPE) AT(inner + i) = next * AT(slopes + i);
    }
    if (status == SLOW) store(p, row, x, z);
    return status;
}

/* A linear row is solved in units of a power of two near its largest entry: cotangents of 1e-23 have squares of 0. */
static REAL unit_of(const REAL *b, ptrdiff_t n) {
    int exponent, most = sizeof(REAL) == 4 ? 120 : 1000;
    REAL largest = 0;
    Vector sizes = {0};
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES) sizes = choose(magnitude(AT(b + i)) > sizes, magnitude(AT(b + i)), sizes);
    for (int lane = 0; lane < LANES; lane++) largest = sizes[lane] > largest ? sizes[lane] : largest;
    for (; i < n; i++) largest = fabs(b[i]) > largest ? fabs(b[i]) : largest;
    if (!(largest > 0 && largest < INFINITY)) return 1;
    frexp(largest, &exponent);
    return ldexp(1, exponent < -most ? -most : exponent > most ? most : exponent);
}

static void load(const Problem *p, Row *row, REAL *const part[PARTS], ptrdiff_t at, ptrdiff_t stride) {
    ptrdiff_t from = row->id * p->n;
    *row = (Row){.id = row->id, .unit = p->phi == SLOPE ? unit_of(p->b + from, p->n) : 1, .best = DBL_MAX};
    /* Behind the last number f(x) is 0, too. */
    REAL behind = p->phi == SIGMOID || p->phi == SOFTPLUS ? -INFINITY : 0;
    for (ptrdiff_t i = p->n; i < stride; i++)
        part[X][at + i] = part[SLOPES][at + i] = 0, part[B][at + i] = behind;
    REAL inverse = 1 / row->unit; /* exact, and so are products with it */
    for (ptrdiff_t i = 0; i < p->n; i++) part[B][at + i] = p->b[from + i] * inverse;
    if (p->x0)
        for (ptrdiff_t i = 0; i < p->n; i++) part[X][at + i] = p->x0[from + i] * inverse;
    else
        for (ptrdiff_t i = 0; i < stride; i += LANES) AT(part[X] + at + i) = activate(p->phi, AT(part[B] + at + i));
    if (p->phi != SLOPE) return;
    put(part[SLOPES] + at, p->slope + from, p->n);
    for (ptrdiff_t i = 0; i < stride; i++) part[INNER][at + i] = part[X][at + i] * part[SLOPES][at + i];
}

/* All steps of the rows from ``start`` on, in memory for ``room`` of them.  Returns how many were not solved. */
static int solve_chunk(
    const Problem *p, const REAL *packed, REAL *memory, ptrdiff_t room, ptrdiff_t stride, ptrdiff_t start) {
    Row rows[CHUNK];
    REAL *part[PARTS];
    ptrdiff_t live = p->batch - start < room ? p->batch - start : room;
    int unsolved = 0;
    for (int i = 0; i < PARTS; i++) part[i] = memory + i * room * stride;
    if (p->phi != SLOPE) part[INNER] = part[X];
    for (ptrdiff_t r = 0; r < live; r++) rows[r].id = start + r, load(p, &rows[r], part, r * stride, stride);
    /* A product takes several rows at once, those behind the last one too. */
    memset(part[INNER] + live * stride, 0, (room - live) * stride * sizeof(REAL));
    memset(part[B] + live * stride, 0, (room - live) * stride * sizeof(REAL));
    for (int k = 1; live; k++) {
        sweep(p, packed, part, stride, live);
        for (ptrdiff_t r = 0; r < live;) {
            int status = finish_step(p, &rows[r], part, r * stride, stride, k);
            if (status == GOES_ON) {
                r++;
                continue;
            }
            p->steps[rows[r].id] = k;
            p->status[rows[r].id] = status;
            p->residual[rows[r].id] = rows[r].residual;
            unsolved += status != DONE;
            if (r == --live) break;
            rows[r] = rows[live];
            for (int i = 0; i < PARTS; i++) put(part[i] + r * stride, part[i] + live * stride, stride);
        }
    }
    return unsolved;
}

/* Returns the number of rows that were not solved, or −1 where there was no memory. */
int64_t solve(const Problem *p) {
    ptrdiff_t vectors = (p->n + LANES - 1) / LANES, stride = vectors * LANES;
    ptrdiff_t share = (p->batch + p->threads - 1) / p->threads, room = (share + ROWS - 1) / ROWS * ROWS;
    if (room > CHUNK) room = CHUNK;
    REAL *packed = malloc(p->n * stride * sizeof(REAL));
    int64_t unsolved = 0;
    int failed = !packed;
#pragma omp parallel num_threads(p->threads) if (!failed)
    {
        REAL *memory = failed ? NULL : malloc(PARTS * room * stride * sizeof(REAL));
#pragma omp for schedule(static)
        for (ptrdiff_t v = 0; v < vectors; v++)
            if (packed) pack(p, packed, v, vectors);
#pragma omp for schedule(dynamic) reduction(+ : unsolved) reduction(| : failed)
        for (ptrdiff_t start = 0; start < p->batch; start += room) {
            if (memory) unsolved += solve_chunk(p, packed, memory, room, stride, start);
            else failed = 1;
        }
        free(memory);
    }
    free(packed);
    return failed ? -1 : unsolved;
}
