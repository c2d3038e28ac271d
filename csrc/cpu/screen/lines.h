// The first level of screening: distances to every component along its line, one direction.
//
// Symbols   u_k [p], a_k = u_k . m_k, and w_k = 1 / (variance of u_k . y under component k), so that
//             w_k (u_k . y - a_k)^2 <= F_k
//           for any u_k: it is the Mahalanobis distance of a projection of y. With u_k = S_k^-1 (m_k - middle), the
//           discriminant between component k and the middle of them all, it rules most components out for most tokens,
//           for p multiply-adds instead of p (R + 3). Its rounding is within the slack of the bound
//           (mfa_kernels/ops/screen/README.md).
// Exact     no sum in a lane is longer than kFlush before it is added to another; and the value of a pair does not
//           depend on the other pairs that it is computed with.
// Floor     N K p vector operations; for one token, one read of the lines. Measured by bench/bench_screen.py.
#pragma once
#include "few_tokens.h"

namespace mfa {

constexpr int64_t kLineComponents = 64;  // their lines stay in L1 while panels pass

// Calls emit(component, distances [kPanel]) for the lines of components [k0, k1) and one panel y [p, kPanel].
template <class T, class Emit>
void scan_lines(const Screen<T>& screen, int64_t k0, int64_t k1, const T* y, Emit&& emit) {
  constexpr int V = kWidth<T>, NV = kTokenVectors, J = kRegisters >= 32 ? 8 : 4;
  const int64_t p = screen.coordinates();
  for (int64_t k = k0; k < k1; k += J) {
    const T* lines[J];
    for (int i = 0; i < J; ++i) lines[i] = screen.lines + std::min(k + i, k1 - 1) * p;
    Vec<T> total[J][NV] = {};
    for (int64_t start = 0; start < p; start += kFlush) {
      Vec<T> sum[J][NV] = {};
      for (int64_t j = start; j < std::min(p, start + kFlush); ++j)
#pragma GCC unroll 8
        for (int i = 0; i < J; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sum[i][v] += load(y + j * kPanel<T> + v * V) * lines[i][j];
      for (int i = 0; i < J; ++i)
        for (int v = 0; v < NV; ++v) total[i][v] += sum[i][v];
    }
    for (int64_t i = 0; i < std::min<int64_t>(J, k1 - k); ++i) {
      T distances[kPanel<T>];
      for (int v = 0; v < NV; ++v) {
        const Vec<T> z = total[i][v] - screen.offsets[k + i];
        store<T>(distances + v * V, z * z * screen.shares[k + i]);
      }
      emit(k + i, distances);
    }
  }
}

// Does the same for L tokens y [L, p], vectorised along the coordinates.
template <class T, int L, class Emit>
void scan_lines_of_few(const Screen<T>& screen, int64_t k0, int64_t k1, const T* y, Emit&& emit) {
  constexpr int V = kWidth<T>;
  const int64_t p = screen.coordinates(), blocks = p / V;
  std::vector<T> sums(L * V * V);
  T products[L][V];
  for (int64_t k = k0; k < k1; k += V) {
    const int64_t count = std::min<int64_t>(V, k1 - k);
    for (int64_t c = 0; c < count; ++c) {
      const T* line = screen.lines + (k + c) * p;
      Vec<T> total[L] = {};
      for (int64_t first = 0; first < blocks; first += kFlush) {
        Vec<T> sum[L] = {};
        for (int64_t i = first; i < std::min(blocks, first + kFlush); ++i)
          for (int n = 0; n < L; ++n) sum[n] += load(line + i * V) * load(y + n * p + i * V);
        for (int n = 0; n < L; ++n) total[n] += sum[n];
      }
      for (int n = 0; n < L; ++n) store<T>(sums.data() + (n * V + c) * V, total[n]);
    }
    for (int n = 0; n < L; ++n) sums_of_lanes(sums.data() + n * V * V, products[n]);
    for (int64_t c = 0; c < count; ++c) {
      T distances[L];
      for (int n = 0; n < L; ++n) {
        const T z = products[n][c] - screen.offsets[k + c];
        distances[n] = z * z * screen.shares[k + c];
      }
      emit(k + c, distances);
    }
  }
}

// Writes the distances [count] of one token y [p] along the lines of at most V components, in any order.
template <class T>
void distances_on_lines(const Screen<T>& screen, const int32_t* components, int64_t count, const T* y, T* distances) {
  constexpr int V = kWidth<T>;
  const int64_t p = screen.coordinates(), blocks = p / V;
  T sums[V * V];
  for (int64_t i = 0; i < V; ++i) {
    const T* line = screen.lines + components[std::min(i, count - 1)] * p;
    Vec<T> total = {};
    for (int64_t first = 0; first < blocks; first += kFlush) {
      Vec<T> sum = {};
      for (int64_t b = first; b < std::min(blocks, first + kFlush); ++b) sum += load(line + b * V) * load(y + b * V);
      total += sum;
    }
    store<T>(sums + i * V, total);
  }
  sums_of_lanes(sums, distances);
  for (int64_t i = 0; i < count; ++i) {
    const T z = distances[i] - screen.offsets[components[i]];
    distances[i] = z * z * screen.shares[components[i]];
  }
}

}  // namespace mfa
