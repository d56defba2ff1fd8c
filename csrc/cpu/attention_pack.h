// Keys and values of a paged cache as operands of the products in gemm.h.
//
// Scores are queries times keys: a key is an output of the product, and a step of its panel holds a pair of bfloat16 or
// a float of each of 32 keys, so words are transposed. Results are weights times values: an element of the head is an
// output, and a step holds two bfloat16 values that follow each other, or one float value.
//
// Many rows take panels, each packed once. For few rows, whose products cost no more than packing does, keys and values
// go from the cache into registers, and what comes next is fetched meanwhile. Both add in the same order.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace S1_ISA {

// Keys and values are fetched so many rows before they are read: no processor guesses where the next block lies.
constexpr int64_t kAheadKeys = 64;
constexpr int64_t kPackedWords = 16;  // words of a key that are packed at once

// A line of memory, into the second-level cache: the first one has too few places for what is on its way.
inline void fetch(const char* line) { __builtin_prefetch(line, 0, 2); }

// panel[w][i] = keys[i][word + w] for 32 keys and kPackedWords words of theirs, fewer at the end of a key.
inline void pack_keys(const char* const* keys, int64_t word, int64_t words, uint32_t* panel) {
#if defined(__AVX512F__)
    const __mmask16 mask = words - word < 16 ? (1u << (words - word)) - 1 : 0xffff;
    for (int half = 0; half < 2; ++half, keys += 16, panel += 16) {
        __m512i a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, keys[i] + 4 * word);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        // Then quarter q of a[4 * j + c] holds word 4 * q + c of keys 4 * j to 4 * j + 3.
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            for (int c = 0; c < 2; ++c) {
                a[i + 2 * c] = _mm512_unpacklo_epi64(b[i + c], b[i + 2 + c]);
                a[i + 2 * c + 1] = _mm512_unpackhi_epi64(b[i + c], b[i + 2 + c]);
            }
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
            const __m512i even_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
            const __m512i odd_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
            const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
            _mm512_storeu_si512(panel + c * kPanel, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
            _mm512_storeu_si512(panel + (4 + c) * kPanel, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
            _mm512_storeu_si512(panel + (8 + c) * kPanel, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
            _mm512_storeu_si512(panel + (12 + c) * kPanel, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
        }
    }
#else
    const int64_t count = words - word < kPackedWords ? words - word : kPackedWords;
    for (int i = 0; i < kPanel; ++i)
        for (int64_t w = 0; w < count; ++w) std::memcpy(panel + w * kPanel + i, keys[i] + 4 * (word + w), 4);
#endif
}

// The next step of a panel of values: `count` elements from `column` on, at most 32, and zeros.
template <class Element>
inline void value_step(const char* const* values, int64_t column, int64_t count, Words (&step)[kVectors]) {
    const Element* const first = reinterpret_cast<const Element*>(values[0]) + column;
    if constexpr (std::is_same_v<Element, float>) {
        for (int v = 0; v < kVectors; ++v, count -= kLanes)
            step[v] = count > 0 ? (Words)load_floats(first + v * kLanes, count < kLanes ? count : kLanes) : Words{};
    } else {
        const Element* const second = reinterpret_cast<const Element*>(values[1]) + column;
#if defined(__AVX512F__)
        const __mmask32 mask = count < 32 ? (1u << count) - 1 : 0xffffffffu;
        const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                               39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
        const __m512i a = _mm512_maskz_loadu_epi16(mask, first), b = _mm512_maskz_loadu_epi16(mask, second);
        step[0] = (Words)_mm512_permutex2var_epi16(a, lower, b);
        step[1] = (Words)_mm512_permutex2var_epi16(a, upper, b);
#else
        uint32_t words[kPanel] = {};
        for (int64_t c = 0; c < count; ++c) words[c] = first[c] | static_cast<uint32_t>(second[c]) << 16;
        std::memcpy(step, words, sizeof(words));
#endif
    }
}

template <class Element>
inline void pack_values(const char* const* values, int64_t column, int64_t count, int64_t steps, uint32_t* panel) {
    for (int64_t i = 0; i < steps; ++i, values += 4 / sizeof(Element), panel += kPanel) {
        Words step[kVectors];
        value_step<Element>(values, column, count, step);
        for (int v = 0; v < kVectors; ++v) store(panel + v * kLanes, step[v]);
    }
}

template <class Kind, int kRows>
inline void multiply_step(const uint32_t* rows, int64_t stride, const Words (&step)[kVectors],
                          Floats (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        const uint32_t input = rows[r * stride];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Kind::multiply_add(sums[r][v], input, step[v]);
    }
}

// out[r][i] = rows[r] . keys[i] for 32 keys. panel: room for kPackedWords steps.
template <class Kind, int kRows>
inline void multiply_keys(const uint32_t* rows, int64_t stride, const char* const* keys, int64_t words, uint32_t* panel,
                          float* out, int64_t out_stride) {
    Floats sums[kRows][kVectors] = {};
    for (int64_t word = 0; word < words; word += kPackedWords) {
        pack_keys(keys, word, words, panel);
        const int64_t count = words - word < kPackedWords ? words - word : kPackedWords;
        for (int64_t i = 0; i < count; ++i) {
            for (int key = 0; key < 2; ++key) fetch(keys[kAheadKeys + 2 * i + key] + 4 * word);
            Words step[kVectors];
            for (int v = 0; v < kVectors; ++v) step[v] = load<Words>(panel + i * kPanel + v * kLanes);
            multiply_step<Kind>(rows + word + i, stride, step, sums);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

// out[r] += rows[r] . values over `steps` steps, for `count` elements of the values from `column` on, at most 32.
template <class Kind, class Element, int kRows>
inline void multiply_values(const uint32_t* rows, int64_t stride, const char* const* values, int64_t column,
                            int64_t count, int64_t steps, float* out, int64_t out_stride) {
    constexpr int64_t kKeys = 4 / sizeof(Element), kBytes = sizeof(Element);
    Floats sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load<Floats>(out + r * out_stride + v * kLanes);
    for (int64_t i = 0; i < steps; ++i, values += kKeys) {
        for (int key = 0; key < kKeys; ++key) fetch(values[kAheadKeys + key] + column * kBytes);
        Words step[kVectors];
        value_step<Element>(values, column, count, step);
        multiply_step<Kind>(rows + i, stride, step, sums);
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

}  // namespace S1_ISA
