// The second level of screening: marginal bounds for the pairs that the lines leave.
#pragma once
#include <bit>
#include <numeric>

#include "bounds.h"

namespace mfa {

// Lists the tokens, left [k1 - k0], whose bound by each of the components [k0, k1) reaches their bar.
template <class T>
void list_reached(const Stretch<T>& s, const std::vector<T>& bars, int64_t k0, int64_t k1,
                  std::vector<std::vector<int64_t>>& left) {
  const int64_t K = s.screen.marginal.components, tokens = s.tokens;
  for (auto& of_one : left) of_one.clear();
  with_lanes_of<T>(s.lanes, [&]<int L>(std::integral_constant<int, L>) {
    for (int64_t n0 = 0; n0 < tokens; n0 += L)
      for (int64_t k = k0; k < k1; ++k) {
        const T *const own = s.bounds.data() + n0 * K + k * L, *const bar = bars.data() + n0;
        int any = 0;
        for (int i = 0; i < L; ++i) any |= !(own[i] < bar[i]);  // NaN reaches it
        if (!any) continue;
        uint64_t reached = 0;
        for (int i = 0; i < L; ++i) reached |= uint64_t(!(own[i] < bar[i])) << i;
        if (tokens - n0 < L) reached &= (uint64_t(1) << (tokens - n0)) - 1;
        for (; reached; reached &= reached - 1) left[k - k0].push_back(n0 + std::countr_zero(reached));
      }
  });
}

// Bounds the pairs of component k with some tokens by its marginal, and keeps the largest bound of each token.
template <class T, int L>
void bound_some(Stretch<T>& s, int64_t k, const std::vector<int64_t>& tokens, FewDistances<T, L>& distances_of,
                T* largest, int32_t* owners) {
  const T* y[L];
  T distances[L];
  for (size_t i = 0; i < tokens.size(); i += L) {
    const size_t here = std::min<size_t>(L, tokens.size() - i);
    for (size_t g = 0; g < L; ++g) y[g] = s.y_of(tokens[i + std::min(g, here - 1)]);  // the last fills up the group
    distances_of(s.screen.rows_of(k), y, distances);
    for (size_t g = 0; g < here; ++g) {
      const int64_t n = tokens[i + g];
      s.screen.bound(k, distances + g, &s.norms[n], 1, &s.bound_of(n, k), largest + n, owners + n);
    }
  }
}

// Replaces every bound that reaches its token's bar, bars [tokens], by the tighter marginal bound, and makes the
// largest of these the token's guess (unchanged if none is finite). Returns how many were replaced.
template <class T, class ParallelFor>
int64_t refine(Stretch<T>& s, std::vector<T> bars, ParallelFor&& parallel_for) {
  const int64_t K = s.screen.marginal.components, ranges = ranges_of(K, parallel_for.threads());
  bars.resize(s.panels * s.lanes, std::numeric_limits<T>::infinity());
  LargestBounds<T> largest(ranges, s.tokens, 0);
  std::copy(s.guesses.begin(), s.guesses.end(), largest.owners.begin());
  std::vector<int64_t> replaced(ranges);
  for_ranges(K, ranges, parallel_for, [&](int64_t range, int64_t begin, int64_t end) {
    FewDistances<T, 4> distances_of(s.screen.marginal);
    std::vector<std::vector<int64_t>> left(kLineComponents);
    for (int64_t k0 = begin; k0 < end; k0 += kLineComponents) {
      const int64_t k1 = std::min(end, k0 + kLineComponents);
      list_reached(s, bars, k0, k1, left);
      for (int64_t k = k0; k < k1; ++k) {
        if (left[k - k0].empty()) continue;
        replaced[range] += static_cast<int64_t>(left[k - k0].size());
        bound_some(s, k, left[k - k0], distances_of, largest.values.data() + range * s.tokens,
                   largest.owners.data() + range * s.tokens);
      }
    }
  });
  s.guesses = largest.merged();
  return std::accumulate(replaced.begin(), replaced.end(), int64_t(0));
}

}  // namespace mfa
