/* C ABI of the thinking state machine, for batches. `csrc/cpu/native.cpp` defines it; plain C can call it.
 *
 * Rows are int32, C-contiguous: programs [slots, s1_thinking_program_width()], states [slots, s1_thinking_state_width()].
 * Check s1_thinking_layout_version() against the version that your program rows were made for (their first integer). */
#ifndef S1ENGINE_THINKING_C_H
#define S1ENGINE_THINKING_C_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int32_t s1_thinking_layout_version(void);
int32_t s1_thinking_program_width(void);
int32_t s1_thinking_state_width(void);

/* One token for each of `count` distinct slots: rows[i] consumes sampled[i], and out[4 * i ...] becomes rewind, token
 * (-1: none), flags and held. Slots that are not named are not touched. */
void s1_thinking_step(const int32_t* programs, int32_t* states, const int32_t* rows, const int32_t* sampled,
                      int32_t count, int32_t* out);

/* Writes one state row from one program row and the end of a prompt; max_tokens -1 is no limit. */
void s1_thinking_init(const int32_t* program, const int32_t* prompt, int64_t prompt_size, int32_t max_tokens,
                      int32_t min_tokens, int32_t ignore_end, int32_t grace_tokens, int32_t* state);

#ifdef __cplusplus
}
#endif

#endif
