// Stage 1, scan: tokens x components -> log p(x) and, per token, the active pairs.
//
// Symbols   x token, k component, v = (x - mu_k) lam, t = A_k v, logit = constant_k - (|v|^2 - |t|^2) / 2.
// Never materialised: anything of size N x K or larger. A micro-tile of one component by two SIMD vectors of tokens
//           holds |v|^2 and the R values of t in registers; its logits go straight into the per-token candidates.
// Exact because x - mu is formed before anything is scaled or squared: the rounding error is that of the true distance,
//           never that of |x|^2 - 2 x.mu + |mu|^2, wherever the origin lies. Sums over features are flushed every kFlush
//           of them.
// Active    logit >= best - threshold, with threshold = log(K / eps): all components left out weigh, together, less
//           than eps of the responsibility. A token with more than S active components overflows its slots: it keeps
//           the S largest, and log p(x) comes from a running sum of all the active ones.
// Floor     N K (R + 3) D vector operations, R + 1 of them multiply-adds. Measured by bench/bench_step.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "residual.h"

namespace mfa {

constexpr int kTokenVectors = 2;                      // SIMD vectors of tokens per micro-tile
constexpr int kMaxGroup = kRegisters >= 32 ? 12 : 5;  // rows of A per pass over the features
constexpr int64_t kFlush = 64;                        // features between flushes of the sums
template <class T>
constexpr int kPanel = kTokenVectors * kWidth<T>;     // tokens per panel

// |v|^2 - |t|^2 over `G` rows of A for C neighbouring components and one panel of tokens, features blocked by V.
//   rows   component c starts at rows + c * component_stride
//   x      [D padded, kPanel]
//   lam    [D padded], zeros past the last feature; not read when the noise is per component
//   first  index of the first row of A in this pass; |v|^2 itself is added when it is 0
//   out    [C, kPanel], accumulated into
template <class T, int C, int G, bool PerComponent>
void micro_tile(const Shape& shape, const T* rows, const T* x, const T* lam, int64_t first, T* out) {
  constexpr int V = kWidth<T>, NV = kTokenVectors;
  const int64_t stride = shape.block_stride<T>(), component_stride = shape.component_stride<T>();
  const int64_t blocks = shape.blocks<T>();
  Vec<T> square[C][NV] = {}, lost[C][NV] = {}, total[C][G > 0 ? G : 1][NV] = {};
  for (int64_t start = 0; start < blocks; start += kFlush / V) {
    const int64_t stop = std::min<int64_t>(blocks, start + kFlush / V);
    Vec<T> s[C][NV] = {}, t[C][G > 0 ? G : 1][NV] = {};
    for (int64_t b = start; b < stop; ++b) {
      const T* block = rows + b * stride;
      const T* panel = x + b * V * kPanel<T>;
      for (int j = 0; j < V; ++j, panel += kPanel<T>) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const T* row = block + c * component_stride + j;
          const T scale = PerComponent ? row[(1 + shape.rank) * V] : lam[b * V + j];
          Vec<T> v[NV];
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) {
            v[n] = (load(panel + n * V) - row[0]) * scale;
            s[c][n] += v[n] * v[n];
          }
#pragma GCC unroll 16
          for (int g = 0; g < G; ++g) {
            const Vec<T> a = Vec<T>{} + row[(1 + g) * V + first * V];
#pragma GCC unroll 2
            for (int n = 0; n < NV; ++n) t[c][g][n] += a * v[n];
          }
        }
      }
    }
    for (int c = 0; c < C; ++c)
      for (int n = 0; n < NV; ++n) {
        // Compensated (Kahan): |v|^2 is the largest sum, and with it the error no longer grows with D.
        const Vec<T> term = s[c][n] - lost[c][n], sum = square[c][n] + term;
        lost[c][n] = (sum - square[c][n]) - term;
        square[c][n] = sum;
        for (int g = 0; g < G; ++g) total[c][g][n] += t[c][g][n];
      }
  }
  for (int c = 0; c < C; ++c)
    for (int n = 0; n < NV; ++n) {
      Vec<T> distance = load(out + c * kPanel<T> + n * V);
      if (first == 0) distance += square[c][n];
      for (int g = 0; g < G; ++g) distance -= total[c][g][n] * once_if_infinite<T>(distance, total[c][g][n]);
      store<T>(out + c * kPanel<T> + n * V, distance);
    }
}

template <class T>
using MicroTile = void (*)(const Shape&, const T*, const T*, const T*, int64_t, T*);

// Components per micro-tile: with few rows, several components share the loads of x and keep the FMA units busy.
constexpr int components_per_tile(int group) {
  return std::max(1, std::min(kRegisters >= 32 ? 4 : 2, (kMaxGroup + 1) / (group + 1)));
}

template <class T, bool Wide, bool PerComponent, int... G>
MicroTile<T> pick_micro_tile(int64_t group, std::integer_sequence<int, G...>) {
  static constexpr MicroTile<T> table[] = {&micro_tile<T, Wide ? components_per_tile(G) : 1, G, PerComponent>...};
  return table[group];
}

// Mahalanobis distances of a few neighbouring components to a panel, the rank split into passes that fit registers.
template <class T>
class PanelDistance {
 public:
  explicit PanelDistance(const Shape& shape) : shape_(shape) {
    passes_ = std::max<int64_t>(1, ceil_div(shape.rank, kMaxGroup));
    group_ = ceil_div(shape.rank, passes_);
    tile_ = passes_ == 1 ? components_per_tile(static_cast<int>(group_)) : 1;
    wide_ = pick(group_, true);
    single_ = pick(group_, false);
  }
  int64_t tile() const { return tile_; }

  // out [count, kPanel] for components k, ..., k + count - 1; count is tile() or 1
  void operator()(const T* rows, const T* x, const T* lam, int64_t count, T* out) const {
    std::fill(out, out + count * kPanel<T>, T(0));
    for (int64_t first = 0, pass = 0; pass < passes_; ++pass) {
      const int64_t group = std::min(group_, shape_.rank - first);
      const MicroTile<T> kernel = group < group_ ? pick(group, false) : count == 1 ? single_ : wide_;
      kernel(shape_, rows, x, lam, first, out);
      first += group;
    }
  }

 private:
  MicroTile<T> pick(int64_t group, bool wide) const {
    using Groups = std::make_integer_sequence<int, kMaxGroup + 1>;
    if (shape_.per_component)
      return wide ? pick_micro_tile<T, true, true>(group, Groups{}) : pick_micro_tile<T, false, true>(group, Groups{});
    return wide ? pick_micro_tile<T, true, false>(group, Groups{}) : pick_micro_tile<T, false, false>(group, Groups{});
  }

  Shape shape_;
  int64_t passes_, group_, tile_;
  MicroTile<T> wide_, single_;
};

// What stage 1 knows of one token while components stream by; the slots are the caller's output rows.
template <class T>
struct TokenState {
  static constexpr T kNone = -std::numeric_limits<T>::infinity();
  T best = kNone;
  T evicted = kNone;  // the largest logit that found no slot
  T base = 0;         // once a logit was evicted, all active ones so far sum to exp(base) * sum
  double sum = 0;
  int32_t count = 0;     // slots in use
  bool invalid = false;  // a logit was NaN

  bool summing() const { return evicted > kNone; }

  // Takes a logit of at least best - threshold (which may round to best), or NaN; `summed` if it is in the sum already.
  void offer(T logit, int32_t component, T threshold, int64_t slots, int32_t* components, T* logits,
             bool summed = false) {
    if (logit != logit) {
      invalid = true;
      return;
    }
    if (logit == kNone) return;
    best = std::max(best, logit);
    if (summing() && !summed) add(logit, 1);
    int64_t smallest = 0;
    if (count == slots) {
      smallest = std::min_element(logits, logits + count) - logits;
      if (logits[smallest] < best - threshold) drop_inactive(threshold, components, logits);
    }
    if (count < slots) {
      components[count] = component;
      logits[count++] = logit;
      return;
    }
    if (!summing()) {
      sum_slots(logits);
      add(logit, 1);
    }
    if (logits[smallest] < logit) {
      std::swap(logits[smallest], logit);
      components[smallest] = component;
    }
    evicted = std::max(evicted, logit);
  }

  // Takes over what another range of components found for the same token.
  void merge(const TokenState& other, T threshold, int64_t slots, int32_t* components, T* logits,
             const int32_t* other_components, const T* other_logits) {
    invalid |= other.invalid;
    if (other.summing()) {  // its slots are in its sum, and are not added again below
      if (!summing()) sum_slots(logits);
      add(other.base, other.sum);
      evicted = std::max(evicted, other.evicted);
    }
    for (int32_t i = 0; i < other.count; ++i) {
      if (other_logits[i] < best - threshold) continue;
      offer(other_logits[i], other_components[i], threshold, slots, components, logits, other.summing());
    }
  }

  // Sorts the slots, largest first; empty ones become (-1, -inf). Returns log p(x).
  T finish(T threshold, int64_t slots, int32_t* components, T* logits) {
    drop_inactive(threshold, components, logits);
    if (count > 32) sort(components, logits);
    for (int32_t i = 1; i < count; ++i) {  // insertion sort: a handful of entries, or in order already
      const T logit = logits[i];
      const int32_t component = components[i];
      int32_t j = i;
      for (; j > 0 && (logits[j - 1] < logit || (logits[j - 1] == logit && components[j - 1] > component)); --j)
        logits[j] = logits[j - 1], components[j] = components[j - 1];
      logits[j] = logit;
      components[j] = component;
    }
    for (int64_t i = count; i < slots; ++i) components[i] = -1, logits[i] = kNone;
    if (invalid || count == 0) return std::numeric_limits<T>::quiet_NaN();
    if (!overflow(threshold)) sum_slots(logits);
    return base + static_cast<T>(std::log(sum));
  }

  // Whether an active component is missing from the slots.
  bool overflow(T threshold) const { return summing() && evicted >= best - threshold; }

 private:
  void add(T other_base, double other_sum) {
    const T top = std::max(base, other_base);
    sum = sum * std::exp(static_cast<double>(base - top)) + other_sum * std::exp(static_cast<double>(other_base - top));
    base = top;
  }

  void sum_slots(const T* logits) {
    base = best;
    sum = 0;
    for (int32_t i = count - 1; i >= 0; --i) sum += std::exp(static_cast<double>(logits[i] - base));
  }

  void sort(int32_t* components, T* logits) const {
    std::vector<std::pair<T, int32_t>> pairs(count);
    for (int32_t i = 0; i < count; ++i) pairs[i] = {-logits[i], components[i]};
    std::sort(pairs.begin(), pairs.end());
    for (int32_t i = 0; i < count; ++i) logits[i] = -pairs[i].first, components[i] = pairs[i].second;
  }

  void drop_inactive(T threshold, int32_t* components, T* logits) {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i)
      if (logits[i] >= best - threshold) {
        components[kept] = components[i];
        logits[kept++] = logits[i];
      }
    count = kept;
  }
};

// Transposes one panel of tokens: x [N, D] -> out [D padded, kPanel], zeros where there is no token.
template <class T>
void pack_panel(const Shape& shape, const T* x, int64_t tokens, T* out) {
  const int64_t D = shape.features;
  std::fill(out + D * kPanel<T>, out + shape.padded<T>() * kPanel<T>, T(0));
  for (int64_t d = 0; d < D; ++d) {
    T* row = out + d * kPanel<T>;
    for (int64_t n = 0; n < tokens; ++n) row[n] = x[n * D + d];
    std::fill(row + tokens, row + kPanel<T>, T(0));
  }
}

constexpr int64_t kTasks = 64;             // panels times ranges of components, at least: threads that few tokens feed
constexpr int64_t kRangeComponents = 32;   // to a range, at least
constexpr int64_t kRangeValues = 1 << 18;  // of their rows, at least: less is not worth a thread
constexpr int64_t kRangeStep = 12;         // ranges begin at its multiples: micro-tiles of 1 to 4 are cut nowhere

// How a scan is cut: blocks of panels that share a cache, and ranges of components when tokens alone cannot feed the
// threads. A token that overflows sums its active components range by range, so ranges are a function of sizes only:
// whatever the number of threads, the same numbers are added in the same order. Blocks may depend on it, since a token
// does not know its block.
struct Schedule {
  int64_t panels, panels_per_block, blocks, splits, components;
  template <class T>
  static Schedule of(const Shape& shape, int64_t tokens, int64_t threads) {
    Schedule s;
    s.panels = ceil_div(tokens, kPanel<T>);
    const int64_t bytes = shape.padded<T>() * kPanel<T> * sizeof(T);
    const int64_t cached = std::clamp<int64_t>((int64_t(3) << 19) / bytes, 2, 32);  // 1.5 MB of tokens
    s.panels_per_block = std::max<int64_t>(1, std::min(cached, ceil_div(s.panels, threads)));
    s.blocks = ceil_div(s.panels, s.panels_per_block);
    s.components = shape.components;
    const int64_t size = shape.features * (shape.rank + 1);
    const int64_t least = std::max(kRangeComponents, ceil_div(kRangeValues, std::max<int64_t>(1, size)));
    const int64_t most = std::max<int64_t>(1, ceil_div(s.components, least));
    s.splits = std::min(most, ceil_div(kTasks, std::max<int64_t>(1, s.panels)));
    return s;
  }

  // The first component of a range; that of the range past the last is K.
  int64_t first(int64_t split) const {
    return std::min(components, ceil_div(components, kRangeStep) * split / splits * kRangeStep);
  }
};

// A generated token and its neighbours: rows stream past once, at the speed of memory, vectorised along the features.
constexpr int64_t kFewTokens = 4;

template <class T, class Visit, class ParallelFor>
void scan_few(const Shape& shape, const Schedule& plan, const T* x, int64_t tokens, const T* rows, const T* lam,
              Visit&& visit, ParallelFor&& parallel_for) {
  parallel_for(plan.splits, [&](int64_t begin, int64_t end) {
    std::vector<T> v(shape.padded<T>() * kFewTokens), t(shape.rank * kFewTokens);
    T out[kFewTokens];
    for (int64_t split = begin; split < end; ++split)
      for (int64_t k = plan.first(split); k < plan.first(split + 1); ++k) {
        const T* own = rows + k * shape.component_stride<T>();
        if (tokens == kFewTokens)
          distances<T, kFewTokens>(shape, x, own, lam, v.data(), t.data(), out);
        else
          for (int64_t n = 0; n < tokens; ++n)
            distances<T, 1>(shape, x + n * shape.features, own, lam, v.data(), t.data(), out + n);
        visit(split, 0, tokens, k, out);
      }
  });
}

// The scan itself: visit(split, first token, tokens here, component, distances [kPanel]) for every component and panel.
// A component's rows stay in cache while the panels of a block pass by.
template <class T, class Visit, class ParallelFor>
void scan_panels(const Shape& shape, const Schedule& plan, const T* x, int64_t tokens, const T* rows, const T* lam,
                 Visit&& visit, ParallelFor&& parallel_for) {
  std::vector<T> scale(shape.padded<T>());
  std::copy(lam, lam + shape.features, scale.begin());
  const PanelDistance<T> distance(shape);
  const int64_t panel_size = shape.padded<T>() * kPanel<T>;
  parallel_for(plan.blocks * plan.splits, [&](int64_t begin, int64_t end) {
    std::vector<T> panels(plan.panels_per_block * panel_size);
    T distances[4 * kPanel<T>];
    int64_t packed = -1;  // the block that is in `panels`
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / plan.splits, split = task % plan.splits;
      const int64_t p0 = block * plan.panels_per_block, p1 = std::min(plan.panels, p0 + plan.panels_per_block);
      auto tokens_of = [&](int64_t p) { return std::min<int64_t>(kPanel<T>, tokens - p * kPanel<T>); };
      for (int64_t p = p0; p < p1 && block != packed; ++p)
        pack_panel(shape, x + p * kPanel<T> * shape.features, tokens_of(p), panels.data() + (p - p0) * panel_size);
      packed = block;
      const int64_t k1 = plan.first(split + 1);
      for (int64_t k = plan.first(split), count; k < k1; k += count) {
        count = k + distance.tile() <= k1 ? distance.tile() : 1;
        for (int64_t p = p0; p < p1; ++p) {
          distance(rows + k * shape.component_stride<T>(), panels.data() + (p - p0) * panel_size, scale.data(), count,
                   distances);
          for (int64_t c = 0; c < count; ++c)
            visit(split, p * kPanel<T>, tokens_of(p), k + c, distances + c * kPanel<T>);
        }
      }
    }
  });
}

template <class T, class Visit, class ParallelFor>
void for_distances(const Shape& shape, const Schedule& plan, const T* x, int64_t tokens, const T* rows, const T* lam,
                   Visit&& visit, ParallelFor&& parallel_for) {
  if (tokens <= kFewTokens) return scan_few(shape, plan, x, tokens, rows, lam, visit, parallel_for);
  scan_panels(shape, plan, x, tokens, rows, lam, visit, parallel_for);
}

// x [N, D], lam [D] (ones when the noise is per component), constants [K]
//   -> log_prob [N], components [N, S], logits [N, S], counts [N] (S + 1 marks an overflow)
template <class T, class ParallelFor>
void scan(const Shape& shape, const T* x, int64_t tokens, const T* rows, const T* constants, const T* lam,
            T threshold, int64_t slots, T* log_prob, int32_t* components, T* logits, int32_t* counts,
            int64_t threads, ParallelFor&& parallel_for) {
  const Schedule plan = Schedule::of<T>(shape, tokens, threads);
  // Ranges of components after the first keep their findings apart until all are done.
  const int64_t spare = plan.splits - 1;
  std::vector<TokenState<T>> states(tokens * plan.splits);
  std::vector<T> bars(tokens * plan.splits, -std::numeric_limits<T>::infinity());  // logits below matter no more
  std::vector<int32_t> spare_components(tokens * slots * spare);
  std::vector<T> spare_logits(tokens * slots * spare);
  auto components_of = [&](int64_t split, int64_t n) {
    return split == 0 ? components + n * slots : spare_components.data() + ((split - 1) * tokens + n) * slots;
  };
  auto logits_of = [&](int64_t split, int64_t n) {
    return split == 0 ? logits + n * slots : spare_logits.data() + ((split - 1) * tokens + n) * slots;
  };

  for_distances(shape, plan, x, tokens, rows, lam,
       [&](int64_t split, int64_t n0, int64_t here, int64_t k, const T* distances) {
         const T constant = constants[k];
         T* bar = bars.data() + split * tokens + n0;
         int any = 0;
         for (int64_t i = 0; i < here; ++i) any |= !(constant - distances[i] / 2 < bar[i]);  // NaN counts too
         if (!any) return;
         for (int64_t i = 0; i < here; ++i) {
           const T logit = constant - distances[i] / 2;
           if (logit < bar[i]) continue;
           TokenState<T>& state = states[split * tokens + n0 + i];
           state.offer(logit, static_cast<int32_t>(k), threshold, slots, components_of(split, n0 + i),
                       logits_of(split, n0 + i));
           bar[i] = state.best - threshold;
         }
       },
       parallel_for);
  parallel_for(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      TokenState<T>& state = states[n];
      for (int64_t split = 1; split < plan.splits; ++split)
        state.merge(states[split * tokens + n], threshold, slots, components_of(0, n), logits_of(0, n),
                    components_of(split, n), logits_of(split, n));
      log_prob[n] = state.finish(threshold, slots, components_of(0, n), logits_of(0, n));
      counts[n] = state.overflow(threshold) ? static_cast<int32_t>(slots + 1) : state.count;
    }
  });
}

// Every logit, on request: x [N, D] -> out [K, N]
template <class T, class ParallelFor>
void dense(const Shape& shape, const T* x, int64_t tokens, const T* rows, const T* constants, const T* lam,
           T* out, int64_t threads, ParallelFor&& parallel_for) {
  for_distances(shape, Schedule::of<T>(shape, tokens, threads), x, tokens, rows, lam,
       [&](int64_t, int64_t n0, int64_t here, int64_t k, const T* distances) {
         for (int64_t i = 0; i < here; ++i) out[k * tokens + n0 + i] = constants[k] - distances[i] / 2;
       },
       parallel_for);
}

}  // namespace mfa
