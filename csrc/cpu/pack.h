// Weights into the packed form of gemm.h and back, at the speed of memory.
//
// Sixteen rows fill one half of each step of a panel. They are transposed in tiles of 16 by 16 words; a word is what
// one output takes in a step, a pair of bfloat16 or one float.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "kernels.h"

namespace S1_ISA {

constexpr int kTileOutputs = 16;

struct fp16 {
    uint16_t bits;
};

// Without numbers below 2^-126 on the way, which a process may have told its processor to take for 0.
inline Floats load_floats(const fp16* from, int64_t count) {
    uint16_t halves[kLanes] = {};
    std::memcpy(halves, from, 2 * count);
    const Words bits = (Words)load_bf16(halves) >> 16;
    const Words magnitude = (bits & 0x7fff) << 13;  // a float's exponent and fraction, but for the bias of the exponent
    const Words normal = magnitude + (112u << 23);
    const Words infinite = magnitude | 0x7f800000u;
    const Words small = (Words)((Floats)(magnitude + (113u << 23)) - 6.103515625e-5f);  // 2^-14
    const Words is_small = (Words)(magnitude < (1u << 23)), is_infinite = (Words)(magnitude >= (31u << 23));
    const Words value = (small & is_small) | (infinite & is_infinite) | (normal & ~(is_small | is_infinite));
    return (Floats)(value | (bits & 0x8000) << 16);
}

template <class From, class To>
inline void convert(const From* from, To* to, int64_t count) {
    if constexpr (std::is_same_v<From, To>) std::memcpy(to, from, count * sizeof(To));
    else over_vectors(count, [=](int64_t i, int64_t n) { store_floats(to + i, load_floats(from + i, n), n); });
}

constexpr int64_t kTileRow = 4 * kTileOutputs, kStep = 4 * kPanel;  // bytes

#if defined(__AVX512F__)
// kPast: past the caches, which the weights of a model would only sweep; a line is not read before it is written then.
template <bool kPast>
inline void store_line(char* to, __m512i line) {
    if constexpr (kPast) _mm512_stream_si512((__m512i*)to, line);
    else _mm512_storeu_si512(to, line);
}
#endif

// 16 vectors of 16 words, `from_stride` bytes apart, become the columns of 16 that are `to_stride` apart.
template <bool kPast = false>
inline void transpose(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // Then a quarter of a[4 * i + c] holds four rows of one column: quarter q of column 4 * q + c.
    for (int i = 0; i < 16; i += 4) {
        for (int c = 0; c < 2; ++c) {
            a[i + 2 * c] = _mm512_unpacklo_epi64(b[i + c], b[i + 2 + c]);
            a[i + 2 * c + 1] = _mm512_unpackhi_epi64(b[i + c], b[i + 2 + c]);
        }
    }
    for (int c = 0; c < 4; ++c) {
        const __m512i even_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        store_line<kPast>(to + c * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        store_line<kPast>(to + (4 + c) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        store_line<kPast>(to + (8 + c) * to_stride, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        store_line<kPast>(to + (12 + c) * to_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
#else
    for (int i = 0; i < kTileOutputs; ++i) {
        for (int j = 0; j < kTileOutputs; ++j) std::memcpy(to + i * to_stride + 4 * j, from + j * from_stride + 4 * i, 4);
    }
#endif
}

// each(row of the group's lane 0, first lane, last lane, the group's words in its panel) over groups of 16 outputs.
template <class Each>
inline void over_groups(const s1engine::cpu::Pack& a, int64_t panel_bytes, Each&& each) {
    if (a.count == 0 || panel_bytes == 0) return;
    const int64_t first = a.first / kTileOutputs, last = (a.first + a.count - 1) / kTileOutputs;
#pragma omp parallel for schedule(dynamic, 8) if (a.count * panel_bytes > 1 << 21)
    for (int64_t group = first; group <= last; ++group) {
        const int64_t row = group * kTileOutputs - a.first;
        const int64_t low = row < 0 ? -row : 0, high = row + kTileOutputs > a.count ? a.count - row : kTileOutputs;
        const int64_t panel = a.half < 0 ? group / 2 : group, half = a.half < 0 ? group % 2 : a.half;
        each(row, low, high, static_cast<char*>(a.weight) + panel * panel_bytes + half * kTileRow);
    }
}

template <class From, class To, bool kPast>
inline void pack_as(const s1engine::cpu::Pack& a) {
    constexpr int64_t kPerWord = 4 / sizeof(To), kTile = kTileOutputs * kPerWord;
    const From* rows = static_cast<const From*>(a.rows);
    const int64_t steps = (a.inputs + kPerWord - 1) / kPerWord;
    over_groups(a, steps * kStep, [=](int64_t row, int64_t low, int64_t high, char* words) {
        for (int64_t i = 0; i < a.inputs; i += kTile, words += kTileOutputs * kStep) {
            const From* from = rows + row * a.inputs + i;
            const int64_t count = a.inputs - i < kTile ? a.inputs - i : kTile;
            const bool whole = count == kTile && high - low == kTileOutputs;
            if (std::is_same_v<From, To> && whole) {
                transpose<kPast>(reinterpret_cast<const char*>(from), a.inputs * sizeof(From), words, kStep);
                continue;
            }
            alignas(64) char tile[kTileOutputs * kTileRow], turned[kTileOutputs * kTileRow];
            if (whole) {
                for (int64_t lane = 0; lane < kTileOutputs; ++lane)
                    convert(from + lane * a.inputs, reinterpret_cast<To*>(tile + lane * kTileRow), kTile);
                transpose<kPast>(tile, kTileRow, words, kStep);
                continue;
            }
            std::memset(tile, 0, sizeof(tile));
            for (int64_t lane = low; lane < high; ++lane)
                convert(from + lane * a.inputs, reinterpret_cast<To*>(tile + lane * kTileRow), count);
            transpose(tile, kTileRow, turned, kTileRow);
            for (int64_t k = 0; k * kPerWord < count; ++k)
                std::memcpy(words + k * kStep + 4 * low, turned + k * kTileRow + 4 * low, 4 * (high - low));
        }
#if defined(__AVX512F__)
        if (kPast) _mm_sfence();
#endif
    });
}

template <class From, class To>
inline void pack_as(const s1engine::cpu::Pack& a) {
    if (reinterpret_cast<uintptr_t>(a.weight) % 64 == 0) pack_as<From, To, true>(a);
    else pack_as<From, To, false>(a);
}

template <class From, class To>
inline void unpack_as(const s1engine::cpu::Pack& a) {
    constexpr int64_t kPerWord = 4 / sizeof(To), kTile = kTileOutputs * kPerWord;
    From* rows = static_cast<From*>(a.rows);
    const int64_t steps = (a.inputs + kPerWord - 1) / kPerWord;
    over_groups(a, steps * kStep, [=](int64_t row, int64_t low, int64_t high, const char* words) {
        for (int64_t i = 0; i < a.inputs; i += kTile, words += kTileOutputs * kStep) {
            From* to = rows + row * a.inputs + i;
            const int64_t count = a.inputs - i < kTile ? a.inputs - i : kTile;
            if (std::is_same_v<From, To> && count == kTile && high - low == kTileOutputs) {
                transpose(words, kStep, reinterpret_cast<char*>(to), a.inputs * sizeof(From));
                continue;
            }
            alignas(64) char turned[kTileOutputs * kTileRow] = {}, tile[kTileOutputs * kTileRow];
            for (int64_t k = 0; k * kPerWord < count; ++k)
                std::memcpy(turned + k * kTileRow, words + k * kStep, kTileRow);
            transpose(turned, kTileRow, tile, kTileRow);
            for (int64_t lane = low; lane < high; ++lane)
                convert(reinterpret_cast<const To*>(tile + lane * kTileRow), to + lane * a.inputs, count);
        }
    });
}

inline void pack_int8(const s1engine::cpu::Pack& a);  // int8_pack.h
inline void unpack_int8(const s1engine::cpu::Pack& a);

inline void pack(const s1engine::cpu::Pack& a) {
    using s1engine::cpu::Dtype;
    if (a.to == Dtype::kInt8) {
        pack_int8(a);
    } else if (a.to == Dtype::kFloat32) {
        if (a.from == Dtype::kFloat32) pack_as<float, float>(a);
        else if (a.from == Dtype::kBf16) pack_as<bf16, float>(a);
        else pack_as<fp16, float>(a);
    } else {
        if (a.from == Dtype::kFloat32) pack_as<float, bf16>(a);
        else if (a.from == Dtype::kBf16) pack_as<bf16, bf16>(a);
        else pack_as<fp16, bf16>(a);
    }
}

inline void unpack(const s1engine::cpu::Pack& a) {
    using s1engine::cpu::Dtype;
    if (a.to == Dtype::kInt8) {
        unpack_int8(a);
    } else if (a.to == Dtype::kFloat32) {
        if (a.from == Dtype::kFloat32) unpack_as<float, float>(a);
        else unpack_as<bf16, float>(a);
    } else {
        if (a.from == Dtype::kFloat32) unpack_as<float, bf16>(a);
        else unpack_as<bf16, bf16>(a);
    }
}

}  // namespace S1_ISA

#include "int8_pack.h"  // (after what it is made of)
