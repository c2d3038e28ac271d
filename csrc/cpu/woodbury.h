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

// Writes one component's rows and Cholesky factor; returns log|M|. It computes in double precision, because M of nearly
// collinear loadings would not stay definite otherwise; every row is rounded once, when it is written.
// white [R, white_stride] is scratch, zero in the padding.
template <class T>
double factor_component(const Shape& shape, const T* mean, const T* loadings, const double* lam, T* rows, T* chol,
                        double* gram, double* white) {
  using WideVec = typename Wide<T>::Vec;
  constexpr int V = kWidth<T>;
  const int64_t D = shape.features, R = shape.rank, B = shape.blocks<T>(), P = white_stride<T>(shape);
  const int64_t stride = shape.block_stride<T>();
  auto wide = [](const double* from) {
    WideVec v;
    std::memcpy(&v, from, sizeof v);
    return v;
  };
  std::memset(rows + (B - 1) * stride, 0, stride * sizeof(T));  // the padding of the last block
  for (int64_t d = 0; d < D; ++d) {
    T* row = rows + d / V * stride + d % V;
    row[0] = mean[d];
    if (shape.per_component) row[(1 + R) * V] = static_cast<T>(lam[d]);
    for (int64_t r = 0; r < R; ++r) white[r * P + d] = lam[d] * static_cast<double>(loadings[d * R + r]);
  }
  if (R == 0) return 0;
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      WideVec sum = {};
      for (int64_t d = 0; d < B * V; d += V) sum += wide(white + i * P + d) * wide(white + j * P + d);
      double total = i == j ? 1 : 0;
      for (int lane = 0; lane < V; ++lane) total += sum[lane];
      gram[i * R + j] = total;
    }
  cholesky(gram, R);
  double log_diagonal = 0;
  for (int64_t i = 0; i < R; ++i) log_diagonal += std::log(gram[i * R + i]);
  for (int64_t i = 0; i < R * R; ++i) chol[i] = static_cast<T>(gram[i]);
  // A = L^-1 W~^T by forward substitution, V features at a time.
  std::vector<WideVec> solved(R);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t i = 0; i < R; ++i) {
      solved[i] = wide(white + i * P + b * V);
      for (int64_t j = 0; j < i; ++j) solved[i] -= gram[i * R + j] * solved[j];
      solved[i] /= gram[i * R + i];
      store<T>(rows + b * stride + (1 + i) * V, __builtin_convertvector(solved[i], Vec<T>));
    }
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
    std::vector<double> gram(R * R), white(R * white_stride<T>(shape)), own_lam(shape.per_component ? D : 0);
    for (int64_t k = begin; k < end; ++k) {
      const double log_noise =
          shape.per_component ? inverse_scale(noise + k * D, D, own_lam.data()) : shared_log_noise;
      const double* lam = shape.per_component ? own_lam.data() : shared_lam.data();
      log_det[k] = static_cast<T>(log_noise + factor_component(shape, means + k * D, loadings + k * D * R, lam,
                                                               rows + k * shape.component_stride<T>(),
                                                               chol + k * R * R, gram.data(), white.data()));
    }
  });
}

}  // namespace mfa
