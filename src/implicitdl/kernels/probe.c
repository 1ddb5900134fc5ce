/* What the other sources need of a compiler, in a few lines. */

#include "vectors.h"

int probe(int count) {
    double total = 0;
    Vector ones = {0};
    ones += 1;
#pragma omp parallel for reduction(+ : total)
    for (int i = 0; i < count; i++) total += sqrt(sum(ones));
    return total > count;
}
