/* The activations of gated MLPs, with their derivatives. */
#pragma once

#include "numbers.h"

enum { SILU, GELU_TANH };
#define LOG2_E 1.44269504f

static inline floats positive(floats x) { return (floats)((integers)x & 0x7fffffff); }

/* act(x) and its derivative. */
static INLINE floats act_of(int act, floats x, floats *slope) {
    if (act == SILU) {
        /* From e^-|x|, which never overflows. */
        const floats e = exp2_of(positive(x) * -LOG2_E), whole = 1.0f / (1.0f + e);
        const floats sigmoid = choose(x >= 0.0f, whole, e * whole);
        *slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
        return x * sigmoid;
    }
    /* x (1 + tanh(inner)) / 2 is x sigmoid(2 inner): arXiv 1606.08415. */
    const float root = 0.797884561f, cubic = 0.044715f;
    const floats square = x * x, twice = 2.0f * root * x * (1.0f + cubic * square);
    const floats e = exp2_of(positive(twice) * -LOG2_E), whole = 1.0f / (1.0f + e);
    const floats sigmoid = choose(twice >= 0.0f, whole, e * whole);
    *slope = sigmoid + x * sigmoid * (1.0f - sigmoid) * (2.0f * root) * (1.0f + 3.0f * cubic * square);
    return x * sigmoid;
}
