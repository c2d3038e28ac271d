// Stage 1 below the flops of the dense scan: bounds from one direction a component first (screen/lines.h), from p << D
// coordinates for what they leave, exact logits for what those leave.
//
// Symbols   y = Q^T lam (x - c), p coordinates of a whitened token; m_k the same of mu_k; B_k the rows of A of the
//           mixture that y follows, noise one. F = |y - m|^2 - |B (y - m)|^2 is the Mahalanobis distance of a marginal,
//           so it is at most that of the whole, and
//             bound_k = constant_k - F / 2 + slack_k (|x~| + |m~_k|)^2  >=  logit_k
//           with everything that rounding can do inside the slack (mfa_kernels/ops/screen/README.md).
// Never materialised: N x K. Bounds are kept for one stretch of tokens a thread, kBoundValues of them.
// Exact     because the logit of a token's best candidate is computed in full, and whatever could come within the
//           threshold of it too. A token for which that is too much work takes the dense scan.
// Floor     N K p vector operations, and (R + 3) p for every pair whose line leaves it (for all of them where lines do
//           not pay); for a few tokens (screen/few_tokens.h) one read of Q, of the lines, and of the rows of what is left.
//           Measured by bench/bench_screen.py.
#pragma once
#include <bit>
#include <numeric>

#include "lines.h"

namespace mfa {

constexpr int64_t kBoundValues = int64_t(1) << 21;  // bounds held at a time, 8 MB in float: within reach of a cache
constexpr int64_t kStretch = 256;                   // tokens at a time at least, so that rows are read seldom enough
constexpr int64_t kPilot = 128;                     // tokens that decide whether screening pays
constexpr int64_t kDenseShare = 16;                 // a token that keeps more than K over this takes the dense scan

// One panel of tokens: y [tokens, p] and norms |x~| [tokens], rounded up.
template <class T>
void project_panel(const Shape& shape, const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, T* panel,
                   T* y, T* norms) {
  constexpr int V = kWidth<T>, NV = kTokenVectors, J = kRegisters >= 32 ? 8 : 4;
  const int64_t D = shape.features, p = screen.features;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < kPanel<T>; ++n)
      panel[d * kPanel<T> + n] = n < tokens ? (x[n * D + d] - screen.center[d]) * lam[d] : T(0);
  for (int64_t j = 0; j < p; j += J) {
    Vec<T> total[J][NV] = {};
    for (int64_t start = 0; start < D; start += kFlush) {
      Vec<T> sum[J][NV] = {};
      for (int64_t d = start; d < std::min(D, start + kFlush); ++d)
#pragma GCC unroll 8
        for (int i = 0; i < J; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sum[i][v] += load(panel + d * kPanel<T> + v * V) * screen.basis[d * p + j + i];
      for (int i = 0; i < J; ++i)
        for (int v = 0; v < NV; ++v) total[i][v] += sum[i][v];
    }
    for (int i = 0; i < J; ++i) {
      T column[kPanel<T>];
      for (int v = 0; v < NV; ++v) store<T>(column + v * V, total[i][v]);
      for (int64_t n = 0; n < tokens; ++n) y[n * p + j + i] = column[n];
    }
  }
  Vec<T> square[NV] = {};
  for (int64_t start = 0; start < D; start += kFlush) {
    Vec<T> sum[NV] = {};
    for (int64_t d = start; d < std::min(D, start + kFlush); ++d)
      for (int v = 0; v < NV; ++v) sum[v] += load(panel + d * kPanel<T> + v * V) * load(panel + d * kPanel<T> + v * V);
    for (int v = 0; v < NV; ++v) square[v] += sum[v];
  }
  T squares[kPanel<T>];
  for (int v = 0; v < NV; ++v) store<T>(squares + v * V, square[v]);
  const T up = 1 + (kFlush + ceil_div(D, kFlush) + 16) * std::numeric_limits<T>::epsilon();
  for (int64_t n = 0; n < tokens; ++n) norms[n] = std::sqrt(squares[n]) * up;
}

// Exact distances of G tokens, anywhere in memory, to one component; v [G, D padded], t [G, R] are scratch.
template <class T, int G>
void distances_of(const Shape& shape, const T* x, const int64_t* tokens, const T* rows, const T* lam, T* v, T* t,
                  T* out) {
  const int64_t padded = shape.padded<T>();
  for (int g = 0; g < G; ++g) residual(shape, x + tokens[g] * shape.features, rows, lam, v + g * padded);
  project<T, G>(shape, rows, v, t);
  for (int g = 0; g < G; ++g) {
    Vec<T> square = {};
    for (int64_t d = 0; d < padded; d += kWidth<T>) square += load(v + g * padded + d) * load(v + g * padded + d);
    out[g] = horizontal_sum<T>(square);
    take_explained(t + g * shape.rank, shape.rank, &out[g]);
  }
}

// Pairs of a token and a component, and their logits once they are computed.
template <class T>
struct Pairs {
  std::vector<int64_t> tokens;
  std::vector<int32_t> components;
  std::vector<T> logits;

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  void add(int64_t token, int32_t component) {
    tokens.push_back(token);
    components.push_back(component);
  }
  void append(const Pairs& other) {
    tokens.insert(tokens.end(), other.tokens.begin(), other.tokens.end());
    components.insert(components.end(), other.components.begin(), other.components.end());
    logits.insert(logits.end(), other.logits.begin(), other.logits.end());
  }
};

// The order that brings equal keys together, earlier entries first; first [keys + 1] is where each key begins.
template <class Key>
std::vector<int64_t> counting_sort(const std::vector<Key>& of, int64_t keys, std::vector<int64_t>& first) {
  first.assign(keys + 1, 0);
  for (Key key : of) ++first[key + 1];
  for (int64_t key = 0; key < keys; ++key) first[key + 1] += first[key];
  std::vector<int64_t> next(first), order(of.size());
  for (size_t i = 0; i < of.size(); ++i) order[next[of[i]]++] = static_cast<int64_t>(i);
  return order;
}

// The order that brings equal keys, of so many, together, where their beginnings are not asked for: the few pairs of a
// token that comes alone should not have to count all components.
template <class Key>
std::vector<int64_t> grouped(const std::vector<Key>& of, int64_t keys) {
  if (16 * static_cast<int64_t>(of.size()) > keys) {
    std::vector<int64_t> first;
    return counting_sort(of, keys, first);
  }
  std::vector<int64_t> order(of.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of[a] < of[b]; });
  return order;
}

// How many of order[i], order[i + 1], ... up to `most` have the same key as the first.
template <class Key>
int64_t run_length(const std::vector<Key>& of, const std::vector<int64_t>& order, int64_t i, int64_t most) {
  int64_t length = 1;
  while (length < most && of[order[i + length]] == of[order[i]]) ++length;
  return length;
}

// Fills in the logits, component by component, so that its rows are read once for up to eight tokens.
template <class T, class ParallelFor>
void evaluate(const Shape& shape, const T* x, const T* rows, const T* constants, const T* lam, Pairs<T>& pairs,
              ParallelFor&& parallel_for) {
  constexpr int64_t G = 8;  // groups of tokens
  const int64_t chunk_size = std::clamp<int64_t>(pairs.size() / 16, G, 64);  // pairs per task, whatever the threads
  const std::vector<int64_t> order = grouped(pairs.components, shape.components);
  pairs.logits.resize(pairs.size());
  parallel_for(ceil_div(pairs.size(), chunk_size), [&](int64_t begin, int64_t end) {
    std::vector<T> v(shape.padded<T>() * G), t(shape.rank * G);
    int64_t group[G];
    T out[G];
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t i = chunk * chunk_size, stop = std::min(pairs.size(), i + chunk_size), count; i < stop;
           i += count) {
        const int64_t k = pairs.components[order[i]];
        const int64_t left = run_length(pairs.components, order, i, std::min(G, stop - i));
        count = left >= G ? G : left >= 2 ? 2 : 1;
        for (int64_t g = 0; g < count; ++g) group[g] = pairs.tokens[order[i + g]];
        const T* own = rows + k * shape.component_stride<T>();
        const auto kernel = count == G ? distances_of<T, G> : count == 2 ? distances_of<T, 2> : distances_of<T, 1>;
        kernel(shape, x, group, own, lam, v.data(), t.data(), out);
        for (int64_t g = 0; g < count; ++g) pairs.logits[order[i + g]] = constants[k] - out[g] / 2;
      }
  });
}

// One stretch of tokens: what the bounds say of it.
template <class T>
struct Stretch {
  int64_t lanes = 0;             // tokens to a panel
  int64_t panels = 0;
  std::vector<T> y, norms;       // [panels lanes, p], [panels lanes]; zeros where there is no token
  std::vector<T> bounds;         // [panels, K, lanes]
  std::vector<int32_t> guesses;  // [tokens] the component with the largest bound

  // The marginal bound of every pair.
  template <class ParallelFor>
  void bound(const Shape& shape, const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, bool few,
             int64_t threads, ParallelFor&& parallel_for) {
    project(shape, screen, x, tokens, lam, few, parallel_for);
    if (few)
      bound_few(shape, screen, threads, parallel_for);
    else
      bound_panels(shape, screen, tokens, threads, parallel_for);
  }

  // The bound of every pair by the line of its component. As guesses the best, by their marginal bounds, of some
  // candidates: of all components whose number leaves the same remainder, the one with the largest bound.
  template <class ParallelFor>
  void bound_lines(const Shape& shape, const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, bool few,
                   int64_t threads, ParallelFor&& parallel_for) {
    project(shape, screen, x, tokens, lam, few, parallel_for);
    const int64_t K = shape.components, D = shape.features, p = screen.features, padded = panels * lanes;
    // In vectors of 16 bytes, the four tokens that are few fill a panel of doubles.
    const bool whole = lanes == kPanel<T>;
    std::vector<T> columns(whole ? padded * p : 0);  // y [panels, p, lanes]
    if (whole)
      parallel_for(panels, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin * lanes; n < end * lanes; ++n)
          for (int64_t j = 0; j < p; ++j) columns[n / lanes * lanes * p + j * lanes + n % lanes] = y[n * p + j];
      });
    bounds.resize(padded * K);
    const int64_t splits = std::clamp<int64_t>(threads, 1, ceil_div(K, kLineComponents));
    const int64_t classes = std::clamp(K / 128, kFewestCandidates, kMostCandidates), size = classes * padded;
    std::vector<T> largest(splits * size, -std::numeric_limits<T>::infinity());
    std::vector<int32_t> owners(splits * size, -1);
    parallel_for(splits, [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split) {
        const int64_t k0 = K * split / splits, k1 = K * (split + 1) / splits;
        with_lanes_of<T>(lanes, [&]<int L>(std::integral_constant<int, L>) {
          auto keep = [&](int64_t panel, int64_t k, const T* distances) {
            const int64_t n0 = panel * L, at = split * size + k % classes * padded + n0;
            screen.bound(k, D, distances, norms.data() + n0, L, bounds.data() + n0 * K + k * L, largest.data() + at,
                         owners.data() + at);
          };
          if constexpr (L < kPanel<T>)
            scan_lines_of_few<T, L>(screen, k0, k1, y.data(), [&](int64_t k, const T* d) { keep(0, k, d); });
          else
            for (int64_t k = k0; k < k1; k += kLineComponents)
              for (int64_t panel = 0; panel < panels; ++panel)
                scan_lines(screen, k, std::min(k1, k + kLineComponents), columns.data() + panel * L * p,
                           [&](int64_t of, const T* d) { keep(panel, of, d); });
        });
      }
    });
    choose(splits, size, largest, owners);  // guesses [classes, padded]
    const std::vector<int32_t> candidates = std::move(guesses);
    guesses.assign(tokens, 0);
    parallel_for(tokens, [&](int64_t begin, int64_t end) {
      FewDistances<T, 1> distance_of(shape.rank, p);
      for (int64_t n = begin; n < end; ++n) {
        T best = -std::numeric_limits<T>::infinity();
        for (int64_t c = 0; c < classes; ++c) {
          const int32_t k = candidates[c * padded + n];
          if (k < 0) continue;
          T distance, value;
          distance_of(screen.rows + k * p * (shape.rank + 1), y.data() + n * p, &distance);
          screen.bound(k, D, &distance, norms.data() + n, 1, &value, &best, &guesses[n]);
        }
      }
    });
  }

  // Puts the marginal bound in the place of every bound that reaches the bar of its token, and chooses the guesses
  // among them; returns how many. A guess stays where no bound is larger than any number.
  template <class ParallelFor>
  int64_t refine(const Shape& shape, const Screen<T>& screen, const std::vector<T>& bars, int64_t threads,
                 ParallelFor&& parallel_for) {
    constexpr int L = 4;
    std::vector<T> padded(bars);
    padded.resize(panels * lanes, std::numeric_limits<T>::infinity());
    const int64_t K = shape.components, p = screen.features, tokens = static_cast<int64_t>(bars.size());
    const int64_t splits = std::clamp<int64_t>(threads, 1, ceil_div(K, kLineComponents));
    std::vector<T> largest(splits * tokens, -std::numeric_limits<T>::infinity());
    std::vector<int32_t> owners(splits * tokens);
    std::vector<int64_t> counts(splits, 0);
    parallel_for(splits, [&](int64_t begin, int64_t end) {
      FewDistances<T, L> distances_of(shape.rank, p);
      std::vector<T> some(L * p);
      std::vector<std::vector<int64_t>> left(kLineComponents);
      for (int64_t split = begin; split < end; ++split) {
        T* const own_largest = largest.data() + split * tokens;
        int32_t* const own_owners = owners.data() + split * tokens;
        std::copy_n(guesses.data(), tokens, own_owners);
        const int64_t k_end = K * (split + 1) / splits;
        for (int64_t k0 = K * split / splits; k0 < k_end; k0 += kLineComponents) {
          const int64_t k1 = std::min(k_end, k0 + kLineComponents);
          for (auto& of_one : left) of_one.clear();
          with_lanes_of<T>(lanes, [&]<int W>(std::integral_constant<int, W>) {
            for (int64_t n0 = 0; n0 < tokens; n0 += W)
              for (int64_t k = k0; k < k1; ++k) {
                const T* const own = bounds.data() + n0 * K + k * W;
                int any = 0;
                for (int i = 0; i < W; ++i) any |= !(own[i] < padded[n0 + i]);  // NaN reaches it
                if (!any) continue;
                uint64_t reached = 0;
                for (int i = 0; i < W; ++i) reached |= uint64_t(!(own[i] < padded[n0 + i])) << i;
                if (tokens - n0 < W) reached &= (uint64_t(1) << (tokens - n0)) - 1;
                for (; reached; reached &= reached - 1) left[k - k0].push_back(n0 + std::countr_zero(reached));
              }
          });
          for (int64_t k = k0; k < k1; ++k) {
            const std::vector<int64_t>& own = left[k - k0];
            counts[split] += static_cast<int64_t>(own.size());
            for (size_t i = 0; i < own.size(); i += L) {
              const size_t here = std::min<size_t>(L, own.size() - i);
              for (size_t g = 0; g < L; ++g)  // the last again and again where there are fewer
                std::copy_n(y.data() + own[i + std::min(g, here - 1)] * p, p, some.data() + g * p);
              T distances[L];
              distances_of(screen.rows + k * p * (shape.rank + 1), some.data(), distances);
              for (size_t g = 0; g < here; ++g) {
                const int64_t n = own[i + g];
                screen.bound(k, shape.features, distances + g, norms.data() + n, 1,
                             bounds.data() + n / lanes * lanes * K + k * lanes + n % lanes, own_largest + n,
                             own_owners + n);
              }
            }
          }
        }
      }
    });
    choose(splits, tokens, largest, owners);
    int64_t total = 0;
    for (int64_t count : counts) total += count;
    return total;
  }

  template <class ParallelFor>
  void project(const Shape& shape, const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, bool few,
               ParallelFor&& parallel_for) {
    const int64_t D = shape.features, p = screen.features;
    lanes = kPanel<T>;
    if (few)  // at most kFewScreened tokens, all in one panel of 1, 2 or 4
      for (lanes = 1; lanes < tokens;) lanes *= 2;
    panels = ceil_div(tokens, lanes);
    y.assign(panels * lanes * p, T(0));
    norms.assign(panels * lanes, T(0));
    if (few) return project_few(shape, screen, x, tokens, lam, y.data(), norms.data(), parallel_for);
    parallel_for(panels, [&](int64_t begin, int64_t end) {
      std::vector<T> panel(D * kPanel<T>);
      for (int64_t n = begin * kPanel<T>; n < std::min(tokens, end * kPanel<T>); n += kPanel<T>)
        project_panel(shape, screen, x + n * D, std::min<int64_t>(kPanel<T>, tokens - n), lam, panel.data(),
                      y.data() + n * p, norms.data() + n);
    });
  }

 private:
  template <class ParallelFor>
  void bound_panels(const Shape& shape, const Screen<T>& screen, int64_t tokens, int64_t threads,
                    ParallelFor&& parallel_for) {
    const int64_t K = shape.components, D = shape.features, p = screen.features;
    const Shape marginal{K, p, shape.rank, false};
    const std::vector<T> ones(p, T(1));
    const Schedule plan = Schedule::of<T>(marginal, tokens, threads);
    bounds.resize(panels * K * kPanel<T>);
    std::vector<T> largest(plan.splits * tokens, -std::numeric_limits<T>::infinity());
    std::vector<int32_t> owners(plan.splits * tokens, 0);
    // By panels, however few tokens are left: where a stretch ends depends on the threads, and no bit may.
    scan_panels(
        marginal, plan, y.data(), tokens, screen.rows, ones.data(),
        [&](int64_t split, int64_t n0, int64_t here, int64_t k, const T* distances) {
          screen.bound(k, D, distances, norms.data() + n0, here, bounds.data() + n0 * K + k * kPanel<T>,
                       largest.data() + split * tokens + n0, owners.data() + split * tokens + n0);
        },
        parallel_for);
    choose(plan.splits, tokens, largest, owners);
  }

  template <class ParallelFor>
  void bound_few(const Shape& shape, const Screen<T>& screen, int64_t threads, ParallelFor&& parallel_for) {
    const int64_t K = shape.components;
    const int64_t splits = std::clamp<int64_t>(threads, 1, ceil_div(K, 64));
    bounds.resize(K * lanes);
    std::vector<T> largest(splits * lanes, -std::numeric_limits<T>::infinity());
    std::vector<int32_t> owners(splits * lanes, 0);
    parallel_for(splits, [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split)
        with_lanes_of<T>(lanes, [&]<int L>(std::integral_constant<int, L>) {
          bounds_of_few<T, L>(shape, screen, K * split / splits, K * (split + 1) / splits, y.data(), norms.data(),
                              bounds.data(), largest.data() + split * L, owners.data() + split * L);
        });
    });
    choose(splits, lanes, largest, owners);
  }

  // guesses [count] from those of every split of the components.
  void choose(int64_t splits, int64_t count, std::vector<T>& largest, std::vector<int32_t>& owners) {
    for (int64_t split = 1; split < splits; ++split)
      for (int64_t n = 0; n < count; ++n)
        if (largest[split * count + n] > largest[n]) {
          largest[n] = largest[split * count + n];
          owners[n] = owners[split * count + n];
        }
    guesses = std::move(owners);
  }
};

// What is left of one panel under the bars of its tokens, `best` known to be reached: appends the pairs beside the
// guesses, and writes `evaluated` and `dropped` (see scan_screened).
template <class T, int L>
void sweep_panel(const T* bounds, int64_t K, int64_t tokens, int64_t first_token, const int32_t* guesses, const T* best,
                 T threshold, int64_t limit, Pairs<T>& pairs, T* dropped, int32_t* evaluated) {
  constexpr T kInf = std::numeric_limits<T>::infinity();
  T bar[L], top[L];
  int32_t kept[L] = {};
  for (int64_t i = 0; i < L; ++i) bar[i] = i < tokens ? best[i] - threshold : kInf, top[i] = -kInf;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t i = 0; i < L; ++i) {
      const T bound = bounds[k * L + i];
      const bool below = bound < bar[i];  // NaN is not
      kept[i] += below ? 0 : 1;
      top[i] = below && bound > top[i] ? bound : top[i];
    }
  for (int64_t i = 0; i < tokens; ++i) {
    const bool diffuse = kept[i] > limit;
    evaluated[i] = diffuse ? -1 : kept[i];
    const double largest = std::exp(static_cast<double>(top[i]) - static_cast<double>(best[i]));
    dropped[i] = diffuse || kept[i] == K ? T(0) : static_cast<T>((K - kept[i]) * largest * (1 + 1e-6));
    if (diffuse) bar[i] = kInf;
  }
  for (int64_t k = 0; k < K; ++k) {
    int any = 0;
    for (int64_t i = 0; i < L; ++i) any |= !(bounds[k * L + i] < bar[i]);
    if (!any) continue;
    for (int64_t i = 0; i < tokens; ++i)
      if (evaluated[i] >= 0 && k != guesses[i] && !(bounds[k * L + i] < bar[i]))
        pairs.add(first_token + i, static_cast<int32_t>(k));
  }
}

// The outputs of `scan`, a row per token.
template <class T>
struct Selection {
  T* log_prob;          // [N]
  int32_t* components;  // [N, S]
  T* logits;            // [N, S]
  int32_t* counts;      // [N]
};

// Tokens one by one: from their guess, guesses holding one pair per token in order, and from the other pairs.
template <class T, class ParallelFor>
void collect(int64_t tokens, const Pairs<T>& guesses, const Pairs<T>& pairs, const int32_t* evaluated, T threshold,
             int64_t slots, const Selection<T>& out, ParallelFor&& parallel_for) {
  std::vector<int64_t> first;
  const std::vector<int64_t> order = counting_sort(pairs.tokens, tokens, first);
  parallel_for(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (evaluated[n] < 0) continue;
      TokenState<T> state;
      int32_t* components = out.components + n * slots;
      T* logits = out.logits + n * slots;
      auto offer = [&](const Pairs<T>& from, int64_t i) {
        if (from.logits[i] < state.best - threshold) return;  // NaN is offered
        state.offer(from.logits[i], from.components[i], threshold, slots, components, logits);
      };
      offer(guesses, n);
      for (int64_t i = first[n]; i < first[n + 1]; ++i) offer(pairs, order[i]);
      out.log_prob[n] = state.finish(threshold, slots, components, logits);
      out.counts[n] = state.overflow(threshold) ? static_cast<int32_t>(slots + 1) : state.count;
    }
  });
}

// Another scan for some of the tokens: run(x, count, out) on a copy of them.
template <class T, class Run>
void scan_some(const T* x, int64_t features, const std::vector<int64_t>& some, int64_t slots, const Selection<T>& out,
                 Run&& run) {
  const int64_t count = static_cast<int64_t>(some.size());
  std::vector<T> own_x(count * features), log_prob(count), logits(count * slots);
  std::vector<int32_t> components(count * slots), counts(count);
  for (int64_t i = 0; i < count; ++i) std::copy_n(x + some[i] * features, features, own_x.data() + i * features);
  run(own_x.data(), count, Selection<T>{log_prob.data(), components.data(), logits.data(), counts.data()});
  for (int64_t i = 0; i < count; ++i) {
    out.log_prob[some[i]] = log_prob[i];
    out.counts[some[i]] = counts[i];
    std::copy_n(components.data() + i * slots, slots, out.components + some[i] * slots);
    std::copy_n(logits.data() + i * slots, slots, out.logits + some[i] * slots);
  }
}

// Tokens [begin, end): appends to `guesses` (one a token, in order) and to `pairs`. Returns how many marginal bounds it
// took beside those of candidates.
template <class T, class ParallelFor>
int64_t screen_tokens(const Shape& shape, const Screen<T>& screen, const T* x, int64_t begin, int64_t end,
                      const T* rows, const T* constants, const T* lam, T threshold, int64_t limit, Pairs<T>& guesses,
                      Pairs<T>& pairs, T* dropped, int32_t* evaluated, bool few, int64_t threads,
                      ParallelFor&& parallel_for) {
  const int64_t K = shape.components, here = end - begin;
  Stretch<T> stretch;
  Pairs<T> guess;      // of every token
  std::vector<T> best;  // reached for certain: its logit less its rounding
  auto try_guesses = [&] {
    Pairs<T> next;
    for (int64_t n = 0; n < here; ++n)
      if (guess.size() < here || guess.components[n] != stretch.guesses[n]) next.add(begin + n, stretch.guesses[n]);
    evaluate(shape, x, rows, constants, lam, next, parallel_for);
    std::vector<T> reached(next.size());
    for (int64_t i = 0; i < next.size(); ++i)
      reached[i] = screen.reached(next.logits[i], next.components[i], stretch.norms[next.tokens[i] - begin]);
    if (guess.size() < here) {
      guess = std::move(next);
      best = std::move(reached);
      return;
    }
    for (int64_t i = 0; i < next.size(); ++i) {
      const int64_t n = next.tokens[i] - begin;
      if (reached[i] > best[n]) {
        best[n] = reached[i];
        guess.components[n] = next.components[i];
        guess.logits[n] = next.logits[i];
      }
    }
  };
  int64_t refined = here * K;
  if (screen.lines) {
    stretch.bound_lines(shape, screen, x + begin * shape.features, here, lam, few, threads, parallel_for);
    try_guesses();
    std::vector<T> bars(best);
    for (T& bar : bars) bar -= threshold;
    refined = stretch.refine(shape, screen, bars, threads, parallel_for);
  } else {
    stretch.bound(shape, screen, x + begin * shape.features, here, lam, few, threads, parallel_for);
  }
  try_guesses();
  guesses.append(guess);

  const int64_t lanes = stretch.lanes, panels = ceil_div(here, lanes);
  std::vector<Pairs<T>> found(panels);
  parallel_for(panels, [&](int64_t first, int64_t last) {
    with_lanes_of<T>(lanes, [&]<int L>(std::integral_constant<int, L>) {
      for (int64_t i = first, n = i * L; i < last; ++i, n += L)
        sweep_panel<T, L>(stretch.bounds.data() + n * K, K, std::min<int64_t>(L, here - n), begin + n,
                          guess.components.data() + n, best.data() + n, threshold, limit, found[i], dropped + begin + n,
                          evaluated + begin + n);
    });
  });
  for (const Pairs<T>& some : found) pairs.append(some);
  return refined;
}

// As `scan`, shared noise only, and
//   dropped    [N] bound on the responsibility, all together, of the components whose logit was never computed
//   evaluated  [N] how many had theirs computed; -1 where the token took the dense scan
template <class T, class ParallelFor>
void scan_screened(const Shape& shape, Screen<T> screen, const T* x, int64_t tokens, const T* rows,
                     const T* constants, const T* lam, T threshold, int64_t slots, const Selection<T>& out, T* dropped,
                     int32_t* evaluated, int64_t threads, ParallelFor&& parallel_for) {
  const int64_t K = shape.components, limit = std::max<int64_t>(slots, K / kDenseShare);
  auto serially = [](int64_t count, auto&& body) { body(int64_t(0), count); };
  auto run = [&](int64_t begin, int64_t end, Pairs<T>& guesses, Pairs<T>& pairs, int64_t inner, auto&& inner_for) {
    return screen_tokens(shape, screen, x, begin, end, rows, constants, lam, threshold, limit, guesses, pairs, dropped,
                         evaluated, tokens <= kFewScreened, inner, inner_for);
  };
  const int64_t pilot = std::min(tokens, kPilot);
  Pairs<T> guesses, pairs;
  const int64_t refined = pilot > 0 ? run(0, pilot, guesses, pairs, threads, parallel_for) : 0;
  if (kLineShare * refined > pilot * K) screen.lines = nullptr;  // the rest does better without

  // One stretch, one thread: threads meet only at the end. Each has some even when tokens are few.
  const int64_t rest = tokens - pilot;
  const int64_t step = std::min(std::max(kStretch, kBoundValues / K), ceil_div(rest, threads));
  const int64_t size = std::max<int64_t>(1, ceil_div(step, kPanel<T>)) * kPanel<T>, stretches = ceil_div(rest, size);
  if (2 * std::count(evaluated, evaluated + pilot, -1) > pilot) {  // the rest goes the same way
    std::fill(evaluated + pilot, evaluated + tokens, -1);
    std::fill(dropped + pilot, dropped + tokens, T(0));
  } else {
    std::vector<Pairs<T>> guessed(stretches), found(stretches);
    parallel_for(stretches, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        run(pilot + i * size, std::min(tokens, pilot + (i + 1) * size), guessed[i], found[i], 1, serially);
    });
    for (const Pairs<T>& some : guessed) guesses.append(some);
    for (const Pairs<T>& some : found) pairs.append(some);
  }

  std::vector<int64_t> diffuse;
  for (int64_t n = 0; n < tokens; ++n)
    if (evaluated[n] < 0) diffuse.push_back(n);
  if (static_cast<int64_t>(diffuse.size()) == tokens)
    return scan(shape, x, tokens, rows, constants, lam, threshold, slots, out.log_prob, out.components, out.logits,
                  out.counts, threads, parallel_for);
  evaluate(shape, x, rows, constants, lam, pairs, parallel_for);
  collect(tokens, guesses, pairs, evaluated, threshold, slots, out, parallel_for);
  if (!diffuse.empty())
    scan_some(x, shape.features, diffuse, slots, out, [&](const T* own_x, int64_t count, const Selection<T>& own) {
      scan(shape, own_x, count, rows, constants, lam, threshold, slots, own.log_prob, own.components, own.logits,
             own.counts, threads, parallel_for);
    });
}

// Every bound, on request, that of lines or that of marginals: x [N, D] -> out [N, K]
template <class T, class ParallelFor>
void bounds(const Shape& shape, const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, bool lines,
            T* out, int64_t threads, ParallelFor&& parallel_for) {
  const int64_t K = shape.components;
  const bool few = tokens <= kFewScreened;
  Stretch<T> stretch;
  for (int64_t begin = 0; begin < tokens; begin += kStretch) {
    const int64_t here = std::min(kStretch, tokens - begin);
    if (lines)
      stretch.bound_lines(shape, screen, x + begin * shape.features, here, lam, few, threads, parallel_for);
    else
      stretch.bound(shape, screen, x + begin * shape.features, here, lam, few, threads, parallel_for);
    for (int64_t n = 0; n < here; ++n)
      for (int64_t k = 0; k < K; ++k)
        out[(begin + n) * K + k] = stretch.bounds[(n / stretch.lanes * K + k) * stretch.lanes + n % stretch.lanes];
  }
}

}  // namespace mfa
