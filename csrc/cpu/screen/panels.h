// Stage 1 below the flops of the dense scan: bounds first, logits of the pairs that they leave.
//
// Bounds come from one direction a component (lines.h), then from p << D coordinates (refine.h); candidates.h computes
// the logits.
// Never materialised: N x K. Bounds are kept for one stretch of tokens a thread, kBoundValues of them.
// Exact     because the logit of a token's best candidate is computed in full, and so is that of every component that
//           could come within the threshold of it. A token for which that is too much work takes the dense scan.
// Floor     N K p vector operations, and (R + 3) p for every pair that its line leaves (for all of them where lines do
//           not pay); for a few tokens (few_tokens.h) one read of Q, of the lines, and of the rows of what is left.
//           Measured by bench/bench_screen.py.
#pragma once
#include "leaders.h"
#include "refine.h"

namespace mfa {

constexpr int64_t kBoundValues = int64_t(1) << 21;  // bounds held at a time, 8 MB in float: within reach of a cache
constexpr int64_t kStretch = 256;                   // least tokens at a time, so that rows are seldom read
constexpr int64_t kPilot = 128;                     // tokens that decide whether screening pays
constexpr int64_t kDenseShare = 16;                 // a token that keeps more than K over this takes the dense scan
constexpr int64_t kLineShare = 12;                  // lines pay while they leave less than 1 of so many pairs

// Adds the pairs of one panel whose bounds come within the threshold of their leader, and writes `dropped` and
// `evaluated`.
template <class T, int L>
void sweep_panel(const Stretch<T>& s, int64_t panel, const Leaders<T>& leaders, const ScreenedPairs<T>& out,
                 Pairs<T>& pairs) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  const int64_t K = s.screen.marginal.components, n0 = panel * L, tokens = std::min<int64_t>(L, s.tokens - n0);
  const int64_t limit = std::max<int64_t>(out.slots, K / kDenseShare);
  const T *const bounds = s.bounds.data() + n0 * K, *const best = leaders.reached.data() + n0;
  const int32_t* const own = leaders.pairs.components.data() + n0;
  int32_t* const evaluated = out.evaluated + s.begin + n0;
  T bar[L], top[L];
  int32_t kept[L] = {};
  for (int64_t i = 0; i < L; ++i) bar[i] = i < tokens ? best[i] - out.threshold : kInf, top[i] = -kInf;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < L; ++i) {
      const T bound = bounds[k * L + i];
      const bool below = bound < bar[i];  // NaN is not
      kept[i] += below ? 0 : 1;
      top[i] = below && bound > top[i] ? bound : top[i];
    }
  for (int64_t i = 0; i < tokens; ++i) {
    const bool overflows = kept[i] > limit;
    evaluated[i] = overflows ? -1 : kept[i];
    const double largest = std::exp(static_cast<double>(top[i]) - static_cast<double>(best[i]));
    out.dropped[s.begin + n0 + i] =
        overflows || kept[i] == K ? T(0) : static_cast<T>((K - kept[i]) * largest * (1 + 1e-6));
    if (overflows) bar[i] = kInf;
  }
  for (int64_t k = 0; k < K; ++k) {
    int any = 0;
    for (int64_t i = 0; i < L; ++i) any |= !(bounds[k * L + i] < bar[i]);
    if (!any) continue;
    for (int64_t i = 0; i < tokens; ++i)
      if (evaluated[i] >= 0 && k != own[i] && !(bounds[k * L + i] < bar[i]))
        pairs.add(s.begin + n0 + i, static_cast<int32_t>(k));
  }
}

// Screens tokens [begin, end) and appends what is left of them. Returns how many marginal bounds the lines left, all
// where there are no lines.
template <class T, class ParallelFor>
int64_t screen_tokens(const ScanInput<T>& in, const Screen<T>& screen, int64_t begin, int64_t end,
                      const ScreenedPairs<T>& out, Candidates<T>& found, ParallelFor&& parallel_for) {
  Stretch<T> stretch(in, screen, begin, end, parallel_for);
  Leaders<T> leaders{in, stretch, {}, {}};
  auto guesses = [&] {  // those that are not leaders yet
    Pairs<T> pairs;
    for (int64_t n = 0; n < stretch.tokens; ++n)
      if (!leaders.pairs.size() || leaders.pairs.components[n] != stretch.guesses[n])
        pairs.add(begin + n, stretch.guesses[n]);
    return pairs;
  };
  int64_t refined = stretch.tokens * in.shape.components;
  if (screen.lines) {
    bound_lines(stretch, parallel_for);
    leaders.start(guesses(), parallel_for);
    std::vector<T> bars(leaders.reached);
    for (T& bar : bars) bar -= out.threshold;
    refined = refine(stretch, std::move(bars), parallel_for);
    Pairs<T> others = guesses();
    leaders.challenge(others, parallel_for);
  } else {
    bound_marginals(stretch, parallel_for);
    leaders.start(guesses(), parallel_for);
  }
  found.leaders.append(leaders.pairs);

  std::vector<Pairs<T>> left(stretch.panels);
  parallel_for(stretch.panels, [&](int64_t first, int64_t last) {
    with_lanes_of<T>(stretch.lanes, [&]<int L>(std::integral_constant<int, L>) {
      for (int64_t i = first; i < last; ++i) sweep_panel<T, L>(stretch, i, leaders, out, left[i]);
    });
  });
  for (const Pairs<T>& some : left) found.others.append(some);
  return refined;
}

// Cuts tokens [begin, end) into stretches of about `step`, a thread each, so that threads meet only at the end, and
// appends what body(first token, end, candidates) finds in each.
template <class T, class Body, class ParallelFor>
void by_stretches(int64_t begin, int64_t end, int64_t step, Candidates<T>& found, Body&& body,
                  ParallelFor&& parallel_for) {
  const int64_t size = std::max<int64_t>(1, ceil_div(step, kPanel<T>)) * kPanel<T>;
  std::vector<Candidates<T>> parts(ceil_div(end - begin, size));
  parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(begin + i * size, std::min(end, begin + (i + 1) * size), parts[i]);
  });
  for (const Candidates<T>& part : parts) {
    found.leaders.append(part.leaders);
    found.others.append(part.others);
  }
}

// Does what `scan` does, for shared noise.
template <class T, class ParallelFor>
void scan_screened(const ScanInput<T>& in, Screen<T> screen, const ScreenedPairs<T>& out, ParallelFor&& parallel_for) {
  const int64_t K = in.shape.components, pilot = std::min(in.tokens, kPilot), rest = in.tokens - pilot;
  Candidates<T> found;
  const int64_t refined = pilot > 0 ? screen_tokens(in, screen, 0, pilot, out, found, parallel_for) : 0;
  if (kLineShare * refined > pilot * K) screen.lines = nullptr;  // the rest does better without

  if (2 * std::count(out.evaluated, out.evaluated + pilot, -1) > pilot) {  // the rest would take the dense scan too
    std::fill(out.evaluated + pilot, out.evaluated + in.tokens, -1);
    std::fill(out.dropped + pilot, out.dropped + in.tokens, T(0));
  } else {
    const int64_t step = std::min(std::max(kStretch, kBoundValues / K), ceil_div(rest, parallel_for.threads()));
    auto body = [&](int64_t begin, int64_t end, Candidates<T>& own) {
      screen_tokens(in, screen, begin, end, out, own, Serially{});
    };
    by_stretches(pilot, in.tokens, step, found, body, parallel_for);
  }
  if (std::count(out.evaluated, out.evaluated + in.tokens, -1) == in.tokens) return scan(in, out, parallel_for);
  collect(in, found, out, parallel_for);
  scan_rest(in, out, [&](const ScanInput<T>& own, const ScreenedPairs<T>& own_out) {
    scan<T>(own, own_out, parallel_for);
  });
}

// Writes every bound, on request, that of lines or that of marginals: out [N, K].
template <class T, class ParallelFor>
void bounds(const ScanInput<T>& in, const Screen<T>& screen, bool lines, T* out, ParallelFor&& parallel_for) {
  const int64_t K = in.shape.components;
  for (int64_t begin = 0; begin < in.tokens; begin += kStretch) {
    Stretch<T> stretch(in, screen, begin, std::min(in.tokens, begin + kStretch), parallel_for);
    if (lines)
      bound_lines(stretch, parallel_for);
    else
      bound_marginals(stretch, parallel_for);
    for (int64_t n = 0; n < stretch.tokens; ++n)
      for (int64_t k = 0; k < K; ++k) out[(begin + n) * K + k] = stretch.bound_of(n, k);
  }
}

}  // namespace mfa
