// What one thread does with rows of attention: it attends splits of the keys, one after the other.
#pragma once

#include "attention_pack.h"
#include "attention_softmax.h"
#include "kernels.h"

namespace S1_ISA {

// Keys of a split. A row attends one as a whole, so their number is part of what decides its bits.
constexpr int64_t kSplitKeys = 512;
// Rows of a block: so many repay the packing of keys and values, and their scores stay in the second-level cache.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kFewRows = 2 * kMaxRows;         // so many take keys and values from the cache
constexpr int64_t kScoreStride = kSplitKeys + 16;  // floats between the scores of two rows: no power of two

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

// each(first row, RowCount<rows>) over tiles of the rows from `first` on.
template <class Each>
inline void over_tiles(int64_t first, int64_t rows, Each&& each) {
    for (int64_t row = first; row < rows; row += kMaxRows)
        with_row_count(rows - row, [&](auto counted) { each(row, counted); });
}

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
        for (int64_t t = 0; t < item.tokens; ++t) {
            const Element* from = static_cast<const Element*>(a.q) + place(row + t, head);
            std::memcpy(queries + t * sizes.group * sizes.words, from, sizes.group * sizes.words * 4);
        }
        if (item.split >= 0) {
            attend_split(item, visible, item.split, item.records);
            return;
        }
        attend_split(item, visible, 0, totals);
        for (int64_t split = 1; split * kSplitKeys < visible; ++split) {
            const Part part = attend_split(item, visible, split, fresh);
            for (int64_t r = part.first_row(0); r < part.rows; ++r)
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
    // An item's part in a split.
    struct Part {
        int64_t group, tokens, rows;
        int64_t rest;   // keys from the split's first on that the last row sees
        int64_t count;  // those in the split
        bool few;

        // The first row that sees a key of the split.
        int64_t first_row(int64_t key) const { return rest - key < tokens ? (tokens - (rest - key)) * group : 0; }

        // Keys of the split that a row sees; that the last row sees of any tile with this one.
        int64_t seen(int64_t row) const {
            const int64_t own = rest - (tokens - 1 - row / group);
            return own < count ? own : count;
        }
        int64_t seen_near(int64_t row) const { return seen(row + kMaxRows < rows ? row + kMaxRows - 1 : rows - 1); }
    };

    static constexpr int64_t kPerWord = 4 / sizeof(Element);

    const s1engine::cpu::Attention& a;
    const AttentionSizes& sizes;
    uint32_t *panel, *queries;
    float *scores, *totals, *fresh;
    const char** keys;
    char* zeros;

    int64_t place(int64_t row, int64_t head) const { return (row * a.heads + head) * a.head_dim; }

    // Writes the records of all rows that see a key of the split. visible: keys that the last row sees in all.
    Part attend_split(const AttentionItem& item, int64_t visible, int64_t split, float* records) {
        const int64_t rest = visible - split * kSplitKeys, count = rest < kSplitKeys ? rest : kSplitKeys;
        Part part = {sizes.group, item.tokens, item.tokens * sizes.group, rest, count, false};
        part.few = part.rows - part.first_row(0) <= kFewRows;
        const char* const* values = locate(item, split * kSplitKeys, count);
        fetch_rows(keys, kAheadKeys < count ? kAheadKeys : count);
        score(part, values);
        const float scale = static_cast<float>(a.scale * 1.4426950408889634);
        for (int64_t row = part.first_row(0); row < part.rows; ++row) {
            float* record = records + row * sizes.record;
            softmax<Element>(scores_of(row), part.seen(row), part.seen_near(row) + 1, scale, record + sizes.width);
            if (part.few) std::memset(record, 0, sizes.width * sizeof(float));
        }
        sum_values(part, values, records);
        return part;
    }

    // Writes to `keys` where `count` keys of a sequence lie, then zeros up to a full panel, then the same of the
    // values, whose place it returns, and what may be fetched ahead of their end.
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

    float* scores_of(int64_t row) const { return scores + row * kScoreStride; }

    // Scores of the split's keys, 32 at once, for the rows that see one of them.
    void score(const Part& part, const char* const* values) {
        for (int64_t key = 0; key < part.count; key += kPanel) {
            if (!part.few) {
                fetch_rows(keys + key + kAheadKeys, kPanel);
                fetch_rows(values + key, kPanel);
                for (int64_t word = 0; word < sizes.words; word += kPackedWords)
                    pack_keys(keys + key, word, sizes.words, panel + word * kPanel);
            }
            over_tiles(part.first_row(part.few ? 0 : key), part.rows, [&](int64_t row, auto counted) {
                constexpr int kRows = decltype(counted)::value;
                const uint32_t* from = queries + row * sizes.words;
                float* to = scores_of(row) + key;
                if (part.few)
                    multiply_keys<Kind, kRows>(from, sizes.words, keys + key, sizes.words, panel, to, kScoreStride);
                else
                    multiply<kRows>(from, sizes.words, sizes.words, to, kScoreStride);
            });
        }
    }

    // Sums of the values times their weights, for 32 elements of the head at once. Few rows take the values in runs, so
    // that all elements of a value follow each other closely.
    void sum_values(const Part& part, const char* const* values, float* records) {
        const int64_t run = part.few ? kAheadKeys : kSplitKeys;
        for (int64_t key = 0; key < part.count; key += run) {
            const auto steps = [&](int64_t end) {
                const int64_t left = end - key;
                return ((left < run ? left : run) + kPerWord - 1) / kPerWord;
            };
            for (int64_t column = 0; column < a.head_dim; column += kPanel) {
                const int64_t columns = a.head_dim - column < kPanel ? a.head_dim - column : kPanel;
                if (!part.few) pack_values<Element>(values, column, columns, steps(part.count), panel);
                over_tiles(part.first_row(0), part.rows, [&](int64_t row, auto counted) {
                    constexpr int kRows = decltype(counted)::value;
                    const uint32_t* from = reinterpret_cast<const uint32_t*>(scores_of(row)) + key / kPerWord;
                    float* to = records + row * sizes.record + column;
                    if (part.few)
                        multiply_values<Kind, Element, kRows>(from, kScoreStride, values + key, column, columns,
                                                              steps(part.seen_near(row)), to, sizes.record);
                    else
                        multiply<kRows>(from, kScoreStride, steps(part.seen_near(row)), to, sizes.record);
                });
            }
        }
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
