// Coordinates of whitened tokens, y = Q^T lam (x - c), from which screening computes its bounds.
//
// Floor     N D p multiply-adds; for a few tokens one read of Q. Measured by bench/bench_screen.py.
#pragma once
#include "../scan.h"
#include "few_tokens.h"

namespace mfa {

// y [p] of one whitened token at columns j, ..., j + C V - 1.
template <class T, int C>
void project_columns(const Screen<T>& screen, const T* whitened, int64_t j, T* y) {
  constexpr int V = kWidth<T>;
  const int64_t features = screen.features, p = screen.coordinates();
  Vec<T> total[C] = {};
  for (int64_t start = 0; start < features; start += kFlush) {
    Vec<T> sum[C] = {};
    for (int64_t d = start; d < std::min(features, start + kFlush); ++d)
      for (int c = 0; c < C; ++c) sum[c] += whitened[d] * load(screen.basis + d * p + j + c * V);
    for (int c = 0; c < C; ++c) total[c] += sum[c];
  }
  for (int c = 0; c < C; ++c) store<T>(y + j + c * V, total[c]);
}

// A few tokens x [tokens, D] -> y [tokens, p] and norms |x~| [tokens], rounded up.
template <class T, class ParallelFor>
void project_few(const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, T* y, T* norms,
                 ParallelFor&& parallel_for) {
  constexpr int V = kWidth<T>, C = 4;
  const int64_t D = screen.features, p = screen.coordinates();
  std::vector<T> whitened(tokens * D);
  for (int64_t n = 0; n < tokens; ++n) {
    double squares = 0;
    for (int64_t d = 0; d < D; ++d) {
      const T value = (x[n * D + d] - screen.center[d]) * lam[d];
      whitened[n * D + d] = value;
      squares += static_cast<double>(value) * value;
    }
    norms[n] = static_cast<T>(std::sqrt(squares)) * (1 + 16 * std::numeric_limits<T>::epsilon());
  }
  parallel_for(ceil_div(p, C * V), [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t j = begin * C * V, stop = std::min(p, end * C * V); j < stop;) {
        const bool whole = j + C * V <= stop;
        const auto kernel = whole ? project_columns<T, C> : project_columns<T, 1>;
        kernel(screen, whitened.data() + n * D, j, y + n * p);
        j += whole ? C * V : V;
      }
  });
}

// One panel of tokens x [tokens, D] -> y [tokens, p] and norms |x~| [tokens], rounded up; panel [D, kPanel] is scratch.
template <class T>
void project_panel(const Screen<T>& screen, const T* x, int64_t tokens, const T* lam, T* panel, T* y, T* norms) {
  constexpr int V = kWidth<T>, NV = kTokenVectors, J = kRegisters >= 32 ? 8 : 4;
  const int64_t D = screen.features, p = screen.coordinates();
  for (int64_t d = 0; d < D; ++d)
    for (int64_t n = 0; n < kPanel<T>; ++n)
      panel[d * kPanel<T> + n] = n < tokens ? (x[n * D + d] - screen.center[d]) * lam[d] : T(0);
  for (int64_t j = 0; j < p; j += J) {
    Vec<T> total[J][NV] = {};
    for (int64_t start = 0; start < D; start += kFlush) {
      Vec<T> sum[J][NV] = {};
      for (int64_t d = start; d < std::min(D, start + kFlush); ++d)
#pragma GCC unroll 8
        for (int i = 0; i < J; ++i)
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sum[i][v] += load(panel + d * kPanel<T> + v * V) * screen.basis[d * p + j + i];
      for (int i = 0; i < J; ++i)
        for (int v = 0; v < NV; ++v) total[i][v] += sum[i][v];
    }
    for (int i = 0; i < J; ++i) {
      T column[kPanel<T>];
      for (int v = 0; v < NV; ++v) store<T>(column + v * V, total[i][v]);
      for (int64_t n = 0; n < tokens; ++n) y[n * p + j + i] = column[n];
    }
  }
  Vec<T> square[NV] = {};
  for (int64_t start = 0; start < D; start += kFlush) {
    Vec<T> sum[NV] = {};
    for (int64_t d = start; d < std::min(D, start + kFlush); ++d)
      for (int v = 0; v < NV; ++v) sum[v] += load(panel + d * kPanel<T> + v * V) * load(panel + d * kPanel<T> + v * V);
    for (int v = 0; v < NV; ++v) square[v] += sum[v];
  }
  T squares[kPanel<T>];
  for (int v = 0; v < NV; ++v) store<T>(squares + v * V, square[v]);
  const T up = 1 + (kFlush + ceil_div(D, kFlush) + 16) * std::numeric_limits<T>::epsilon();
  for (int64_t n = 0; n < tokens; ++n) norms[n] = std::sqrt(squares[n]) * up;
}

// Tokens [begin, begin + tokens) of a scan, which are screened together: projected here, bounded by bounds.h.
template <class T>
struct Stretch {
  const Screen<T>& screen;
  int64_t begin, tokens;
  bool few;                      // all tokens of the scan are in one panel of 1, 2 or 4
  int64_t lanes, panels;         // tokens to a panel, and panels
  std::vector<T> y, norms;       // [panels lanes, p], [panels lanes]; zeros where there is no token
  std::vector<T> bounds;         // [panels, K, lanes] upper bounds of the logits
  std::vector<int32_t> guesses;  // [tokens] the component with the largest bound

  template <class ParallelFor>
  Stretch(const ScanInput<T>& in, const Screen<T>& screen, int64_t begin, int64_t end, ParallelFor&& parallel_for)
      : screen(screen), begin(begin), tokens(end - begin), few(in.tokens <= kFewScreened), lanes(few ? 1 : kPanel<T>) {
    const int64_t D = screen.features, p = screen.coordinates();
    const T* const x = in.x + begin * D;
    while (few && lanes < tokens) lanes *= 2;
    panels = ceil_div(tokens, lanes);
    y.resize(panels * lanes * p);
    norms.resize(panels * lanes);
    if (few) project_few(screen, x, tokens, in.lam, y.data(), norms.data(), parallel_for);
    parallel_for(few ? 0 : panels, [&](int64_t first, int64_t last) {
      std::vector<T> panel(D * kPanel<T>);
      for (int64_t n = first * kPanel<T>; n < std::min(tokens, last * kPanel<T>); n += kPanel<T>)
        project_panel(screen, x + n * D, std::min<int64_t>(kPanel<T>, tokens - n), in.lam, panel.data(),
                      y.data() + n * p, norms.data() + n);
    });
  }

  const T* y_of(int64_t n) const { return y.data() + n * screen.coordinates(); }
  T& bound_of(int64_t n, int64_t k) {
    return bounds[(n / lanes * screen.marginal.components + k) * lanes + n % lanes];
  }
};

}  // namespace mfa
