// Stage 1 by lists of neighbors (neighbor_lists.h): the work of a token does not grow with K.
//
// Symbols   s, a number that the Mahalanobis distance d_j(x) of a token from its pivot j does not exceed: sqrt of
//           2 (constant_j - logit_j), rounded up. A component that can be active beside j has its onset at or below s,
//           and onsets are sorted: a prefix of the list of j holds them all. They get marginal bounds, and those that
//           the bounds leave get logits.
// The pivot is searched for, not certified: among the members of the groups whose centers are nearest. A poor one makes
//           s large and the prefix long; then the best of its neighbors is tried in its place.
// Never materialised: anything of size N x K.
// Exact     for the reason that panels.h is: every component that could come within the threshold has its logit
//           computed in full. Tokens whose prefix is longer than the list are left to panels.h.
// Floor     D p multiply-adds for the projection, (G + 3 K / G) p for the pivot, p (R + 1) for every neighbor in the
//           prefix and D (R + 1) for every logit. Measured by bench/bench_screen.py.
#pragma once
#include "panels.h"

namespace mfa {

constexpr int64_t kNeighborStretch = 1024;  // tokens at a time: some of them share neighbors
constexpr int kPivotGroups = 3;             // groups that are searched for a pivot
constexpr int kPivotMembers = 2;            // members of these, of which the marginal bounds choose one
constexpr int64_t kNeighborTries = 16;      // neighbors that may take the place of a poor pivot
constexpr int kClimbs = 3;                  // times that one may

// The tensors of mfa_kernels/ops/screen/neighbors.py. Lists are too long to be checked at every call, so an index out
// of its range is clamped as it is read.
template <class T>
struct NeighborLists {
  int64_t components;        // K
  int64_t groups;            // G
  const T* centers;          // [G, p]
  const T* center_halves;    // [G] half of their squared lengths
  const int32_t* starts;     // [G + 1] where the members of each group begin
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

// The N rows of a matrix [count, p] nearest to y, best first: those with the largest y.row - half.
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

  // Takes rows [begin, end).
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

// A stretch of tokens: a pivot for each, the neighbors that its distance leaves, the pairs to be computed.
template <class T>
class NeighborStretch {
 public:
  NeighborStretch(const ScanInput<T>& in, const Screen<T>& screen, const NeighborLists<T>& lists,
                  const ScreenedPairs<T>& out, int64_t begin, int64_t end)
      : screen(screen), lists(lists), out(out), stretch(in, screen, begin, end, Serially{}), begin(begin),
        here(end - begin), pivots{in, stretch, {}, {}}, distance_of(screen.marginal) {}

  // Appends the pivots and what is left beside them, and writes `dropped` and `evaluated`, -1 for a token that the
  // lists do not settle.
  void run(Candidates<T>& found) {
    find_pivots();
    climb();
    bound_prefixes();
    settle(found.others);
    found.leaders.append(pivots.pairs);
  }

 private:
  static constexpr T kInf = std::numeric_limits<T>::infinity(), kEps = std::numeric_limits<T>::epsilon();

  const Screen<T>& screen;
  const NeighborLists<T>& lists;
  const ScreenedPairs<T>& out;
  const Stretch<T> stretch;
  const int64_t begin, here;
  Leaders<T> pivots;
  FewDistances<T, 1> distance_of;
  std::vector<T> distances;     // s: the token is no farther from its pivot
  Pairs<T> close;               // tokens of this stretch, counted from 0, and neighbors; bounds as logits
  std::vector<int32_t> rivals;  // [here] the neighbor that may be better than the pivot, or -1

  int32_t pivot(int64_t n) const { return pivots.pairs.components[n]; }
  const int32_t* neighbors(int64_t n) const { return lists.neighbors + pivot(n) * lists.length; }
  // True where the list of the pivot holds every component that can matter at this distance.
  bool within(int64_t n) const { return distances[n] < lists.horizons[pivot(n)]; }

  // Returns the bound of k from its distance, and keeps the largest with its component.
  T bound(int64_t n, int64_t k, T distance, T* largest, int32_t* owner) const {
    T value;
    screen.bound(k, &distance, stretch.norms.data() + n, 1, &value, largest, owner);
    return value;
  }
  void offer(int64_t n, int64_t k, T* largest, int32_t* owner) {
    bound(n, k, marginal_distance(n, k), largest, owner);
  }
  T marginal_distance(int64_t n, int64_t k) {
    const T* const y[] = {stretch.y_of(n)};
    T distance;
    distance_of(screen.rows_of(k), y, &distance);
    return distance;
  }

  // Returns s for the pivot of token n, for onsets that may have been made for a smaller threshold; NaN stays.
  T distance(int64_t n) const {
    const T best = pivots.reached[n];
    const T wider = static_cast<T>(2 * std::max(0.0, out.threshold - lists.threshold)) * (1 + kEps);
    const T constant = screen.raised(pivot(n)) + screen.slack[pivot(n)];
    const T rounding = 4 * kEps * (std::abs(constant) + std::abs(best) + wider);
    return std::sqrt(std::max(2 * (constant - best) + wider + rounding, T(0))) * (1 + 4 * kEps);
  }

  void find_pivots() {
    const int64_t p = screen.coordinates();
    Pairs<T> first;
    for (int64_t n = 0; n < here; ++n) {
      const T* const y = stretch.y_of(n);
      NearestRows<T, kPivotGroups> groups;
      groups.search(y, p, lists.centers, lists.center_halves, 0, lists.groups);
      NearestRows<T, kPivotMembers> found;
      for (int i = 0; i < groups.count; ++i) {
        const int64_t group = groups.rows[i];
        found.search(y, p, lists.means, lists.mean_halves, lists.start(group), lists.start(group + 1));
      }
      int32_t best = found.count ? lists.component(lists.members[found.rows[0]]) : 0;
      T largest = -kInf;
      for (int i = 0; i < found.count; ++i) offer(n, lists.component(lists.members[found.rows[i]]), &largest, &best);
      first.add(begin + n, best);
    }
    pivots.start(std::move(first), Serially{});
    for (int64_t n = 0; n < here; ++n) distances.push_back(distance(n));
  }

  // Finds better pivots for tokens beyond the horizon of theirs, among its neighbors, while that helps.
  void climb() {
    std::vector<char> stuck(here, 0);
    for (int climb = 0; climb < kClimbs; ++climb) {
      Pairs<T> others;
      for (int64_t n = 0; n < here; ++n) {
        if (within(n) || stuck[n]) continue;
        T largest = pivots.reached[n];
        int32_t owner = -1;
        for (int64_t m = 0; m < std::min(lists.length, kNeighborTries); ++m)
          offer(n, lists.component(neighbors(n)[m]), &largest, &owner);
        stuck[n] = 1;  // unless the owner turns out to be better
        if (owner >= 0) others.add(begin + n, owner);
      }
      if (!others.size()) break;
      const std::vector<int32_t> candidates(others.components);
      pivots.challenge(others, Serially{});
      for (int64_t i = 0; i < others.size(); ++i) {
        const int64_t n = others.tokens[i] - begin;
        distances[n] = distance(n);
        stuck[n] = pivot(n) != candidates[i];
      }
    }
  }

  // Lists what the lines leave of the prefixes, and bounds it by the marginals, component by component.
  void bound_prefixes() {
    constexpr int V = kWidth<T>, L = 4;
    for (int64_t n = 0; n < here; ++n) {
      if (!within(n)) continue;
      const int32_t* const own = neighbors(n);
      const T* const onsets = lists.onsets + pivot(n) * lists.length;
      const int64_t length = std::upper_bound(onsets, onsets + lists.length, distances[n]) - onsets;
      for (int64_t m = 0; m < length; m += V) {
        const int64_t count = std::min<int64_t>(V, length - m);
        T on_lines[V] = {}, largest = kInf;
        int32_t owner = -1, some[V];
        for (int64_t i = 0; i < count; ++i) some[i] = lists.component(own[m + i]);
        if (screen.lines) distances_on_lines(screen, some, count, stretch.y_of(n), on_lines);
        for (int64_t i = 0; i < count; ++i)
          if (!(bound(n, some[i], on_lines[i], &largest, &owner) < pivots.reached[n] - out.threshold))  // NaN is not
            close.add(n, some[i]);
      }
    }
    close.logits.resize(close.size());
    rivals.assign(here, -1);
    const std::vector<int64_t> order = grouped(close.components, lists.components);
    std::vector<T> largest(pivots.reached);
    FewDistances<T, L> distances_of(screen.marginal);
    for (int64_t i = 0, count; i < close.size(); i += count) {
      const int64_t k = close.components[order[i]];
      count = run_length(close.components, order, i, std::min<int64_t>(L, close.size() - i));
      T together[L];
      const T* y[L];
      for (int64_t g = 0; g < L; ++g)  // the last fills up the group
        y[g] = stretch.y_of(close.tokens[order[i + std::min(g, count - 1)]]);
      if (count == 1)
        together[0] = marginal_distance(close.tokens[order[i]], k);
      else
        distances_of(screen.rows_of(k), y, together);
      for (int64_t g = 0; g < count; ++g) {
        const int64_t n = close.tokens[order[i + g]];
        close.logits[order[i + g]] = bound(n, k, together[g], &largest[n], &rivals[n]);
      }
    }
  }

  // Lets the rivals challenge their pivots, and lists what the bounds leave under the better of the two.
  void settle(Pairs<T>& pairs) {
    std::vector<char> settled(here);
    Pairs<T> others;
    for (int64_t n = 0; n < here; ++n) {
      settled[n] = within(n);  // of the pivot whose list was used
      if (rivals[n] >= 0) others.add(begin + n, rivals[n]);
    }
    pivots.challenge(others, Serially{});
    std::vector<int32_t> kept(here, 1);
    auto keep = [&](int64_t n, int32_t k) {
      pairs.add(begin + n, k);
      ++kept[n];
    };
    for (int64_t i = 0; i < close.size(); ++i) {
      const int64_t n = close.tokens[i];
      if (close.components[i] != pivot(n) && !(close.logits[i] < pivots.reached[n] - out.threshold))  // NaN is not
        keep(n, close.components[i]);
    }
    // A pivot that lost its place here is not among its own neighbors.
    for (int64_t i = 0; i < others.size(); ++i) {
      const int64_t n = others.tokens[i] - begin;
      if (others.components[i] != rivals[n]) keep(n, others.components[i]);
    }
    const double share = std::exp(-static_cast<double>(out.threshold)) * (1 + 1e-6);
    for (int64_t n = 0; n < here; ++n) {
      out.evaluated[begin + n] = settled[n] ? kept[n] : -1;
      if (settled[n]) out.dropped[begin + n] = static_cast<T>((lists.components - kept[n]) * share);
    }
  }
};

// Does what `scan_screened` does, which takes the tokens that the lists leave.
template <class T, class ParallelFor>
void scan_by_neighbors(const ScanInput<T>& in, const Screen<T>& screen, const NeighborLists<T>& lists,
                       const ScreenedPairs<T>& out, ParallelFor&& parallel_for) {
  const int64_t pilot = std::min(in.tokens, kPilot);
  std::fill(out.evaluated, out.evaluated + in.tokens, -1);
  Candidates<T> found;
  auto run = [&](int64_t from, int64_t to) {
    const int64_t step = std::min(ceil_div(to - from, parallel_for.threads()), kNeighborStretch);
    auto body = [&](int64_t begin, int64_t end, Candidates<T>& own) {
      NeighborStretch<T>(in, screen, lists, out, begin, end).run(own);
    };
    by_stretches(from, to, step, found, body, parallel_for);
  };
  run(0, pilot);
  if (2 * std::count(out.evaluated, out.evaluated + pilot, -1) <= pilot) run(pilot, in.tokens);
  collect(in, found, out, parallel_for);
  scan_rest(in, out, [&](const ScanInput<T>& own, const ScreenedPairs<T>& own_out) {
    scan_screened(own, screen, own_out, parallel_for);
  });
}

}  // namespace mfa
