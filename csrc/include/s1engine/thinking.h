// The thinking state machine: a header-only C++17 library over two rows of int32, with no allocation and no dependency.
//
// A sequence slot has a program row (delimiters and extensions, constant) and a state row (one request). Program rows
// are made by `s1engine.thinking.program.compile_program` in Python, and are plain int32 arrays that can be saved and
// shipped; `init_state` here makes the state row of a new request, `step` consumes one sampled token. The rules are
// those of `s1engine/thinking/machine.py`, the layout is in `thinking_layout.h`.
//
// Every function is usable on a device too: S1ENGINE_HD is `__host__ __device__` under nvcc and hipcc. A kernel gives
// one thread to each row. The C ABI for batches is in `thinking_c.h`, its definitions in `csrc/cpu/native.cpp`.
#pragma once

#include <cstdint>

#include "s1engine/thinking_layout.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define S1ENGINE_HD __host__ __device__
#else
#define S1ENGINE_HD
#endif

namespace s1engine::thinking {

// What one sampled token became: `rewind` emitted tokens are taken back, then `token` stands at this position (-1: none
// was written). `held` of the tokens that now stand may be taken back by a later step.
struct Result {
    int32_t rewind;
    int32_t token;
    int32_t flags;
    int32_t held;
};
static_assert(sizeof(Result) == 4 * sizeof(int32_t));

namespace detail {

// The place of `token` in an ascending list, or -1.
S1ENGINE_HD inline int32_t find(const int32_t* list, int32_t size, int32_t token) {
    int32_t low = 0, high = size;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (list[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low < size && list[low] == token ? low : -1;
}

// Entry i of unsigned numbers of `bits` bits each, packed into 32-bit words from the lowest bits up.
S1ENGINE_HD inline int32_t unpack(const int32_t* words, int32_t i, int32_t bits) {
    const int32_t per_word = 32 / bits;
    const uint32_t word = static_cast<uint32_t>(words[i / per_word]);
    return static_cast<int32_t>((word >> (bits * (i % per_word))) & ((1u << bits) - 1u));
}

S1ENGINE_HD inline bool ends_line(const int32_t* program, int32_t token) {
    const int32_t page = token >> 8;
    if (token < 0 || page >= program[kNewlinePages]) return false;
    const int32_t* bytes = program + program[kNewlineBytesAt];
    int32_t low = unpack(program + program[kNewlinePagesAt], page, 16);
    const int32_t end = unpack(program + program[kNewlinePagesAt], page + 1, 16);
    int32_t high = end;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (unpack(bytes, middle, 8) < (token & 255)) low = middle + 1;
        else high = middle;
    }
    return low < end && unpack(bytes, low, 8) == (token & 255);
}

// Knuth, Morris, Pratt: how many tokens of the pattern at `at` are matched after one more, `matched` < size before.
S1ENGINE_HD inline int32_t advance(const int32_t* program, int32_t at, int32_t size, int32_t matched, int32_t token) {
    const int32_t* pattern = program + at;
    const int32_t* fail = pattern + size;
    while (matched > 0 && pattern[matched] != token) matched = fail[matched];
    return pattern[matched] == token ? matched + 1 : 0;
}

// The same, where a complete match goes on as its longest proper part: what a close has already in the output.
S1ENGINE_HD inline int32_t advance_close(const int32_t* program, int32_t at, int32_t size, int32_t matched,
                                         int32_t token) {
    const int32_t now = advance(program, at, size, matched, token);
    return now == size ? program[at + size + now] : now;
}

S1ENGINE_HD inline void forget_delimiters(int32_t* state) {
    state[kStartState] = 0;
    state[kTriggerState] = 0;
    state[kForcedCloseState] = 0;
    state[kSecondCloseState] = 0;
    state[kHeld] = 0;
}

S1ENGINE_HD inline void queue(int32_t* state, int32_t kind, int32_t at, int32_t size) {
    state[kQueueKind] = kind;
    state[kQueueAt] = at;
    state[kPending] = size;
    forget_delimiters(state);
}

S1ENGINE_HD inline void queue_written(int32_t* state) {
    state[kBan] = state[kQueueKind];
    if (state[kQueueKind] == kQueueClose) state[kPhase] = kAnswer;
}

S1ENGINE_HD inline Result write_queued(const int32_t* program, int32_t* state, int32_t rewind, int32_t events) {
    const int32_t token = program[state[kQueueAt]++];
    if (state[kQueueKind] == kQueueExtension) ++state[kThinkingTokens];
    state[kLastToken] = token;
    if (--state[kPending] == 0) queue_written(state);
    return {rewind, token, kForced | events, 0};
}

S1ENGINE_HD inline Result outside(const int32_t* program, int32_t* state, int32_t x) {
    int32_t flags = 0;
    if (find(program + program[kEosAt], program[kEosSize], x) >= 0) {
        state[kFinished] = 1;
        flags |= kFlagFinished;
    }
    const int32_t size = program[kStartSize];
    state[kStartState] = advance(program, program[kStartAt], size, state[kStartState], x);
    if (state[kStartState] == size) {
        forget_delimiters(state);
        state[kPhase] = kThinking;
        state[kLastToken] = -1;
        flags |= kStarted;
    }
    return {0, x, flags, 0};
}

S1ENGINE_HD inline int32_t used(const int32_t* program, const int32_t* state) {
    return program[kSegment] ? state[kSegmentTokens] : state[kThinkingTokens];
}

S1ENGINE_HD inline bool used_up(const int32_t* program, const int32_t* state) {
    return state[kMaxTokens] >= 0 && used(program, state) >= state[kMaxTokens];
}

S1ENGINE_HD inline bool may_ignore(const int32_t* program, const int32_t* state, int32_t extension_size) {
    const bool wanted =
        state[kExtensionsUsed] < state[kIgnoreEnd] || state[kThinkingTokens] < state[kMinTokens];
    if (!wanted || used_up(program, state)) return false;
    return state[kMaxTokens] < 0 || program[kSegment] || state[kThinkingTokens] + extension_size < state[kMaxTokens];
}

S1ENGINE_HD inline Result end(const int32_t* program, int32_t* state, int32_t index, int32_t x) {
    const int32_t* record = program + program[kTriggersAt] + index * kTriggerWidth;
    const int32_t begun = record[kLength] - 1;
    state[kThinkingTokens] -= begun;
    state[kSegmentTokens] -= begun;
    const int32_t count = program[kExtensionCount];
    if (record[kIgnorable] && count > 0) {
        const int32_t* extension = program + program[kExtensionsAt] + 2 * (state[kExtensionsUsed] % count);
        if (may_ignore(program, state, extension[1])) {
            ++state[kExtensionsUsed];
            state[kSegmentTokens] = 0;
            queue(state, kQueueExtension, extension[0], extension[1]);
            return write_queued(program, state, begun, kIgnored);
        }
    }
    state[kStopReason] = kNatural;
    const int32_t common = record[kCommon];
    queue(state, kQueueClose, record[kRestAt], record[kRestSize]);
    if (common <= begun) return write_queued(program, state, begun - common, kClosedNatural);
    state[kLastToken] = x;
    if (state[kPending] == 0) queue_written(state);
    return {0, x, kClosedNatural, 0};
}

S1ENGINE_HD inline Result out_of_budget(const int32_t* program, int32_t* state, bool line_ended) {
    state[kStopReason] = kBudget;
    if (program[kTruncate]) {
        state[kFinished] = 1;
        state[kHeld] = 0;
        return {0, -1, kFlagFinished | kTruncated, 0};
    }
    const bool second = state[kForcedCloses] > 0;
    state[kForcedCloses] = 1;
    const int32_t kept = second ? state[kSecondCloseState] : state[kForcedCloseState];
    state[kThinkingTokens] -= kept;
    state[kSegmentTokens] -= kept;
    const int32_t size = second ? program[kSecondCloseSize] : program[kForcedCloseSize];
    const int32_t at = second ? program[kSecondCloseAt] : program[kForcedCloseAt];
    // The separator lies right before the close.
    const int32_t separator = kept > 0 || line_ended ? 0 : program[kSeparatorSize];
    queue(state, kQueueClose, at + kept - separator, size - kept + separator);
    return write_queued(program, state, 0, kClosedBudget);
}

S1ENGINE_HD inline Result think(const int32_t* program, int32_t* state, int32_t x) {
    const int32_t* alphabet = program + program[kAlphabetAt];
    const int32_t alphabet_size = program[kAlphabetSize];
    const int32_t place = find(alphabet, alphabet_size, x);
    const int32_t symbol = place < 0 ? 0 : alphabet[alphabet_size + place];
    const int32_t node = program[program[kTriggerNextAt] + state[kTriggerState] * program[kSymbolCount] + symbol];
    if (node < 0) return end(program, state, -node - 1, x);

    const int32_t max_tokens = state[kMaxTokens], spent = used(program, state);
    if (max_tokens >= 0 && spent >= max_tokens - state[kGraceTokens]) {
        const bool line_ended = ends_line(program, state[kLastToken]);
        if (spent >= max_tokens || line_ended) return out_of_budget(program, state, line_ended);
    }

    state[kTriggerState] = node;
    state[kForcedCloseState] = advance_close(program, program[kForcedCloseAt], program[kForcedCloseSize],
                                             state[kForcedCloseState], x);
    state[kSecondCloseState] = advance_close(program, program[kSecondCloseAt], program[kSecondCloseSize],
                                             state[kSecondCloseState], x);
    ++state[kThinkingTokens];
    ++state[kSegmentTokens];
    state[kLastToken] = x;
    state[kHeld] = program[program[kTriggerDepthAt] + node];
    return {0, x, 0, state[kHeld]};
}

}  // namespace detail

// Consumes `x`, sampled at the next position. A finished request stays as it is and yields no token.
S1ENGINE_HD inline Result step(const int32_t* program, int32_t* state, int32_t x) {
    if (state[kFinished]) return {0, -1, kFlagFinished, 0};
    state[kBan] = kBanNothing;
    if (state[kPending] > 0) return detail::write_queued(program, state, 0, 0);
    if (state[kPhase] == kThinking) return detail::think(program, state, x);
    return detail::outside(program, state, x);
}

// Limits of a new request, as in Python's ThinkingBudget; max_tokens is -1 for none. `min_tokens` and `ignore_end` have
// no effect with a program that has no extensions.
struct Limits {
    int32_t max_tokens = -1;
    int32_t min_tokens = 0;
    int32_t ignore_end = 0;
    int32_t grace_tokens = 0;
};

// Writes the state (kStateWidth integers) of a request that has sampled nothing yet. Reads the end of the prompt only.
S1ENGINE_HD inline void init_state(const int32_t* program, const int32_t* prompt, int64_t prompt_size, Limits limits,
                                   int32_t* state) {
    for (int32_t i = 0; i < kStateWidth; ++i) state[i] = 0;
    state[kLastToken] = -1;
    state[kMaxTokens] = limits.max_tokens;
    state[kMinTokens] = limits.min_tokens;
    state[kIgnoreEnd] = limits.ignore_end;
    state[kGraceTokens] = limits.grace_tokens;

    const int32_t* start = program + program[kStartAt];
    const int32_t size = program[kStartSize];
    for (int64_t end = prompt_size; end >= size; --end) {
        int32_t same = 0;
        while (same < size && prompt[end - size + same] == start[same]) ++same;
        if (same == size) {
            state[kPhase] = kThinking;
            return;
        }
        if (!detail::ends_line(program, prompt[end - 1])) break;
    }
    for (int64_t i = prompt_size < size - 1 ? 0 : prompt_size - (size - 1); i < prompt_size; ++i)
        state[kStartState] = detail::advance(program, program[kStartAt], size, state[kStartState], prompt[i]);
}

}  // namespace s1engine::thinking
