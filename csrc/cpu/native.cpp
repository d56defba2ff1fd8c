// The C ABI of `s1engine/thinking_c.h`, as the shared library `s1engine._native`: no Python and no torch symbol in it,
// Python reads it with ctypes.
#include "s1engine/thinking_c.h"

#include "s1engine/thinking.h"

namespace thinking = s1engine::thinking;

extern "C" {

int32_t s1_thinking_layout_version(void) { return thinking::kLayoutVersion; }
int32_t s1_thinking_program_width(void) { return thinking::kProgramWidth; }
int32_t s1_thinking_state_width(void) { return thinking::kStateWidth; }

void s1_thinking_step(const int32_t* programs, int32_t* states, const int32_t* rows, const int32_t* sampled,
                      int32_t count, int32_t* out) {
    for (int32_t i = 0; i < count; ++i) {
        const int64_t row = rows[i];
        const thinking::Result result =
            thinking::step(programs + row * thinking::kProgramWidth, states + row * thinking::kStateWidth, sampled[i]);
        out[4 * i] = result.rewind;
        out[4 * i + 1] = result.token;
        out[4 * i + 2] = result.flags;
        out[4 * i + 3] = result.held;
    }
}

void s1_thinking_init(const int32_t* program, const int32_t* prompt, int64_t prompt_size, int32_t max_tokens,
                      int32_t min_tokens, int32_t ignore_end, int32_t grace_tokens, int32_t* state) {
    thinking::init_state(program, prompt, prompt_size, {max_tokens, min_tokens, ignore_end, grace_tokens}, state);
}

}  // extern "C"
