// The widest vector of floats that the instruction set of this compilation has, and bfloat16 beside it.
//
// Kernels are compiled once for each instruction set (kernels.cpp), each time in a namespace of that name, so that no
// inline function of one can stand in for that of another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef S1_ISA
#error "S1_ISA names the instruction set"
#endif

namespace S1_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

using bf16 = uint16_t;  // its bits

template <class Vector, class Element>
inline Vector load(const Element* from) {
    static_assert(sizeof(Element) == 4);
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <class Vector, class Element>
inline void store(Element* to, Vector vector) {
    static_assert(sizeof(Element) == 4);
    std::memcpy(to, &vector, sizeof(vector));
}

inline Floats broadcast(float value) { return Floats{} + value; }

inline float to_float(bf16 value) {
    const uint32_t bits = uint32_t{value} << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return static_cast<bf16>((bits >> 16) | 0x40);
    return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// kLanes bfloat16 values in a row, to float and back.
inline Floats load_bf16(const bf16* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline void store_bf16(bf16* to, Floats values) {
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words quiet = (bits >> 16) | 0x40;
    const Words is_nan = (Words)(values != values);
    const Words result = (rounded & ~is_nan) | (quiet & is_nan);
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)result));
#else
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    const Halves halves = __builtin_convertvector(result, Halves);
    std::memcpy(to, &halves, sizeof(halves));
#endif
}

// The first `count` elements in a row, at most kLanes, as floats with zeros after them; and floats to such elements.
inline Floats load_floats(const float* from, int64_t count) {
    if (count == kLanes) return load<Floats>(from);
    Floats values{};
    std::memcpy(&values, from, 4 * count);
    return values;
}

inline Floats load_floats(const bf16* from, int64_t count) {
    if (count == kLanes) return load_bf16(from);
    bf16 elements[kLanes] = {};
    std::memcpy(elements, from, 2 * count);
    return load_bf16(elements);
}

inline void store_floats(float* to, Floats values, int64_t count) {
    if (count == kLanes) {
        store(to, values);
        return;
    }
    std::memcpy(to, &values, 4 * count);
}

inline void store_floats(bf16* to, Floats values, int64_t count) {
    if (count == kLanes) {
        store_bf16(to, values);
        return;
    }
    bf16 elements[kLanes];
    store_bf16(elements, values);
    std::memcpy(to, elements, 2 * count);
}

// each(first, count) over runs of kLanes elements and the rest.
template <class Each>
inline void over_vectors(int64_t size, Each&& each) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) each(i, int64_t{kLanes});
    if (i < size) each(i, size - i);
}

// sum + the product of two pairs of bfloat16, low halves first: `a` is one pair for all lanes, `b` one a lane.
inline Floats dot_pairs(Floats sum, uint32_t a, Words b) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    sum += (Floats)(Words{} + (a << 16)) * (Floats)(b << 16);
    return sum + (Floats)(Words{} + (a & 0xffff0000)) * (Floats)(b & 0xffff0000);
#endif
}

inline Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return a > b ? a : b;
#endif
}

// The same order of additions on every call; which order differs between instruction sets.
inline float sum(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)values);
#else
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += values[i];
    return total;
#endif
}

inline float largest(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float result = values[0];
    for (int i = 1; i < kLanes; ++i) result = values[i] > result ? values[i] : result;
    return result;
#endif
}

// A bit for each lane where a comparison holds, the first lane's the lowest.
inline uint32_t bits_of(Ints holds) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)holds);
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)holds);
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (holds[i] & 1u) << i;
    return bits;
#endif
}

// e^x within 2 units in the last place, for x up to 88.7; 0 below -87.3, and for -inf. (Cephes' expf: the exponent apart,
// a polynomial of degree 6 in what remains.)
inline Floats exp(Floats x) {
    const Words vanishes = (Words)(x < -87.33654f);
    const Floats bounded = max(x, broadcast(-87.33654f));
    const Floats shifted = bounded * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded away
    const Floats whole = shifted - 12582912.0f;
    Floats rest = bounded - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Floats y = broadcast(1.9875691500e-4f);
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * (rest * rest) + rest + 1.0f;
    // Its integer is in the low bits of `shifted`: from there into the exponent.
    const Words power = ((Words)shifted << 23) + 0x3f800000u;
    return (Floats)((Words)(y * (Floats)power) & ~vanishes);
}

// 2^x within 1e-7 of itself, for x up to 127; 0 below -126, where AVX-512 still has the subnormal numbers. NaN stays NaN.
inline Floats exp2(Floats x) {
    // Between two whole numbers: a polynomial with the least relative error on [0, 1].
    const auto fraction = [](Floats f) {
        Floats y = broadcast(2.1702255e-4f);
        y = y * f + 1.2439688e-3f;
        y = y * f + 9.6788410e-3f;
        y = y * f + 5.5483342e-2f;
        y = y * f + 2.4022984e-1f;
        y = y * f + 6.9314698e-1f;
        return y * f + 1.0f;
    };
#if defined(__AVX512F__)
    const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (Floats)_mm512_scalef_ps((__m512)fraction(rest), (__m512)x);
#else
    const Words vanishes = (Words)(x < -126.0f);
    const Floats bounded = max(broadcast(-126.0f), x);
    const Floats shifted = (bounded - 0.5f) + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded away
    const Floats whole = shifted - 12582912.0f;
    const Words power = ((Words)shifted << 23) + 0x3f800000u;  // its integer, in the low bits, into the exponent
    return (Floats)((Words)(fraction(bounded - whole) * (Floats)power) & ~vanishes);
#endif
}

// x * sigmoid(x). The exponential is of -|x|, so that it never overflows.
inline Floats silu(Floats x) {
    const Floats decay = exp((Floats)((Words)x | 0x80000000u));
    return x * (x < 0.0f ? decay : broadcast(1.0f)) / (1.0f + decay);
}

}  // namespace S1_ISA
