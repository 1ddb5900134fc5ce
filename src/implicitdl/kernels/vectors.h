#pragma once
/* The vectors of this processor.  Compiled for each REAL, with the INT of its size. */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* By which a library is known to be this one. */
#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)
const char stamp[] = TEXT_OF(STAMP);

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { LANES = BYTES / sizeof(REAL) };
/* A product keeps so many rows of three vectors of sums in registers, beside three of a factor: 27 of 32, or 15 of 16. */
enum { ROWS = BYTES == 64 ? 8 : 4 };

typedef REAL Vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
typedef INT Mask __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define AT(p) (*(Vector *)(p))

static inline Vector choose(Mask which, Vector yes, Vector no) {
    return (Vector)(((Mask)yes & which) | ((Mask)no & ~which));
}

static inline Vector magnitude(Vector v) { return choose(v < 0, -v, v); }

/* In a few instructions: a chain of additions would take longer than the sweep that it follows. */
typedef REAL Short __attribute__((vector_size(16), aligned(sizeof(REAL)), may_alias));
static inline double sum(Vector v) {
    Short part[BYTES / 16], total;
    memcpy(part, &v, sizeof v);
    total = part[0];
    for (int i = 1; i < BYTES / 16; i++) total += part[i];
    REAL sum = total[0];
    for (size_t i = 1; i < 16 / sizeof(REAL); i++) sum += total[i];
    return sum;
}
