// What one thread does with rows of attention: it attends splits of the keys, and merges them.
#pragma once

#include "attention_pack.h"
#include "kernels.h"

namespace S1_ISA {

// Keys of a split. A row attends one as a whole, so their number is part of what decides its bits.
constexpr int64_t kSplitKeys = 512;
// Rows of a block: so many repay the packing of keys and values, and their scores stay in the second-level cache.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kFewRows = 2 * kMaxRows;         // rows that take keys and values from the cache
constexpr int64_t kScoreStride = kSplitKeys + 16;  // floats between the scores of two rows: no power of two

// Sizes of a call. A record is a row's result of some splits: the weighted sum of the values, in `width` floats, then the
// largest score and the sum of the weights, which are relative to it.
struct AttentionSizes {
    int64_t group, words, width, record, block_tokens, block_rows;

    explicit AttentionSizes(const s1engine::cpu::Attention& a) {
        group = a.heads / a.kv_heads;
        words = a.dtype == s1engine::cpu::Dtype::kBf16 ? a.head_dim / 2 : a.head_dim;
        width = (a.head_dim + kPanel - 1) / kPanel * kPanel;
        record = width + 16;  // whole lines
        block_tokens = group < kBlockRows ? kBlockRows / group : 1;
        block_rows = block_tokens * group;
    }
};

// Rows of some tokens of a sequence, for one key-value head.
struct AttentionItem {
    int64_t sequence, kv_head, token, tokens;  // tokens are counted from the first of the sequence's rows
    int64_t split;                             // -1: all of them
    float* records;                            // where those of a single split go
};

template <int kRows>
struct RowCount {
    static constexpr int value = kRows;
};

// each(RowCount<count>) for a count from 1 to kMaxRows, which larger ones are taken for.
template <int kRows = kMaxRows, class Each>
inline void with_row_count(int64_t count, Each&& each) {
    if constexpr (kRows > 1) {
        if (count < kRows) {
            with_row_count<kRows - 1>(count, each);
            return;
        }
    }
    each(RowCount<kRows>{});
}

inline void store_weights(float* to, Floats weights) { store(to, weights); }

inline void store_weights(bf16* to, Floats weights) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(to, &rounded, sizeof(rounded));
#else
    store_bf16(to, weights);
#endif
}

// The first `count` scores, in place, into weights: 2^(scale * score - largest), in the dtype of the values, with zeros up
// to `padded`. result: the largest scaled score, the sum of the weights.
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
    for (int64_t i = (count + kLanes - 1) / kLanes * kLanes; i < padded; i += kLanes) store_weights(weights + i, Floats{});
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

// Hands out pieces of one piece of memory, each at the start of a line.
struct Pieces {
    uintptr_t next;

    template <class Element>
    Element* take(int64_t count) {
        const uintptr_t piece = next;
        next += (count * sizeof(Element) + 63) / 64 * 64;
        return reinterpret_cast<Element*>(piece);
    }
};

// One thread's part in a call.
template <class Kind, class Element>
class AttentionRows {
  public:
    AttentionRows(const s1engine::cpu::Attention& a, const AttentionSizes& sizes, Pieces& memory) : a(a), sizes(sizes) {
        const int64_t steps = sizes.words + kPackedWords > kSplitKeys ? sizes.words + kPackedWords : kSplitKeys;
        panel = memory.take<uint32_t>(steps * kPanel);
        queries = memory.take<uint32_t>(sizes.block_rows * sizes.words);
        scores = memory.take<float>(sizes.block_rows * kScoreStride);
        totals = memory.take<float>(sizes.block_rows * sizes.record);
        fresh = memory.take<float>(sizes.block_rows * sizes.record);
        keys = memory.take<const char*>(2 * kSplitKeys + kAheadKeys);
        zeros = memory.take<char>(a.head_dim * sizeof(Element));
    }

    // Once, when there is memory.
    void start() { std::memset(zeros, 0, a.head_dim * sizeof(Element)); }

    // All of an item, or one split of it.
    void attend(const AttentionItem& item) {
        const int64_t row = a.query_start[item.sequence] + item.token, head = item.kv_head * sizes.group;
        const int64_t visible = a.context_lens[item.sequence] - a.query_start[item.sequence + 1] + row + item.tokens;
        for (int64_t t = 0; t < item.tokens; ++t)
            std::memcpy(queries + t * sizes.group * sizes.words, static_cast<const Element*>(a.q) + place(row + t, head),
                        sizes.group * sizes.words * 4);
        if (item.split >= 0) {
            attend_split(item, visible, item.split, item.records);
            return;
        }
        attend_split(item, visible, 0, totals);
        for (int64_t split = 1; split * kSplitKeys < visible; ++split) {
            attend_split(item, visible, split, fresh);
            for (int64_t r = first_row(item, visible - split * kSplitKeys); r < item.tokens * sizes.group; ++r)
                merge(totals + r * sizes.record, fresh + r * sizes.record, sizes.width);
        }
        for (int64_t r = 0; r < item.tokens * sizes.group; ++r)
            write(totals + r * sizes.record, row + r / sizes.group, head + r % sizes.group);
    }

    void write(const float* record, int64_t row, int64_t head) const {
        Element* out = static_cast<Element*>(a.out) + place(row, head);
        const float scale = 1.0f / record[sizes.width + 1];
        over_vectors(a.head_dim, [&](int64_t i, int64_t count) {
            store_floats(out + i, load<Floats>(record + i) * scale, count);
        });
    }

  private:
    static constexpr int64_t kPerWord = 4 / sizeof(Element);

    const s1engine::cpu::Attention& a;
    const AttentionSizes& sizes;
    uint32_t *panel, *queries;
    float *scores, *totals, *fresh;
    const char** keys;
    char* zeros;

    int64_t place(int64_t row, int64_t head) const { return (row * a.heads + head) * a.head_dim; }

    // The first row that sees a key, where the last row sees `rest` keys from that one on.
    int64_t first_row(const AttentionItem& item, int64_t rest) const {
        return rest < item.tokens ? (item.tokens - rest) * sizes.group : 0;
    }

    // Writes to `keys` where `count` keys of a sequence lie, then zeros up to a full panel, then the same of the values,
    // whose place it returns, and enough to fetch ahead of.
    const char** locate(const AttentionItem& item, int64_t first, int64_t count) {
        const int32_t* table = a.block_tables + item.sequence * a.max_blocks;
        const int64_t stride = a.kv_heads * a.head_dim, padded = (count + kPanel - 1) / kPanel * kPanel;
        const char** values = keys + padded;
        for (int64_t i = 0; i < count;) {
            const int64_t block = (first + i) / a.block_size, offset = (first + i) % a.block_size;
            const int64_t end = count - i < a.block_size - offset ? count : i + a.block_size - offset;
            int64_t at = (table[block] * a.block_size + offset) * stride + item.kv_head * a.head_dim;
            for (; i < end; ++i, at += stride) {
                keys[i] = reinterpret_cast<const char*>(static_cast<const Element*>(a.k_cache) + at);
                values[i] = reinterpret_cast<const char*>(static_cast<const Element*>(a.v_cache) + at);
            }
        }
        for (int64_t i = count; i < padded; ++i) keys[i] = zeros;
        for (int64_t i = count; i < padded + kAheadKeys; ++i) values[i] = zeros;
        return values;
    }

    void fetch_rows(const char* const* rows, int64_t count) const {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t word = 0; word < sizes.words; word += 16) fetch(rows[i] + 4 * word);
    }

    // The records of all rows that see a key of the split. visible: keys that the last row sees in all.
    void attend_split(const AttentionItem& item, int64_t visible, int64_t split, float* records) {
        const int64_t rest = visible - split * kSplitKeys, count = rest < kSplitKeys ? rest : kSplitKeys;
        const int64_t first = first_row(item, rest), rows = item.tokens * sizes.group;
        const char* const* values = locate(item, split * kSplitKeys, count);
        fetch_rows(keys, kAheadKeys < count ? kAheadKeys : count);
        // Keys of the split that a row sees, and that the last row sees of any tile with this one.
        const auto seen = [&](int64_t row) {
            const int64_t own = rest - (item.tokens - 1 - row / sizes.group);
            return own < count ? own : count;
        };
        const auto seen_near = [&](int64_t row) { return seen(row + kMaxRows < rows ? row + kMaxRows - 1 : rows - 1); };
        const bool few = rows - first <= kFewRows;

        for (int64_t key = 0; key < count; key += kPanel) {
            if (!few) {
                fetch_rows(keys + key + kAheadKeys, kPanel);
                fetch_rows(values + key, kPanel);
                for (int64_t word = 0; word < sizes.words; word += kPackedWords)
                    pack_keys(keys + key, word, sizes.words, panel + word * kPanel);
            }
            over_tiles(few ? first : first_row(item, rest - key), rows, [&](int64_t row, auto counted) {
                constexpr int kRows = decltype(counted)::value;
                const uint32_t* from = queries + row * sizes.words;
                float* to = scores + row * kScoreStride + key;
                if (few) multiply_keys<Kind, kRows>(from, sizes.words, keys + key, sizes.words, panel, to, kScoreStride);
                else multiply<kRows>(from, sizes.words, sizes.words, to, kScoreStride);
            });
        }

        const float scale = static_cast<float>(a.scale * 1.4426950408889634);
        for (int64_t row = first; row < rows; ++row) {
            float* record = records + row * sizes.record;
            softmax<Element>(scores + row * kScoreStride, seen(row), seen_near(row) + 1, scale, record + sizes.width);
            std::memset(record, 0, sizes.width * sizeof(float));
        }

        // Few rows go through the values in parts, whose columns follow each other before the next part is there.
        const int64_t part = few ? kAheadKeys : kSplitKeys;
        for (int64_t key = 0; key < count; key += part) {
            const auto steps = [&](int64_t end) { return ((end - key < part ? end - key : part) + kPerWord - 1) / kPerWord; };
            for (int64_t column = 0; column < a.head_dim; column += kPanel) {
                const int64_t columns = a.head_dim - column < kPanel ? a.head_dim - column : kPanel;
                if (!few) pack_values<Element>(values, column, columns, steps(count), panel);
                over_tiles(first, rows, [&](int64_t row, auto counted) {
                    constexpr int kRows = decltype(counted)::value;
                    const uint32_t* from = reinterpret_cast<const uint32_t*>(scores + row * kScoreStride) + key / kPerWord;
                    float* to = records + row * sizes.record + column;
                    if (few) {
                        multiply_values<Kind, Element, kRows>(from, kScoreStride, values + key, column, columns,
                                                              steps(seen_near(row)), to, sizes.record);
                    } else {
                        multiply<kRows>(from, kScoreStride, steps(seen_near(row)), to, sizes.record);
                    }
                });
            }
        }
    }

    // each(first row, RowCount<rows>) over tiles of the rows from `first` on.
    template <class Each>
    static void over_tiles(int64_t first, int64_t rows, Each&& each) {
        for (int64_t row = first; row < rows; row += kMaxRows)
            with_row_count(rows - row, [&](auto counted) { each(row, counted); });
    }

    // out[r] = rows[r] . panel
    template <int kRows>
    void multiply(const uint32_t* rows, int64_t stride, int64_t steps, float* out, int64_t out_stride) const {
        Floats sums[kRows][kVectors] = {};
        multiply_panel<Kind, kRows>(rows, stride, panel, steps, reinterpret_cast<const char*>(panel), 0, sums);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
    }
};

}  // namespace S1_ISA
