// The M-step of every component from its statistics (statistics.h), with the tokens of a prior of covariance S added.
//
// Symbols   G = M^-1 W^T Psi^-1 = L^-T A lam [R, D], so that E[z | y] = G y. B = G S: a matrix product of the caller's.
//           P = [cross + nu B; shift] [R + 1, D], Q = [second + nu (B G^T + M^-1), latent; latent^T, mass] [R + 1, R + 1].
//           [W delta]^T = F = Q^-1 P. What they leave of the squares, feature by feature: -sum_r F_r (2 P - Q F)_r.
// Never materialised: P, Q, F of all components. They are computed in double, whatever the dtype of the parameters.
// Floor     the statistics, G and B read once, the loadings written once; (R + 1) (4 R + 4) D multiply-adds a component.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "pairs.h"

namespace mfa {

// Rows and Cholesky factors of a mixture (layout.h), and lam [D], of ones where every component has its own noise.
template <class T>
struct Factors {
  Shape shape;
  const T *rows, *chol, *lam;

  const T* rows_of(int64_t k) const { return rows + k * shape.component_stride<T>(); }
  const T* chol_of(int64_t k) const { return chol + k * shape.rank * shape.rank; }
};

// out [K, R, D]: G.
template <class T, class ParallelFor>
void m_step_gains(const Factors<T>& in, T* out, ParallelFor&& parallel_for) {
  constexpr int V = kWidth<T>;
  const Shape& shape = in.shape;
  const int64_t R = shape.rank, D = shape.features;
  parallel_for(shape.components, [&](int64_t begin, int64_t end) {
    std::vector<double> inverse;
    std::vector<T> turned(R * R), scale(shape.padded<T>());
    std::copy_n(in.lam, D, scale.begin());
    for (int64_t k = begin; k < end; ++k) {
      invert_lower(R, in.chol_of(k), inverse);
      for (int64_t r = 0; r < R; ++r)
        for (int64_t s = 0; s < R; ++s) turned[r * R + s] = static_cast<T>(inverse[s * R + r]);
      for (int64_t b = 0; b < shape.blocks<T>(); ++b) {
        const T* a = in.rows_of(k) + b * shape.block_stride<T>() + V;
        const Vec<T> lam = shape.per_component ? load(a + R * V) : load(scale.data() + b * V);
        const int64_t lanes = std::min<int64_t>(V, D - b * V);
        for (int64_t r = 0; r < R; ++r) {
          Vec<T> sum = {};
          for (int64_t s = r; s < R; ++s) sum += load(a + s * V) * turned[r * R + s];
          sum *= lam;
          std::memcpy(out + (k * R + r) * D + b * V, &sum, lanes * sizeof(T));
        }
      }
    }
  });
}

// products [R, R] = B G^T, of rows [R, D].
template <class T>
void spread_products(const Shape& shape, const T* spread, const T* gains, double* products) {
  constexpr int W = kWidth<double>;
  const int64_t R = shape.rank, D = shape.features, whole = D / W * W;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t s = 0; s < R; ++s) {
      const T *b = spread + r * D, *g = gains + s * D;
      Vec<double> sum = {};
      for (int64_t d = 0; d < whole; d += W) sum += load_wide(b + d) * load_wide(g + d);
      double total = horizontal_sum<double>(sum);
      for (int64_t d = whole; d < D; ++d) total += static_cast<double>(b[d]) * g[d];
      products[r * R + s] = total;
    }
}

// out [K]: tr(W^T Psi^-1 S Psi^-1 W M^-1), the part of tr(Psi^-1 S) that the loadings explain.
template <class T, class ParallelFor>
void m_step_traces(const Factors<T>& in, const T* gains, const T* spread, double* out, ParallelFor&& parallel_for) {
  const int64_t R = in.shape.rank, size = R * in.shape.features;
  parallel_for(in.shape.components, [&](int64_t begin, int64_t end) {
    std::vector<double> products(R * R);
    for (int64_t k = begin; k < end; ++k) {
      spread_products(in.shape, spread + k * size, gains + k * size, products.data());
      const T* chol = in.chol_of(k);
      double trace = 0;
      for (int64_t r = 0; r < R; ++r)
        for (int64_t s = 0; s < R; ++s) {
          double m = 0;  // of M = L L^T
          for (int64_t i = 0; i <= std::min(r, s); ++i) m += static_cast<double>(chol[r * R + i]) * chol[s * R + i];
          trace += products[r * R + s] * m;
        }
      out[k] = trace;
    }
  });
}

struct MStepSums {
  const double *mass, *shift, *latent, *second, *cross;  // of `Sums`
};

// Where the results go: loadings [K, D, R]; change [K, D] of the means; left [D] or [K, D], added to.
template <class T>
struct MStepResults {
  T* loadings;
  double *change, *left;
};

// The M-step of one component after another.
template <class T>
class Solver {
 public:
  explicit Solver(const Shape& shape)
      : shape_(shape), N_(shape.rank + 1), P_(ceil_div(shape.features, W) * W), products_(shape.rank * shape.rank),
        q_(N_ * N_), factor_(N_ * N_), p_(N_ * P_), f_(N_ * P_) {}

  // Adds to left [D]. Returns false where Q has no Cholesky factor.
  bool operator()(const Factors<T>& in, int64_t k, const MStepSums& sums, const T* gains, const T* spread, double nu,
                  const MStepResults<T>& out, double* left) {
    const int64_t R = shape_.rank, D = shape_.features;
    gather(in, k, sums, gains, spread, nu);
    factor_ = q_;
    if (!factorise()) return false;
    invert_lower(N_, factor_.data(), inverse_);
    solve();
    double* change = out.change + k * D;
    std::copy_n(f_.data() + R * P_, D, change);
    T* loadings = out.loadings + k * D * R;
    for (int64_t d = 0; d < D; ++d)
      for (int64_t r = 0; r < R; ++r) loadings[d * R + r] = static_cast<T>(f_[r * P_ + d]);
    add_left(left);
    return true;
  }

  // The same for a component that keeps its parameters, `loadings` [D, R].
  void keep(const Factors<T>& in, int64_t k, const MStepSums& sums, const T* gains, const T* spread, double nu,
            const T* loadings, const MStepResults<T>& out, double* left) {
    const int64_t R = shape_.rank, D = shape_.features;
    gather(in, k, sums, gains, spread, nu);
    std::fill_n(out.change + k * D, D, 0.0);
    std::copy_n(loadings, D * R, out.loadings + k * D * R);
    std::fill(f_.begin(), f_.end(), 0.0);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t r = 0; r < R; ++r) f_[r * P_ + d] = loadings[d * R + r];
    add_left(left);
  }

 private:
  static constexpr int W = kWidth<double>;

  // P and Q.
  void gather(const Factors<T>& in, int64_t k, const MStepSums& sums, const T* gains, const T* spread, double nu) {
    const int64_t R = shape_.rank, D = shape_.features;
    spread_products(shape_, spread, gains, products_.data());
    invert_lower(R, in.chol_of(k), inverse_);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t s = 0; s < R; ++s) {
        double posterior = 0;  // M^-1 = L^-T L^-1
        for (int64_t i = std::max(r, s); i < R; ++i) posterior += inverse_[i * R + r] * inverse_[i * R + s];
        q_[r * N_ + s] = sums.second[(k * R + r) * R + s] + nu * (products_[r * R + s] + posterior);
      }
      q_[r * N_ + R] = q_[R * N_ + r] = sums.latent[k * R + r];
      const double* cross = sums.cross + (k * R + r) * D;
      for (int64_t d = 0; d < D; ++d) p_[r * P_ + d] = cross[d] + nu * static_cast<double>(spread[r * D + d]);
    }
    q_[R * N_ + R] = sums.mass[k];
    std::copy_n(sums.shift + k * D, D, p_.data() + R * P_);
  }

  // factor_ = its lower Cholesky factor.
  bool factorise() {
    for (int64_t j = 0; j < N_; ++j)
      for (int64_t i = j; i < N_; ++i) {
        double sum = factor_[i * N_ + j];
        for (int64_t s = 0; s < j; ++s) sum -= factor_[i * N_ + s] * factor_[j * N_ + s];
        if (i == j && !(sum > 0)) return false;
        factor_[i * N_ + j] = i == j ? std::sqrt(sum) : sum / factor_[j * N_ + j];
      }
    return true;
  }

  // F = L^-T (L^-1 P), a vector of features at a time; inverse_ is L^-1.
  void solve() {
    half_.resize(N_ * W);
    for (int64_t d = 0; d < P_; d += W) {
      for (int64_t i = 0; i < N_; ++i) {
        Vec<double> sum = {};
        for (int64_t j = 0; j <= i; ++j) sum += load(p_.data() + j * P_ + d) * inverse_[i * N_ + j];
        store<double>(half_.data() + i * W, sum);
      }
      for (int64_t i = 0; i < N_; ++i) {
        Vec<double> sum = {};
        for (int64_t j = i; j < N_; ++j) sum += load(half_.data() + j * W) * inverse_[j * N_ + i];
        store<double>(f_.data() + i * P_ + d, sum);
      }
    }
  }

  void add_left(double* left) const {
    for (int64_t d = 0; d < P_; d += W) {
      Vec<double> total = {};
      for (int64_t i = 0; i < N_; ++i) {
        Vec<double> rest = 2 * load(p_.data() + i * P_ + d);
        for (int64_t j = 0; j < N_; ++j) rest -= load(f_.data() + j * P_ + d) * q_[i * N_ + j];
        total -= load(f_.data() + i * P_ + d) * rest;
      }
      for (int64_t lane = 0; lane < W && d + lane < shape_.features; ++lane) left[d + lane] += total[lane];
    }
  }

  Shape shape_;
  int64_t N_, P_;  // rows of P and F, and features padded
  std::vector<double> products_, q_, factor_, inverse_, p_, f_, half_;
};

// Returns false where a component's Q has no Cholesky factor. A component that owns next to nothing, less than `least`,
// keeps its parameters, `loadings` [K, D, R].
template <class T, class ParallelFor>
bool m_step_solve(const Factors<T>& in, const MStepSums& sums, const T* gains, const T* spread, double nu, double least,
                  const T* loadings, const MStepResults<T>& out, ParallelFor&& parallel_for) {
  const Shape& shape = in.shape;
  const int64_t K = shape.components, D = shape.features, size = shape.rank * D;
  const int64_t chunks = std::min<int64_t>(K, 64);  // fixed, so that sums do not depend on the thread count
  std::vector<double> partial(shape.per_component ? 0 : chunks * D);
  std::vector<char> solved(chunks, true);
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    Solver<T> solver(shape);
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t k = K * chunk / chunks; k < K * (chunk + 1) / chunks; ++k) {
        double* left = shape.per_component ? out.left + k * D : partial.data() + chunk * D;
        if (sums.mass[k] > least)
          solved[chunk] &= solver(in, k, sums, gains + k * size, spread + k * size, nu, out, left);
        else
          solver.keep(in, k, sums, gains + k * size, spread + k * size, nu, loadings + k * size, out, left);
      }
  });
  for (int64_t chunk = 0; !shape.per_component && chunk < chunks; ++chunk)
    for (int64_t d = 0; d < D; ++d) out.left[d] += partial[chunk * D + d];
  return std::find(solved.begin(), solved.end(), false) == solved.end();
}

}  // namespace mfa
