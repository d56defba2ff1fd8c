// The matrix products of a model: rows times a packed weight, with bias, and with the gate of a SwiGLU layer.
//
// Each thread has a run of panels that follow each other in memory. Few rows read the weight as fast as memory gives it,
// many are bound by arithmetic: then the rows' tiles go over one group of panels in the second-level cache while the next
// group is fetched.
#pragma once

#include <omp.h>

#include <memory>

#include "gemm.h"
#include "int8.h"
#include "kernels.h"

namespace S1_ISA {

// Bytes of the panels that tiles go over together: half of a second-level cache of 512 KiB.
constexpr int64_t kGroupBytes = 256 << 10;

struct Tile {
    const char* rows;
    int64_t stride, inputs;  // `stride` in bytes
    const char* panel;
    int64_t panel_index;
    const char* ahead;
    int64_t ahead_stride;
    const void* bias;
    void* out;        // the first row's outputs
    int64_t outputs;  // products of a row
};

template <class Weight, class Element, class Out, bool kGated, int kRows>
void run_tile(const Tile& tile) {
    Floats sums[kRows][kVectors] = {};
    Weight::template multiply<kRows>(tile, sums);
    const Element* bias = static_cast<const Element*>(tile.bias);
    // Outputs of a row, and how many vectors of a panel hold them. (A gated panel: its gates, then what they gate.)
    const int64_t size = kGated ? tile.outputs / 2 : tile.outputs;
    constexpr int kOutVectors = kGated ? kVectors / 2 : kVectors;
    for (int v = 0; v < kOutVectors; ++v) {
        const int64_t column = tile.panel_index * kOutVectors * kLanes + v * kLanes;
        const int64_t left = size - column, count = left < kLanes ? left : kLanes;
        if (count <= 0) return;
        for (int r = 0; r < kRows; ++r) {
            Floats result = sums[r][v];
            if (bias) result += load_floats(bias + column, count);
            if constexpr (kGated) {
                Floats up = sums[r][v + kOutVectors];
                if (bias) up += load_floats(bias + size + column, count);
                result = silu(result) * up;
            }
            store_floats(static_cast<Out*>(tile.out) + r * size + column, result, count);
        }
    }
}

typedef void (*RunTile)(const Tile&);

template <class Weight, class Element, class Out, bool kGated>
struct Tiles {
    RunTile of[kMaxRows + 1] = {};

    constexpr Tiles() { fill<kMaxRows>(); }

    template <int kRows>
    constexpr void fill() {
        of[kRows] = run_tile<Weight, Element, Out, kGated, kRows>;
        if constexpr (kRows > 1) fill<kRows - 1>();
    }
};

// A weight of the elements that the rows have: its panels and rows are words (gemm.h).
template <class Kind, class Element>
struct WordWeight {
    // How far in front of a tile's reads memory is asked for, where no tile is behind it. Measured, as below.
    static constexpr int64_t kAheadBytes = 2048;
    static constexpr int64_t kPerWord = 4 / sizeof(Element);

    static int64_t steps(int64_t inputs) { return (inputs + kPerWord - 1) / kPerWord; }
    static int64_t panel_bytes(int64_t inputs) { return steps(inputs) * kPanel * 4; }

    template <int kRows>
    static void multiply(const Tile& tile, Floats (&sums)[kRows][kVectors]) {
        multiply_panel<Kind, kRows>(reinterpret_cast<const uint32_t*>(tile.rows), tile.stride / 4,
                                    reinterpret_cast<const uint32_t*>(tile.panel), steps(tile.inputs), tile.ahead,
                                    tile.ahead_stride, sums);
    }

    // Rows as whole aligned words at one distance. Copied only where they are not that already.
    struct Rows {
        const char* data;
        int64_t stride;
        std::unique_ptr<uint32_t[]> copy;

        explicit Rows(const s1engine::cpu::Linear& a) {
            const bool whole = a.inputs % kPerWord == 0 && a.x_stride % kPerWord == 0;
            if (whole && reinterpret_cast<uintptr_t>(a.x) % 4 == 0) {
                data = static_cast<const char*>(a.x);
                stride = a.x_stride * sizeof(Element);
                return;
            }
            const int64_t words = steps(a.inputs);
            copy.reset(new uint32_t[a.rows * words]());
            for (int64_t r = 0; r < a.rows; ++r)
                std::memcpy(copy.get() + r * words, static_cast<const Element*>(a.x) + r * a.x_stride,
                            a.inputs * sizeof(Element));
            data = reinterpret_cast<const char*>(copy.get());
            stride = words * 4;
        }
    };
};

// A weight of int8, which the rows are rounded to as well.
template <class Element>
struct Int8Weight {
    static constexpr int64_t kAheadBytes = 1024;

    static int64_t panel_bytes(int64_t inputs) { return int8_panel_bytes(inputs); }

    template <int kRows>
    static void multiply(const Tile& tile, Floats (&sums)[kRows][kVectors]) {
        multiply_int8<kRows>(reinterpret_cast<const RoundedBlock*>(tile.rows), tile.stride / sizeof(RoundedBlock),
                             tile.panel, tile.inputs, tile.ahead, tile.ahead_stride, sums);
    }

    struct Rows {
        const char* data;
        int64_t stride;
        std::unique_ptr<RoundedBlock[]> blocks;

        explicit Rows(const s1engine::cpu::Linear& a) {
            const int64_t count = int8_blocks(a.inputs);
            blocks.reset(new RoundedBlock[a.rows * count]);
#pragma omp parallel for schedule(static) if (a.rows > 1 && a.rows * a.inputs > 1 << 14)
            for (int64_t r = 0; r < a.rows; ++r)
                round_row(static_cast<const Element*>(a.x) + r * a.x_stride, a.inputs, blocks.get() + r * count);
            data = reinterpret_cast<const char*>(blocks.get());
            stride = count * sizeof(RoundedBlock);
        }
    };
};

template <class Weight, class Element, class Out, bool kGated>
void run_linear(const s1engine::cpu::Linear& a) {
    static constexpr Tiles<Weight, Element, Out, kGated> tiles;
    const typename Weight::Rows x(a);
    const int64_t panel_bytes = Weight::panel_bytes(a.inputs);
    const int64_t panels = (a.outputs + kPanel - 1) / kPanel;
    // A tile alone waits for memory; with a second one behind it the next panels arrive meanwhile.
    const int64_t num_tiles = a.rows > 4 && a.rows <= kMaxRows ? 2 : (a.rows + kMaxRows - 1) / kMaxRows;
    const int64_t ahead_stride = 128 / num_tiles;  // bytes; a step of a panel has 128
    const int64_t group = num_tiles == 1 ? 1 : kGroupBytes / (panel_bytes + 1) + 1;
#pragma omp parallel if (a.rows * panels * panel_bytes > 1 << 18)
    {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const int64_t last = panels * (thread + 1) / threads;
        for (int64_t first = panels * thread / threads; first < last; first += group) {
            const int64_t end = first + group < last ? first + group : last;
            const char* weight = static_cast<const char*>(a.weight);
            const char* next = weight + end * panel_bytes;
            for (int64_t t = 0, row = 0; t < num_tiles; ++t) {
                const int64_t next_row = a.rows * (t + 1) / num_tiles;
                for (int64_t p = first; p < end; ++p) {
                    const char* panel = weight + p * panel_bytes;
                    const char* ahead = num_tiles == 1
                                            ? panel + Weight::kAheadBytes
                                            : next + ((p - first) * num_tiles + t) * panel_bytes / num_tiles;
                    Out* out = static_cast<Out*>(a.out) + row * (kGated ? a.outputs / 2 : a.outputs);
                    const Tile tile = {x.data + row * x.stride, x.stride, a.inputs, panel, p, ahead, ahead_stride,
                                       a.bias, out, a.outputs};
                    tiles.of[next_row - row](tile);
                }
                row = next_row;
            }
        }
    }
}

template <class Weight, class Element, class Out>
void run_linear(const s1engine::cpu::Linear& a) {
    if (a.gated) run_linear<Weight, Element, Out, true>(a);
    else run_linear<Weight, Element, Out, false>(a);
}

inline void linear(const s1engine::cpu::Linear& a) {
    using s1engine::cpu::Dtype;
    if (a.rows == 0 || a.outputs == 0) return;
    const bool float_out = a.out_dtype == Dtype::kFloat32;
    if (a.weight_dtype == Dtype::kInt8) {
        if (a.dtype == Dtype::kFloat32) run_linear<Int8Weight<float>, float, float>(a);
        else if (float_out) run_linear<Int8Weight<bf16>, bf16, float>(a);
        else run_linear<Int8Weight<bf16>, bf16, bf16>(a);
    } else if (a.dtype == Dtype::kFloat32) {
        run_linear<WordWeight<Singles, float>, float, float>(a);
    } else if (float_out) {
        run_linear<WordWeight<Bf16Pairs, bf16>, bf16, float>(a);
    } else {
        run_linear<WordWeight<Bf16Pairs, bf16>, bf16, bf16>(a);
    }
}

}  // namespace S1_ISA
