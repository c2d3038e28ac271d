// K-means: the nearest centroid of every row, and the sums over the rows of each cluster.
//
// Symbols   v = x - center, c_k centroid (less the centre too), y = Q^T v and m_k = Q^T c_k their P coordinates,
//           r and r_k bounds on what is left of v and c_k besides. By Cauchy and Schwarz v . c_k <= y . m_k + r r_k, so
//             score_k = |c_k|^2 / 2 - y . m_k - r r_k  <=  (|v - c_k|^2 - |v|^2) / 2
//           with everything that rounding can do inside r and r_k (mfa_kernels/ops/kmeans/README.md). Without a basis
//           y = v, and r r_k is the rounding alone.
// Never materialised: N x K. Scores are kept for kRowsPerTask rows a thread.
// Exact     because the centroid of the least score is measured by difference, and so is whatever could come as close:
//           the owner is the argmin of the distances by difference over all k, whatever the basis and the threads.
// Floor     N (D P + K (P + 1)) multiply-adds, N K D without a basis. Measured by bench/bench_kmeans.py.
#pragma once
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace mfa {

constexpr int kDotRows = kRegisters >= 32 ? 8 : 6;     // rows of x per micro-tile
constexpr int kDotVectors = kRegisters >= 32 ? 3 : 2;  // SIMD vectors of centroids per micro-tile
constexpr int64_t kRowsPerTask = 4 * kDotRows;         // they share what is read of the centroids
constexpr int64_t kDotFlush = 256;                      // features between flushes of a sum
template <class T>
constexpr int kDotWidth = kDotVectors * kWidth<T>;

// out[i][v] = sum over f of rows[i][f] * columns[f][v]; columns [features, NV * V]. `out` must be aligned to whole
// vectors: clang assumes it of what it gets by reference.
template <class T, int NV, int R>
void dot_tile(const T* const* rows, int64_t features, const T* columns, Vec<T> (&out)[R][NV]) {
  constexpr int V = kWidth<T>;
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < NV; ++v) out[i][v] = Vec<T>{};
  for (int64_t start = 0; start < features; start += kDotFlush) {
    Vec<T> sum[R][NV] = {};
    const int64_t stop = std::min(features, start + kDotFlush);
    for (int64_t f = start; f < stop; ++f) {
      const T* column = columns + f * NV * V;
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[i][v] += load(column + v * V) * rows[i][f];
    }
    asm volatile("" ::: "memory");  // `out` stays in memory: its registers would be taken from the loop
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < NV; ++v) out[i][v] += sum[i][v];
  }
}

// Loads the features past the last whole vector, zeros behind them.
template <class T>
Vec<T> load_tail(const T* p, int64_t count) {
  T lane[kWidth<T>] = {};
  std::copy_n(p, count, lane);
  return load(lane);
}

// Returns |a - b|^2, always added in the same order: the distance of a pair is the same for every caller.
template <class T>
T distance_by_difference(const T* a, const T* b, int64_t features) {
  constexpr int V = kWidth<T>, A = 4;
  Vec<T> sum[A] = {};
  int64_t d = 0;
  for (; d + A * V <= features; d += A * V)
#pragma GCC unroll 4
    for (int i = 0; i < A; ++i) {
      const Vec<T> gap = load(a + d + i * V) - load(b + d + i * V);
      sum[i] += gap * gap;
    }
  for (; d + V <= features; d += V) {
    const Vec<T> gap = load(a + d) - load(b + d);
    sum[0] += gap * gap;
  }
  if (d < features) {
    const Vec<T> gap = load_tail(a + d, features - d) - load_tail(b + d, features - d);
    sum[1] += gap * gap;
  }
  return horizontal_sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
T squared_norm(const T* a, int64_t features) {
  constexpr int V = kWidth<T>;
  Vec<T> sum = {};
  int64_t d = 0;
  for (; d + V <= features; d += V) sum += load(a + d) * load(a + d);
  if (d < features) {
    const Vec<T> tail = load_tail(a + d, features - d);
    sum += tail * tail;
  }
  return horizontal_sum<T>(sum);
}

// Returns a mask, whose bit i is set where values[i] is not above the bar, or NaN.
template <class T>
uint32_t not_above(const T* values, T bar) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float>)
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(bar), _CMP_NGT_UQ);
  else
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(values), _mm512_set1_pd(bar), _CMP_NGT_UQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth<T>; ++i) bits |= static_cast<uint32_t>(!(values[i] > bar)) << i;
  return bits;
#endif
}

// Centroids, and their coordinates, which the scores are made from.
template <class T>
struct Centroids {
  int64_t count, features;  // K, D
  const T* rows;            // c [K, D]
  const T* center;          // [D]
  int64_t coordinates;      // P; D where there is no basis
  const T* basis;           // Q [D, P], or null
  const T* projected;       // m [K, P]; the centroids where there is no basis
  T slack;                  // rho: see the README
};

template <class T>
class NearestCentroid {
 public:
  explicit NearestCentroid(const Centroids<T>& c) : c_(c), blocks_(ceil_div(c.count, kDotWidth<T>)) {
    const int64_t P = c.coordinates, W = kDotWidth<T>;
    columns_.assign(blocks_ * (P + 1) * W, T(0));
    halves_.assign(blocks_ * W, std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < c.count; ++k) {
      T* column = columns_.data() + k / W * (P + 1) * W + k % W;
      double square = 0, inside = 0;
      for (int64_t d = 0; d < c.features; ++d) {
        const double value = c.rows[k * c.features + d];
        square += value * value;
      }
      for (int64_t p = 0; p < P; ++p) {
        const T value = c.projected[k * P + p];
        inside += static_cast<double>(value) * value;
        column[p * W] = value;
      }
      column[P * W] = rest(square, inside);
      halves_[k] = static_cast<T>(square / 2);
      // A square that overflows says nothing: NaN makes every row measure this centroid.
      if (!std::isfinite(halves_[k])) halves_[k] = std::numeric_limits<T>::quiet_NaN();
    }
    if (c.basis == nullptr) return;
    // Whole tiles of columns, and one narrower for those that remain.
    const int64_t D = c.features, V = kWidth<T>;
    basis_.resize(D * P);
    for (int64_t p = 0, count; p < P; p += count) {
      count = std::min<int64_t>(W, P - p) / V * V;
      for (int64_t d = 0; d < D; ++d) std::copy_n(c.basis + d * P + p, count, basis_.data() + p * D + d * count);
    }
  }

  // Rows [begin, end) of x [N, D] -> owner, distance. Returns the pairs measured by difference.
  int64_t operator()(const T* x, int64_t begin, int64_t end, int64_t* owner, T* distance) const {
    const int64_t D = c_.features, P = c_.coordinates, W = kDotWidth<T>, padded = blocks_ * W;
    std::vector<T> v(kRowsPerTask * D), y(kRowsPerTask * (P + 1)), scores(kRowsPerTask * padded);
    std::vector<T> squares(kRowsPerTask);
    int64_t pairs = 0;
    for (int64_t first = begin; first < end; first += kRowsPerTask) {
      const int64_t here = std::min(kRowsPerTask, end - first), groups = ceil_div(here, kDotRows);
      for (int64_t i = 0; i < groups * kDotRows; ++i) {
        const T* from = x + (first + std::min(i, here - 1)) * D;
        T* to = v.data() + i * D;
        for (int64_t d = 0; d < D; ++d) to[d] = from[d] - c_.center[d];
        squares[i] = squared_norm(to, D);
      }
      for (int64_t i = 0; i < groups * kDotRows; i += kDotRows)
        coordinates(v.data() + i * D, squares.data() + i, y.data() + i * (P + 1));
      for (int64_t b = 0; b < blocks_; ++b)
        for (int64_t i = 0; i < groups * kDotRows; i += kDotRows)
          score(y.data() + i * (P + 1), b, scores.data() + i * padded + b * W);
      for (int64_t i = 0; i < here; ++i)
        pairs += settle(v.data() + i * D, squares[i], scores.data() + i * padded, owner + first + i,
                        distance + first + i);
    }
    return pairs;
  }

 private:
  // Returns a bound on the norm of what the coordinates leave, rounding included.
  T rest(double square, double inside) const {
    return static_cast<T>(std::sqrt(std::max(square - inside, 0.0) + static_cast<double>(c_.slack) * square));
  }

  // v [kDotRows, D] -> y [kDotRows, P + 1], the last of them the rest.
  void coordinates(const T* v, const T* squares, T* y) const {
    const int64_t D = c_.features, P = c_.coordinates;
    if (c_.basis == nullptr) {
      for (int i = 0; i < kDotRows; ++i) std::copy_n(v + i * D, D, y + i * (P + 1));
    } else {
      const T* rows[kDotRows];
      for (int i = 0; i < kDotRows; ++i) rows[i] = v + i * D;
      for (int64_t p = 0; p < P;) {
        const int64_t left = std::min<int64_t>(kDotVectors, (P - p) / kWidth<T>);
        with_constant<kDotVectors>(left, [&]<int NV>(std::integral_constant<int, NV>) { project<NV>(rows, p, y); });
        p += left * kWidth<T>;
      }
    }
    for (int i = 0; i < kDotRows; ++i) {
      T* own = y + i * (P + 1);
      own[P] = rest(squares[i], c_.basis == nullptr ? squares[i] : squared_norm(own, P));
    }
  }

  template <int NV>
  void project(const T* const* rows, int64_t p, T* y) const {
    alignas(kVectorBytes) Vec<T> out[kDotRows][NV];
    dot_tile<T, NV>(rows, c_.features, basis_.data() + p * c_.features, out);
    for (int i = 0; i < kDotRows; ++i)
      for (int n = 0; n < NV; ++n) store<T>(y + i * (c_.coordinates + 1) + p + n * kWidth<T>, out[i][n]);
  }

  // Scores a tile of rows and block b of centroids; out [kDotRows, all centroids].
  void score(const T* y, int64_t b, T* out) const {
    constexpr int V = kWidth<T>;
    const int64_t P = c_.coordinates, W = kDotWidth<T>;
    const T* rows[kDotRows];
    for (int i = 0; i < kDotRows; ++i) rows[i] = y + i * (P + 1);
    alignas(kVectorBytes) Vec<T> dots[kDotRows][kDotVectors];
    dot_tile<T, kDotVectors>(rows, P + 1, columns_.data() + b * (P + 1) * W, dots);
    for (int v = 0; v < kDotVectors; ++v) {
      const Vec<T> half = load(halves_.data() + b * W + v * V);
      for (int i = 0; i < kDotRows; ++i) store<T>(out + i * blocks_ * W + v * V, half - dots[i][v]);
    }
  }

  // Measures the distances that the scores leave open, for their argmin. Returns how many were measured.
  int64_t settle(const T* v, T square, const T* scores, int64_t* owner, T* distance) const {
    constexpr int V = kWidth<T>;
    const int64_t D = c_.features, K = c_.count;
    T least = std::numeric_limits<T>::infinity();
    int64_t best = K, measured = 0;
    auto measure = [&](int64_t k) {
      const T gap = distance_by_difference(v, c_.rows + k * D, D);
      ++measured;
      if (gap < least || (gap == least && k < best)) least = gap, best = k;
    };
    const int64_t guess = lowest(scores);
    T bar = std::numeric_limits<T>::quiet_NaN();  // nothing is above it
    if (std::isfinite(square) && guess < K) {
      measure(guess);
      const T unit = (D / V + 32) * std::numeric_limits<T>::epsilon();
      bar = (least - square) / 2 + unit * (least + square);
    }
    for (int64_t b = 0; b < ceil_div(K, V); ++b)
      for (uint32_t bits = not_above(scores + b * V, bar); bits != 0; bits &= bits - 1) {
        const int64_t k = b * V + __builtin_ctz(bits);
        if (k < K && k != best) measure(k);
      }
    if (!(least < std::numeric_limits<T>::infinity())) least = std::numeric_limits<T>::quiet_NaN(), best = K;
    *owner = best;
    *distance = least;
    return measured;
  }

  // Returns the index of the least score, K or beyond where all are NaN or infinite.
  int64_t lowest(const T* scores) const {
    constexpr int V = kWidth<T>;
    Vec<T> least = broadcast(std::numeric_limits<T>::infinity());
    const int64_t vectors = blocks_ * kDotVectors;
    for (int64_t b = 0; b < vectors; ++b) {
      const Vec<T> value = load(scores + b * V);
      least = value < least ? value : least;
    }
    T lane[V], lowest = std::numeric_limits<T>::infinity();
    store<T>(lane, least);
    for (int i = 0; i < V; ++i) lowest = std::min(lowest, lane[i]);
    if (!(lowest < std::numeric_limits<T>::infinity())) return c_.count;
    for (int64_t b = 0; b < vectors; ++b)
      for (uint32_t bits = not_above(scores + b * V, lowest); bits != 0; bits &= bits - 1) {
        const int64_t k = b * V + __builtin_ctz(bits);
        if (scores[k] == lowest) return k;
      }
    return c_.count;
  }

  Centroids<T> c_;
  int64_t blocks_;
  std::vector<T> columns_, halves_, basis_;  // [blocks, P + 1, W], [blocks, W], tiles of [D, up to W]
};

// x [N, D] -> owner [N], distance [N]. Returns the pairs measured by difference.
template <class T, class ParallelFor>
int64_t nearest(const Centroids<T>& centroids, const T* x, int64_t rows, int64_t* owner, T* distance,
                ParallelFor&& parallel_for) {
  const NearestCentroid<T> to(centroids);
  const int64_t tasks = ceil_div(rows, kRowsPerTask);
  std::vector<int64_t> pairs(tasks);
  parallel_for(tasks, [&](int64_t begin, int64_t end) {
    pairs[begin] = to(x, begin * kRowsPerTask, std::min(rows, end * kRowsPerTask), owner, distance);
  });
  return std::accumulate(pairs.begin(), pairs.end(), int64_t(0));
}

// Adds to sums [K, D], mass [K] and inertia [K], in double precision, one writer a cluster, rows in order:
//   x [N, D] less the centre, distances [N] and weights [N] (null: ones) by owner [N]; owners from K on are left out.
template <class T, class ParallelFor>
void cluster_sums(const T* x, int64_t rows, int64_t features, const T* center, const int64_t* owner, const T* distance,
                  const double* weights, int64_t clusters, double* sums, double* mass, double* inertia,
                  ParallelFor&& parallel_for) {
  std::vector<int64_t> first(clusters + 2);
  for (int64_t n = 0; n < rows; ++n) ++first[std::min(owner[n], clusters) + 1];
  for (int64_t k = 0; k < clusters; ++k) first[k + 1] += first[k];
  std::vector<int64_t> next(first.begin(), first.end() - 1), order(rows);
  for (int64_t n = 0; n < rows; ++n)
    if (owner[n] < clusters) order[next[owner[n]]++] = n;
  parallel_for(clusters, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double* sum = sums + k * features;
      for (int64_t i = first[k]; i < first[k + 1]; ++i) {
        const int64_t n = order[i];
        const double weight = weights == nullptr ? 1 : weights[n];
        const T* row = x + n * features;
        for (int64_t d = 0; d < features; ++d) sum[d] += weight * (row[d] - center[d]);
        mass[k] += weight;
        inertia[k] += weight * distance[n];
      }
    }
  });
}

}  // namespace mfa
