// Bounds of a few tokens, a generated one and its neighbours: the rows {m, B} stream past once, at the speed of memory.
// Vectorised along the p coordinates, because a panel of tokens (scan.h) would be empty but for one lane.
//
// Never materialised: anything per component but its bounds.
// Exact     as the panels: no sum in a lane is longer than kFlush before it is added to another.
// Floor     K p (R + 1) + D p values read. Measured by bench/bench_screen.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "../scan.h"

namespace mfa {

// What stage 0 leaves for the bounds (mfa_kernels/ops/screen/op.py).
template <class T>
struct Screen {
  int64_t features;    // p, a multiple of 8 and of the SIMD width
  const T* basis;      // Q [D, p]
  const T* center;     // c [D]
  const T* rows;       // {m_k, B_k} [K, p/V, R+1, V]
  const T* constants;  // [K] those of the mixture
  const T* log_det;    // [K] log|C_k|
  const T* radii;      // [K] |m~_k|, rounded up
  const T* slack;      // [K]
  const T* lines;      // [K, p] a direction for every component (screen/lines.h), or null
  const T* offsets;    // [K] m_k along it
  const T* shares;     // [K] one over the variance along it, rounded down
  T exact_slack;       // what a logit computed in full adds to it

  // A constant raised by the rounding of its terms.
  T raised(int64_t k, int64_t all_features) const {
    const T size = std::abs(constants[k]) + std::abs(log_det[k]) + 2 * static_cast<T>(all_features);
    if (!(size < std::numeric_limits<T>::infinity())) return constants[k];  // -inf where a component has no weight
    return constants[k] + 2 * std::numeric_limits<T>::epsilon() * size;
  }

  // What the logit of component k is for certain at least, however it was rounded when it was computed in full.
  T reached(T logit, int64_t k, T norm) const {
    const T reach = norm + radii[k];
    return logit - (exact_slack + slack[k]) * (reach * reach) - 8 * std::numeric_limits<T>::epsilon() * std::abs(logit);
  }

  // out [tokens], the bounds of component k from the distances of its marginal; keeps the largest and whose it is.
  void bound(int64_t k, int64_t all_features, const T* distances, const T* norms, int64_t tokens, T* out, T* largest,
             int32_t* owners) const {
    const T constant = raised(k, all_features), radius = radii[k], slack_k = slack[k];
    for (int64_t i = 0; i < tokens; ++i) {
      const T reach = norms[i] + radius;
      const T value = constant - distances[i] / 2 + slack_k * (reach * reach);
      out[i] = value;
      const bool best = value > largest[i] && value < std::numeric_limits<T>::infinity();
      owners[i] = best ? static_cast<int32_t>(k) : owners[i];
      largest[i] = best ? value : largest[i];
    }
  }
};

constexpr int64_t kFewScreened = 4;  // from five tokens on, a panel that is mostly empty costs less

// Calls body with the number of tokens to a panel as a constant.
template <class T, class Body>
void with_lanes_of(int64_t lanes, Body&& body) {
  if (lanes == 1) return body(std::integral_constant<int, 1>{});
  if (lanes == 2) return body(std::integral_constant<int, 2>{});
  if (lanes == 4) return body(std::integral_constant<int, 4>{});
  body(std::integral_constant<int, kPanel<T>>{});
}

// y [p] of one whitened token at columns j, ..., j + C V - 1.
template <class T, int C>
void project_columns(const Screen<T>& screen, int64_t features, const T* whitened, int64_t j, T* y) {
  constexpr int V = kWidth<T>;
  const int64_t p = screen.features;
  Vec<T> total[C] = {};
  for (int64_t start = 0; start < features; start += kFlush) {
    Vec<T> sum[C] = {};
    for (int64_t d = start; d < std::min(features, start + kFlush); ++d)
      for (int c = 0; c < C; ++c) sum[c] += whitened[d] * load(screen.basis + d * p + j + c * V);
    for (int c = 0; c < C; ++c) total[c] += sum[c];
  }
  for (int c = 0; c < C; ++c) store<T>(y + j + c * V, total[c]);
}

// y [tokens, p] and norms |x~| [tokens], rounded up.
template <class T, class ParallelFor>
void project_few(const Shape& shape, const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, T* y, T* norms,
                 ParallelFor&& parallel_for) {
  constexpr int V = kWidth<T>, C = 4;
  const int64_t D = shape.features, p = screen.features;
  std::vector<T> whitened(tokens * D);
  for (int64_t n = 0; n < tokens; ++n) {
    double squares = 0;
    for (int64_t d = 0; d < D; ++d) {
      const T value = (x[n * D + d] - screen.center[d]) * lam[d];
      whitened[n * D + d] = value;
      squares += static_cast<double>(value) * value;
    }
    norms[n] = static_cast<T>(std::sqrt(squares)) * (1 + 16 * std::numeric_limits<T>::epsilon());
  }
  parallel_for(ceil_div(p, C * V), [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t j = begin * C * V, stop = std::min(p, end * C * V); j < stop;) {
        const bool whole = j + C * V <= stop;
        const auto kernel = whole ? project_columns<T, C> : project_columns<T, 1>;
        kernel(screen, D, whitened.data() + n * D, j, y + n * p);
        j += whole ? C * V : V;
      }
  });
}

// sums [M, L, V] += rows r, ..., r + M - 1 of B times b [L, p], lane by lane, over the blocks [first, last); the first
// of them begin the sums.
template <class T, int L, int M>
void add_products(const T* rows, int64_t row_count, const T* b, int64_t p, int64_t first, int64_t last, int64_t r,
                  T* sums) {
  constexpr int V = kWidth<T>;
  Vec<T> sum[M][L] = {};
  for (int64_t i = first; i < last; ++i)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<T> row = load(rows + (i * row_count + 1 + r + m) * V);
#pragma GCC unroll 4
      for (int n = 0; n < L; ++n) sum[m][n] += row * load(b + n * p + i * V);
    }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < L; ++n) {
      T* out = sums + ((r + m) * L + n) * V;
      store<T>(out, first ? load(out) + sum[m][n] : sum[m][n]);
    }
}

// Squared marginal distances of L tokens y [L, p] to a component, whose rows {m, B} are given.
template <class T, int L>
struct FewDistances {
  static constexpr int V = kWidth<T>, M = std::max(1, std::min(4, kRegisters / 2 / L));
  int64_t rank, features, count;  // count of sums: those of B first, |b|^2 last
  std::vector<T> b, sums, scalars;

  FewDistances(int64_t rank, int64_t features)
      : rank(rank), features(features), count(ceil_div((rank + 1) * L, V) * V), b(L * features), sums(count * V),
        scalars(count) {}

  void operator()(const T* rows, const T* y, T* distances) {
    const int64_t R = rank, p = features, row_count = R + 1, blocks = p / V;
    for (int64_t first = 0; first < blocks; first += kFlush) {
      const int64_t last = std::min(blocks, first + kFlush);
      Vec<T> square[L] = {};
      for (int64_t i = first; i < last; ++i)
        for (int n = 0; n < L; ++n) {
          const Vec<T> v = load(y + n * p + i * V) - load(rows + i * row_count * V);
          store<T>(b.data() + n * p + i * V, v);
          square[n] += v * v;
        }
      for (int n = 0; n < L; ++n) {
        T* out = sums.data() + (R * L + n) * V;
        store<T>(out, first ? load(out) + square[n] : square[n]);
      }
      int64_t r = 0;
      for (; r + M <= R; r += M) add_products<T, L, M>(rows, row_count, b.data(), p, first, last, r, sums.data());
      for (; r < R; ++r) add_products<T, L, 1>(rows, row_count, b.data(), p, first, last, r, sums.data());
    }
    for (int64_t i = 0; i < count; i += V) sums_of_lanes(sums.data() + i * V, scalars.data() + i);
    for (int n = 0; n < L; ++n) distances[n] = scalars[R * L + n];
    for (int64_t r = 0; r < R; ++r)
      for (int n = 0; n < L; ++n) distances[n] -= scalars[r * L + n] * scalars[r * L + n];
  }
};

// Bounds [K, L] of the components [k0, k1), and the largest of each token; y [L, p].
template <class T, int L>
void bounds_of_few(const Shape& shape, const Screen<T>& screen, int64_t k0, int64_t k1, const T* y, const T* norms,
                   T* bounds, T* largest, int32_t* owners) {
  const int64_t size = screen.features * (shape.rank + 1);
  FewDistances<T, L> distances_of(shape.rank, screen.features);
  T distances[L];
  for (int64_t k = k0; k < k1; ++k) {
    const T* rows = screen.rows + k * size;
    // A component's rows are read by jumps, which hide from the hardware that all of them are one stream.
    for (int64_t i = 0; i < size && k + 1 < k1; i += 64 / sizeof(T)) __builtin_prefetch(rows + size + i);
    distances_of(rows, y, distances);
    screen.bound(k, shape.features, distances, norms, L, bounds + k * L, largest, owners);
  }
}

}  // namespace mfa
