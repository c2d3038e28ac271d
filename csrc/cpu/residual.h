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

constexpr int64_t kRowsAtOnce = 16;       // rows of A whose sums are held while features pass by
constexpr int64_t kFeaturesAtOnce = 192;  // of a few tokens and of the rows of A: they stay in the first cache

// The V features of x [D] from d on, zeros past the last one.
template <class T>
Vec<T> last_features(const T* x, int64_t d, int64_t features) {
  T tail[kWidth<T>] = {};
  std::copy(x + d, x + features, tail);
  return load(tail);
}

// v [D/V, G, V] of G tokens, each x[g] [D], for one component, over the blocks [begin, end), and their squares, which
// are added to.
template <class T, int G>
void residuals(const Shape& shape, const T* const* x, const T* rows, const T* lam, int64_t begin, int64_t end, T* v,
               Vec<T>* squares) {
  constexpr int V = kWidth<T>;
  const int64_t stride = shape.block_stride<T>(), D = shape.features, own_scale = (1 + shape.rank) * V;
  const T* token[G];
  Vec<T> square[G];
  for (int g = 0; g < G; ++g) token[g] = x[g], square[g] = squares[g];
  auto add = [&](int64_t b, Vec<T> scale, auto&& features_of) {
    const Vec<T> mean = load(rows + b * stride);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Vec<T> own = (features_of(token[g]) - mean) * scale;
      store<T>(v + (b * G + g) * V, own);
      square[g] += own * own;
    }
  };
  const T* scales = shape.per_component ? rows + own_scale : lam;
  const int64_t next = shape.per_component ? stride : V, whole = std::min(end, D / V);
  for (int64_t b = begin; b < whole; ++b)
    add(b, load(scales + b * next), [&](const T* own) { return load(own + b * V); });
  for (int64_t b = whole; b < end; ++b)  // lam is zero past the last feature
    add(b, shape.per_component ? load(scales + b * next) : last_features(lam, b * V, D),
        [&](const T* own) { return last_features(own, b * V, D); });
  for (int g = 0; g < G; ++g) squares[g] = square[g];
}

// Adds M rows of A against G tokens over the blocks [begin, end) to sums [M, G].
template <class T, int G, int M>
void add_products(const Shape& shape, const T* rows, const T* v, int64_t begin, int64_t end, Vec<T>* sums) {
  constexpr int V = kWidth<T>;
  const int64_t stride = shape.block_stride<T>();
  Vec<T> sum[M * G];
  for (int i = 0; i < M * G; ++i) sum[i] = sums[i];
  for (int64_t b = begin; b < end; ++b) {
    Vec<T> a[M];
    for (int m = 0; m < M; ++m) a[m] = load(rows + b * stride + m * V);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Vec<T> own = load(v + (b * G + g) * V);
      for (int m = 0; m < M; ++m) sum[m * G + g] += a[m] * own;
    }
  }
  for (int i = 0; i < M * G; ++i) sums[i] = sum[i];
}

// v [D/V, G, V] and t [G, R] = A v of G tokens, each x[g] [D], for one component, and squares [G]: |v|^2, by lanes.
template <class T, int G>
void project(const Shape& shape, const T* const* x, const T* rows, const T* lam, T* v, T* t, Vec<T>* squares) {
  constexpr int V = kWidth<T>, M = G <= 4 ? 4 : kRegisters >= 32 ? 2 : 1;  // M G sums in registers
  constexpr int64_t step = std::max<int64_t>(1, kFeaturesAtOnce / V);
  const int64_t B = shape.blocks<T>(), R = shape.rank;
  for (int g = 0; g < G; ++g) squares[g] = Vec<T>{};
  for (int64_t first = 0; first == 0 || first < R; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, R - first);
    const T* own = rows + (1 + first) * V;
    Vec<T> sums[kRowsAtOnce * G];
    T flat[kRowsAtOnce * G];
    for (int64_t i = 0; i < ceil_div(count * G, V) * V; ++i) sums[i] = Vec<T>{};
    for (int64_t b = 0; b < B; b += step) {
      const int64_t end = std::min(B, b + step);
      if (first == 0) residuals<T, G>(shape, x, rows, lam, b, end, v, squares);
      int64_t r = 0;
      for (; r + M <= count; r += M) add_products<T, G, M>(shape, own + r * V, v, b, end, sums + r * G);
      for (; r < count; ++r) add_products<T, G, 1>(shape, own + r * V, v, b, end, sums + r * G);
    }
    for (int64_t i = 0; i < count * G; i += V) sums_of_lanes<T>(reinterpret_cast<const T*>(sums + i), flat + i);
    for (int64_t r = 0; r < count; ++r)
      for (int g = 0; g < G; ++g) t[g * R + first + r] = flat[r * G + g];
  }
}

template <class T, int G>
void project(const Shape& shape, const T* const* x, const T* rows, const T* lam, T* v, T* t) {
  Vec<T> squares[G];
  project<T, G>(shape, x, rows, lam, v, t, squares);
}

// out [G] = |v|^2 - |t|^2 for G tokens, each x[g] [D], and one component; v [G, D padded] and t [G, R] are scratch.
template <class T, int G>
void distances(const Shape& shape, const T* const* x, const T* rows, const T* lam, T* v, T* t, T* out) {
  Vec<T> squares[G];
  project<T, G>(shape, x, rows, lam, v, t, squares);
  for (int g = 0; g < G; ++g) {
    out[g] = horizontal_sum<T>(squares[g]);
    for (const T* own = t + g * shape.rank; own < t + (g + 1) * shape.rank; ++own)
      out[g] -= *own * (out[g] == std::numeric_limits<T>::infinity() ? T(1) : *own);
  }
}

}  // namespace mfa
