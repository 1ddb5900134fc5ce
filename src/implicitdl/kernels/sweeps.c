/* The loop of Picard with Aitken steps on x ← φ(xAᵀ + b), every row to its own tolerance.

   A sweep of a small model takes ten microseconds, and an operation of torch's beside it half as long.  Here a sweep is
   a matrix product with the rest of the step behind it, while the row is in cache.  Rows are dealt to the threads in
   chunks; one that is done leaves its chunk, and the chunk's last row takes its place.  What is computed for a row
   depends on nothing but the row.

   Compiled once for each REAL; INT is the integer of its size. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* A product keeps ROWS × WIDE vectors of sums in registers, beside WIDE of A: 27 of 32, or 15 of 16. */
#if defined(__AVX512F__)
enum { BYTES = 64, ROWS = 8 };
#elif defined(__AVX__)
enum { BYTES = 32, ROWS = 4 };
#else
enum { BYTES = 16, ROWS = 4 };
#endif
enum { LANES = BYTES / sizeof(REAL), WIDE = 3, CHUNK = 32 };

typedef REAL Vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef INT Mask __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define AT(p) (*(Vector *)(p))

enum Phi { RELU, LEAKY_RELU, IDENTITY, HARDTANH, SLOPE };
/* What became of a row: too slow to go on with, done, or with numbers that this loop does not judge. */
enum Status { SLOW, DONE, STRANGE, GOES_ON };

typedef struct {
    ptrdiff_t n, batch, row, column;  /* a_ij is at A[i * row + j * column] */
    const REAL *A, *b, *x0, *slope;   /* (batch, n); slope φ' only for v ← b + (v ∘ φ')Aᵀ */
    REAL *packed;                     /* room for n × n, n rounded up to whole vectors */
    REAL *x, *z, *residual;           /* the last iterate (after a slow one, f of it), xAᵀ + b, the residual at x */
    int64_t *steps;                   /* evaluations of f */
    uint8_t *status;
    double rtol, atol, smallest, longest, fast;
    int32_t phi, budget, period, patience, threads;
} Problem;

typedef struct {
    ptrdiff_t id;
    double first_size, largest, best, previous;
} Row;

/* The vectors of the rows of a chunk, which move together; INNER is what is multiplied by A. */
enum { X, Z, B, BEFORE, SLOPES, INNER, PARTS };

static inline Vector choose(Mask which, Vector yes, Vector no) {
    return (Vector)(((Mask)yes & which) | ((Mask)no & ~which));
}

/* Comparisons are such that NaN stays NaN. */
static inline Vector activate(int phi, Vector z) {
    Vector zero = {0}, one = zero + 1;
    switch (phi) {
    case RELU: return choose(z <= 0, zero, z);
    case LEAKY_RELU: return choose(z <= 0, (REAL)0.01 * z, z);
    case HARDTANH: return choose(z > 1, one, choose(z < -1, -one, z));
    default: return z;
    }
}

static double sum(Vector v) {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

/* How many of the vectors that are left the next panel of A has: three, but never one where two and two do. */
static ptrdiff_t panel_width(ptrdiff_t left) { return left == 4 ? 2 : left < WIDE ? left : WIDE; }

/* The v-th vector of columns of Aᵀ, where `sweep` reads it; zeros beyond n.  In blocks, since one side has strides. */
static void pack(const Problem *p, ptrdiff_t v, ptrdiff_t vectors) {
    ptrdiff_t first = 0, width = panel_width(vectors), n = p->n;
    while (v >= first + width) first += width, width = panel_width(vectors - first);
    REAL *to = p->packed + (first * n + v - first) * LANES;
    ptrdiff_t full = n - v * LANES < LANES ? n - v * LANES : LANES;
    for (ptrdiff_t j = 0; j < n; j++) {
        const REAL *from = p->A + v * LANES * p->row + j * p->column;
        AT(to + j * width * LANES) = (Vector){0};
        for (ptrdiff_t lane = 0; lane < full; lane++) to[j * width * LANES + lane] = from[lane * p->row];
    }
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
static void sweep(const Problem *p, REAL *const part[PARTS], ptrdiff_t stride, ptrdiff_t rows) {
    const REAL *panel = p->packed;
    ptrdiff_t width, at = 0;
    for (ptrdiff_t left = stride / LANES; left; left -= width, at += width * LANES) {
        width = panel_width(left);
        (width == 3 ? panel3 : width == 2 ? panel2 : panel1)(
            panel, p->n, stride, rows, part[INNER], part[B] + at, part[Z] + at);
        panel += p->n * width * LANES;
    }
}

/* Whether it takes too long from here: the rate of a whole period says how many sweeps are left. */
static int is_slow(const Problem *p, double residual, double previous, int left) {
    if (residual <= pow(p->fast, p->period) * previous) return 0;
    double remaining = p->period * log(p->rtol / residual) / log(residual / previous);
    return !(remaining >= 0 && remaining <= (p->patience < left ? p->patience : left));
}

/* What becomes of a row after evaluation k, from ‖f(x)‖ and ‖f(x) − x‖; `iterate.py` has the reasons. */
static int judge(const Problem *p, Row *row, double size, double change, int k) {
    double floor = p->atol / p->rtol, residual = change / (size + floor);
    p->steps[row->id] = k;
    p->residual[row->id] = (REAL)residual;
    if (!(size > p->smallest && size < DBL_MAX && change < DBL_MAX)) return STRANGE;
    if (k == 1) row->first_size = size;
    row->largest = fmax(row->largest, change);
    if (residual <= p->rtol) {
        double rounding = 4 * (sizeof(REAL) == 4 ? FLT_EPSILON : DBL_EPSILON) * size;
        int outgrown = size > 2 * row->first_size && p->rtol * (size + floor) > row->largest &&
                       change + rounding > 0.5 * row->largest;
        return outgrown ? STRANGE : DONE;
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

static int is_zero(Vector v) {
    for (int i = 0; i < LANES; i++)
        if (v[i] != 0) return 0;
    return 1;
}

/* Evaluation k of a row, of which z has just been computed: look, and step or store. */
static int finish_step(const Problem *p, Row *row, REAL *const part[PARTS], ptrdiff_t at, ptrdiff_t stride, int k) {
    REAL *x = part[X] + at, *z = part[Z] + at, *before = part[BEFORE] + at;
    int remember = k % p->period == p->period - 1, extrapolate = k % p->period == 0, zero = 1;
    Vector size = {0}, change = {0}, dd = {0}, dr = {0};
    for (ptrdiff_t i = 0; i < stride; i += LANES) {
        Vector fx = activate(p->phi, AT(z + i)), r = fx - AT(x + i);
        zero = zero && is_zero(fx) && is_zero(r);
        size += fx * fx;
        change += r * r;
        if (extrapolate) {
            Vector d = r - AT(before + i);
            dd += d * d;
            dr += d * r;
        }
        if (remember) AT(before + i) = r;
    }
    int status = judge(p, row, sqrt(sum(size)), sqrt(sum(change)), k);
    if (zero) status = DONE, p->residual[row->id] = 0;
    if (status == DONE || status == STRANGE) {
        put(p->x + row->id * p->n, x, p->n);
        put(p->z + row->id * p->n, z, p->n);
        return status;
    }
    double gamma = 0;
    if (extrapolate && status == GOES_ON && sum(dd) > 0)
        /* A residual that all but repeats itself differs by rounding: half the digits' worth is the longest step. */
        gamma = fmin(fmax(sum(dr) / sum(dd), -p->longest), p->longest);
    for (ptrdiff_t i = 0; i < stride; i += LANES) {
        Vector fx = activate(p->phi, AT(z + i));
        AT(x + i) = fx - (REAL)gamma * (fx - AT(x + i));
        if (p->phi == SLOPE) AT(part[INNER] + at + i) = AT(x + i) * AT(part[SLOPES] + at + i);
    }
    if (status == SLOW) put(p->x + row->id * p->n, x, p->n);
    return status;
}

static void load(const Problem *p, Row *row, REAL *const part[PARTS], ptrdiff_t at) {
    ptrdiff_t from = row->id * p->n;
    put(part[X] + at, p->x0 + from, p->n);
    put(part[B] + at, p->b + from, p->n);
    if (p->phi == SLOPE) {
        put(part[SLOPES] + at, p->slope + from, p->n);
        for (ptrdiff_t i = 0; i < p->n; i++) part[INNER][at + i] = p->x0[from + i] * p->slope[from + i];
    }
    row->best = DBL_MAX;
    row->largest = 0;
}

/* All steps of the rows from ``start`` on, in memory for ``room`` of them.  Returns how many were not solved. */
static int solve_chunk(const Problem *p, REAL *memory, ptrdiff_t room, ptrdiff_t stride, ptrdiff_t start) {
    Row rows[CHUNK];
    REAL *part[PARTS];
    ptrdiff_t live = p->batch - start < room ? p->batch - start : room;
    int unsolved = 0;
    memset(memory, 0, PARTS * room * stride * sizeof(REAL));
    for (int i = 0; i < PARTS; i++) part[i] = memory + i * room * stride;
    if (p->phi != SLOPE) part[INNER] = part[X];
    for (ptrdiff_t r = 0; r < live; r++) rows[r].id = start + r, load(p, &rows[r], part, r * stride);
    for (int k = 1; live; k++) {
        sweep(p, part, stride, live);
        for (ptrdiff_t r = 0; r < live;) {
            int status = finish_step(p, &rows[r], part, r * stride, stride, k);
            if (status == GOES_ON) {
                r++;
                continue;
            }
            p->status[rows[r].id] = status;
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
    int64_t unsolved = 0;
    int failed = 0;
    if (room > CHUNK) room = CHUNK;
#pragma omp parallel num_threads(p->threads)
    {
#pragma omp for schedule(static)
        for (ptrdiff_t v = 0; v < vectors; v++) pack(p, v, vectors);
        REAL *memory = malloc(PARTS * room * stride * sizeof(REAL));
#pragma omp for schedule(dynamic) reduction(+ : unsolved) reduction(| : failed)
        for (ptrdiff_t start = 0; start < p->batch; start += room) {
            if (memory) unsolved += solve_chunk(p, memory, room, stride, start);
            else failed = 1;
        }
        free(memory);
    }
    return failed ? -1 : unsolved;
}
