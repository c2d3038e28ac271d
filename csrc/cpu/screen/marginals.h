// Stage 0 of screening: the marginal of every component on p directions.
//
// Symbols   P = lam Q [D, p]; m_k = P^T (mu_k - c), V_k^T = W_k^T P: R + 1 rows of p; L L^T = I + V_k^T V_k,
//           B_k = L^-1 V_k^T. In double precision, because the certificate counts the rounding of L times tau
//           (mfa_kernels/ops/screen/README.md): in float it would cost more in bounds than it saves here.
// Never materialised: V of all components, unless the caller keeps it to add columns to it later.
// Exact     sums in an order that depends on sizes alone.
// Floor     2 K (R + 1) D p flops in double precision, and one read of the loadings. Measured by bench/bench_screen.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../woodbury.h"

namespace mfa {

constexpr int kTileRows = kRegisters >= 32 ? 12 : 6;  // at most, by two vectors of columns
constexpr int kTileColumns = 2 * kWidth<double>;
constexpr int64_t kTilesPerGroup = 4;  // they share what they read of P
constexpr int64_t kDepth = 128;        // features at a time: a tile's share of them stays in L1

// Arguments of `marginals`; T is the dtype of the mixture.
template <class T>
struct Marginals {
  const T* means;            // [K, D]
  const T* loadings;         // [K, D, R]
  const T* cholesky;         // [K, R, R] of the whole: its rows have the lengths s_r of tau
  const T* center;           // [D]
  const double* scale;       // lam [D]
  const double* projection;  // P [D, p]
  int64_t features;          // p
  const double* known;       // [K, R+1, columns] {m, V^T} on the first columns, or null
  int64_t columns;           // 0 where nothing is known
  double* kept;              // [K, R+1, p] the same on all of them, for later; or null
  double rounding, base;     // slack_k = base + rounding tau_k
  double norm;               // largest eigenvalue of Q^T Q, at most
  const double* middle;      // [p] of the means m: lines lead from it to them
  double up;                 // raises what is rounded to T
  T* rows;                   // {m, B} [K, p/V, R+1, V]
  T* radii;                  // [K]
  T* slack;                  // [K]
  T* lines;                  // [K, p]
  T* offsets;                // [K]
  T* shares;                 // [K]
};

// out [M, kTileColumns] += a^T q over some features; a [features, M], q [features, kTileColumns]
template <int M>
void project_tile(const double* a, const double* q, int64_t features, double* out, int64_t stride) {
  constexpr int V = kWidth<double>;
  Vec<double> sum[M][2];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) sum[m][v] = load(out + m * stride + v * V);
  for (int64_t d = 0; d < features; ++d, a += M, q += kTileColumns) {
    const Vec<double> left = load(q), right = load(q + V);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const Vec<double> row = broadcast(a[m]);
      sum[m][0] += row * left;
      sum[m][1] += row * right;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) store<double>(out + m * stride + v * V, sum[m][v]);
}

// Columns m, m + 1, ..., of a [features, M]: rows row, ..., row + count - 1 of {mu - c, W^T} of component k.
template <class T, int M>
void pack_rows(const Shape& shape, const Marginals<T>& in, int64_t k, int64_t row, int64_t count, int64_t d0,
               int64_t features, double* a) {
  const int64_t D = shape.features, R = shape.rank;
  if (row == 0 && count > 0) {
    for (int64_t d = 0; d < features; ++d)
      a[d * M] = static_cast<double>(in.means[k * D + d0 + d]) - static_cast<double>(in.center[d0 + d]);
    ++a, ++row, --count;
  }
  const T* from = in.loadings + (k * D + d0) * R + row - 1;
  if (count == M - 1)  // one component a tile: a length that the compiler knows
    for (int64_t d = 0; d < features; ++d)
      for (int m = 0; m < M - 1; ++m) a[d * M + m] = from[d * R + m];
  else
    for (int64_t d = 0; d < features; ++d)
      for (int64_t m = 0; m < count; ++m) a[d * M + m] = from[d * R + m];
}

// Writes the line of component k (lines.h), from m [p], B [R, p] and L: u = S^-1 v = v - B^T B v, v = m - middle. A
// rounded direction is as valid as any; its variance is that of the rounded one, raised by the error of V = L B, where
// `size` is the sum of the s_r^2. Where there is no usable direction, it writes zeros, which rule nothing out.
template <class T>
void line_of(const Shape& shape, const Marginals<T>& in, int64_t k, const double* m, const double* b,
             const double* cholesky, double size, bool usable, double* u) {
  const int64_t R = shape.rank, p = in.features;
  auto dot = [p](const double* left, const double* right) {
    Vec<double> sum = {};
    for (int64_t c = 0; c < p; c += kWidth<double>) sum += load(left + c) * load(right + c);
    return horizontal_sum<double>(sum);
  };
  for (int64_t c = 0; c < p; ++c) u[c] = m[c] - in.middle[c];
  double square = dot(u, u);  // of v, and then v^T S^-1 v
  std::vector<double> products(R);
  for (int64_t r = 0; r < R; ++r) products[r] = dot(b + r * p, u);
  for (int64_t r = 0; r < R; ++r) {
    square -= products[r] * products[r];
    for (int64_t c = 0; c < p; ++c) u[c] -= products[r] * b[r * p + c];
  }
  const double length = std::sqrt(square);
  T* line = in.lines + k * p;
  for (int64_t c = 0; c < p; ++c) u[c] = line[c] = static_cast<T>(u[c] / length);
  const double own = std::sqrt(dot(u, u));
  double loaded = 0;
  for (int64_t r = 0; r < R; ++r) {
    products[r] = dot(b + r * p, u);
    double value = 0;
    for (int64_t j = 0; j <= r; ++j) value += cholesky[r * R + j] * products[j];
    loaded += value * value;
  }
  loaded = std::sqrt(loaded) + in.rounding * std::sqrt(size) * own;
  const double variance = (in.norm * own * own + loaded * loaded) * (1 + in.rounding);
  const double share = 1 / (variance * in.up), offset = dot(u, m);
  usable = usable && length > 0 && std::isfinite(share) && std::isfinite(offset);
  if (!usable) std::fill_n(line, p, T(0));
  in.offsets[k] = usable ? static_cast<T>(offset) : T(0);
  in.shares[k] = usable ? static_cast<T>(share) : T(0);
}

// Writes the outputs of one component from its rows {m, V^T}, v [R+1, p], which are overwritten.
template <class T>
void finish_marginal(const Shape& shape, const Marginals<T>& in, int64_t k, double* v, double* gram, double* inverse,
                     double* line) {
  constexpr int V = kWidth<T>, W = kWidth<double>;
  const int64_t D = shape.features, R = shape.rank, p = in.features;
  double* b = v + p;
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      Vec<double> sum = {};
      for (int64_t c = 0; c < p; c += W) sum += load(b + i * p + c) * load(b + j * p + c);
      gram[i * R + j] = (i == j ? 1 : 0) + horizontal_sum<double>(sum);
    }
  cholesky(gram, R);
  bool usable = true;  // a value of V that is not finite makes the diagonal of L so
  for (int64_t i = 0; i < R * R; ++i) usable = usable && std::isfinite(gram[i]);

  double tau = 0, sizes = 0;
  for (int64_t j = 0; j < R && usable; ++j) {  // column j of L^-1
    double diagonal = 0, size = 0;
    for (int64_t i = j; i < R; ++i) {
      double sum = i == j ? 1 : 0;
      for (int64_t s = j; s < i; ++s) sum -= gram[i * R + s] * inverse[s];
      inverse[i] = sum / gram[i * R + i];
      diagonal += inverse[i] * inverse[i];
    }
    for (int64_t s = 0; s < R; ++s) size += std::pow(static_cast<double>(in.cholesky[(k * R + j) * R + s]), 2);
    tau += size * diagonal;
    sizes += size;
  }
  // A component that rounding leaves nothing of, or that has no factorisation, gets an infinite slack.
  usable = usable && in.rounding * tau < 0.5;
  const double slack = usable ? in.base + in.rounding * tau : std::numeric_limits<double>::infinity();
  in.slack[k] = static_cast<T>(slack * in.up);

  if (usable)
    for (int64_t i = 0; i < R; ++i) {
      const double reciprocal = 1 / gram[i * R + i];
      for (int64_t c = 0; c < p; c += W) {
        Vec<double> sum = load(b + i * p + c);
        for (int64_t j = 0; j < i; ++j) sum -= gram[i * R + j] * load(b + j * p + c);
        store<double>(b + i * p + c, sum * reciprocal);
      }
    }
  else
    std::fill(b, b + R * p, 0.0);
  line_of(shape, in, k, v, b, gram, sizes, usable, line);
  T* out = in.rows + k * p * (R + 1);
  for (int64_t c = 0; c < p; c += V)
    for (int64_t r = 0; r <= R; ++r, out += V)
      for (int lane = 0; lane < V; ++lane) out[lane] = static_cast<T>(v[r * p + c + lane]);

  double square[W] = {};
  for (int64_t d = 0; d < D; d += W)
    for (int64_t lane = 0; lane < std::min<int64_t>(W, D - d); ++lane) {
      const double value =
          (static_cast<double>(in.means[k * D + d + lane]) - static_cast<double>(in.center[d + lane])) *
          in.scale[d + lane];
      square[lane] += value * value;
    }
  double total = 0;
  for (double part : square) total += part;
  in.radii[k] = static_cast<T>(std::sqrt(total) * in.up);
}

// Tiles of M rows: of several components where their R + 1 rows are few, of a part of one where they are many.
template <class T, int M, class ParallelFor>
void marginals_by(const Shape& shape, const Marginals<T>& in, ParallelFor&& parallel_for) {
  const int64_t K = shape.components, D = shape.features, R = shape.rank, p = in.features;
  const int64_t period = R + 1 <= M ? R + 1 : ceil_div(R + 1, M) * M;  // rows from one component to the next
  const int64_t own = std::max<int64_t>(1, kTilesPerGroup * M / period), tiles = ceil_div(own * period, M);
  const int64_t strips = p / kTileColumns;
  std::vector<double> packed(D * p);  // P [strips, D, kTileColumns]
  parallel_for(strips, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t d = 0; d < D; ++d)
        std::copy_n(in.projection + d * p + strip * kTileColumns, kTileColumns,
                    packed.data() + (strip * D + d) * kTileColumns);
  });
  parallel_for(ceil_div(K, own), [&](int64_t begin, int64_t end) {
    // Rows of padding stay zero: no component writes them.
    std::vector<double> a(tiles * kDepth * M), v(tiles * M * p), gram(R * R), inverse(R), line(p);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t k0 = group * own, here = std::min(own, K - k0), used = ceil_div(here * period, M);
      std::fill(v.begin(), v.end(), 0.0);
      for (int64_t k = 0; k < here; ++k)
        for (int64_t r = 0; r <= R && in.known; ++r)
          std::copy_n(in.known + ((k0 + k) * (R + 1) + r) * in.columns, in.columns, v.data() + (k * period + r) * p);
      for (int64_t d0 = 0; d0 < D; d0 += kDepth) {
        const int64_t features = std::min(kDepth, D - d0);
        for (int64_t tile = 0; tile < used; ++tile)
          for (int64_t row = tile * M, count; row < std::min((tile + 1) * M, here * period); row += count) {
            count = std::min((tile + 1) * M - row, period - row % period);
            pack_rows<T, M>(shape, in, k0 + row / period, row % period,
                            std::min(count, std::max<int64_t>(0, R + 1 - row % period)), d0, features,
                            a.data() + tile * kDepth * M + row % M);
          }
        for (int64_t strip = in.columns / kTileColumns; strip < strips; ++strip)
          for (int64_t tile = 0; tile < used; ++tile)
            project_tile<M>(a.data() + tile * kDepth * M, packed.data() + (strip * D + d0) * kTileColumns, features,
                            v.data() + tile * M * p + strip * kTileColumns, p);
      }
      for (int64_t k = 0; k < here; ++k) {
        if (in.kept) std::copy_n(v.data() + k * period * p, (R + 1) * p, in.kept + (k0 + k) * (R + 1) * p);
        finish_marginal(shape, in, k0 + k, v.data() + k * period * p, gram.data(), inverse.data(),
                        line.data());
      }
    }
  });
}

template <class T, class ParallelFor>
void marginals(const Shape& shape, const Marginals<T>& in, ParallelFor&& parallel_for) {
  const int64_t rows = shape.rank + 1;
  const int64_t size = rows <= kTileRows ? kTileRows / rows * rows : ceil_div(rows, ceil_div(rows, kTileRows));
  with_constant<kTileRows>(size, [&]<int M>(std::integral_constant<int, M>) {
    marginals_by<T, M>(shape, in, parallel_for);
  });
}

}  // namespace mfa
