// Stage 0, woodbury: parameters -> rows, Cholesky factors, log-determinants. One pass over the loadings.
//
//   W~ = lam W,  M = I + W~^T W~ = L L^T,  A = L^-1 W~^T,  log|C| = sum log Psi + 2 sum log diag L
//
// A component's W~ stays in a thread's scratch from the first read to the last, so that of all that has the size K*D*R
// only `rows` is written.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "gram.h"
#include "layout.h"

namespace mfa {

// Replaces m [n, n], the identity plus a Gram matrix, by its lower Cholesky factor; the upper triangle becomes zero. No
// pivot of such a matrix is below 1: one that rounding makes smaller (of collinear loadings) is set to 1, so that no
// machine finds the matrix indefinite.
inline void cholesky(double* m, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j; i < n; ++i) {
      double sum = m[i * n + j];
      for (int64_t s = 0; s < j; ++s) sum -= m[i * n + s] * m[j * n + s];
      m[i * n + j] = i == j ? std::sqrt(sum < 1 ? 1 : sum) : sum / m[j * n + j];  // NaN stays
    }
    for (int64_t i = 0; i < j; ++i) m[i * n + j] = 0;
  }
}

// Writes lam = Psi^-1/2 for one noise row [D]; returns sum log Psi.
template <class T>
double inverse_scale(const T* noise, int64_t features, double* lam) {
  double log_noise = 0;
  for (int64_t d = 0; d < features; ++d) {
    const double psi = static_cast<double>(noise[d]);
    lam[d] = 1 / std::sqrt(psi);
    log_noise += std::log(psi);
  }
  return log_noise;
}

// Returns the stride of the scratch: rows a power of two apart would fall on the same lines of a cache.
template <class T>
int64_t white_stride(const Shape& shape) {
  return shape.padded<T>() + kWidth<T>;
}

// white [R, white_stride] = lam W, transposed; what pads it is left as it is.
template <class T>
void whiten(const Shape& shape, const T* loadings, const double* lam, double* white) {
  constexpr int V = kWidth<T>, W = kWidth<double>;
  const int64_t D = shape.features, R = shape.rank, P = white_stride<T>(shape);
  T lanes[V];
  int64_t d = 0;
  // V features of V ranks at a time, as long as the last row of a tile ends inside the array.
  for (; (d + V - 1) * R + ceil_div(R, V) * V <= D * R; d += V)
    for (int64_t r = 0; r < R; r += V) {
      alignas(kVectorBytes) Vec<T> tile[V];
      for (int i = 0; i < V; ++i) tile[i] = load(loadings + (d + i) * R + r);
      transpose<T>(tile);
      for (int i = 0; i < std::min<int64_t>(V, R - r); ++i) {
        store<T>(lanes, tile[i]);
        for (int j = 0; j < V; j += W)
          store<double>(white + (r + i) * P + d + j, load_wide(lanes + j) * load(lam + d + j));
      }
    }
  for (; d < D; ++d)
    for (int64_t r = 0; r < R; ++r) white[r * P + d] = lam[d] * static_cast<double>(loadings[d * R + r]);
}

// Writes the rows A = L^-1 W~^T, some features at a time, by forward substitution. N is the rank, or 0 where the
// compiler need not know it. inverse [R]: one over the diagonal of L; solved [R, W] is scratch. The loadings of the next
// component, or null, are asked for meanwhile.
template <class T, int N>
void solve_rows(const Shape& shape, const double* white, const double* chol, const double* inverse, T* rows,
                double* solved, const T* next) {
  constexpr int V = kWidth<T>, W = kWidth<double>;
  const int64_t R = N ? N : shape.rank, P = white_stride<T>(shape);
  Vec<double> registers[N ? N : 1];
  Vec<double>* const own = N ? registers : reinterpret_cast<Vec<double>*>(solved);
  for (int64_t d = 0; d < shape.padded<T>(); d += W) {
    T* const row = rows + d / V * shape.block_stride<T>() + d % V;
    if (next && d < shape.features) prefetch(next + d * R, W * R);
#pragma GCC unroll 12
    for (int64_t i = 0; i < R; ++i) {
      Vec<double> sum = load(white + i * P + d);
#pragma GCC unroll 12
      for (int64_t j = 0; j < i; ++j) sum -= chol[i * R + j] * own[j];
      own[i] = sum * inverse[i];
      store_narrow(row + (1 + i) * V, own[i]);
    }
  }
}

// Writes one component's rows and Cholesky factor; returns log|M|. It computes in double precision, because M of nearly
// collinear loadings would not stay definite otherwise; every row is rounded once, when it is written.
// white [R, white_stride] is scratch, zero in the padding; so are products [R, R], inverse [R] and
// solved [R, W], vectors of W doubles.
template <class T>
double factor_component(const Shape& shape, const T* mean, const T* loadings, const double* lam, T* rows, T* chol,
                        double* products, double* white, double* inverse, double* solved,
                        const T* next) {
  constexpr int V = kWidth<T>, kUnrolled = 12;
  const int64_t D = shape.features, R = shape.rank, stride = shape.block_stride<T>();
  std::memset(rows + (shape.blocks<T>() - 1) * stride, 0, stride * sizeof(T));  // the padding of the last block
  for (int64_t d = 0; d < D; d += V) {
    T* const row = rows + d / V * stride;
    const int64_t here = std::min<int64_t>(V, D - d);
    std::copy_n(mean + d, here, row);
    for (int64_t j = 0; j < here && shape.per_component; ++j) row[(1 + R) * V + j] = static_cast<T>(lam[d + j]);
  }
  if (R == 0) return 0;
  whiten(shape, loadings, lam, white);
  gram(white, R, shape.padded<T>(), white_stride<T>(shape), products);
  for (int64_t i = 0; i < R; ++i) products[i * R + i] += 1;
  cholesky(products, R);
  double log_diagonal = 0;
  for (int64_t i = 0; i < R; ++i) {
    log_diagonal += std::log(products[i * R + i]);
    inverse[i] = 1 / products[i * R + i];
  }
  for (int64_t i = 0; i < R * R; ++i) chol[i] = static_cast<T>(products[i]);
  if (R > kUnrolled)
    solve_rows<T, 0>(shape, white, products, inverse, rows, solved, next);
  else
    with_constant<kUnrolled>(R, [&]<int N>(std::integral_constant<int, N>) {
      solve_rows<T, N>(shape, white, products, inverse, rows, solved, next);
    });
  return 2 * log_diagonal;
}

// means [K, D], loadings [K, D, R], noise [D] or [K, D] -> rows (layout.h), chol [K, R, R], log_det [K]
template <class T, class ParallelFor>
void woodbury(const Shape& shape, const T* means, const T* loadings, const T* noise, T* rows, T* chol,
             T* log_det, ParallelFor&& parallel_for) {
  const int64_t D = shape.features, R = shape.rank;
  std::vector<double> shared_lam(D);
  const double shared_log_noise = shape.per_component ? 0 : inverse_scale(noise, D, shared_lam.data());
  parallel_for(shape.components, [&](int64_t begin, int64_t end) {
    std::vector<double> products(R * R), inverse(R), solved(R * kWidth<double>), white(R * white_stride<T>(shape));
    std::vector<double> own_lam(shape.per_component ? D : 0);
    for (int64_t k = begin; k < end; ++k) {
      const double log_noise =
          shape.per_component ? inverse_scale(noise + k * D, D, own_lam.data()) : shared_log_noise;
      const double* lam = shape.per_component ? own_lam.data() : shared_lam.data();
      log_det[k] = static_cast<T>(log_noise + factor_component(shape, means + k * D, loadings + k * D * R, lam,
                                                               rows + k * shape.component_stride<T>(),
                                                               chol + k * R * R, products.data(), white.data(),
                                                               inverse.data(), solved.data(),
                                                               k + 1 < end ? loadings + (k + 1) * D * R : nullptr));
    }
  });
}

}  // namespace mfa
