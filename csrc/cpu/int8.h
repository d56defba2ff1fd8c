// int8 weights: their packed form, rows rounded to 8 bits, and the products of both.
//
// A panel of 32 outputs (gemm.h) is cut into blocks of 64 inputs, the last of which may be shorter. A block holds, step
// by step, four consecutive inputs of each output as codes of one byte, as the dot instruction reads them, and then the
// outputs' scales in bfloat16: a panel is one stream of memory. The code c is the weight (c - 128) * scale. Rows are
// rounded block by block too; that codes are 128 too high is undone by the sum of the row's block.
//
// Sums within a block are exact integers. A block's sum is scaled in float32, and those of an output are added in the
// order of K: its bits are the same whatever the number of rows.
#pragma once

#include "gemm.h"

namespace S1_ISA {

// Inputs that share a scale. Measured: 128 are 5 % faster from 8 rows on and as fast below, but lose 40 % more of inputs
// of which a few are a hundred times larger than the rest; 32 lose a quarter less, and cost 12 % from 4 rows on.
constexpr int64_t kBlock = 64;
constexpr int64_t kCodesBytes = 4 * kPanel, kScalesBytes = 2 * kPanel;  // of a step, of a block

// Steps of the next block where so many inputs are left.
inline int64_t int8_steps(int64_t left) { return left < kBlock ? (left + 3) / 4 : kBlock / 4; }

inline int64_t int8_blocks(int64_t inputs) { return (inputs + kBlock - 1) / kBlock; }

inline int64_t int8_panel_bytes(int64_t inputs) {
    return (inputs + 3) / 4 * kCodesBytes + int8_blocks(inputs) * kScalesBytes;
}

// To the nearest, ties to even; any number where an int has none. (An instruction, and no addition of 2^23: a compiler
// would fuse that with the product before it, and instruction sets would differ.)
inline Words to_ints(Floats values) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtps_epi32((__m512)values);
#elif defined(__AVX__)
    return (Words)_mm256_cvtps_epi32((__m256)values);
#elif defined(__SSE2__)
    return (Words)_mm_cvtps_epi32((__m128)values);
#else
    Words result{};
    for (int i = 0; i < kLanes; ++i)
        if (__builtin_fabsf(values[i]) < 1e9f) result[i] = static_cast<int32_t>(__builtin_rintf(values[i]));
    return result;
#endif
}

inline void store_low_bytes(uint8_t* to, Words values) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)values));
#else
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes bytes = __builtin_convertvector(values, Bytes);
    std::memcpy(to, &bytes, sizeof(bytes));
#endif
}

// A block of values on its way to 8 bits: in registers between the search for the largest and the rounding.
struct Block {
    static constexpr int kVectorsOf = kBlock / kLanes;
    Floats values[kVectorsOf];

    // `left` of them, zeros from there on.
    template <class Element>
    Block(const Element* from, int64_t left) {
        for (int i = 0; i < kVectorsOf; ++i, from += kLanes, left -= kLanes)
            values[i] = left <= 0 ? Floats{} : load_floats(from, left < kLanes ? left : int64_t{kLanes});
    }

    // The largest without its sign, NaN where there is one. What is below 1e-30 counts as 0: 127 / 1e-40 is infinite.
    float magnitude() const {
        Ints top{};  // numbers without a sign are in the order of their bits, and NaN above them
        for (int i = 0; i < kVectorsOf; ++i) {
            const Ints bits = (Ints)values[i] & 0x7fffffff;
            top = bits > top ? bits : top;
        }
        int32_t largest = top[0];
#if defined(__AVX512F__)
        largest = _mm512_reduce_max_epi32((__m512i)top);
#else
        for (int i = 1; i < kLanes; ++i) largest = top[i] > largest ? top[i] : largest;
#endif
        float result;
        std::memcpy(&result, &largest, 4);
        return result < 1e-30f ? 0.0f : result;
    }

    // Stores values * inverse rounded, with the bits of `flip` turned over, and returns their sum before that.
    uint32_t round(float inverse, uint32_t flip, uint8_t* to) const {
        Words total{};
        for (int i = 0; i < kVectorsOf; ++i) {
            const Words rounded = to_ints(values[i] * inverse);
            total += rounded;
            store_low_bytes(to + i * kLanes, rounded ^ flip);
        }
#if defined(__AVX512F__)
        return static_cast<uint32_t>(_mm512_reduce_add_epi32((__m512i)total));
#else
        uint32_t result = 0;
        for (int i = 0; i < kLanes; ++i) result += total[i];
        return result;
#endif
    }
};

// A block of a row: bytes (of two's complement) * scale.
struct RoundedBlock {
    uint8_t bytes[kBlock];
    float scale;
    uint32_t offset;  // -128 * the sum of the bytes
};

template <class Element>
inline void round_row(const Element* x, int64_t inputs, RoundedBlock* to) {
    for (int64_t i = 0; i < inputs; i += kBlock, ++to) {
        const Block block(x + i, inputs - i);
        const float magnitude = block.magnitude();
        to->scale = magnitude / 127.0f;
        to->offset = block.round(magnitude == 0 ? 0.0f : 127.0f / magnitude, 0, to->bytes) * -128u;
    }
}

// sum + the products of four bytes a lane: signed ones of `a`, unsigned ones of `b`. Exact.
inline Ints dot_bytes(Ints sum, uint32_t a, Words b) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32((int)a));
#else
    typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
    const Shorts bytes = (Shorts)(Words{} + a);
    const Shorts even = (bytes << 8) >> 8, odd = bytes >> 8;
    const Shorts even_codes = (Shorts)(b & 0x00ff00ff), odd_codes = (Shorts)((b >> 8) & 0x00ff00ff);
#if defined(__AVX512BW__)
    const Ints low = (Ints)_mm512_madd_epi16((__m512i)even, (__m512i)even_codes);
    return sum + low + (Ints)_mm512_madd_epi16((__m512i)odd, (__m512i)odd_codes);
#elif defined(__AVX2__)
    const Ints low = (Ints)_mm256_madd_epi16((__m256i)even, (__m256i)even_codes);
    return sum + low + (Ints)_mm256_madd_epi16((__m256i)odd, (__m256i)odd_codes);
#elif defined(__SSE2__)
    const Ints low = (Ints)_mm_madd_epi16((__m128i)even, (__m128i)even_codes);
    return sum + low + (Ints)_mm_madd_epi16((__m128i)odd, (__m128i)odd_codes);
#else
    for (int i = 0; i < 2 * kLanes; ++i) sum[i / 2] += even[i] * even_codes[i] + odd[i] * odd_codes[i];
    return sum;
#endif
#endif
}

// sums[r] += rows[r] . panel. rows: kRows of them, `stride` blocks apart. ahead: what to prefetch into the second-level
// cache, `ahead_stride` bytes a step; it may lie outside of any allocation.
template <int kRows>
inline void multiply_int8(const RoundedBlock* rows, int64_t stride, const char* panel, int64_t inputs,
                          const char* ahead, int64_t ahead_stride, Floats (&sums)[kRows][kVectors]) {
    for (int64_t left = inputs; left > 0; left -= kBlock, ++rows) {
        const int64_t steps = int8_steps(left);
        Ints totals[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) totals[r][v] = (Ints)(Words{} + rows[r * stride].offset);
#pragma GCC unroll 2
        for (int64_t k = 0; k < steps; ++k, panel += kCodesBytes) {
            __builtin_prefetch(ahead, 0, 2);
            if constexpr (kRows <= 4) __builtin_prefetch(ahead + 64, 0, 2);
            ahead += ahead_stride;
            Words codes[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) std::memcpy(&codes[v], panel + v * sizeof(Words), sizeof(Words));
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                uint32_t input;
                std::memcpy(&input, rows[r * stride].bytes + 4 * k, 4);
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) totals[r][v] = dot_bytes(totals[r][v], input, codes[v]);
            }
        }
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_stride * kScalesBytes / kCodesBytes;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const Floats scales = load_bf16(reinterpret_cast<const bf16*>(panel) + v * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r)
                sums[r][v] += __builtin_convertvector(totals[r][v], Floats) * (scales * rows[r * stride].scale);
        }
        panel += kScalesBytes;
    }
}

// The weights of one output, `column` of a panel, as floats.
inline void read_int8(const char* panel, int64_t column, int64_t inputs, float* out) {
    for (int64_t left = inputs; left > 0; left -= kBlock) {
        const int64_t steps = int8_steps(left);
        bf16 bits;
        std::memcpy(&bits, panel + steps * kCodesBytes + 2 * column, 2);
        const float scale = to_float(bits);
        const int64_t count = left < kBlock ? left : kBlock;
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(panel) + 4 * column;
        for (int64_t i = 0; i < count; ++i)
            *out++ = static_cast<float>(codes[i / 4 * kCodesBytes + i % 4] - 128) * scale;
        panel += steps * kCodesBytes + kScalesBytes;
    }
}

}  // namespace S1_ISA
