// The random words and the Gumbel noise of kernels/philox.py, bit for bit.
#pragma once

#include <cmath>

#include "vector.h"

namespace S1_ISA {

// Tokens whose words are made together: 16 counters of four.
constexpr int kGroup = 64;
constexpr int kGroupVectors = kGroup / kLanes;

// 64-bit lanes of which the low halves count; what the high ones hold does not matter.
typedef uint64_t Wides __attribute__((vector_size(4 * kLanes)));
constexpr int kWides = kLanes / 2;

// The low halves' products, all 64 bits.
inline Wides multiply_low(Wides a, Wides b) {
#if defined(__AVX512F__)
    return (Wides)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wides)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (Wides)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// a[0] b[0] a[2] b[2] ..., then a[1] b[1] a[3] b[3] ...
inline void interleave(Wides a, Wides b, Words* out) {
#if defined(__AVX512F__)
    out[0] = (Words)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
    out[1] = (Words)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    out[0] = (Words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    out[1] = (Words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
    Wides even{}, odd{};
    for (int i = 0; i < kWides; i += 2) {
        even[i] = a[i], even[i + 1] = b[i];
        odd[i] = a[i + 1], odd[i + 1] = b[i + 1];
    }
    out[0] = (Words)even, out[1] = (Words)odd;
#endif
}

// Philox4x32-10 with a sample's seed as its key, at one position of the sequence.
class Philox {
   public:
    Philox(int64_t seed, int64_t position) : position_(static_cast<uint32_t>(position)) {
        const uint64_t bits = static_cast<uint64_t>(seed);
        for (uint32_t round = 0; round < kRounds; ++round) {
            keys_[round][0] = static_cast<uint32_t>(bits) + round * 0x9E3779B9u;
            keys_[round][1] = static_cast<uint32_t>(bits >> 32) + round * 0xBB67AE85u;
        }
    }

    // Those of tokens 64 * group to 64 * group + 63.
    void words(int64_t group, Words (&out)[kGroupVectors]) const {
        // Counters in the order that `interleave` undoes: of a vector's, the first half in even lanes.
        Wides quads{};
        for (int i = 0; i < kWides; ++i) quads[i] = i % 2 * (kWides / 2) + i / 2;
        quads += static_cast<uint64_t>(group) * (kGroup / 4);
        for (int v = 0; v < kGroupVectors; v += 2 * kAtOnce) {
            Wides c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; ++i, quads += kWides) {
                // The first round: words 2 and 3 of the counter are zero.
                c3[i] = multiply_low(quads, Wides{} + kMultipliers[0]);
                c2[i] = (c3[i] >> 32) ^ keys_[0][1];
                c1[i] = Wides{};
                c0[i] = Wides{} + (position_ ^ keys_[0][0]);
            }
#pragma GCC unroll 9
            for (int round = 1; round < kRounds; ++round) {
#pragma GCC unroll 4
                for (int i = 0; i < kAtOnce; ++i) {
                    const Wides p0 = multiply_low(c0[i], Wides{} + kMultipliers[0]);
                    const Wides p1 = multiply_low(c2[i], Wides{} + kMultipliers[1]);
                    c0[i] = (p1 >> 32) ^ c1[i] ^ keys_[round][0];
                    c2[i] = (p0 >> 32) ^ c3[i] ^ keys_[round][1];
                    c1[i] = p1, c3[i] = p0;
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kAtOnce; ++i)
                interleave((c0[i] & 0xffffffff) | (c1[i] << 32), (c2[i] & 0xffffffff) | (c3[i] << 32), out + v + 2 * i);
        }
    }

   private:
    static constexpr int kRounds = 10;
    // Vectors of counters whose chains of multiplications overlap.
    static constexpr int kAtOnce = kLanes == 16 ? 2 : 4;
    static constexpr uint64_t kMultipliers[2] = {0xD2511F53, 0xCD9E8D57};

    uint64_t position_, keys_[kRounds][2];
};

// (word + 0.5) * 2^-32 in float32 arithmetic, at most 1 - 2^-24: in (0, 1).
inline Floats uniform(Words words) {
    const Floats u = (__builtin_convertvector(words, Floats) + 0.5f) * 0x1p-32f;
    return u < 1 - 0x1p-24f ? u : broadcast(1 - 0x1p-24f);
}

// Standard Gumbel noise of such a number: computed in float64 and rounded. (1 - u itself is exact.)
inline float gumbel(float u) { return static_cast<float>(-::log(-::log(1.0 - u))); }

}  // namespace S1_ISA
