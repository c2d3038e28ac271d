// Stage 1, scan: tokens x components -> log p(x) and, per token, the active pairs.
//
// Symbols   x token, k component, v = (x - mu_k) lam, t = A_k v, logit = constant_k - (|v|^2 - |t|^2) / 2.
// Never materialised: anything of size N x K or larger. The logits of a micro-tile (panel_distances.h) go straight into
//           the slots of their tokens (token_state.h).
// Floor     N K (R + 3) D vector operations, R + 1 of them multiply-adds. Measured by bench/bench_step.py.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "panel_distances.h"
#include "token_state.h"

namespace mfa {

// Tokens, and the mixture that they are compared with.
template <class T>
struct ScanInput {
  Shape shape;
  const T* x;          // [N, D]
  int64_t tokens;      // N
  const T* rows;       // [K, D/V, row_count, V] (layout.h)
  const T* lam;        // [D]; ones where every component has its own noise
  const T* constants;  // [K]

  const T* rows_of(int64_t k) const { return rows + k * shape.component_stride<T>(); }
};

constexpr int64_t kTasks = 64;             // least panels times ranges of components, so that few tokens feed threads
constexpr int64_t kRangeComponents = 32;   // least components in a range
constexpr int64_t kRangeValues = 1 << 18;  // least values in the rows of a range: fewer are not worth a thread
constexpr int64_t kRangeStep = 12;         // ranges begin at its multiples, so that no micro-tile of 1 to 4 is cut

// How a scan is cut: blocks of panels that share a cache, and ranges of components when tokens alone cannot feed the
// threads. A token that overflows sums its active components range by range, so ranges depend on sizes only: whatever
// the number of threads, the same numbers are added in the same order. Blocks may depend on it, since no result does.
struct Schedule {
  int64_t panels, panels_per_block, blocks, splits, components;
  template <class T>
  static Schedule of(const Shape& shape, int64_t tokens, int64_t threads) {
    Schedule s;
    s.panels = ceil_div(tokens, kPanel<T>);
    const int64_t bytes = shape.padded<T>() * kPanel<T> * sizeof(T);
    const int64_t cached = std::clamp<int64_t>((int64_t(1) << 21) / bytes, 2, 32);  // 2 MB of tokens
    s.cut(cached, threads);
    s.components = shape.components;
    const int64_t size = shape.features * (shape.rank + 1);
    const int64_t least = std::max(kRangeComponents, ceil_div(kRangeValues, std::max<int64_t>(1, size)));
    const int64_t most = std::max<int64_t>(1, ceil_div(s.components, least));
    s.splits = std::min(most, ceil_div(kTasks, std::max<int64_t>(1, s.panels)));
    return s;
  }

  // Cuts the panels into blocks of about equal size, at most `most` panels each, as many for every thread.
  void cut(int64_t most, int64_t threads) {
    const int64_t rounds = ceil_div(panels, most * threads);
    panels_per_block = std::max<int64_t>(1, ceil_div(panels, std::max<int64_t>(1, rounds * threads)));
    blocks = ceil_div(panels, panels_per_block);
  }

  // The first component of a range; that of the range past the last is K.
  int64_t first(int64_t split) const {
    return std::min(components, ceil_div(components, kRangeStep) * split / splits * kRangeStep);
  }
};

constexpr int64_t kFewTokens = 4;

// Visits every component with at most kFewTokens tokens, vectorised along the features, so that rows stream past once,
// at the speed of memory: visit(split, first token, tokens here, component, distances).
template <class T, class Visit, class ParallelFor>
void scan_few(const ScanInput<T>& in, const Schedule& plan, Visit&& visit, ParallelFor&& parallel_for) {
  const T* tokens[kFewTokens];
  for (int64_t n = 0; n < in.tokens; ++n) tokens[n] = in.x + n * in.shape.features;
  parallel_for(plan.splits, [&](int64_t begin, int64_t end) {
    std::vector<T> v(in.shape.template padded<T>() * kFewTokens), t(in.shape.rank * kFewTokens);
    T out[kFewTokens];
    for (int64_t split = begin; split < end; ++split)
      for (int64_t k = plan.first(split); k < plan.first(split + 1); ++k) {
        if (in.tokens == kFewTokens)
          distances<T, kFewTokens>(in.shape, tokens, in.rows_of(k), in.lam, v.data(), t.data(), out);
        else
          for (int64_t n = 0; n < in.tokens; ++n)
            distances<T, 1>(in.shape, tokens + n, in.rows_of(k), in.lam, v.data(), t.data(), out + n);
        visit(split, 0, in.tokens, k, out);
      }
  });
}

// Visits every component with every panel: visit(split, first token, tokens here, component, distances [kPanel]).
// A component's rows stay in cache while the panels of a block pass by.
template <class T, class Visit, class ParallelFor>
void scan_panels(const ScanInput<T>& in, const Schedule& plan, Visit&& visit, ParallelFor&& parallel_for) {
  const Shape& shape = in.shape;
  std::vector<T> scale(shape.padded<T>());
  std::copy(in.lam, in.lam + shape.features, scale.begin());
  const PanelDistance<T> distance(shape);
  const int64_t panel_size = shape.padded<T>() * kPanel<T>;
  parallel_for(plan.blocks * plan.splits, [&](int64_t begin, int64_t end) {
    std::vector<T> panels(plan.panels_per_block * panel_size);
    T distances[4 * kPanel<T>];
    int64_t packed = -1;  // the block that is in `panels`
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / plan.splits, split = task % plan.splits;
      const int64_t p0 = block * plan.panels_per_block, p1 = std::min(plan.panels, p0 + plan.panels_per_block);
      auto tokens_of = [&](int64_t p) { return std::min<int64_t>(kPanel<T>, in.tokens - p * kPanel<T>); };
      for (int64_t p = p0; p < p1 && block != packed; ++p)
        pack_panel(shape, in.x + p * kPanel<T> * shape.features, tokens_of(p), panels.data() + (p - p0) * panel_size);
      packed = block;
      const int64_t k1 = plan.first(split + 1);
      for (int64_t k = plan.first(split), count; k < k1; k += count) {
        count = k + distance.tile() <= k1 ? distance.tile() : 1;
        // What follows comes from memory: a processor does not see it coming, since the panels are read in between.
        const bool more = k + 2 * count <= k1;
        for (int64_t p = p0; p < p1; ++p) {
          const Ahead<T> ahead{more ? in.rows_of(k + count) : nullptr, p - p0, p1 - p0};
          distance(in.rows_of(k), panels.data() + (p - p0) * panel_size, scale.data(), count, distances, ahead);
          for (int64_t c = 0; c < count; ++c)
            visit(split, p * kPanel<T>, tokens_of(p), k + c, distances + c * kPanel<T>);
        }
      }
    }
  });
}

template <class T, class Visit, class ParallelFor>
void for_distances(const ScanInput<T>& in, const Schedule& plan, Visit&& visit, ParallelFor&& parallel_for) {
  if (in.tokens <= kFewTokens) return scan_few(in, plan, visit, parallel_for);
  scan_panels(in, plan, visit, parallel_for);
}

// Finds the active pairs; `all`, where it is not null, is every logit [K, N], which a backward pass over crowded tokens
// needs again.
template <class T, class ParallelFor>
void scan(const ScanInput<T>& in, const ActivePairs<T>& out, ParallelFor&& parallel_for, T* all = nullptr) {
  const int64_t tokens = in.tokens, size = tokens * out.slots;
  const Schedule plan = Schedule::of<T>(in.shape, tokens, parallel_for.threads());
  std::vector<TokenState<T>> states(tokens * plan.splits);
  std::vector<T> bars(tokens * plan.splits, TokenState<T>::kNone);  // lower logits are not active
  // Ranges of components after the first keep their findings apart until all are done.
  std::vector<int32_t> components(size * (plan.splits - 1));
  std::vector<T> logits(size * (plan.splits - 1));
  auto slots_of = [&](int64_t split, int64_t n) -> Slots<T> {
    if (split == 0) return out.of(n);
    const int64_t at = (split - 1) * size + n * out.slots;
    return {out.threshold, out.slots, components.data() + at, logits.data() + at};
  };
  auto visit = [&](int64_t split, int64_t n0, int64_t here, int64_t k, const T* distances) {
    const T constant = in.constants[k];
    T* bar = bars.data() + split * tokens + n0;
    if (all)
      for (int64_t i = 0; i < here; ++i) all[k * tokens + n0 + i] = constant - distances[i] / 2;
    int any = 0;
    for (int64_t i = 0; i < here; ++i) any |= !(constant - distances[i] / 2 < bar[i]);  // NaN counts too
    if (!any) return;
    for (int64_t i = 0; i < here; ++i) {
      const T logit = constant - distances[i] / 2;
      if (logit < bar[i]) continue;
      TokenState<T>& state = states[split * tokens + n0 + i];
      state.offer(logit, static_cast<int32_t>(k), slots_of(split, n0 + i));
      bar[i] = state.best - out.threshold;
    }
  };
  for_distances(in, plan, visit, parallel_for);
  parallel_for(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t split = 1; split < plan.splits; ++split)
        states[n].merge(states[split * tokens + n], out.of(n), slots_of(split, n));
      states[n].finish(out, n);
    }
  });
}

constexpr int64_t kCrowdTokens = 256;  // so many are looked at as they are; of more, a panel

// Returns whether most of a few tokens, evenly spread, have more active components than slots.
template <class T, class ParallelFor>
bool crowded(const ScanInput<T>& in, const ActivePairs<T>& out, ParallelFor&& parallel_for) {
  const int64_t D = in.shape.features, S = out.slots, count = std::min<int64_t>(in.tokens, kPanel<T>);
  std::vector<T> x(count * D), log_prob(count), logits(count * S);
  std::vector<int32_t> components(count * S), counts(count);
  for (int64_t i = 0; i < count; ++i) std::copy_n(in.x + in.tokens * i / count * D, D, x.data() + i * D);
  ScanInput<T> some = in;
  some.x = x.data(), some.tokens = count;
  scan<T>(some, {out.threshold, S, log_prob.data(), components.data(), logits.data(), counts.data()}, parallel_for);
  return 2 * std::count(counts.begin(), counts.end(), static_cast<int32_t>(S + 1)) > count;
}

// Writes every logit, on request: out [K, N].
template <class T, class ParallelFor>
void dense(const ScanInput<T>& in, T* out, ParallelFor&& parallel_for) {
  auto visit = [&](int64_t, int64_t n0, int64_t here, int64_t k, const T* distances) {
    for (int64_t i = 0; i < here; ++i) out[k * in.tokens + n0 + i] = in.constants[k] - distances[i] / 2;
  };
  for_distances(in, Schedule::of<T>(in.shape, in.tokens, parallel_for.threads()), visit, parallel_for);
}

}  // namespace mfa
