// One component and a few tokens, vectorised along the features: what the pairs and the scan of a few tokens share.
#pragma once
#include <algorithm>

#include "layout.h"

namespace mfa {

// v [D padded] of one token for one component.
template <class T>
void residual(const Shape& shape, const T* x, const T* rows, const T* lam, const T* center, T* v) {
  constexpr int V = kWidth<T>;
  const int64_t B = shape.blocks<T>(), stride = shape.block_stride<T>();
  for (int64_t b = 0; b < B; ++b) {
    const int64_t d = b * V;
    const T* block = rows + b * stride;
    Vec<T> value = {};
    if (d + V <= shape.features) {
      value = (load(x + d) - load(center + d)) * load(lam + d);
    } else {
      T tail[V] = {};
      for (int64_t j = 0; d + j < shape.features; ++j) tail[j] = (x[d + j] - center[d + j]) * lam[d + j];
      value = load(tail);
    }
    value -= load(block);
    if (shape.per_component) value *= load(block + (1 + shape.rank) * V);
    store<T>(v + d, value);
  }
}

// t [G, R] = A v for G tokens of one component; v [G, D padded]
template <class T, int G>
void project(const Shape& shape, const T* rows, const T* v, T* t) {
  constexpr int V = kWidth<T>;
  const int64_t B = shape.blocks<T>(), stride = shape.block_stride<T>(), padded = shape.padded<T>();
  for (int64_t r0 = 0; r0 < shape.rank; r0 += 4) {
    const int64_t r1 = std::min(shape.rank, r0 + 4);
    Vec<T> sum[4][G] = {};
    for (int64_t b = 0; b < B; ++b)
      for (int64_t r = r0; r < r1; ++r) {
        const Vec<T> a = load(rows + b * stride + (1 + r) * V);
        for (int g = 0; g < G; ++g) sum[r - r0][g] += a * load(v + g * padded + b * V);
      }
    for (int64_t r = r0; r < r1; ++r)
      for (int g = 0; g < G; ++g) t[g * shape.rank + r] = horizontal_sum<T>(sum[r - r0][g]);
  }
}

// |v|^2 - |t|^2 for G tokens x [G, D] of one component; v [G, D padded] and t [G, R] are scratch.
template <class T, int G>
void distances(const Shape& shape, const T* x, const T* rows, const T* lam, const T* center, T* v, T* t, T* out) {
  const int64_t padded = shape.padded<T>();
  for (int g = 0; g < G; ++g) residual(shape, x + g * shape.features, rows, lam, center, v + g * padded);
  project<T, G>(shape, rows, v, t);
  for (int g = 0; g < G; ++g) {
    Vec<T> square = {};
    for (int64_t d = 0; d < padded; d += kWidth<T>) square += load(v + g * padded + d) * load(v + g * padded + d);
    out[g] = horizontal_sum<T>(square);
    for (int64_t r = 0; r < shape.rank; ++r) out[g] -= t[g * shape.rank + r] * t[g * shape.rank + r];
  }
}

}  // namespace mfa
