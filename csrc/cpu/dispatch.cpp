// Which instruction set's kernels serve this process.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
namespace avx512_bf16 {
extern const s1engine::cpu::Kernels table;
}
namespace avx512 {
extern const s1engine::cpu::Kernels table;
}
namespace avx2 {
extern const s1engine::cpu::Kernels table;
}
#endif
namespace baseline {
extern const s1engine::cpu::Kernels table;
}

namespace s1engine::cpu {

static const Kernels* best(const char* wanted) {
    const auto allowed = [wanted](const char* name) { return !wanted || !std::strcmp(wanted, name); };
#if defined(__x86_64__)
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (allowed("avx512_bf16") && wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        return &avx512_bf16::table;
    if (allowed("avx512") && wide) return &avx512::table;
    if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
    return allowed("baseline") ? &baseline::table : nullptr;
}

const Kernels& kernels() {
    static const Kernels* const chosen = [] {
        const char* wanted = std::getenv("S1ENGINE_CPU_ISA");
        const Kernels* found = best(wanted);
        if (found) return found;
        std::fprintf(stderr,
                     "s1engine: S1ENGINE_CPU_ISA=%s: this processor has no such kernels (avx512_bf16, avx512, avx2, "
                     "baseline); the best ones serve\n",
                     wanted);
        return best(nullptr);
    }();
    return *chosen;
}

}  // namespace s1engine::cpu
