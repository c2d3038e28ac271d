// Gram matrices of a few rows.
#pragma once
#include <algorithm>

#include "vec.h"

namespace mfa {

// Fills the tiles of `gram` for rows i, ..., i + S - 1 against j, ..., j + S - 1, S S sums in registers.
template <class T, int S>
void gram_by(const T* a, int64_t rank, int64_t size, int64_t stride, T* out) {
  constexpr int V = kWidth<T>;
  constexpr int64_t kSums = ceil_div(S * S, V) * V;
  T sums[kSums * V] = {}, totals[kSums];
  for (int64_t i = 0; i < rank; i += S)
    for (int64_t j = 0; j <= i; j += S) {
      const T *left[S], *right[S];  // past the last row the last again
      for (int s = 0; s < S; ++s) {
        left[s] = a + std::min(i + s, rank - 1) * stride;
        right[s] = a + std::min(j + s, rank - 1) * stride;
      }
      Vec<T> sum[S][S] = {};
      for (int64_t d = 0; d < size; d += V) {
        Vec<T> others[S];
        for (int t = 0; t < S; ++t) others[t] = load(right[t] + d);
#pragma GCC unroll 5
        for (int s = 0; s < S; ++s) {
          const Vec<T> own = load(left[s] + d);
#pragma GCC unroll 5
          for (int t = 0; t < S; ++t) sum[s][t] += own * others[t];
        }
      }
      for (int s = 0; s < S; ++s)
        for (int t = 0; t < S; ++t) store<T>(sums + (s * S + t) * V, sum[s][t]);
      for (int64_t from = 0; from < kSums; from += V) sums_of_lanes<T>(sums + from * V, totals + from);
      for (int64_t s = 0; s < std::min<int64_t>(S, rank - i); ++s)
        for (int64_t t = 0; t < std::min<int64_t>(S, rank - j); ++t)
          out[(i + s) * rank + j + t] = out[(j + t) * rank + i + s] = totals[s * S + t];
    }
}

// out [rank, rank] = a a^T for a [rank, stride], of which `size` columns, a multiple of the SIMD width, count.
template <class T>
void gram(const T* a, int64_t rank, int64_t size, int64_t stride, T* out) {
  constexpr int kMost = kRegisters >= 32 ? 5 : 3;
  const int64_t side = ceil_div(rank, ceil_div(rank, kMost));
  with_constant<kMost>(side, [&]<int S>(std::integral_constant<int, S>) { gram_by<T, S>(a, rank, size, stride, out); });
}

}  // namespace mfa
