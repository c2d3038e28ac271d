// Mahalanobis distances of a panel of tokens, one to a SIMD lane, to neighbouring components.
//
// Never materialised: v and t. A micro-tile of a few components by two SIMD vectors of tokens holds |v|^2 and the R
//           values of t in registers.
// Exact because x - mu is formed before anything is scaled or squared: the rounding error is that of the true distance,
//           never that of |x|^2 - 2 x.mu + |mu|^2, wherever the origin lies. Sums are flushed every kFlush features.
#pragma once
#include <algorithm>
#include <utility>

#include "residual.h"

namespace mfa {

constexpr int kTokenVectors = 2;                      // SIMD vectors of tokens per micro-tile
constexpr int kMaxGroup = kRegisters >= 32 ? 12 : 5;  // rows of A per pass over the features
constexpr int64_t kFlush = 64;                        // features between flushes of the sums
template <class T>
constexpr int kPanel = kTokenVectors * kWidth<T>;     // tokens per panel

// Transposes one panel of tokens: x [N, D] -> out [D padded, kPanel], zeros where there is no token.
template <class T>
void pack_panel(const Shape& shape, const T* x, int64_t tokens, T* out) {
  const int64_t D = shape.features;
  std::fill(out + D * kPanel<T>, out + shape.padded<T>() * kPanel<T>, T(0));
  for (int64_t d = 0; d < D; ++d) {
    T* row = out + d * kPanel<T>;
    for (int64_t n = 0; n < tokens; ++n) row[n] = x[n * D + d];
    std::fill(row + tokens, row + kPanel<T>, T(0));
  }
}

// The rows that come next, which are asked for while a tile is computed: a part of them, one of `turns`.
template <class T>
struct Ahead {
  const T* rows = nullptr;
  int64_t turn = 0, turns = 1;
};

// |v|^2 - |t|^2 over `G` rows of A for C neighbouring components and one panel of tokens, features blocked by V.
//   rows   component c starts at rows + c * component_stride
//   x      [D padded, kPanel]
//   lam    [D padded], zeros past the last feature; not read when the noise is per component
//   first  index of the first row of A in this pass; |v|^2 itself is added when it is 0
//   out    [C, kPanel], accumulated into
template <class T, int C, int G, bool PerComponent>
void micro_tile(const Shape& shape, const T* rows, const T* x, const T* lam, int64_t first, T* out,
                const Ahead<T>& ahead) {
  constexpr int V = kWidth<T>, NV = kTokenVectors;
  const int64_t stride = shape.block_stride<T>(), component_stride = shape.component_stride<T>();
  const int64_t blocks = shape.blocks<T>();
  Vec<T> square[C][NV] = {}, lost[C][NV] = {}, total[C][G > 0 ? G : 1][NV] = {};
  for (int64_t start = 0; start < blocks; start += kFlush / V) {
    const int64_t stop = std::min<int64_t>(blocks, start + kFlush / V);
    Vec<T> s[C][NV] = {}, t[C][G > 0 ? G : 1][NV] = {};
    for (int64_t b = start; b < stop; ++b) {
      const T* block = rows + b * stride;
      const T* panel = x + b * V * kPanel<T>;
      for (int c = 0; ahead.rows && b % ahead.turns == ahead.turn && c < C; ++c)
        prefetch(ahead.rows + c * component_stride + b * stride, stride);
      for (int j = 0; j < V; ++j, panel += kPanel<T>) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const T* row = block + c * component_stride + j;
          const T scale = PerComponent ? row[(1 + shape.rank) * V] : lam[b * V + j];
          Vec<T> v[NV];
#pragma GCC unroll 2
          for (int n = 0; n < NV; ++n) {
            v[n] = (load(panel + n * V) - row[0]) * scale;
            s[c][n] += v[n] * v[n];
          }
#pragma GCC unroll 16
          for (int g = 0; g < G; ++g) {
            const Vec<T> a = broadcast(row[(1 + g) * V + first * V]);
#pragma GCC unroll 2
            for (int n = 0; n < NV; ++n) t[c][g][n] += a * v[n];
          }
        }
      }
    }
    for (int c = 0; c < C; ++c)
      for (int n = 0; n < NV; ++n) {
        // Compensated (Kahan): |v|^2 is the largest sum, and with it the error no longer grows with D.
        const Vec<T> term = s[c][n] - lost[c][n], sum = square[c][n] + term;
        lost[c][n] = (sum - square[c][n]) - term;
        square[c][n] = sum;
        for (int g = 0; g < G; ++g) total[c][g][n] += t[c][g][n];
      }
  }
  for (int c = 0; c < C; ++c)
    for (int n = 0; n < NV; ++n) {
      Vec<T> distance = load(out + c * kPanel<T> + n * V);
      if (first == 0) distance += square[c][n];
      for (int g = 0; g < G; ++g) distance -= total[c][g][n] * once_if_infinite<T>(distance, total[c][g][n]);
      store<T>(out + c * kPanel<T> + n * V, distance);
    }
}

template <class T>
using MicroTile = void (*)(const Shape&, const T*, const T*, const T*, int64_t, T*, const Ahead<T>&);

// Components per micro-tile: with few rows, several components share the loads of x and keep the FMA units busy.
constexpr int components_per_tile(int group) {
  return std::max(1, std::min(kRegisters >= 32 ? 4 : 2, (kMaxGroup + 1) / (group + 1)));
}

template <class T, bool Wide, bool PerComponent, int... G>
MicroTile<T> pick_micro_tile(int64_t group, std::integer_sequence<int, G...>) {
  static constexpr MicroTile<T> table[] = {&micro_tile<T, Wide ? components_per_tile(G) : 1, G, PerComponent>...};
  return table[group];
}

// Mahalanobis distances of a few neighbouring components to a panel, the rank split into passes that fit registers.
template <class T>
class PanelDistance {
 public:
  explicit PanelDistance(const Shape& shape) : shape_(shape) {
    passes_ = std::max<int64_t>(1, ceil_div(shape.rank, kMaxGroup));
    group_ = ceil_div(shape.rank, passes_);
    tile_ = passes_ == 1 ? components_per_tile(static_cast<int>(group_)) : 1;
    wide_ = pick(group_, true);
    single_ = pick(group_, false);
  }
  int64_t tile() const { return tile_; }

  // out [count, kPanel] for components k, ..., k + count - 1; count is tile() or 1
  void operator()(const T* rows, const T* x, const T* lam, int64_t count, T* out, const Ahead<T>& ahead) const {
    std::fill(out, out + count * kPanel<T>, T(0));
    for (int64_t first = 0, pass = 0; pass < passes_; ++pass) {
      const int64_t group = std::min(group_, shape_.rank - first);
      const MicroTile<T> kernel = group < group_ ? pick(group, false) : count == 1 ? single_ : wide_;
      kernel(shape_, rows, x, lam, first, out, first == 0 ? ahead : Ahead<T>{});
      first += group;
    }
  }

 private:
  MicroTile<T> pick(int64_t group, bool wide) const {
    using Groups = std::make_integer_sequence<int, kMaxGroup + 1>;
    if (shape_.per_component)
      return wide ? pick_micro_tile<T, true, true>(group, Groups{}) : pick_micro_tile<T, false, true>(group, Groups{});
    return wide ? pick_micro_tile<T, true, false>(group, Groups{}) : pick_micro_tile<T, false, false>(group, Groups{});
  }

  Shape shape_;
  int64_t passes_, group_, tile_;
  MicroTile<T> wide_, single_;
};

}  // namespace mfa
