// The layout of a mixture's rows, which stage 0 writes and stages 1 and 2 read.
//
//   rows  [K, D/V, row_count, V]   V = SIMD width; features padded with zeros to a multiple of V
//     row 0          mu        as it is: x - mu is then as exact as the dtype allows
//     rows 1..R      A         L^-1 W^T lam, so that t = A v is the part of v that the loadings explain
//     row R+1        lam       Psi^-1/2, only when every component has its own noise
//
// v = (x - mu) * lam is the whitened residual. Blocks of V features keep a component's rows together for the
// scan (which broadcasts one feature at a time) and contiguous along features for the pairs (which do not).
#pragma once
#include "vec.h"

namespace mfa {

struct Shape {
  int64_t components;  // K
  int64_t features;    // D
  int64_t rank;        // R
  bool per_component;  // noise_variance is [K, D] instead of [D]

  int64_t row_count() const { return rank + 1 + (per_component ? 1 : 0); }
  template <class T>
  int64_t blocks() const { return ceil_div(features, kWidth<T>); }
  template <class T>
  int64_t padded() const { return blocks<T>() * kWidth<T>; }
  template <class T>
  int64_t block_stride() const { return row_count() * kWidth<T>; }
  template <class T>
  int64_t component_stride() const { return blocks<T>() * block_stride<T>(); }
};

}  // namespace mfa
