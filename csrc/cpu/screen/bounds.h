// Bounds of the logits of many components: of a panel of tokens, one to a lane, or of a few tokens along features.
//
// Never materialised: anything per component but its bounds.
// Floor     (D + R p) / 4 products of four a pair; for a few tokens D + R p bytes a component.
//           Measured by bench/bench_screen.py.
#pragma once
#include "tokens.h"

namespace mfa {

constexpr int kProducts = kRegisters >= 32 ? 6 : 4;  // components whose y . w are summed together

// The products of a panel with rows of 64 bytes to a block: sums [G, NV] += quads [count, lanes, 4] times rows, row g
// beginning at rows + g * stride and its next block at rows + g * stride + next.
template <int G>
inline void add_products(const uint8_t* quads, int64_t count, const int8_t* rows, int64_t stride, int64_t next,
                         Ints (&sum)[G][kTokenVectors]) {
  constexpr int64_t kQuads = kScreenBlock / 4;
  for (int64_t first = 0; first < count; first += kQuads, rows += next) {
    const int64_t here = std::min(kQuads, count - first);
    const int8_t* row = rows;
    for (int64_t i = 0; i < here; ++i, row += 4, quads += 4 * kScreenLanes) {
      Ints token[kTokenVectors];
      for (int n = 0; n < kTokenVectors; ++n) std::memcpy(&token[n], quads + n * sizeof(Ints), sizeof(Ints));
#pragma GCC unroll 12
      for (int g = 0; g < G; ++g) {
        int32_t four;
        std::memcpy(&four, row + g * stride, 4);
        const Ints a = broadcast(four);
#pragma GCC unroll 2
        for (int n = 0; n < kTokenVectors; ++n) sum[g][n] = dot4(sum[g][n], token[n], a);
      }
    }
  }
}

// out [C, lanes] = y^ . w^ of C neighbouring components, in units of the quanta of both.
template <int C>
void mean_products(const Screen& screen, int64_t k, const TokenPanel& tokens, int32_t* out) {
  const int64_t stride = screen.blocks() * kScreenBlock;
  alignas(kVectorBytes) Ints sum[C][kTokenVectors];  // clang takes what add_products is given to be aligned
  for (int c = 0; c < C; ++c)
    for (int n = 0; n < kTokenVectors; ++n) sum[c][n] = broadcast(screen.starts_of(k + c)[0]);
  add_products<C>(tokens.features.data(), ceil_div(screen.shape.features, 4), screen.rows_of(k), stride, kScreenBlock,
                  sum);
  std::memcpy(out, sum, sizeof sum);
}

// out [lanes] += |T^ z^ - offset|^2 over the rows r, ..., r + G - 1 of component k.
template <int G>
void row_products(const Screen& screen, int64_t k, int64_t r, const TokenPanel& tokens, float* out) {
  constexpr int V = kWidth<float>;
  const int64_t R = screen.shape.rank;
  const int8_t* rows = screen.rows_of(k) + (screen.feature_blocks() + r) * kScreenBlock;
  alignas(kVectorBytes) Ints sum[G][kTokenVectors];
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < kTokenVectors; ++n) sum[g][n] = broadcast(screen.starts_of(k)[1 + r + g]);
  add_products<G>(tokens.coordinates.data(), ceil_div(screen.coordinates, 4), rows, kScreenBlock, R * kScreenBlock, sum);
  const float *quanta = screen.quanta_of(k) + r, *offsets = quanta + R;
  for (int n = 0; n < kTokenVectors; ++n) {
    Floats square = load(out + n * V);
    const Floats quantum = load(tokens.terms.quantum_inside + n * V);
    for (int g = 0; g < G; ++g) {
      const Floats t = to_float(sum[g][n]) * quanta[g] * quantum - offsets[g];
      square += t * t;
    }
    store<float>(out + n * V, square);
  }
}

// Bounds [count, lanes] of the components from k0 on, and the best estimate of each token with its component.
inline void panel_bounds(const Screen& screen, const float* constants, int64_t k0, int64_t count,
                         const TokenPanel& tokens, float* out, float* best, int32_t* owners) {
  constexpr int V = kWidth<float>, L = kScreenLanes;
  const int64_t R = screen.shape.rank, passes = std::max<int64_t>(1, ceil_div(R, kMaxGroup)), group = ceil_div(R, passes);
  alignas(kVectorBytes) int32_t products[kProducts * L];
  for (int64_t c = 0, tile; c < count; c += tile) {
    tile = c + kProducts <= count ? kProducts : 1;
    tile == 1 ? mean_products<1>(screen, k0 + c, tokens, products)
              : mean_products<kProducts>(screen, k0 + c, tokens, products);
    for (int64_t i = 0; i < tile; ++i) {
      const int64_t k = k0 + c + i;
      float explained[L] = {};
      for (int64_t r = 0, rows; r < R; r += rows) {
        rows = std::min(group, R - r);
        with_constant<kMaxGroup>(rows, [&]<int G>(std::integral_constant<int, G>) {
          row_products<G>(screen, k, r, tokens, explained);
        });
      }
      const Screen::Terms& terms = screen.terms_of(k);
      float* const bounds = out + (c + i) * L;
      const int32_t owner = static_cast<int32_t>(k);
      for (int n = 0; n < L; n += V) {
        Ints product;
        std::memcpy(&product, products + i * L + n, sizeof product);
        const auto token = tokens.terms.at<Floats>(n);
        const auto found = bound<Floats>(terms, constants[k], token, to_float(product) * terms.quantum * token.quantum,
                                         load(explained + n));
        store<float>(bounds + n, found.value);
        const Floats known = load(best + n);
        const auto better = found.estimate > known;
        store<float>(best + n, better ? found.estimate : known);
        Ints own;
        std::memcpy(&own, owners + n, sizeof own);
        own = better ? broadcast(owner) : own;
        std::memcpy(owners + n, &own, sizeof own);
      }
    }
  }
}

// The sum of products of `blocks` blocks of one token with a row, whose blocks are `next` bytes apart, lane by lane.
inline Ints along(const uint8_t* token, const int8_t* row, int64_t blocks, int64_t next) {
  constexpr int64_t kVectors = kScreenBlock / kVectorBytes;
  Ints sum = {};
  for (int64_t b = 0; b < blocks; ++b, row += next)
    for (int64_t v = 0; v < kVectors; ++v, token += kVectorBytes) {
      Ints u, s;
      std::memcpy(&u, token, sizeof u);
      std::memcpy(&s, row + v * kVectorBytes, sizeof s);
      sum = dot4(sum, u, s);
    }
  return sum;
}

// The same as panel_bounds for each of a few tokens: out [K, count].
class FewBounds {
 public:
  FewBounds(const Screen& screen, const FewTokens& tokens, int64_t count)
      : screen_(screen), tokens_(tokens), count_(count), padded_(ceil_div(screen.shape.rank + 1, V) * V),
        sums_(padded_ * V), scalars_(padded_) {}

  void operator()(const float* constants, int64_t k0, int64_t count, float* out, float* best, int32_t* owners) {
    const int64_t R = screen_.shape.rank, blocks = screen_.coordinate_blocks();
    const int64_t size = screen_.blocks() * kScreenBlock;
    for (int64_t k = k0; k < k0 + count; ++k) {
      const int8_t *mean = screen_.rows_of(k), *rows = mean + screen_.feature_blocks() * kScreenBlock;
      if (k + 1 < k0 + count) prefetch(mean + size, size);
      const float* quanta = screen_.quanta_of(k);
      const int32_t* starts = screen_.starts_of(k);
      for (int64_t n = 0; n < count_; ++n) {
        const uint8_t* z = tokens_.coordinates.data() + n * tokens_.coordinates_stride;
        put(0, along(tokens_.features.data() + n * tokens_.features_stride, mean, screen_.feature_blocks(), kScreenBlock));
        for (int64_t r = 0; r < R; ++r) put(r + 1, along(z, rows + r * kScreenBlock, blocks, R * kScreenBlock));
        for (int64_t i = 0; i < padded_; i += V) sums_of_lanes(sums_.data() + i * V, scalars_.data() + i);
        const auto token = tokens_.terms.at<float>(n);
        float explained = 0;
        for (int64_t r = 0; r < R; ++r) {
          const float t = static_cast<float>(scalars_[r + 1] + starts[r + 1]) * quanta[r] * token.quantum_inside -
                          quanta[R + r];
          explained += t * t;
        }
        const Screen::Terms& terms = screen_.terms_of(k);
        const float product = static_cast<float>(scalars_[0] + starts[0]) * terms.quantum * token.quantum;
        const auto found = bound<float>(terms, constants[k], token, product, explained);
        out[(k - k0) * count_ + n] = found.value;
        if (found.estimate > best[n]) best[n] = found.estimate, owners[n] = static_cast<int32_t>(k);
      }
    }
  }

 private:
  static constexpr int V = kWidth<float>;
  void put(int64_t i, Ints sum) { std::memcpy(sums_.data() + i * V, &sum, sizeof sum); }

  const Screen& screen_;
  const FewTokens& tokens_;
  int64_t count_, padded_;
  std::vector<int32_t> sums_, scalars_;
};

}  // namespace mfa
