// The screen of a mixture, which stage 0 of screening makes, and the bounds that it gives.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "../layout.h"

namespace mfa {

// The tensors of mfa_kernels/ops/screen/op.py.
template <class T>
struct Screen {
  Shape marginal;      // K components of rank R on p coordinates; p is a multiple of 8 and of the SIMD width
  int64_t features;    // D
  const T* basis;      // Q [D, p]
  const T* center;     // c [D]
  const T* rows;       // {m_k, B_k} [K, p/V, R+1, V]
  const T* constants;  // [K] those of the mixture
  const T* log_det;    // [K] log|C_k|
  const T* radii;      // [K] |m~_k|, rounded up
  const T* slack;      // [K]
  const T* lines;      // [K, p] a direction for every component (lines.h), or null
  const T* offsets;    // [K] m_k along it
  const T* shares;     // [K] one over the variance along it, rounded down
  T exact_slack;       // that of a logit computed in full

  int64_t coordinates() const { return marginal.features; }
  const T* rows_of(int64_t k) const { return rows + k * coordinates() * (marginal.rank + 1); }

  // Returns a constant, raised by the rounding of its terms.
  T raised(int64_t k) const {
    const T size = std::abs(constants[k]) + std::abs(log_det[k]) + 2 * static_cast<T>(features);
    if (!(size < std::numeric_limits<T>::infinity())) return constants[k];  // -inf where a component has no weight
    return constants[k] + 2 * std::numeric_limits<T>::epsilon() * size;
  }

  // Returns a lower bound of the exact logit of component k, from its computed value and the norm of the token.
  T reached(T logit, int64_t k, T norm) const {
    const T reach = norm + radii[k];
    return logit - (exact_slack + slack[k]) * (reach * reach) - 8 * std::numeric_limits<T>::epsilon() * std::abs(logit);
  }

  // Writes the bounds of component k, out [tokens], from the distances of its marginal, and keeps the largest bound of
  // each token with its component.
  void bound(int64_t k, const T* distances, const T* norms, int64_t tokens, T* out, T* largest, int32_t* owners) const {
    const T constant = raised(k), radius = radii[k], slack_k = slack[k];
    for (int64_t i = 0; i < tokens; ++i) {
      const T reach = norms[i] + radius;
      const T value = constant - distances[i] / 2 + slack_k * (reach * reach);
      out[i] = value;
      const bool best = value > largest[i] && value < std::numeric_limits<T>::infinity();
      owners[i] = best ? static_cast<int32_t>(k) : owners[i];
      largest[i] = best ? value : largest[i];
    }
  }
};

}  // namespace mfa
