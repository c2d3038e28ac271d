// Stage 2, pairs: latents, gradients and decoding, for work in proportion to the active pairs.
//
// A pair is (token n, component k, weight w). With v = lam (x - mu), t = A v, q = v - A^T t = C~^-1 v, z = L^-T t:
//   d logit / d mu   =  lam q                                d logit / d x = -lam q
//   d logit / d W    =  lam (q z^T - A^T L^-1)               (Jacobi's formula and C~^-1 W~ = A^T L^-1)
//   d logit / d Psi  =  lam^2 (q^2 - 1 + sum_r A_r^2) / 2
//   d logit / d log pi = 1
// so the gradients reach the parameters in closed form: no stored rows' gradient, no backward through the Cholesky.
// Never materialised: anything with P x D or K x R x D beyond the gradients themselves.
// Deterministic: pairs are sorted by component, tokens in order; a component has one writer; the noise shared by all
//           is reduced over a fixed number of chunks.
// Floor     read `rows`, write the gradients once (memory); flops are 6 P R D. Measured by bench/bench_step.py.
#pragma once
#include <algorithm>
#include <vector>

#include "residual.h"

namespace mfa {

// Pairs sorted by component: those of k are order[offsets[k]] ... order[offsets[k + 1] - 1], tokens ascending.
struct ByComponent {
  std::vector<int64_t> offsets, order;
  ByComponent(const int32_t* components, int64_t pairs, int64_t component_count)
      : offsets(component_count + 1), order(pairs) {
    for (int64_t p = 0; p < pairs; ++p) ++offsets[components[p] + 1];
    for (int64_t k = 0; k < component_count; ++k) offsets[k + 1] += offsets[k];
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    for (int64_t p = 0; p < pairs; ++p) order[next[components[p]]++] = p;  // a stable counting sort
  }

  // Calls add(group size as a constant, &order[i]) for the pairs of component k, in groups of 8, of 4, and of 1.
  template <class Add>
  void for_groups(int64_t k, Add&& add) const {
    for (int64_t i = offsets[k], left; (left = offsets[k + 1] - i) > 0; i += left >= 8 ? 8 : left >= 4 ? 4 : 1) {
      if (left >= 8)
        add(std::integral_constant<int, 8>{}, &order[i]);
      else if (left >= 4)
        add(std::integral_constant<int, 4>{}, &order[i]);
      else
        add(std::integral_constant<int, 1>{}, &order[i]);
    }
  }
};

constexpr int kGroup = 8;  // tokens that are added to the sums of a component together, at most

// z = L^-T t by back substitution: the posterior mean of the latents.
template <class T>
void latents_of(int64_t rank, const T* chol, const T* t, T* z) {
  for (int64_t i = rank - 1; i >= 0; --i) {
    T sum = t[i];
    for (int64_t j = i + 1; j < rank; ++j) sum -= chol[j * rank + i] * z[j];
    z[i] = sum / chol[i * rank + i];
  }
}

// inverse [R, R] = L^-1, lower triangular.
template <class T, class U>
void invert_lower(int64_t rank, const T* chol, std::vector<U>& inverse) {
  inverse.assign(rank * rank, 0);
  for (int64_t j = 0; j < rank; ++j)
    for (int64_t i = j; i < rank; ++i) {
      U sum = i == j ? 1 : 0;
      for (int64_t m = j; m < i; ++m) sum -= chol[i * rank + m] * inverse[m * rank + j];
      inverse[i * rank + j] = sum / chol[i * rank + i];
    }
}

// x [N, D], tokens [P], components [P] -> latents [P, R]
template <class T, class ParallelFor>
void latents(const Shape& shape, const T* x, const int64_t* tokens, const int32_t* components, int64_t pairs,
             const T* rows, const T* chol, const T* lam, T* out, ParallelFor&& parallel_for) {
  const ByComponent by(components, pairs, shape.components);
  const int64_t R = shape.rank;
  parallel_for(pairs, [&](int64_t begin, int64_t end) {
    std::vector<T> v(shape.padded<T>()), t(R);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = by.order[i], k = components[p];
      const T* own = rows + k * shape.component_stride<T>();
      const T* token = x + tokens[p] * shape.features;
      project<T, 1>(shape, &token, own, lam, v.data(), t.data());
      latents_of(R, chol + k * R * R, t.data(), out + p * R);
    }
  });
}

template <class T>
struct Gradients {  // one that is null is not computed
  T* x;             // [N, D]
  T* means;         // [K, D]
  T* loadings;      // [K, D, R]
  T* noise;         // [D] or [K, D]
  T* log_weights;   // [K]
};

// Sums over the pairs of one component: w, w q [D], w q^2 [D], w q z^T [D/V, R, V].
template <class T>
struct GradientSums {
  T weight;
  std::vector<T> q, q2, qz;
  std::vector<T> v, t, z;  // scratch of a group of tokens

  explicit GradientSums(const Shape& shape)
      : q(shape.padded<T>()), q2(shape.padded<T>()), qz(shape.padded<T>() * shape.rank),
        v(shape.padded<T>() * kGroup), t(shape.rank * kGroup), z(shape.rank * kGroup) {}

  void clear() {
    weight = 0;
    std::fill(q.begin(), q.end(), T(0));
    std::fill(q2.begin(), q2.end(), T(0));
    std::fill(qz.begin(), qz.end(), T(0));
  }

  template <int G>
  void add(const Shape& shape, const T* rows, const T* chol, const T* const* x, const T* w, const T* lam) {
    constexpr int V = kWidth<T>;
    const int64_t R = shape.rank, B = shape.blocks<T>(), stride = shape.block_stride<T>();
    project<T, G>(shape, x, rows, lam, v.data(), t.data());
    for (int g = 0; g < G; ++g) {
      latents_of(R, chol, t.data() + g * R, z.data() + g * R);
      for (int64_t r = 0; r < R; ++r) z[g * R + r] *= w[g];
      weight += w[g];
    }
    for (int64_t b = 0; b < B; ++b) {
      const T* a = rows + b * stride + V;
      Vec<T> c[G];
      for (int g = 0; g < G; ++g) c[g] = load(v.data() + (b * G + g) * V);
      for (int64_t r = 0; r < R; ++r) {
        const Vec<T> row = load(a + r * V);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) c[g] -= row * t[g * R + r];
      }
      Vec<T> sum = load(q.data() + b * V), sum2 = load(q2.data() + b * V);
      for (int g = 0; g < G; ++g) {
        sum += c[g] * w[g];
        sum2 += c[g] * c[g] * w[g];
      }
      store<T>(q.data() + b * V, sum);
      store<T>(q2.data() + b * V, sum2);
      for (int64_t r = 0; r < R; ++r) {
        T* cell = qz.data() + (b * R + r) * V;
        Vec<T> value = load(cell);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) value += c[g] * z[g * R + r];
        store<T>(cell, value);
      }
    }
  }
};

// Adds one component's sums to the gradients of its parameters; `noise` is its own row, or a chunk's partial sum.
template <class T>
void add_gradients(const Shape& shape, const GradientSums<T>& s, const T* rows, const T* chol, const T* lam, T* means,
                   T* loadings, T* noise, std::vector<T>& inverse) {
  constexpr int V = kWidth<T>;
  const int64_t R = shape.rank, D = shape.features, stride = shape.block_stride<T>();
  if (loadings) invert_lower(R, chol, inverse);
  for (int64_t b = 0; b < shape.blocks<T>(); ++b) {
    const T* a = rows + b * stride + V;
    const int64_t d0 = b * V, lanes = std::min<int64_t>(V, D - d0);
    T scale[V] = {};
    for (int64_t j = 0; j < lanes; ++j) scale[j] = shape.per_component ? a[R * V + j] : lam[d0 + j];
    if (means)
      for (int64_t j = 0; j < lanes; ++j) means[d0 + j] += scale[j] * s.q[d0 + j];
    if (noise) {
      Vec<T> explained = {};
      for (int64_t r = 0; r < R; ++r) explained += load(a + r * V) * load(a + r * V);
      T value[V];
      store<T>(value, (load(s.q2.data() + d0) - s.weight * (1 - explained)) / 2);
      for (int64_t j = 0; j < lanes; ++j) noise[d0 + j] += scale[j] * scale[j] * value[j];
    }
    if (loadings)
      for (int64_t r = 0; r < R; ++r) {
        Vec<T> prior = {};
        for (int64_t m = r; m < R; ++m) prior += load(a + m * V) * inverse[m * R + r];
        T value[V];
        store<T>(value, load(s.qz.data() + (b * R + r) * V) - s.weight * prior);
        for (int64_t j = 0; j < lanes; ++j) loadings[(d0 + j) * R + r] += scale[j] * value[j];
      }
  }
}

// Adds sum_pairs w d logit / d parameter to the gradients. Pairs are ordered by token: tokens ascending.
template <class T, class ParallelFor>
void backward(const Shape& shape, const T* x, const int64_t* tokens, const int32_t* components, const T* weights,
              int64_t pairs, const T* rows, const T* chol, const T* lam, const Gradients<T>& grad,
              ParallelFor&& parallel_for) {
  const int64_t D = shape.features, R = shape.rank, K = shape.components;
  if (grad.means || grad.loadings || grad.noise || grad.log_weights) {
    const ByComponent by(components, pairs, K);
    const int64_t chunks = std::min<int64_t>(K, 64);  // fixed, so that sums do not depend on the thread count
    const bool shared_noise = grad.noise && !shape.per_component;
    std::vector<T> partial(shared_noise ? chunks * D : 0);
    parallel_for(chunks, [&](int64_t begin, int64_t end) {
      GradientSums<T> sums(shape);
      std::vector<T> inverse;
      for (int64_t chunk = begin; chunk < end; ++chunk)
        for (int64_t k = K * chunk / chunks; k < K * (chunk + 1) / chunks; ++k) {
          if (by.offsets[k] == by.offsets[k + 1]) continue;
          const T *own = rows + k * shape.component_stride<T>(), *own_chol = chol + k * R * R;
          sums.clear();
          by.for_groups(k, [&]<int G>(std::integral_constant<int, G>, const int64_t* some) {
            const T* token[G];
            T weight[G];
            for (int g = 0; g < G; ++g) token[g] = x + tokens[some[g]] * D, weight[g] = weights[some[g]];
            sums.template add<G>(shape, own, own_chol, token, weight, lam);
          });
          T* noise = !grad.noise ? nullptr : shape.per_component ? grad.noise + k * D : partial.data() + chunk * D;
          add_gradients(shape, sums, own, own_chol, lam, grad.means ? grad.means + k * D : nullptr,
                        grad.loadings ? grad.loadings + k * D * R : nullptr, noise, inverse);
          if (grad.log_weights) grad.log_weights[k] += sums.weight;
        }
    });
    for (int64_t chunk = 0; shared_noise && chunk < chunks; ++chunk)
      for (int64_t d = 0; d < D; ++d) grad.noise[d] += partial[chunk * D + d];
  }
  if (grad.x) {
    // One writer per token: cut the pairs where the token changes.
    std::vector<int64_t> starts;
    for (int64_t p = 0; p < pairs; ++p)
      if (p == 0 || tokens[p] != tokens[p - 1]) starts.push_back(p);
    starts.push_back(pairs);
    parallel_for(static_cast<int64_t>(starts.size()) - 1, [&](int64_t begin, int64_t end) {
      constexpr int V = kWidth<T>;
      std::vector<T> v(shape.padded<T>()), t(R);
      for (int64_t p = starts[begin]; p < starts[end]; ++p) {
        const T* own = rows + components[p] * shape.component_stride<T>();
        const T* token = x + tokens[p] * D;
        project<T, 1>(shape, &token, own, lam, v.data(), t.data());
        T* out = grad.x + tokens[p] * D;
        for (int64_t b = 0; b < shape.blocks<T>(); ++b) {
          const T* a = own + b * shape.block_stride<T>() + V;
          Vec<T> q = load(v.data() + b * V);
          for (int64_t r = 0; r < R; ++r) q -= load(a + r * V) * t[r];
          if (shape.per_component) q *= load(a + R * V);
          T value[V];
          store<T>(value, q * weights[p]);
          for (int64_t j = 0, d = b * V; j < V && d + j < D; ++j) out[d + j] -= lam[d + j] * value[j];
        }
      }
    });
  }
}

// components [N, S] (-1: an empty slot), responsibilities [N, S], latents [N, S, R]
//   -> sum_c r_c (mu_c + W_c z_c) [N, D]
template <class T, class ParallelFor>
void decode(const Shape& shape, const int32_t* components, const T* responsibilities, const T* latents, int64_t tokens,
            int64_t slots, const T* means, const T* loadings, T* out, ParallelFor&& parallel_for) {
  const int64_t D = shape.features, R = shape.rank;
  parallel_for(tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      T* row = out + n * D;
      std::fill(row, row + D, T(0));
      for (int64_t c = 0; c < slots; ++c) {
        const int64_t k = components[n * slots + c];
        const T r = responsibilities[n * slots + c];
        if (r != r) std::fill(row, row + D, r);  // a token that is not finite
        if (k < 0 || r == 0) continue;
        const T *mean = means + k * D, *w = loadings + k * D * R, *z = latents + (n * slots + c) * R;
        for (int64_t d = 0; d < D; ++d, w += R) {
          T value = mean[d];
          for (int64_t i = 0; i < R; ++i) value += w[i] * z[i];
          row[d] += r * value;
        }
      }
    }
  });
}

}  // namespace mfa
