// The softmax of attention: of a row over one split of the keys, and over its splits.
//
// A record is a row's result of some splits: the sum of the values times their weights, in `width` floats, then the
// largest score and the sum of the weights. Scores and weights are in powers of two, and weights are relative to the
// largest score.
#pragma once

#include "vector.h"

namespace S1_ISA {

// Weights are rounded to the dtype of the values. (The instruction takes what is below 2^-126 for 0.)
inline void store_weights(float* to, Floats weights) { store(to, weights); }

inline void store_weights(bf16* to, Floats weights) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(to, &rounded, sizeof(rounded));
#else
    store_bf16(to, weights);
#endif
}

// The first `count` scores, in place, into weights, with zeros up to `padded`. scale: what the scores are still to be
// multiplied with. result: the largest score, the sum of the weights.
template <class Element>
__attribute__((noinline)) void softmax(float* scores, int64_t count, int64_t padded, float scale, float* result) {
    Ints lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    const int64_t whole = count / kLanes * kLanes;
    const Ints seen = lanes < static_cast<int32_t>(count - whole);
    Floats tops = broadcast(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += kLanes) tops = max(tops, load<Floats>(scores + i) * scale);
    if (whole < count) tops = max(tops, seen ? load<Floats>(scores + whole) * scale : tops);
    const float top = largest(tops);
    Floats total{};
    Element* weights = reinterpret_cast<Element*>(scores);
    for (int64_t i = 0; i < whole; i += kLanes) {
        const Floats weight = exp2(load<Floats>(scores + i) * scale - top);
        total += weight;
        store_weights(weights + i, weight);
    }
    if (whole < count) {
        const Floats weight = exp2(load<Floats>(scores + whole) * scale - top);
        const Floats kept = seen ? weight : Floats{};
        total += kept;
        store_weights(weights + whole, kept);
    }
    const int64_t written = (count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = written; i < padded; i += kLanes) store_weights(weights + i, Floats{});
    result[0] = top;
    result[1] = sum(total);
}

// The record of the next split into that of the splits before it.
__attribute__((noinline)) inline void merge(float* into, const float* next, int64_t width) {
    const float top = next[width] > into[width] ? next[width] : into[width];
    Floats shares{};
    shares[0] = into[width] - top;
    shares[1] = next[width] - top;
    shares = exp2(shares);
    for (int64_t i = 0; i < width; i += kLanes)
        store(into + i, load<Floats>(into + i) * shares[0] + load<Floats>(next + i) * shares[1]);
    into[width + 1] = into[width + 1] * shares[0] + next[width + 1] * shares[1];
    into[width] = top;
}

}  // namespace S1_ISA
