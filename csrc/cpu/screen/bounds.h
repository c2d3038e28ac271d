// Upper bounds of the logits of a stretch of tokens, from lines or from marginals.
//
// The component with the largest bound becomes the guess of its token.
// Symbols   y = Q^T lam (x - c), p coordinates of a whitened token; m_k the same of mu_k; B_k the rows of A of the
//           mixture that y follows, noise one. F = |y - m|^2 - |B (y - m)|^2 is the Mahalanobis distance of a marginal,
//           so it is at most that of the whole, and
//             bound_k = constant_k - F / 2 + slack_k (|x~| + |m~_k|)^2  >=  logit_k
//           with everything that rounding can do inside the slack (mfa_kernels/ops/screen/README.md). The distance
//           along a line (lines.h) is at most F and takes its place.
#pragma once
#include "lines.h"
#include "projection.h"

namespace mfa {

constexpr int64_t kFewestCandidates = 8, kMostCandidates = 32;  // of a token (bound_lines); K / 128 in between

// The largest bound of each token and its component, found in ranges of the components.
template <class T>
struct LargestBounds {
  int64_t count;
  std::vector<T> values;
  std::vector<int32_t> owners;

  // `owner` stays where no bound of a token is finite.
  LargestBounds(int64_t ranges, int64_t count, int32_t owner)
      : count(count), values(ranges * count, -std::numeric_limits<T>::infinity()), owners(ranges * count, owner) {}

  // Returns the owners [count] over all ranges, the first of those whose bounds are equal.
  std::vector<int32_t> merged() {
    for (int64_t i = count; i < static_cast<int64_t>(values.size()); ++i)
      if (values[i] > values[i % count]) values[i % count] = values[i], owners[i % count] = owners[i];
    owners.resize(count);
    return std::move(owners);
  }
};

// Returns how many ranges of K components feed the threads, each at least as many as the lines that stay in L1.
inline int64_t ranges_of(int64_t components, int64_t threads) {
  return std::clamp<int64_t>(threads, 1, ceil_div(components, kLineComponents));
}

// Calls body(range, first component, end) for each range.
template <class ParallelFor, class Body>
void for_ranges(int64_t components, int64_t ranges, ParallelFor&& parallel_for, Body&& body) {
  parallel_for(ranges, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, components * i / ranges, components * (i + 1) / ranges);
  });
}

// Bounds every pair by the marginal of its component.
template <class T, class ParallelFor>
void bound_marginals(Stretch<T>& s, ParallelFor&& parallel_for) {
  const Screen<T>& screen = s.screen;
  const int64_t K = screen.marginal.components;
  s.bounds.resize(s.panels * K * s.lanes);
  if (s.few) {
    const int64_t ranges = ranges_of(K, parallel_for.threads());
    LargestBounds<T> largest(ranges, s.lanes, 0);
    for_ranges(K, ranges, parallel_for, [&](int64_t range, int64_t k0, int64_t k1) {
      with_lanes_of<T>(s.lanes, [&]<int L>(std::integral_constant<int, L>) {
        bounds_of_few<T, L>(screen, k0, k1, s.y.data(), s.norms.data(), s.bounds.data(),
                            largest.values.data() + range * L, largest.owners.data() + range * L);
      });
    });
    s.guesses = largest.merged();
    return;
  }
  // By panels, however few tokens are left: where a stretch ends depends on the threads, and no bit may.
  const std::vector<T> ones(screen.coordinates(), T(1));
  const ScanInput<T> in{screen.marginal, s.y.data(), s.tokens, screen.rows, ones.data(), nullptr};
  const Schedule plan = Schedule::of<T>(in.shape, s.tokens, parallel_for.threads());
  LargestBounds<T> largest(plan.splits, s.tokens, 0);
  auto visit = [&](int64_t range, int64_t n0, int64_t here, int64_t k, const T* distances) {
    const int64_t at = range * s.tokens + n0;
    screen.bound(k, distances, s.norms.data() + n0, here, s.bounds.data() + n0 * K + k * kPanel<T>,
                 largest.values.data() + at, largest.owners.data() + at);
  };
  scan_panels(in, plan, visit, parallel_for);
  s.guesses = largest.merged();
}

// Makes the guess of each token the best, by its marginal bound, of its candidates [count, panels lanes].
template <class T, class ParallelFor>
void guess_among(Stretch<T>& s, const std::vector<int32_t>& candidates, ParallelFor&& parallel_for) {
  const int64_t padded = s.panels * s.lanes;
  s.guesses.assign(s.tokens, 0);
  parallel_for(s.tokens, [&](int64_t begin, int64_t end) {
    FewDistances<T, 1> distance_of(s.screen.marginal);
    for (int64_t n = begin; n < end; ++n) {
      const T* const y[] = {s.y_of(n)};
      T best = -std::numeric_limits<T>::infinity(), distance, value;
      for (size_t i = n; i < candidates.size(); i += padded) {
        const int32_t k = candidates[i];
        if (k < 0) continue;
        distance_of(s.screen.rows_of(k), y, &distance);
        s.screen.bound(k, &distance, &s.norms[n], 1, &value, &best, &s.guesses[n]);
      }
    }
  });
}

// Bounds every pair by the line of its component. The candidates of a token, from which its guess is made, are the
// components with the largest bound among all whose number leaves the same remainder.
template <class T, class ParallelFor>
void bound_lines(Stretch<T>& s, ParallelFor&& parallel_for) {
  const Screen<T>& screen = s.screen;
  const int64_t K = screen.marginal.components, p = screen.coordinates(), lanes = s.lanes, padded = s.panels * lanes;
  const bool whole = lanes == kPanel<T>;  // in vectors of 16 bytes, four tokens that are few fill a panel of doubles
  std::vector<T> columns(whole ? padded * p : 0);  // y [panels, p, lanes]
  if (whole)
    parallel_for(s.panels, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * lanes; n < end * lanes; ++n)
        for (int64_t j = 0; j < p; ++j) columns[n / lanes * lanes * p + j * lanes + n % lanes] = s.y[n * p + j];
    });
  s.bounds.resize(padded * K);
  const int64_t ranges = ranges_of(K, parallel_for.threads());
  const int64_t classes = std::clamp(K / 128, kFewestCandidates, kMostCandidates);
  LargestBounds<T> largest(ranges, classes * padded, -1);
  for_ranges(K, ranges, parallel_for, [&](int64_t range, int64_t k0, int64_t k1) {
    with_lanes_of<T>(lanes, [&]<int L>(std::integral_constant<int, L>) {
      auto keep = [&](int64_t panel, int64_t k, const T* distances) {
        const int64_t n0 = panel * L, at = (range * classes + k % classes) * padded + n0;
        screen.bound(k, distances, s.norms.data() + n0, L, s.bounds.data() + n0 * K + k * L, largest.values.data() + at,
                     largest.owners.data() + at);
      };
      if constexpr (L < kPanel<T>)
        scan_lines_of_few<T, L>(screen, k0, k1, s.y.data(), [&](int64_t k, const T* d) { keep(0, k, d); });
      else
        for (int64_t k = k0; k < k1; k += kLineComponents)
          for (int64_t panel = 0; panel < s.panels; ++panel)
            scan_lines(screen, k, std::min(k1, k + kLineComponents), columns.data() + panel * L * p,
                       [&](int64_t of, const T* d) { keep(panel, of, d); });
    });
  });
  guess_among(s, largest.merged(), parallel_for);
}

}  // namespace mfa
