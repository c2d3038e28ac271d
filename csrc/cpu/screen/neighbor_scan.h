// Stage 1 where every component knows its neighbors (screen/neighbor_lists.h): the work of a token does not grow with K.
//
// Symbols   s, a number that the Mahalanobis distance d_j(x) of a token from its pivot j does not exceed: sqrt of
//           2 (constant_j - logit_j), rounded up. What can be active beside j has its onset at or below s, and onsets
//           are sorted: a prefix of the list of j. Marginal bounds of those, logits of what the bounds leave.
// The pivot is looked for, not certified: among the members of the groups whose centers are nearest. A poor one makes s
//           large and the prefix long; then the best of its neighbors is tried in its place.
// Never materialised: anything of size N x K.
// Exact     for the reason that panels.h is: whatever could come within the threshold has its logit computed in full.
//           Tokens whose prefix is longer than the list are left to panels.h.
// Floor     D p multiply-adds for the projection, (G + 3 K / G) p for the pivot, p (R + 1) for every neighbor in the
//          prefix and D (R + 1) for every logit. Measured by bench/bench_screen.py.
#pragma once
#include "panels.h"

namespace mfa {

constexpr int64_t kNearStretch = 1024;  // tokens at a time: some of them share neighbors
constexpr int kNearGroups = 3;          // looked into for a pivot
constexpr int kNearMembers = 2;         // of those, whose marginal bounds choose it
constexpr int64_t kNearTries = 16;      // neighbors that may take the place of a poor pivot
constexpr int kNearClimbs = 3;          // times that one may

// What stage 0 leaves (mfa_kernels/ops/screen/neighbors.py). Lists are too long to be looked through at every call: what
// is no component, or no place in a list, is brought to one as it is read.
template <class T>
struct Near {
  int64_t components;        // K
  int64_t groups;            // G; none where there are no neighbors
  const T* centers;          // [G, p]
  const T* center_halves;    // [G] half of their squared lengths
  const int32_t* starts;     // [G + 1] the members of each
  const int32_t* members;    // [K] components, group by group
  const T* means;            // [K, p] m of the members
  const T* mean_halves;      // [K]
  int64_t length;            // M
  const int32_t* neighbors;  // [K, M] by rising onset
  const T* onsets;           // [K, M]
  const T* horizons;         // [K]
  double threshold;          // nats, for which the onsets hold

  int64_t start(int64_t group) const { return std::clamp<int64_t>(starts[group], 0, components); }
  int32_t component(int32_t k) const { return static_cast<int32_t>(std::clamp<int64_t>(k, 0, components - 1)); }
};

// The N rows of a matrix [count, p] nearest to y, best first: with the largest y.row - half. Returns how many.
template <class T, int N>
struct NearestRows {
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  T scores[N], worst = -kInf;
  int64_t rows[N];
  int count = 0;

  void offer(T score, int64_t row) {
    if (!(score > worst)) return;
    int at = count < N ? count++ : N - 1;
    for (; at > 0 && score > scores[at - 1]; --at) scores[at] = scores[at - 1], rows[at] = rows[at - 1];
    scores[at] = score, rows[at] = row;
    if (count == N) worst = scores[N - 1];
  }

  // Rows [begin, end).
  void search(const T* y, int64_t p, const T* matrix, const T* halves, int64_t begin, int64_t end) {
    constexpr int V = kWidth<T>;
    T sums[V * V], products[V];
    for (int64_t row = begin; row < end; row += V) {
      const int64_t here = std::min<int64_t>(V, end - row);
      for (int64_t i = 0; i < here; ++i) {
        Vec<T> sum = {};
        for (int64_t c = 0; c < p; c += V) sum += load(y + c) * load(matrix + (row + i) * p + c);
        store<T>(sums + i * V, sum);
      }
      for (int64_t i = here; i < V; ++i) store<T>(sums + i * V, Vec<T>{});
      sums_of_lanes(sums, products);
      for (int i = 0; i < V; ++i) products[i] = i < here ? products[i] - halves[row + i] : -kInf;
      bool any = false;
      for (int i = 0; i < V; ++i) any |= products[i] > worst;
      if (!any) continue;
      for (int64_t i = 0; i < here; ++i) offer(products[i], row + i);
    }
  }
};

// Tokens [begin, end) on their way: a pivot for each, the neighbors that its distance leaves, the pairs to be computed.
template <class T>
class NearTokens {
 public:
  NearTokens(const Shape& shape, const Screen<T>& screen, const Near<T>& near, const T* x, int64_t begin, int64_t end,
             const T* rows, const T* constants, const T* lam, T threshold, bool few)
      : shape(shape), screen(screen), near(near), x(x), rows(rows), constants(constants), lam(lam),
        threshold(threshold), begin(begin), here(end - begin), distance_of(shape.rank, screen.features) {
    stretch.project(shape, screen, x + begin * shape.features, here, lam, few, serially);
  }

  // Appends to `guesses` (the pivots, in order, their logits computed) and to `pairs` (without logits), and writes
  // `dropped` and `evaluated`, -1 where the token is left to others.
  void run(Pairs<T>& guesses, Pairs<T>& pairs, T* dropped, int32_t* evaluated) {
    find_pivots();
    climb();
    bound_prefixes();
    settle(pairs, dropped, evaluated);
    guesses.append(pivots);
  }

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity(), kEps = std::numeric_limits<T>::epsilon();
  static constexpr auto serially = [](int64_t count, auto&& body) { body(int64_t(0), count); };

  const Shape& shape;
  const Screen<T>& screen;
  const Near<T>& near;
  const T *x, *rows, *constants, *lam;
  const T threshold;
  const int64_t begin, here;
  FewDistances<T, 1> distance_of;
  Stretch<T> stretch;
  Pairs<T> pivots;                  // one a token
  std::vector<T> best;              // what their logits reach for certain
  std::vector<T> distances;         // s: the token is no farther from its pivot
  Pairs<T> close;                   // tokens of this stretch, counted from 0, and neighbors; bounds as logits
  std::vector<int32_t> rivals;      // [here] the neighbor that may be better than the pivot, or -1

  const T* y(int64_t n) const { return stretch.y.data() + n * screen.features; }
  const T* marginal(int64_t k) const { return screen.rows + k * screen.features * (shape.rank + 1); }
  bool within(int64_t n) const { return distances[n] < near.horizons[pivots.components[n]]; }  // its list goes so far

  // The bound of k from its distance; keeps the largest and whose it is.
  T bound(int64_t n, int64_t k, T distance, T* largest, int32_t* owner) const {
    T value;
    screen.bound(k, shape.features, &distance, stretch.norms.data() + n, 1, &value, largest, owner);
    return value;
  }
  void offer(int64_t n, int64_t k, T* largest, int32_t* owner) {
    T distance;
    distance_of(marginal(k), y(n), &distance);
    bound(n, k, distance, largest, owner);
  }

  // s for the pivot of token n, for onsets that may have been made for a smaller threshold; NaN stays.
  T distance(int64_t n) const {
    const int64_t k = pivots.components[n];
    const T wider = static_cast<T>(2 * std::max(0.0, threshold - near.threshold)) * (1 + kEps);
    const T constant = screen.raised(k, shape.features) + screen.slack[k];
    const T rounding = 4 * kEps * (std::abs(constant) + std::abs(best[n]) + wider);
    return std::sqrt(std::max(2 * (constant - best[n]) + wider + rounding, T(0))) * (1 + 4 * kEps);
  }

  void find_pivots() {
    const int64_t p = screen.features;
    for (int64_t n = 0; n < here; ++n) {
      NearestRows<T, kNearGroups> groups;
      groups.search(y(n), p, near.centers, near.center_halves, 0, near.groups);
      NearestRows<T, kNearMembers> found;
      for (int i = 0; i < groups.count; ++i)
        found.search(y(n), p, near.means, near.mean_halves, near.start(groups.rows[i]), near.start(groups.rows[i] + 1));
      int32_t pivot = found.count ? near.component(near.members[found.rows[0]]) : 0;
      T largest = -kInf;
      for (int i = 0; i < found.count; ++i) offer(n, near.component(near.members[found.rows[i]]), &largest, &pivot);
      pivots.add(begin + n, pivot);
    }
    evaluate(shape, x, rows, constants, lam, pivots, serially);
    best.resize(here), distances.resize(here);
    for (int64_t n = 0; n < here; ++n) {
      best[n] = screen.reached(pivots.logits[n], pivots.components[n], stretch.norms[n]);
      distances[n] = distance(n);
    }
  }

  // Computes the logits of `others`; those that reach more change places with the pivots.
  void challenge(Pairs<T>& others) {
    evaluate(shape, x, rows, constants, lam, others, serially);
    for (int64_t i = 0; i < others.size(); ++i) {
      const int64_t n = others.tokens[i] - begin;
      const T reached = screen.reached(others.logits[i], others.components[i], stretch.norms[n]);
      if (!(reached > best[n])) continue;
      best[n] = reached;
      std::swap(pivots.components[n], others.components[i]);
      std::swap(pivots.logits[n], others.logits[i]);
    }
  }

  // Better pivots for tokens beyond the horizon of theirs: neighbors of theirs, while that helps.
  void climb() {
    const int64_t M = near.length;
    std::vector<char> stuck(here, 0);
    for (int climb = 0; climb < kNearClimbs; ++climb) {
      Pairs<T> others;
      for (int64_t n = 0; n < here; ++n) {
        if (within(n) || stuck[n]) continue;
        T largest = best[n];
        int32_t owner = -1;
        const int32_t* const neighbors = near.neighbors + pivots.components[n] * M;
        for (int64_t m = 0; m < std::min(M, kNearTries); ++m) offer(n, near.component(neighbors[m]), &largest, &owner);
        stuck[n] = 1;  // unless it is better
        if (owner >= 0) others.add(begin + n, owner);
      }
      if (!others.size()) break;
      const std::vector<int32_t> candidates(others.components);
      challenge(others);
      for (int64_t i = 0; i < others.size(); ++i) {
        const int64_t n = others.tokens[i] - begin;
        distances[n] = distance(n);
        stuck[n] = pivots.components[n] != candidates[i];
      }
    }
  }

  // What their lines leave of the prefixes, and the marginal bounds of that, component by component.
  void bound_prefixes() {
    constexpr int V = kWidth<T>, L = 4;
    const int64_t M = near.length, p = screen.features;
    for (int64_t n = 0; n < here; ++n) {
      if (!within(n)) continue;
      const int32_t* const neighbors = near.neighbors + pivots.components[n] * M;
      const T* const onsets = near.onsets + pivots.components[n] * M;
      const int64_t length = std::upper_bound(onsets, onsets + M, distances[n]) - onsets;
      for (int64_t m = 0; m < length; m += V) {
        const int64_t count = std::min<int64_t>(V, length - m);
        T on_lines[V] = {}, largest = kInf;
        int32_t owner = -1, some[V];
        for (int64_t i = 0; i < count; ++i) some[i] = near.component(neighbors[m + i]);
        if (screen.lines) distances_on_lines(screen, some, count, y(n), on_lines);
        for (int64_t i = 0; i < count; ++i)
          if (!(bound(n, some[i], on_lines[i], &largest, &owner) < best[n] - threshold))  // NaN is not
            close.add(n, some[i]);
      }
    }
    close.logits.resize(close.size());
    rivals.assign(here, -1);
    const std::vector<int64_t> order = grouped(close.components, shape.components);
    std::vector<T> largest(best), some(L * p);
    FewDistances<T, L> distances_of(shape.rank, p);
    for (int64_t i = 0, count; i < close.size(); i += count) {
      const int64_t k = close.components[order[i]];
      count = run_length(close.components, order, i, std::min<int64_t>(L, close.size() - i));
      T together[L];
      if (count == 1) {
        distance_of(marginal(k), y(close.tokens[order[i]]), together);
      } else {
        for (int64_t g = 0; g < L; ++g)  // the last again and again where there are fewer
          std::copy_n(y(close.tokens[order[i + std::min(g, count - 1)]]), p, some.data() + g * p);
        distances_of(marginal(k), some.data(), together);
      }
      for (int64_t g = 0; g < count; ++g) {
        const int64_t n = close.tokens[order[i + g]];
        close.logits[order[i + g]] = bound(n, k, together[g], &largest[n], &rivals[n]);
      }
    }
  }

  void settle(Pairs<T>& pairs, T* dropped, int32_t* evaluated) {
    std::vector<char> settled(here);
    Pairs<T> others;
    for (int64_t n = 0; n < here; ++n) {
      settled[n] = within(n);  // of the pivot whose list was used
      if (rivals[n] >= 0) others.add(begin + n, rivals[n]);
    }
    challenge(others);
    std::vector<int32_t> kept(here, 1);
    auto keep = [&](int64_t n, int32_t k) {
      pairs.add(begin + n, k);
      ++kept[n];
    };
    for (int64_t i = 0; i < close.size(); ++i) {
      const int64_t n = close.tokens[i];
      if (close.components[i] != pivots.components[n] && !(close.logits[i] < best[n] - threshold))  // NaN is not
        keep(n, close.components[i]);
    }
    // A pivot that lost its place here is not among its own neighbors.
    for (int64_t i = 0; i < others.size(); ++i) {
      const int64_t n = others.tokens[i] - begin;
      if (others.components[i] != rivals[n]) keep(n, others.components[i]);
    }
    const double share = std::exp(-static_cast<double>(threshold)) * (1 + 1e-6);
    for (int64_t n = 0; n < here; ++n) {
      evaluated[begin + n] = settled[n] ? kept[n] : -1;
      if (settled[n]) dropped[begin + n] = static_cast<T>((shape.components - kept[n]) * share);
    }
  }
};

// As `scan_screened` in panels.h, which takes the tokens that this leaves.
template <class T, class ParallelFor>
void scan_near(const Shape& shape, const Screen<T>& screen, const Near<T>& near, const T* x, int64_t tokens,
                 const T* rows, const T* constants, const T* lam, T threshold, int64_t slots, const Selection<T>& out,
                 T* dropped, int32_t* evaluated, int64_t threads, ParallelFor&& parallel_for) {
  const int64_t pilot = std::min(tokens, kPilot);
  std::fill(evaluated, evaluated + tokens, -1);
  Pairs<T> guesses, pairs;
  auto run = [&](int64_t from, int64_t to) {
    const int64_t step = std::clamp<int64_t>(ceil_div(to - from, threads), 1, kNearStretch);
    const int64_t size = ceil_div(step, kPanel<T>) * kPanel<T>, stretches = ceil_div(to - from, size);
    std::vector<Pairs<T>> guessed(stretches), found(stretches);
    parallel_for(stretches, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t begin = from + i * size, end = std::min(to, begin + size);
        NearTokens<T>(shape, screen, near, x, begin, end, rows, constants, lam, threshold, tokens <= kFewScreened)
            .run(guessed[i], found[i], dropped, evaluated);
      }
    });
    for (const Pairs<T>& some : guessed) guesses.append(some);
    for (const Pairs<T>& some : found) pairs.append(some);
  };
  run(0, pilot);
  if (2 * std::count(evaluated, evaluated + pilot, -1) <= pilot) run(pilot, tokens);

  std::vector<int64_t> left;
  for (int64_t n = 0; n < tokens; ++n)
    if (evaluated[n] < 0) left.push_back(n);
  evaluate(shape, x, rows, constants, lam, pairs, parallel_for);
  collect(tokens, guesses, pairs, evaluated, threshold, slots, out, parallel_for);
  if (left.empty()) return;
  std::vector<T> own_dropped(left.size());
  std::vector<int32_t> own_evaluated(left.size());
  scan_some(x, shape.features, left, slots, out, [&](const T* own_x, int64_t count, const Selection<T>& own) {
    scan_screened(shape, screen, own_x, count, rows, constants, lam, threshold, slots, own, own_dropped.data(),
                    own_evaluated.data(), threads, parallel_for);
  });
  for (size_t i = 0; i < left.size(); ++i) dropped[left[i]] = own_dropped[i], evaluated[left[i]] = own_evaluated[i];
}

}  // namespace mfa
