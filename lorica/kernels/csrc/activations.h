/* The activations of gated MLPs, with their derivatives. */
#pragma once

#include "numbers.h"

enum { SILU, GELU_TANH };

/* 1 / (1 + e^-x), and in *other 1 less that, exact where it is small; what is below 2^-126 is 0. */
static INLINE floats sigmoid_of(floats x, floats *other) {
    const floats power = x * -LOG2_E, e = exp2_within(between(power, -126.0f, 126.0f)), sigmoid = 1.0f / (1.0f + e);
    *other = (floats)((integers)(e * sigmoid) & ~(power <= -126.0f));
    return (floats)((integers)sigmoid & ~(power >= 126.0f));
}

/* act(x) and its derivative. */
static INLINE floats act_of(int act, floats x, floats *slope) {
    floats other;
    if (act == SILU) {
        const floats sigmoid = sigmoid_of(x, &other);
        *slope = sigmoid * (1.0f + x * other);
        return x * sigmoid;
    }
    /* x (1 + tanh(inner)) / 2 is x sigmoid(2 inner): arXiv 1606.08415. */
    const float root = 0.797884561f, cubic = 0.044715f;
    const floats square = x * x, sigmoid = sigmoid_of(2.0f * root * x * (1.0f + cubic * square), &other);
    *slope = sigmoid * (1.0f + x * other * (2.0f * root) * (1.0f + 3.0f * cubic * square));
    return x * sigmoid;
}
