// Distances of a few tokens to one component, vectorised along the features.
#pragma once
#include <algorithm>
#include <limits>

#include "layout.h"

namespace mfa {

// Returns the second factor of t t, the product that is subtracted from |v|^2: t; 1 where |v|^2 overflowed. Such a
// component is far away on every processor, while inf - t^2 depends on whether t^2, which overflows too, is rounded
// before it is subtracted. Where t is not finite either, the difference is NaN.
template <class T>
Vec<T> once_if_infinite(Vec<T> square, Vec<T> t) {
  return square == std::numeric_limits<T>::infinity() ? broadcast<T>(1) : t;
}

// v [D padded] of one token for one component.
template <class T>
void residual(const Shape& shape, const T* x, const T* rows, const T* lam, T* v) {
  constexpr int V = kWidth<T>;
  const int64_t B = shape.blocks<T>(), stride = shape.block_stride<T>();
  for (int64_t b = 0; b < B; ++b) {
    const int64_t d = b * V;
    const T* block = rows + b * stride;
    Vec<T> token, scale;
    if (d + V <= shape.features) {
      token = load(x + d);
      scale = load(lam + d);
    } else {  // lam is zero past the last feature
      T tail[V] = {}, tail_scale[V] = {};
      for (int64_t j = 0; d + j < shape.features; ++j) tail[j] = x[d + j], tail_scale[j] = lam[d + j];
      token = load(tail);
      scale = load(tail_scale);
    }
    if (shape.per_component) scale = load(block + (1 + shape.rank) * V);
    store<T>(v + d, (token - load(block)) * scale);
  }
}

// t [G, R] at r, ..., r + M - 1: M rows of A against G tokens, M x G sums in registers.
template <class T, int G, int M>
void project_rows(const Shape& shape, const T* rows, const T* v, int64_t r, T* t) {
  constexpr int V = kWidth<T>;
  const int64_t B = shape.blocks<T>(), stride = shape.block_stride<T>(), padded = shape.padded<T>();
  Vec<T> sum[M][G] = {};
  for (int64_t b = 0; b < B; ++b) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<T> a = load(rows + b * stride + (1 + r + m) * V);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[m][g] += a * load(v + g * padded + b * V);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int g = 0; g < G; ++g) t[g * shape.rank + r + m] = horizontal_sum<T>(sum[m][g]);
}

// t [G, R] = A v for G tokens of one component; v [G, D padded]
template <class T, int G>
void project(const Shape& shape, const T* rows, const T* v, T* t) {
  constexpr int M = G > 4 ? 2 : 4;  // M G sums in registers
  int64_t r = 0;
  for (; r + M <= shape.rank; r += M) project_rows<T, G, M>(shape, rows, v, r, t);
  for (; r < shape.rank; ++r) project_rows<T, G, 1>(shape, rows, v, r, t);
}

// out [G] = |v|^2 - |t|^2 for G tokens, each x[g] [D], and one component; v [G, D padded] and t [G, R] are scratch.
template <class T, int G>
void distances(const Shape& shape, const T* const* x, const T* rows, const T* lam, T* v, T* t, T* out) {
  const int64_t padded = shape.padded<T>();
  for (int g = 0; g < G; ++g) residual(shape, x[g], rows, lam, v + g * padded);
  project<T, G>(shape, rows, v, t);
  for (int g = 0; g < G; ++g) {
    Vec<T> square = {};
    for (int64_t d = 0; d < padded; d += kWidth<T>) square += load(v + g * padded + d) * load(v + g * padded + d);
    out[g] = horizontal_sum<T>(square);
    for (const T* own = t + g * shape.rank; own < t + (g + 1) * shape.rank; ++own)
      out[g] -= *own * (out[g] == std::numeric_limits<T>::infinity() ? T(1) : *own);
  }
}

}  // namespace mfa
