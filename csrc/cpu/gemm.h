// Products of a few rows with one panel of a packed weight: what all matrix products here are made of.
//
// A packed weight [N, K] is cut into panels of 32 outputs. A panel holds, step by step through K, what one step of the
// sums takes: of bfloat16 two consecutive inputs of each output (a pair, as the dot instruction reads it), of float32 one.
// N and K are filled up with zeros. Every output is one chain of additions in the order of K, so its bits are the same
// whatever the number of rows.
#pragma once

#include "vector.h"

namespace S1_ISA {

constexpr int kPanel = 32;                  // outputs of a panel
constexpr int kVectors = kPanel / kLanes;   // vectors that hold them
// Rows of a tile: their sums stay in registers (16 of 32, 8 of 16). More rows would fit into 32; measured, they are slower.
constexpr int kMaxRows = kLanes == 16 ? 8 : 2;

// Inputs of one step, as 32-bit words: a pair of bfloat16 or one float.
struct Bf16Pairs {
    static Floats multiply_add(Floats sum, uint32_t a, Words b) { return dot_pairs(sum, a, b); }
};
struct Singles {
    static Floats multiply_add(Floats sum, uint32_t a, Words b) { return sum + (Floats)(Words{} + a) * (Floats)b; }
};

// sums[r] += rows[r] . panel over `steps` words. rows: kRows of them, `stride` words apart. ahead: what to prefetch into
// the second-level cache, `ahead_stride` bytes a step; it may lie outside of any allocation.
template <class Kind, int kRows>
inline void multiply_panel(const uint32_t* rows, int64_t stride, const uint32_t* panel, int64_t steps,
                           const char* ahead, int64_t ahead_stride, Floats (&sums)[kRows][kVectors]) {
    Floats totals[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) totals[r][v] = sums[r][v];
#pragma GCC unroll 2
    for (int64_t k = 0; k < steps; ++k) {
        __builtin_prefetch(ahead, 0, 2);
        if constexpr (kRows <= 2) __builtin_prefetch(ahead + 64, 0, 2);
        ahead += ahead_stride;
        Words weights[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) weights[v] = load<Words>(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const uint32_t input = rows[r * stride + k];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) totals[r][v] = Kind::multiply_add(totals[r][v], input, weights[v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = totals[r][v];
}

}  // namespace S1_ISA
