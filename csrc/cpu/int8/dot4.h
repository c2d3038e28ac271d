// Products of int8 by fours, and the vectors of int32 that they are added to.
#pragma once
#include <cmath>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#include "../vec.h"

namespace mfa {

using Ints = Vec<int32_t>;
using Floats = Vec<float>;
typedef int8_t Bytes __attribute__((vector_size(kWidth<float>)));

#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || (!defined(__AVX512F__) && defined(__AVXVNNI__))
constexpr bool kHasDot4 = true;  // the processor multiplies int8 faster than float
#else
constexpr bool kHasDot4 = false;
#endif

// sum + the products of four bytes in every lane: those of u without a sign, those of s with one.
inline Ints dot4(Ints sum, Ints u, Ints s) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s);
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s);
#else
  for (int byte = 0; byte < 4; ++byte) sum += ((u >> (8 * byte)) & 255) * ((s << (24 - 8 * byte)) >> 24);
  return sum;
#endif
}

inline Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }

inline Floats sqrt(Floats v) {
  float lane[kWidth<float>];
  store<float>(lane, v);
  for (float& value : lane) value = std::sqrt(value);
  return load(lane);
}

}  // namespace mfa
