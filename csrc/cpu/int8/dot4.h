// Products of int8 by fours, and the vectors of int32 that they are added to.
#pragma once
#include <algorithm>
#include <cmath>

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

#include "../vec.h"

namespace mfa {

using Ints = Vec<int32_t>;
using Floats = Vec<float>;
typedef int8_t Bytes __attribute__((vector_size(kWidth<float>)));

// kHasDot4 where the processor multiplies int8 by fours in one instruction. kInt8Rate is how much faster than the scan in
// float a scan in int8 is: 3 was measured on a Zen 5 (bench/bench_screen.py), the others are guesses. kTokenMost is the
// largest integer of a token: so small, where products are added in pairs in int16, that no pair overflows.
#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || (!defined(__AVX512F__) && defined(__AVXVNNI__)) || \
    defined(__ARM_FEATURE_DOTPROD)
constexpr bool kHasDot4 = true;
constexpr double kInt8Rate = 3;
constexpr int kTokenMost = 127;
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool kHasDot4 = false;
constexpr double kInt8Rate = 1;
constexpr int kTokenMost = 63;
#else
constexpr bool kHasDot4 = false;
constexpr double kInt8Rate = 0.2;
constexpr int kTokenMost = 127;
#endif

// The largest integer where four products of a token's, with kTokenOffset added, must fit into int16 on every processor.
constexpr int kFewBits = 63;

// What is added to a token's integers so that they have no sign, where products take them so.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kTokenOffset = 0;
#else
constexpr int kTokenOffset = kTokenMost + 1;
#endif

// sum + the products of four bytes in every lane: those of u, a token's, and those of s, which have a sign.
inline Ints dot4(Ints sum, Ints u, Ints s) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Ints)vdotq_s32((int32x4_t)sum, (int8x16_t)u, (int8x16_t)s);
#elif defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)u, (__m512i)s), _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)s), _mm256_set1_epi16(1));
#else
  for (int byte = 0; byte < 4; ++byte) sum += ((u >> (8 * byte)) & 255) * ((s << (24 - 8 * byte)) >> 24);
  return sum;
#endif
}

// dot4 of two quads: of integers of a token up to kFewBits, and of others up to as much.
inline Ints dot8(Ints sum, Ints u0, Ints s0, Ints u1, Ints s1) {
#if !defined(__AVX512VNNI__) && defined(__AVX512BW__)
  const __m512i first = _mm512_maddubs_epi16((__m512i)u0, (__m512i)s0);
  const __m512i both = _mm512_add_epi16(first, _mm512_maddubs_epi16((__m512i)u1, (__m512i)s1));
  return sum + (Ints)_mm512_madd_epi16(both, _mm512_set1_epi16(1));
#elif !defined(__AVXVNNI__) && defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i first = _mm256_maddubs_epi16((__m256i)u0, (__m256i)s0);
  const __m256i both = _mm256_add_epi16(first, _mm256_maddubs_epi16((__m256i)u1, (__m256i)s1));
  return sum + (Ints)_mm256_madd_epi16(both, _mm256_set1_epi16(1));
#else
  return dot4(dot4(sum, u0, s0), u1, s1);
#endif
}

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

inline Floats sqrt(Floats v) {
  float lane[kWidth<float>];
  store<float>(lane, v);
  for (float& value : lane) value = std::sqrt(value);
  return load(lane);
}

inline float sqrt(float v) { return std::sqrt(v); }

// The nearest integers, for values up to 2^22; 0 for NaN.
inline Floats nearest(Floats v) {
  constexpr float kMagic = 0x1.8p23f;  // its unit in the last place is 1
  const Floats near = (v + kMagic) - kMagic;
  return near == near ? near : Floats{};
}

// What values up to `largest` are multiples of in integers up to `most`, and one over it; 0 where they are too small.
struct Quantum {
  float size, inverse;
  Quantum(float largest, int most) : size(largest > 1e-30f ? largest / most : 0), inverse(size > 0 ? 1 / size : 0) {}
};

inline float largest_lane(Floats v) {
  float most = v[0];
  for (int lane = 1; lane < kWidth<float>; ++lane) most = std::max(most, v[lane]);
  return most;
}

}  // namespace mfa
