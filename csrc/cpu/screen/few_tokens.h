// Marginal distances of up to four tokens, vectorised along the p coordinates.
//
// The rows {m, B} of a component stream past once, at the speed of memory: a panel of tokens, one to a SIMD lane, would
// be almost empty.
// Never materialised: anything per component but its bounds.
// Exact     as the panels are: no sum in a lane is longer than kFlush before it is added to another.
// Floor     K p (R + 1) + D p values read. Measured by bench/bench_screen.py.
#pragma once
#include <type_traits>
#include <vector>

#include "../panel_distances.h"
#include "screen.h"

namespace mfa {

constexpr int64_t kFewScreened = 4;  // five tokens cost less in a panel, although it is mostly empty

// Calls body with the number of tokens to a panel as a constant.
template <class T, class Body>
void with_lanes_of(int64_t lanes, Body&& body) {
  if (lanes == 1) return body(std::integral_constant<int, 1>{});
  if (lanes == 2) return body(std::integral_constant<int, 2>{});
  if (lanes == 4) return body(std::integral_constant<int, 4>{});
  body(std::integral_constant<int, kPanel<T>>{});
}

// sums [M, L, V] += rows r, ..., r + M - 1 of B times b [L, p], lane by lane, over the blocks [first, last); block 0
// begins the sums.
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

// Computes the marginal distances of L tokens, each y[n] [p], to a component from its rows {m, B}.
template <class T, int L>
struct FewDistances {
  static constexpr int V = kWidth<T>, M = std::max(1, std::min(4, kRegisters / 2 / L));
  int64_t rank, coordinates, count;  // count of sums: those of B first, |b|^2 last
  std::vector<T> b, sums, scalars;

  explicit FewDistances(const Shape& marginal)
      : rank(marginal.rank), coordinates(marginal.features), count(ceil_div((rank + 1) * L, V) * V),
        b(L * coordinates), sums(count * V), scalars(count) {}

  void operator()(const T* rows, const T* const (&y)[L], T* distances) {
    const int64_t R = rank, p = coordinates, row_count = R + 1, blocks = p / V;
    for (int64_t first = 0; first < blocks; first += kFlush) {
      const int64_t last = std::min(blocks, first + kFlush);
      Vec<T> square[L] = {};
      for (int64_t i = first; i < last; ++i)
        for (int n = 0; n < L; ++n) {
          const Vec<T> v = load(y[n] + i * V) - load(rows + i * row_count * V);
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

// Writes bounds [K, L] of the components [k0, k1) for tokens y [L, p], and keeps the largest of each token.
template <class T, int L>
void bounds_of_few(const Screen<T>& screen, int64_t k0, int64_t k1, const T* y, const T* norms, T* bounds, T* largest,
                   int32_t* owners) {
  const int64_t size = screen.coordinates() * (screen.marginal.rank + 1);
  FewDistances<T, L> distances_of(screen.marginal);
  T distances[L];
  const T* tokens[L];
  for (int n = 0; n < L; ++n) tokens[n] = y + n * screen.coordinates();
  for (int64_t k = k0; k < k1; ++k) {
    const T* rows = screen.rows_of(k);
    // A component's rows are read by jumps, which hide from the hardware that all of them are one stream.
    for (int64_t i = 0; i < size && k + 1 < k1; i += 64 / sizeof(T)) __builtin_prefetch(rows + size + i);
    distances_of(rows, tokens, distances);
    screen.bound(k, distances, norms, L, bounds + k * L, largest, owners);
  }
}

}  // namespace mfa
