// Where things lie in the two int32 rows of a sequence slot. `s1engine/thinking/layout.py` says what each of them means.
#pragma once

#include <cstdint>

namespace s1engine::thinking {

constexpr int32_t kLayoutVersion = 1;
constexpr int32_t kProgramWidth = 2048;
constexpr int32_t kStateWidth = 32;

// Columns of a program row's header; `...At` are offsets into the row.
enum Header : int32_t {
    kVersion = 0,
    kSegment,
    kTruncate,
    kAlphabetAt,
    kAlphabetSize,
    kSymbolCount,
    kTriggerNextAt,
    kTriggerDepthAt,
    kTriggersAt,
    kStartAt,
    kStartSize,
    kSeparatorSize,
    kForcedCloseAt,
    kForcedCloseSize,
    kSecondCloseAt,
    kSecondCloseSize,
    kExtensionsAt,
    kExtensionCount,
    kNewlinePagesAt,
    kNewlinePages,
    kNewlineBytesAt,
    kEosAt,
    kEosSize,
    kBannedTriggersAt,
    kBannedTriggersSize,
    kHeaderWidth,
};

// Integers of one trigger record.
enum TriggerRecord : int32_t { kLength = 0, kIgnorable, kCommon, kRestAt, kRestSize, kTriggerWidth };

// Columns of a state row.
enum State : int32_t {
    kPhase = 0,
    kThinkingTokens,
    kSegmentTokens,
    kExtensionsUsed,
    kStopReason,
    kFinished,
    kBan,
    kHeld,
    kPending,
    kQueueAt,
    kQueueKind,
    kStartState,
    kTriggerState,
    kForcedCloseState,
    kSecondCloseState,
    kForcedCloses,
    kLastToken,
    kMaxTokens,  // -1: no limit. Set to 0 between two steps, thinking closes at the next position.
    kMinTokens,
    kIgnoreEnd,
    kGraceTokens,
    kStateColumns,
};

enum Phase : int32_t { kBefore = 0, kThinking, kAnswer };
enum StopReason : int32_t { kNone = 0, kNatural, kBudget };
enum Ban : int32_t { kBanNothing = 0, kBanTriggers, kBanEos };
enum Queue : int32_t { kQueueExtension = kBanTriggers, kQueueClose = kBanEos };  // the ban that follows the last token

enum Flag : int32_t {
    kForced = 1,
    kFlagFinished = 2,
    kTruncated = 4,
    kClosedNatural = 8,
    kClosedBudget = 16,
    kIgnored = 32,
    kStarted = 64,
};

// A change here is a change in layout.py, and of the version in both.
static_assert(kLayoutVersion == 1 && kHeaderWidth == 25 && kTriggerWidth == 5 && kStateColumns == 21);
static_assert(kStateColumns <= kStateWidth && kHeaderWidth < kProgramWidth);

}  // namespace s1engine::thinking
