// The screen of a mixture, which stage 0 of screening makes, and the bound that it gives.
//
// Symbols   y = lam (x - c), m_k = lam (mu_k - c), v = y - m_k; Q [D, p] any matrix whose columns are nearly orthonormal,
//           z = Q^T y; T_k [R, p] and nu_k, so that |A_k v|^2 <= |T_k Q^T v|^2 + nu_k (|v|^2 - |Q^T v|^2), and
//             |v|^2 - |A_k v|^2  >=  |Q^T v|^2 + (1 - nu_k) (|v|^2 - |Q^T v|^2) - |T_k Q^T v|^2
//                                =   |z|^2 + (1 - nu_k) (|y|^2 - |z|^2) + size_k - 2 y . w_k - |T_k z - offset_k|^2
//           with w_k = m_k less nu_k of its part outside of Q: products of y and z with rows in int8, and norms
//           (mfa_kernels/ops/screen/README.md).
#pragma once
#include <cmath>
#include <limits>

#include "../int8/rows.h"

namespace mfa {

constexpr int64_t kScreenBlock = 64;  // bytes of a row that lie together

// The tensors of mfa_kernels/ops/screen/types.py.
struct Screen {
  Shape shape;           // of the mixture
  int64_t coordinates;   // p
  const float* basis;    // Q [D, p]
  const int8_t* rows;    // [K, D/64 + R p/64, 64]: w, then blocks of 64 coordinates of all R rows of T
  const int32_t* starts; // [K, R + 1] -kTokenOffset times the sums of w and of the rows
  const float* terms;    // [K, 2 R + kTerms] quanta [R] and offsets [R] of the rows, then the struct `Terms`
  float exact_slack;     // of a logit computed in full, per squared reach

  // Of one component, rounded to the side that keeps bounds valid; q^ is what is computed in int8.
  struct Terms {
    float quantum;       // of w
    float size;          // |Q^T m|^2 + (1 - nu) (|m|^2 - |Q^T m|^2)
    float rest;          // 1 - nu
    float mean;          // |w|
    float lost;          // |w - w^|
    float rows;          // |T|_2
    float lost_rows;     // |T - T^|_2
    float offset;        // rounding of the offsets, all together
    float radius;        // |m|
    float slack;         // of the bound, per squared reach |y| + |m|; infinite where nothing is known
    float raise;         // rounding of the constant
    float half;          // |m|^2 / 2
    float share;         // |B|^2 / |T|^2, by which |T z|^2 is more than |B z|^2, about
  };
  static constexpr int64_t kTerms = sizeof(Terms) / sizeof(float);

  int64_t feature_blocks() const { return ceil_div(shape.features, kScreenBlock); }
  int64_t coordinate_blocks() const { return ceil_div(coordinates, kScreenBlock); }
  int64_t blocks() const { return feature_blocks() + shape.rank * coordinate_blocks(); }
  int64_t term_count() const { return 2 * shape.rank + kTerms; }
  const int8_t* rows_of(int64_t k) const { return rows + k * blocks() * kScreenBlock; }
  const int32_t* starts_of(int64_t k) const { return starts + k * (shape.rank + 1); }
  const float* quanta_of(int64_t k) const { return terms + k * term_count(); }
  const Terms& terms_of(int64_t k) const {
    return *reinterpret_cast<const Terms*>(quanta_of(k) + 2 * shape.rank);
  }

  // Returns a lower bound of the exact logit of component k, from its computed value and the norm of the token; -inf or
  // NaN where nothing is known of the component.
  template <class T>
  T reached(T logit, int64_t k, float norm) const {
    const float reach = norm + terms_of(k).radius;
    return logit - T((exact_slack + terms_of(k).slack) * (reach * reach)) - 8 * std::numeric_limits<T>::epsilon() * std::abs(logit);
  }
};

// What the bounds know of a token, or of several in lanes.
template <class F>
struct TokenTerms {
  F quantum, lost, norm;                        // y^ = quantum q, |y - y^| at most, |y^|
  F quantum_inside, lost_inside, norm_inside;   // the same of z
  F inside, outside;                            // |z|^2, |y|^2 - |z|^2
  F reach;                                      // |y|, rounded up
};

// The upper bound of a logit, and an estimate of it.
template <class F>
struct Bound {
  F value, estimate;
};

// From the products y^ . w^ and |T^ z^ - offset|^2.
template <class F>
inline Bound<F> bound(const Screen::Terms& k, float constant, const TokenTerms<F>& token, F product, F explained) {
  const F root = sqrt(explained) + (k.rows * token.lost_inside + k.lost_rows * token.norm_inside + k.offset);
  const F off = k.mean * token.lost + k.lost * token.norm;
  const F reach = token.reach + k.radius;
  const F distance = token.inside + k.rest * token.outside + k.size - 2 * product - 2 * off - root * root;
  const F least = distance - 2 * k.slack * (reach * reach);
  return {constant + k.raise - least / 2, constant - k.half + product + k.share / 2 * explained};
}

}  // namespace mfa
