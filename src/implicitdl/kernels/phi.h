#pragma once
/* φ and φ' of a vector of numbers.  Errors are below 4 ulp for every φ and 8 ulp for every φ', where these are normal
   numbers, and where φ' does not cross 0; tests/test_kernels_phi.py measures them against 40 digits.

   The polynomials are Chebyshev fits, made in 60 digits by mpmath's chebyfit; the degree is that of the precision. */

#include "vectors.h"

/* The numbers of activations.COMPILED, in its order; SLOPE is x ↦ x ∘ slope, whose slopes are given. */
enum Phi { RELU, LEAKY_RELU, IDENTITY, HARDTANH, TANH, SIGMOID, SOFTPLUS, ELU, SILU, GELU, SLOPE };

enum { SINGLE = sizeof(REAL) == 4 };
#define CONSTANT(single, both) ((REAL)(SINGLE ? (single) : (both)))
#define ALL(c) ((Vector){0} + (REAL)(c))
#define FIT(x, single, both) \
    (SINGLE ? polynomial(single, sizeof(single) / sizeof(double), x) : polynomial(both, sizeof(both) / sizeof(double), x))

static inline __attribute__((always_inline)) Vector polynomial(const double *c, int terms, Vector x) {
    Vector y = ALL(c[terms - 1]);
    for (int i = terms - 2; i >= 0; i--) y = y * x + (REAL)c[i];
    return y;
}

/* (eʳ − 1 − r) / r² for |r| ≤ log(2)/2. */
static const double EXP_4[] = {0.5, 0.16666666719312480889, 0.041666666719295684981, 0.0083332983440230920421,
    0.0013888853909945039048, 0.00019899390183679230806, 0.000024859694394752071826};
static const double EXP_8[] = {0.49999999999999999998, 0.16666666666666666667, 0.041666666666666676865,
    0.0083333333333333340131, 0.0013888888888879003084, 0.00019841269841263251867, 0.000024801587336630946966,
    2.7557319247344509509e-6, 2.7557263077309411451e-7, 2.5052070959803661989e-8, 2.0918212319133978192e-9,
    1.6086677666787361497e-10};
/* (artanh(s)/s − 1) / s² as a function of s² ≤ 1/9. */
static const double LOG_4[] = {0.33333333324959077356, 0.20000005413675787649, 0.14285150436532948128,
    0.11132425714676972307, 0.087315374395745506395, 0.10397071388750588196};
static const double LOG_8[] = {0.33333333333333333333, 0.19999999999999999748, 0.14285714285714412383,
    0.11111111111086127806, 0.09090909093465007142, 0.076923075370067686267, 0.066666727080449023142,
    0.058821960037397371202, 0.052659346393192180147, 0.047284259554222212538, 0.046169462508863401137,
    0.026382116698042286108, 0.0747488762946273026};
/* erfc(y) exp(y²) / t with t = 2 / (2 + y), y ≥ 0, as a function of 2t − 1. */
static const double ERFC_4[] = {0.51079135262101148773, 0.34358033225994908603, 0.139736042840987889,
    0.018221398230371855528, -0.010755235482217255031, -0.003241932340935392431, 0.0015445584106293220136,
    0.00042719568846085103751, -0.0003290872549910655257, -0.000033125930157794175721, 0.000068566622903292394288,
    -1.2643131229988906927e-6, -8.8021603494661690767e-6};
static const double ERFC_8[] = {0.51079135262101148893, 0.34358034220690529782, 0.13973604627802694565,
    0.018221115753439500638, -0.010755330944719348691, -0.0032395925338790128683, 0.0015453060291222002697,
    0.00041864803150011777096, -0.00033153674834618891347, -0.000017185720676919689391, 0.000072235355489974290179,
    -0.000017074435930768933736, -0.000010848078288332048909, 8.0604269638581863269e-6, -5.6275591923781385579e-7,
    -1.8218361427008797386e-6, 1.0007982351303098008e-6, -1.1572473805236540196e-9, -2.8538447745551666251e-7,
    1.6246994987175689497e-7, -1.8486693687551917638e-9, -5.5465870442121343411e-8, 2.9131155308482957029e-8,
    5.1403459189614640515e-9, -9.7755566671098483208e-9, 1.6323398807152122736e-9, 1.2098746244200366637e-9,
    -3.9863629427719117142e-10};

/* x = n log 2 + r, with r small; n as the low bits of a number so large that its last digit is 1. */
typedef struct {
    Vector r;
    Mask n;
} Reduced;

static inline Reduced reduced(Vector x) {
    const REAL shift = CONSTANT(0x1.8p23, 0x1.8p52);
    Vector large = x * (REAL)1.4426950408889634074 + shift, n = large - shift;
    Vector r = x - n * CONSTANT(0x1.62e4p-1, 0x1.62e42feep-1);
    return (Reduced){r - n * CONSTANT(1.428606820309417232e-6, 1.9082149292705877e-10),
                     (Mask)large - (Mask)ALL(shift)};
}

/* 2ⁿ of a normal number. */
static inline Vector power_of_two(Mask n) { return (Vector)((n + (SINGLE ? 127 : 1023)) << (SINGLE ? 23 : 52)); }

/* exp(x + rest) for a small rest; from −∞ on to where it overflows, subnormal numbers too. */
static inline Vector exp_of(Vector x, Vector rest) {
    const REAL least = CONSTANT(-104, -746), most = CONSTANT(89, 710);
    Reduced at = reduced(choose(x < least, ALL(least), choose(x > most, ALL(most), x)));
    Vector r = at.r + choose(x < least, ALL(0), rest);
    Mask half = at.n >> 1;
    return (1 + (r + r * r * FIT(r, EXP_4, EXP_8))) * power_of_two(half) * power_of_two(at.n - half);
}

/* eˣ − 1 for x ≤ 0, to the last digits near 0. */
static inline Vector expm1_of(Vector x) {
    Reduced at = reduced(choose(x < -50, ALL(-50), x));
    Vector scale = power_of_two(at.n);
    return scale * (at.r + at.r * at.r * FIT(at.r, EXP_4, EXP_8)) + (scale - 1);
}

static inline Vector tanh_of(Vector z) {
    Vector down = expm1_of(-2 * magnitude(z)), t = -down / (2 + down);
    return choose(z < 0, -t, t);
}

static inline Vector sigmoid_of(Vector z) {
    Vector e = exp_of(-magnitude(z), ALL(0));
    return choose(z < 0, e, ALL(1)) / (1 + e);
}

static inline Vector softplus_of(Vector z) {
    Vector e = exp_of(-magnitude(z), ALL(0)), s = e / (2 + e), s2 = s * s;
    return choose(z > 0, z, ALL(0)) + 2 * (s + s * s2 * FIT(s2, LOG_4, LOG_8));
}

/* exp(−z²/2), of which the square is taken in two parts: half of the digits of z squared are exact. */
static inline Vector bell_of(Vector z) {
    Vector head = (Vector)((Mask)z & ~(((INT)1 << (SINGLE ? 12 : 27)) - 1));
    return exp_of(-head * head / 2, -(z - head) * (z + head) / 2);
}

/* P(X ≤ z) of a standard normal X, and its density times √(2π). */
static inline Vector normal_of(Vector z, Vector *bell) {
    Vector size = magnitude(z), y = size * (REAL)0.70710678118654752440, t = 2 / (2 + y);
    *bell = choose(size > 100, ALL(0), bell_of(choose(size > 100, ALL(0), z)));
    Vector tail = *bell * t * FIT(2 * t - 1, ERFC_4, ERFC_8) / 2;
    return choose(z < 0, tail, 1 - tail);
}

/* Comparisons are such that NaN stays NaN. */
static inline Vector activate(int phi, Vector z) {
    Vector zero = {0}, one = zero + 1, bell;
    switch (phi) {
    case RELU: return choose(z <= 0, zero, z);
    case LEAKY_RELU: return choose(z <= 0, (REAL)0.01 * z, z);
    case HARDTANH: return choose(z > 1, one, choose(z < -1, -one, z));
    case TANH: return tanh_of(z);
    case SIGMOID: return sigmoid_of(z);
    case SOFTPLUS: return softplus_of(z);
    case ELU: return choose(z > 0, z, expm1_of(choose(z > 0, zero, z)));
    case SILU: return choose(z < -(REAL)FLT_MAX, zero, z * sigmoid_of(z));
    case GELU: return choose(z < -(REAL)FLT_MAX, zero, z * normal_of(z, &bell));
    default: return z;
    }
}

static inline Vector slope_of(int phi, Vector z) {
    Vector zero = {0}, one = zero + 1, s, e, bell;
    switch (phi) {
    case RELU: return choose(z > 0, one, zero);
    case LEAKY_RELU: return choose(z > 0, one, zero + (REAL)0.01);
    case HARDTANH: return choose((z > -1) & (z < 1), one, zero);
    case TANH: /* 4e / (1 + e)², e = exp(−2|z|): 1 − tanh² has no digits where tanh is near 1 */
        e = exp_of(-2 * magnitude(z), zero);
        return 4 * e / ((1 + e) * (1 + e));
    case SIGMOID:
        e = exp_of(-magnitude(z), zero);
        return e / ((1 + e) * (1 + e));
    case SOFTPLUS: return sigmoid_of(z);
    case ELU: return choose(z > 0, one, exp_of(choose(z > 0, zero, z), zero));
    case SILU:
        s = sigmoid_of(z);
        return choose(z < -1000, zero, s * (1 + choose(z < -1000, zero, z) * sigmoid_of(-z)));
    case GELU:
        s = normal_of(z, &bell);
        return s + choose(magnitude(z) > 100, zero, z) * bell * (REAL)0.39894228040143267794;
    default: return one;
    }
}
