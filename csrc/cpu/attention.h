// Paged causal attention: rows of decoding sequences and chunks of prompts alike.
//
// The keys of a sequence are cut into splits at fixed positions. A row attends a split as a whole: its scores, the
// largest of them, the weights, the weighted sum of the values; then its splits are merged in order. That is all that
// decides the bits of a row. Rows of a chunk, and the query heads that share a key-value head, are rows of matrix
// products; which of them go together, and whether one thread goes through the splits or several do, is a matter of
// speed.
#pragma once

#include <omp.h>

#include <new>

#include "attention_rows.h"

namespace S1_ISA {

// Sequences of up to so many rows of a key-value head are shared out split by split, the heads of a split one after the
// other: they lie side by side in memory. Longer sequences have blocks of rows enough for all threads.
constexpr int64_t kSharedRows = 512;
// Products of a call below which waking the other threads costs more than they save.
constexpr int64_t kAloneProducts = 1 << 18;

struct AttentionSequence {
    int64_t rows, context, blocks, splits;
    bool shared;

    AttentionSequence(const s1engine::cpu::Attention& a, const AttentionSizes& sizes, int64_t sequence) {
        rows = a.query_start[sequence + 1] - a.query_start[sequence];
        context = a.context_lens[sequence];
        blocks = (rows + sizes.block_tokens - 1) / sizes.block_tokens;
        splits = (context + kSplitKeys - 1) / kSplitKeys;
        shared = splits > 1 && rows * sizes.group <= kSharedRows;
    }

    // Floats of the records of one split, of all heads: [kv_heads, rows, group].
    int64_t split_records(const s1engine::cpu::Attention& a, const AttentionSizes& sizes) const {
        return rows * a.heads * sizes.record;
    }
};

// Writes the items of a call, in the order in which threads take them, and returns how many they are. The sequences are
// in reverse: chunks come last in a batch and take longest.
inline int64_t list_items(const s1engine::cpu::Attention& a, const AttentionSizes& sizes, AttentionItem* items,
                          float* partials) {
    int64_t count = 0;
    for (int64_t s = a.sequences - 1; s >= 0; --s) {
        const AttentionSequence sequence(a, sizes, s);
        for (int64_t split = sequence.shared ? 0 : -1; split < (sequence.shared ? sequence.splits : 0); ++split) {
            for (int64_t block = sequence.blocks - 1; block >= 0; --block) {
                const int64_t token = block * sizes.block_tokens, left = sequence.rows - token;
                const int64_t tokens = left < sizes.block_tokens ? left : sizes.block_tokens;
                if (sequence.context - left + tokens <= split * kSplitKeys) continue;  // sees nothing of the split
                for (int64_t head = 0; head < a.kv_heads; ++head) {
                    float* records = partials + (head * sequence.rows + token) * sizes.group * sizes.record;
                    items[count++] = {s, head, token, tokens, split, records};
                }
            }
            if (sequence.shared) partials += sequence.split_records(a, sizes);
        }
    }
    return count;
}

// Merges the splits of shared sequences, of which `partials` are in the order of list_items: every `team`-th row.
template <class Rows>
inline void merge_splits(const s1engine::cpu::Attention& a, const AttentionSizes& sizes, const Rows& rows,
                         float* partials, int64_t thread, int64_t team) {
    int64_t turn = 0;
    for (int64_t s = a.sequences - 1; s >= 0; --s) {
        const AttentionSequence sequence(a, sizes, s);
        if (!sequence.shared) continue;
        const int64_t of_head = sequence.rows * sizes.group, of_split = sequence.split_records(a, sizes);
        for (int64_t i = 0; i < sequence.rows * a.heads; ++i) {
            if (turn++ % team != thread) continue;
            const int64_t token = i % of_head / sizes.group, visible = sequence.context - sequence.rows + token + 1;
            float* record = partials + i * sizes.record;
            for (int64_t split = 1; split * kSplitKeys < visible; ++split)
                merge(record, record + split * of_split, sizes.width);
            rows.write(record, a.query_start[s] + token, i / of_head * sizes.group + i % sizes.group);
        }
        partials += sequence.splits * of_split;
    }
}

// Memory that is kept from call to call.
struct Scratch {
    void* memory = nullptr;
    int64_t size = 0;

    ~Scratch() { ::operator delete(memory, std::align_val_t{64}); }

    uintptr_t at_least(int64_t wanted) {
        if (wanted > size) {
            ::operator delete(memory, std::align_val_t{64});
            memory = nullptr;
            size = 0;
            memory = ::operator new(wanted, std::align_val_t{64});
            size = wanted;
        }
        return reinterpret_cast<uintptr_t>(memory);
    }
};

template <class Kind, class Element>
void run_attention(const s1engine::cpu::Attention& a) {
    using Rows = AttentionRows<Kind, Element>;
    const AttentionSizes sizes(a);
    int64_t max_items = 0, num_partials = 0, products = 0;
    for (int64_t s = 0; s < a.sequences; ++s) {
        const AttentionSequence sequence(a, sizes, s);
        products += sequence.rows * sequence.context * a.heads * a.head_dim;
        max_items += sequence.blocks * a.kv_heads * (sequence.shared ? sequence.splits : 1);
        num_partials += sequence.shared ? sequence.splits * sequence.split_records(a, sizes) : 0;
    }
    const int64_t threads = products > kAloneProducts ? omp_get_max_threads() : 1;
    static thread_local Scratch scratch;
    Pieces measure{0};
    Rows(a, sizes, measure);
    const int64_t own = measure.next, shared = max_items * sizeof(AttentionItem) + num_partials * sizeof(float) + 128;
    Pieces memory{scratch.at_least(shared + own * threads)};
    AttentionItem* const items = memory.take<AttentionItem>(max_items);
    float* const partials = memory.take<float>(num_partials);
    const int64_t count = list_items(a, sizes, items, partials);
#pragma omp parallel if (threads > 1)
    {
        const int64_t thread = omp_get_thread_num();
        Pieces mine{memory.next + own * thread};
        Rows rows(a, sizes, mine);
        rows.start();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) rows.attend(items[i]);
        if (num_partials > 0) merge_splits(a, sizes, rows, partials, thread, omp_get_num_threads());
    }
}

inline void attention(const s1engine::cpu::Attention& a) {
    if (a.dtype == s1engine::cpu::Dtype::kFloat32) run_attention<Singles, float>(a);
    else run_attention<Bf16Pairs, bf16>(a);
}

}  // namespace S1_ISA
