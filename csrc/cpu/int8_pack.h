// Weights into the packed form of int8.h and back: to 8 bits block by block, each with a scale of its own.
#pragma once

#include "int8.h"
#include "pack.h"

namespace S1_ISA {

// The scale of a block, rounded up: no code is more than 127 away from 128.
inline bf16 int8_scale(float magnitude) {
    const float scale = magnitude / 127.0f;
    if (!(scale < __builtin_inff())) return to_bf16(scale);
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    return static_cast<bf16>((bits + 0xffff) >> 16);
}

template <class From, bool kPast>
inline void pack_int8_as(const s1engine::cpu::Pack& a) {
    const From* rows = static_cast<const From*>(a.rows);
    over_groups(a, int8_panel_bytes(a.inputs), [=](int64_t row, int64_t low, int64_t high, char* to) {
        const int64_t half = a.half < 0 ? (a.first + row) / kTileOutputs % 2 : a.half;
        for (int64_t i = 0; i < a.inputs; i += kBlock) {
            const int64_t steps = int8_steps(a.inputs - i);
            // A block's codes of one output are a row of a tile: 16 words.
            static_assert(kBlock == kTileRow);
            alignas(64) char tile[kTileOutputs * kTileRow], turned[kTileOutputs * kTileRow];
            bf16 scales[kTileOutputs];
            const bool whole = steps == kTileOutputs && high - low == kTileOutputs;
            if (!whole) std::memset(tile, 0, sizeof(tile));
            for (int64_t lane = low; lane < high; ++lane) {
                const Block block(rows + (row + lane) * a.inputs + i, a.inputs - i);
                const float magnitude = block.magnitude();
                scales[lane] = int8_scale(magnitude);
                const float inverse = magnitude == 0 ? 0.0f : 1.0f / to_float(scales[lane]);
                block.round(inverse, 0x80, reinterpret_cast<uint8_t*>(tile + lane * kTileRow));
            }
            if (whole) {
                transpose<kPast>(tile, kTileRow, to, kCodesBytes);
            } else {
                transpose(tile, kTileRow, turned, kTileRow);
                for (int64_t k = 0; k < steps; ++k)
                    std::memcpy(to + k * kCodesBytes + 4 * low, turned + k * kTileRow + 4 * low, 4 * (high - low));
            }
            to += steps * kCodesBytes;
            // (`to` is 16 codes of four bytes into its lines for the upper half, where scales are 16 of two.)
            std::memcpy(to - half * kTileOutputs * 2 + 2 * low, scales + low, 2 * (high - low));
            to += kScalesBytes;
        }
#if defined(__AVX512F__)
        if (kPast) _mm_sfence();
#endif
    });
}

template <class From>
inline void pack_int8_as(const s1engine::cpu::Pack& a) {
    if (reinterpret_cast<uintptr_t>(a.weight) % 64 == 0) pack_int8_as<From, true>(a);
    else pack_int8_as<From, false>(a);
}

inline void pack_int8(const s1engine::cpu::Pack& a) {
    using s1engine::cpu::Dtype;
    if (a.from == Dtype::kFloat32) pack_int8_as<float>(a);
    else if (a.from == Dtype::kBf16) pack_int8_as<bf16>(a);
    else pack_int8_as<fp16>(a);
}

// Into float32 rows.
inline void unpack_int8(const s1engine::cpu::Pack& a) {
    const int64_t width = a.half < 0 ? kPanel : kTileOutputs, shift = a.half > 0 ? kTileOutputs : 0;
#pragma omp parallel for schedule(static) if (a.count * a.inputs > 1 << 14)
    for (int64_t row = 0; row < a.count; ++row) {
        const int64_t output = a.first + row;
        const char* panel = static_cast<const char*>(a.weight) + output / width * int8_panel_bytes(a.inputs);
        read_int8(panel, output % width + shift, a.inputs, static_cast<float*>(a.rows) + row * a.inputs);
    }
}

}  // namespace S1_ISA
