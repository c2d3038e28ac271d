// Tokens as the bounds read them: y and z = Q^T y in int8, and how far the one is from the other.
//
// Floor     N D p multiply-adds; for a few tokens one read of Q. Measured by bench/bench_screen.py.
#pragma once
#include <vector>

#include "../scan.h"
#include "screen.h"

namespace mfa {

constexpr int kScreenLanes = kPanel<float>;  // tokens to a panel
constexpr int64_t kFewScreened = 4;          // so many tokens go along features: a panel would be nearly empty

// y [D] of one token, zeros up to `padded`.
template <class T>
void whiten(const ScanInput<T>& in, const T* center, const T* x, int64_t padded, float* y) {
  const int64_t D = in.shape.features;
  for (int64_t d = 0; d < D; ++d) y[d] = static_cast<float>((x[d] - center[d]) * in.lam[d]);
  std::fill(y + D, y + padded, 0.0f);
}

// Sums of squares, in chains of kFlush: their error is part of the slack (mfa_kernels/ops/screen/rounding.py).
struct Squares {
  Floats total = {}, chain = {};
  int64_t left = kFlush;
  void add(Floats v) {
    chain += v * v;
    if (--left == 0) total += chain, chain = Floats{}, left = kFlush;
  }
  Floats sum() const { return total + chain; }
};

// The terms of tokens in lanes, as arrays.
template <int L>
struct TokenArrays {
  float quantum[L], lost[L], norm[L], quantum_inside[L], lost_inside[L], norm_inside[L], inside[L], outside[L], reach[L];

  template <class F>
  TokenTerms<F> at(int64_t n) const {
    auto get = [&](const float* from) {
      F value;
      std::memcpy(&value, from + n, sizeof(F));
      return value;
    };
    return {get(quantum), get(lost), get(norm), get(quantum_inside), get(lost_inside), get(norm_inside), get(inside),
            get(outside), get(reach)};
  }

  // From |y|^2 and |z|^2, which are sums of `length` chains at most; `unit` (D) is what z is off by, per |y|.
  void finish(int64_t n, float square, float inside_square, float unit) {
    const float size = std::sqrt(square);
    reach[n] = size * 1.0001f;
    inside[n] = inside_square;
    outside[n] = square - inside_square;
    lost[n] += 4 * kUnit * size;
    lost_inside[n] += unit * size;
  }
};

// What the sums of z = Q^T y and the rounding of y leave of z, per |y|: a chain of kFlush products and their sums, each
// coordinate at most as long as y.
inline float projection_unit(const Screen& screen) {
  const int64_t D = screen.shape.features;
  return static_cast<float>(1.01 * (kFlush + ceil_div(D, kFlush) + 6) * kUnit *
                            std::sqrt(2.0 * screen.coordinates));
}

// Sums over D of squares in float are off by a share of themselves.
inline float raised_by(int64_t features) { return 1 + 1.1f * static_cast<float>(features + 16) * kUnit; }

// values [count, lanes] -> quads [count padded / 4, lanes, 4] with kTokenOffset added, quanta and norms [lanes]. Lanes of
// zeros have quanta of 0.
inline void quantise_lanes(const float* values, int64_t count, int64_t padded, uint8_t* quads, float* quanta, float* lost,
                           float* norms) {
  constexpr int V = kWidth<float>, L = kScreenLanes;
  const float up = raised_by(count);
  for (int n = 0; n < L; n += V) {
    Floats most = {};
    for (int64_t d = 0; d < count; ++d) {
      const Floats value = load(values + d * L + n), size = value < 0 ? -value : value;
      most = size > most ? size : most;
    }
    for (int lane = 0; lane < V; ++lane) quanta[n + lane] = most[lane] > 1e-30f ? most[lane] / kTokenMost : 0;
    Floats inverse;
    for (int lane = 0; lane < V; ++lane) inverse[lane] = quanta[n + lane] > 0 ? 1 / quanta[n + lane] : 0;
    const Floats quantum = load(quanta + n);
    Floats off = {}, rounded = {};
    for (int64_t d = 0; d < padded; d += 4) {
      Ints word = {};
      for (int64_t j = 0; j < 4; ++j) {
        Floats near = {};
        if (d + j < count) {
          const Floats value = load(values + (d + j) * L + n);
          near = nearest(value * inverse);
          const Floats rest = value - near * quantum;
          off += rest * rest;
          rounded += near * near;
        }
        word |= ((__builtin_convertvector(near, Ints) + kTokenOffset) & 255) << (8 * static_cast<int>(j));
      }
      std::memcpy(quads + (d * L + 4 * n), &word, sizeof word);
    }
    for (int lane = 0; lane < V; ++lane) {
      lost[n + lane] = std::sqrt(off[lane]) * up + 1e-17f;
      norms[n + lane] = std::sqrt(rounded[lane]) * quanta[n + lane] * up * 1.0001f + 1e-17f;
    }
  }
}

// z [p, lanes] of a panel y [D, lanes].
inline void project_panel(const Screen& screen, const float* y, float* z) {
  constexpr int V = kWidth<float>, NV = kTokenVectors, J = kRegisters >= 32 ? 8 : 4, L = kScreenLanes;
  const int64_t D = screen.shape.features, p = screen.coordinates;
  for (int64_t j = 0; j < p; j += J) {
    Floats total[J][NV] = {};
    for (int64_t start = 0; start < D; start += kFlush) {
      Floats sum[J][NV] = {};
      for (int64_t d = start; d < std::min(D, start + kFlush); ++d) {
        Floats token[NV];
        for (int v = 0; v < NV; ++v) token[v] = load(y + d * L + v * V);
#pragma GCC unroll 8
        for (int i = 0; i < J; ++i) {
          const Floats q = broadcast(screen.basis[d * p + j + i]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sum[i][v] += token[v] * q;
        }
      }
      for (int i = 0; i < J; ++i)
        for (int v = 0; v < NV; ++v) total[i][v] += sum[i][v];
    }
    for (int i = 0; i < J; ++i)
      for (int v = 0; v < NV; ++v) store<float>(z + (j + i) * L + v * V, total[i][v]);
  }
}

// A panel of tokens in int8.
struct TokenPanel {
  std::vector<uint8_t> features, coordinates;  // quads [D'/4, lanes, 4], [p'/4, lanes, 4]
  TokenArrays<kScreenLanes> terms;

  // x [count, D]; y [D, lanes] and z [p, lanes] are scratch.
  template <class T>
  void pack(const ScanInput<T>& in, const Screen& screen, const T* center, const T* x, int64_t count, float* y,
            float* z) {
    constexpr int V = kWidth<float>, L = kScreenLanes;
    const int64_t D = in.shape.features, p = screen.coordinates;
    const int64_t D4 = ceil_div(D, 4) * 4, p4 = ceil_div(p, 4) * 4;
    features.resize(D4 * L);
    coordinates.resize(p4 * L);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t n = 0; n < L; ++n)
        y[d * L + n] = n < count ? static_cast<float>((x[n * D + d] - center[d]) * in.lam[d]) : 0.0f;
    project_panel(screen, y, z);
    quantise_lanes(y, D, D4, features.data(), terms.quantum, terms.lost, terms.norm);
    quantise_lanes(z, p, p4, coordinates.data(), terms.quantum_inside, terms.lost_inside, terms.norm_inside);
    const float unit = projection_unit(screen);
    for (int n = 0; n < L; n += V) {
      Squares whole, inside;
      for (int64_t d = 0; d < D; ++d) whole.add(load(y + d * L + n));
      for (int64_t d = 0; d < p; ++d) inside.add(load(z + d * L + n));
      for (int lane = 0; lane < V; ++lane)
        terms.finish(n + lane, whole.sum()[lane], inside.sum()[lane], unit);
    }
  }
};

// A few tokens in int8, each along its features.
struct FewTokens {
  int64_t features_stride, coordinates_stride;
  std::vector<uint8_t> features, coordinates;  // [count, D'], [count, p'], multiples of kScreenBlock
  TokenArrays<kFewScreened> terms;

  template <class T, class ParallelFor>
  FewTokens(const ScanInput<T>& in, const Screen& screen, const T* center, ParallelFor&& parallel_for)
      : features_stride(screen.feature_blocks() * kScreenBlock),
        coordinates_stride(screen.coordinate_blocks() * kScreenBlock),
        features(in.tokens * features_stride), coordinates(in.tokens * coordinates_stride) {
    const int64_t D = in.shape.features, p = screen.coordinates;
    std::vector<float> y(in.tokens * features_stride), z(in.tokens * coordinates_stride);
    for (int64_t n = 0; n < in.tokens; ++n)
      whiten(in, center, in.x + n * D, features_stride, y.data() + n * features_stride);
    project(screen, in.tokens, y.data(), z.data(), parallel_for);
    const float unit = projection_unit(screen);
    for (int64_t n = 0; n < in.tokens; ++n) {
      const float square = quantise(y.data() + n * features_stride, features_stride, D,
                                    features.data() + n * features_stride, n, terms.quantum, terms.lost, terms.norm);
      const float inside =
          quantise(z.data() + n * coordinates_stride, coordinates_stride, p, coordinates.data() + n * coordinates_stride,
                   n, terms.quantum_inside, terms.lost_inside, terms.norm_inside);
      terms.finish(n, square, inside, unit);
    }
  }

 private:
  // z [p] of every token, columns shared among threads.
  template <class ParallelFor>
  void project(const Screen& screen, int64_t tokens, const float* y, float* z, ParallelFor&& parallel_for) const {
    constexpr int V = kWidth<float>, C = 4;
    const int64_t D = screen.shape.features, p = screen.coordinates;
    parallel_for(ceil_div(p, C * V), [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < tokens; ++n)
        for (int64_t j = begin * C * V, stop = std::min(p, end * C * V); j < stop;) {
          const bool whole = j + C * V <= stop;
          const auto kernel = whole ? columns<C> : columns<1>;
          kernel(screen, y + n * features_stride, D, p, j, z + n * coordinates_stride + j);
          j += whole ? C * V : V;
        }
    });
  }

  template <int C>
  static void columns(const Screen& screen, const float* y, int64_t D, int64_t p, int64_t j, float* z) {
    constexpr int V = kWidth<float>;
    Floats total[C] = {};
    for (int64_t start = 0; start < D; start += kFlush) {
      Floats sum[C] = {};
      for (int64_t d = start; d < std::min(D, start + kFlush); ++d)
        for (int c = 0; c < C; ++c) sum[c] += broadcast(y[d]) * load(screen.basis + d * p + j + c * V);
      for (int c = 0; c < C; ++c) total[c] += sum[c];
    }
    for (int c = 0; c < C; ++c) store<float>(z + c * V, total[c]);
  }

  // values [padded], zeros from `count` on; returns the sum of their squares.
  static float quantise(const float* values, int64_t padded, int64_t count, uint8_t* out, int64_t n, float* quanta,
                        float* lost, float* norms) {
    constexpr int V = kWidth<float>;
    const float up = raised_by(count);
    Floats most = {}, off = {}, rounded = {};
    Squares square;
    for (int64_t d = 0; d < padded; d += V) {
      const Floats value = load(values + d), size = value < 0 ? -value : value;
      most = size > most ? size : most;
      square.add(value);
    }
    float largest = most[0];
    for (int lane = 1; lane < V; ++lane) largest = std::max(largest, most[lane]);
    const float quantum = largest > 1e-30f ? largest / kTokenMost : 0, inverse = quantum > 0 ? 1 / quantum : 0;
    for (int64_t d = 0; d < padded; d += V) {
      const Floats value = load(values + d), near = nearest(value * inverse), rest = value - near * quantum;
      off += rest * rest;
      rounded += near * near;
      const auto bytes = __builtin_convertvector(__builtin_convertvector(near, Ints) + kTokenOffset, Bytes);
      std::memcpy(out + d, &bytes, sizeof bytes);
    }
    quanta[n] = quantum;
    lost[n] = std::sqrt(horizontal_sum<float>(off)) * up + 1e-17f;
    norms[n] = std::sqrt(horizontal_sum<float>(rounded)) * quantum * up * 1.0001f + 1e-17f;
    return horizontal_sum<float>(square.sum());
  }
};

}  // namespace mfa
