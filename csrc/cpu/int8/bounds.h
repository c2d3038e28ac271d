// Bounds of the logits of a panel of tokens, from |v|^2 in float and t in int8.
//
//   |v|^2 - |t|^2 in [low, high],  | |t^| - |t| | <= e = |B| |y - y^| + |E| |y^| + rounding
// Never materialised: v, t, and the bounds of more than one component and panel.
// Floor     (1 + R / 4) D multiply-adds a pair, R / 4 of them in int8, where a GEMM has (R + 1) D.
//           Measured by bench/scan_rates.py. Derived in mfa_kernels/ops/scan/README.md.
#pragma once
#include "tokens.h"

namespace mfa {

constexpr int kSquares = kRegisters >= 32 ? 12 : 5;  // components whose |v|^2 are summed together

// out [C, kLanes] = |v|^2 of C neighbouring components.
template <int C, bool PerComponent>
void squares_tile(const Int8Rows& rows, int64_t k, const float* y, float* out) {
  constexpr int V = kWidth<float>, NV = kTokenVectors;
  const int64_t P = rows.padded(), next = rows.mean_rows() * P;
  const float* means = rows.means_of(k);
  Floats total[C][NV] = {};
  for (int64_t start = 0; start < P; start += kFlush) {
    const int64_t stop = std::min<int64_t>(P, start + kFlush);
    Floats sum[C][NV] = {};
    for (int64_t d = start; d < stop; ++d) {
      Floats token[NV];
      for (int n = 0; n < NV; ++n) token[n] = load(y + d * kLanes + n * V);
#pragma GCC unroll 12
      for (int c = 0; c < C; ++c) {
        const Floats mean = broadcast(means[c * next + d]);
#pragma GCC unroll 2
        for (int n = 0; n < NV; ++n) {
          Floats v = token[n] - mean;
          if (PerComponent) v *= broadcast(means[c * next + P + d]);
          sum[c][n] += v * v;
        }
      }
    }
    for (int c = 0; c < C; ++c)
      for (int n = 0; n < NV; ++n) total[c][n] += sum[c][n];
  }
  for (int c = 0; c < C; ++c)
    for (int n = 0; n < NV; ++n) store<float>(out + c * kLanes + n * V, total[c][n]);
}

// out [kLanes] += |t^|^2 over the rows r, ..., r + G - 1 of component k.
template <int G>
void products_tile(const Int8Rows& rows, int64_t k, int64_t r, const uint8_t* quads, const float* quanta, float* out) {
  constexpr int V = kWidth<float>, NV = kTokenVectors;
  const int64_t R = rows.shape.rank, count = rows.padded() / 4;
  const int8_t* row = rows.rows_of(k) + 4 * r;
  const int32_t* starts = rows.starts_of(k) + r;
  Ints sum[G][NV];
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < NV; ++n) sum[g][n] = broadcast(starts[g]);
  for (int64_t i = 0; i < count; ++i, row += 4 * R, quads += 4 * kLanes) {
    Ints token[NV];
    for (int n = 0; n < NV; ++n) std::memcpy(&token[n], quads + n * sizeof(Ints), sizeof(Ints));
#pragma GCC unroll 12
    for (int g = 0; g < G; ++g) {
      int32_t four;
      std::memcpy(&four, row + 4 * g, 4);
      const Ints a = broadcast(four);
#pragma GCC unroll 2
      for (int n = 0; n < NV; ++n) sum[g][n] = dot4(sum[g][n], token[n], a);
    }
  }
  const float *own = rows.terms_of(k) + r, *offsets = own + R;
  for (int n = 0; n < NV; ++n) {
    Floats square = load(out + n * V);
    for (int g = 0; g < G; ++g) {
      const Floats t = to_float(sum[g][n]) * own[g] * load(quanta + n * V) - offsets[g];
      square += t * t;
    }
    store<float>(out + n * V, square);
  }
}

// Bounds of the logits of one component, low and high [kLanes].
struct LogitBounds {
  float low[kLanes], high[kLanes];
};

class Int8Bounds {
 public:
  explicit Int8Bounds(const Int8Rows& rows) : rows_(rows) {
    passes_ = std::max<int64_t>(1, ceil_div(rows.shape.rank, kMaxGroup));
    group_ = ceil_div(rows.shape.rank, passes_);
    const int64_t P = rows.padded();
    // A sum of float is as long as a chain of kFlush and of the sums of those; 20 more are single operations.
    share_ = static_cast<float>(1.01 * (std::min<int64_t>(P, kFlush) + ceil_div(P, kFlush) + 20) * kUnit) + kSlack;
    turn_ = 1.01f * static_cast<float>(rows.shape.rank + 8) * kUnit;
  }

  // squares [kSquares, kLanes] of components k, ..., k + count - 1; count is kSquares or 1
  void squares(int64_t k, int64_t count, const float* y, float* out) const {
    const bool own = rows_.shape.per_component;
    if (count == 1) return (own ? squares_tile<1, true> : squares_tile<1, false>)(rows_, k, y, out);
    if (!own) return squares_tile<kSquares, false>(rows_, k, y, out);
    constexpr int kOwn = kSquares % 2 ? kSquares : kSquares / 2;  // a means and a ratio each: half as many pointers
    for (int64_t c = 0; c < count; c += kOwn) squares_tile<kOwn, true>(rows_, k + c, y, out + c * kLanes);
  }

  // Asks for a part of what belongs to component k, one of `turns`, before it is needed.
  void ahead(int64_t k, int64_t turn, int64_t turns) const {
    auto part = [&](const auto* from, int64_t count) {
      prefetch(from + count * turn / turns, count * (turn + 1) / turns - count * turn / turns);
    };
    part(rows_.rows_of(k), rows_.padded() * rows_.shape.rank);
    part(rows_.means_of(k), rows_.padded() * rows_.mean_rows());
  }

  // From the squares [kLanes] of component k.
  void operator()(int64_t k, float constant, const float* squares, const uint8_t* quads, const PanelNorms& norms,
                  LogitBounds& out) const {
    constexpr int V = kWidth<float>;
    const int64_t R = rows_.shape.rank;
    float explained[kLanes] = {};
    for (int64_t r = 0, count; r < R; r += count) {
      count = std::min(group_, R - r);
      with_constant<kMaxGroup>(count, [&]<int G>(std::integral_constant<int, G>) {
        products_tile<G>(rows_, k, r, quads, norms.quantum, explained);
      });
    }
    const float* own = rows_.terms_of(k) + 2 * R;
    const float margin = std::isfinite(constant) ? 8 * kUnit * std::abs(constant) : 0;  // -inf where a weight is 0
    for (int n = 0; n < kLanes; n += V) {
      const Floats square = load(squares + n), root = sqrt(load(explained + n));
      const Floats e = own[0] * load(norms.error + n) + own[1] * load(norms.norm + n) + own[2] + root * turn_;
      const Floats off = (load(norms.reach + n) + 1.1f * kUnit * own[3]) * own[4];
      const Floats width = square * share_ + off * off * (2 / kSlack);
      const Floats most = root + e;
      Floats least = root - e;
      least = least > 0 ? least : Floats{};
      store<float>(out.high + n, (constant + margin) - (square - width - most * most * (1 + 16 * kUnit)) / 2);
      store<float>(out.low + n, (constant - margin) - (square + width - least * least * (1 - 16 * kUnit)) / 2);
    }
  }

 private:
  // 2 |v| r <= kSlack |v|^2 + r^2 / kSlack, for what the rounding r of v does to |v|^2.
  static constexpr float kSlack = 0x1p-20f;
  const Int8Rows& rows_;
  int64_t passes_, group_;
  float share_, turn_;
};

}  // namespace mfa
