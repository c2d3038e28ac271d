// Stage 2, statistics: the sums over active pairs that EM needs, per component.
//
// A pair is (token n, component k, weight w). With y = x - mu, v = lam y, t = A v, z = L^-T t = E[z | x, k]:
//   mass sum w      shift sum w y      latent sum w z      second sum w (z z^T + M^-1)
//   cross sum w z y^T                  squares sum w y^2   (one row for all components where they share the noise)
// They are added to what the outputs hold, in double precision: batches, and shards of the data, add up.
// Never materialised: anything with P x R, or with P x D beyond a group of eight tokens.
// Deterministic: pairs are sorted by component, tokens in order; a component has one writer; what all components share
//           is reduced over a fixed number of chunks.
// Floor     P (R + 2) D multiply-adds in double precision, and one read and write of the outputs a batch. The scan does
//           as much, in the dtype of the parameters, for every component.
#pragma once
#include "pairs.h"

namespace mfa {

struct Sums {
  double* mass;     // [K]
  double* shift;    // [K, D]
  double* latent;   // [K, R]
  double* second;   // [K, R, R]
  double* cross;    // [K, R, D]
  double* squares;  // [D] or [K, D]
};

// Sums over the pairs of one component, features padded and whitened (v in place of y), which `flush` undoes.
template <class T>
struct ComponentSums {
  using Double = typename Wide<T>::Vec;
  double mass = 0;
  std::vector<double> latent, outer, weighted;
  std::vector<Double> shift, squares, cross;  // [B], [B], [B, R] blocks of V features
  std::vector<T> v, t, z;                     // of a group of tokens

  explicit ComponentSums(const Shape& shape)
      : latent(shape.rank), outer(shape.rank * shape.rank), weighted(shape.rank * kGroup), shift(shape.blocks<T>()),
        squares(shape.blocks<T>()), cross(shape.blocks<T>() * shape.rank), v(shape.padded<T>() * kGroup),
        t(shape.rank * kGroup), z(shape.rank * kGroup) {}

  void clear() {
    mass = 0;
    std::fill(latent.begin(), latent.end(), 0);
    std::fill(outer.begin(), outer.end(), 0);
    std::fill(shift.begin(), shift.end(), Double{});
    std::fill(squares.begin(), squares.end(), Double{});
    std::fill(cross.begin(), cross.end(), Double{});
  }

  template <int G>
  void add(const Shape& shape, const T* rows, const T* chol, const T* const* x, const double* w, const T* lam) {
    constexpr int V = kWidth<T>;
    const int64_t R = shape.rank;
    project<T, G>(shape, x, rows, lam, v.data(), t.data());
    for (int g = 0; g < G; ++g) {
      T* own = z.data() + g * R;
      latents_of(R, chol, t.data() + g * R, own);
      mass += w[g];
      for (int64_t r = 0; r < R; ++r) {
        const double value = weighted[g * R + r] = w[g] * own[r];
        latent[r] += value;
        for (int64_t s = 0; s <= r; ++s) outer[r * R + s] += value * own[s];
      }
    }
    for (int64_t b = 0; b < shape.blocks<T>(); ++b) {
      Double c[G];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        c[g] = widen<T>(load(v.data() + (b * G + g) * V));
        const Double wc = c[g] * w[g];
        shift[b] += wc;
        squares[b] += wc * c[g];
      }
      for (int64_t r = 0; r < R; ++r) {
        Double sum = cross[b * R + r];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) sum += c[g] * weighted[g * R + r];
        cross[b * R + r] = sum;
      }
    }
  }

  // Adds to component k of the outputs; `noise_sums` is its own row of squares, or a chunk's partial sum.
  void flush(const Shape& shape, int64_t k, const T* rows, const T* chol, const T* lam, const Sums& out,
             double* noise_sums, std::vector<double>& inverse) const {
    constexpr int V = kWidth<T>;
    const int64_t R = shape.rank, D = shape.features;
    out.mass[k] += mass;
    invert_lower(R, chol, inverse);
    for (int64_t r = 0; r < R; ++r) {
      out.latent[k * R + r] += latent[r];
      for (int64_t s = 0; s <= r; ++s) {
        double covariance = 0;  // of M^-1 = L^-T L^-1
        for (int64_t m = r; m < R; ++m) covariance += inverse[m * R + r] * inverse[m * R + s];
        const double value = outer[r * R + s] + mass * covariance;
        out.second[(k * R + r) * R + s] += value;
        if (s < r) out.second[(k * R + s) * R + r] += value;
      }
    }
    for (int64_t b = 0; b < shape.blocks<T>(); ++b)
      for (int64_t j = 0, d = b * V; j < V && d < D; ++j, ++d) {
        const double scale = shape.per_component ? rows[b * shape.block_stride<T>() + (1 + R) * V + j] : lam[d];
        const double unit = 1 / scale;
        out.shift[k * D + d] += shift[b][j] * unit;
        noise_sums[d] += squares[b][j] * unit * unit;
        for (int64_t r = 0; r < R; ++r) out.cross[(k * R + r) * D + d] += cross[b * R + r][j] * unit;
      }
  }
};

// x [N, D], components and weights [N, S]; a slot of component -1 or weight 0 is no pair.
template <class T, class ParallelFor>
void statistics(const Shape& shape, const T* x, const int32_t* components, const T* weights, int64_t tokens,
                int64_t slots, const T* rows, const T* chol, const T* lam, const Sums& out,
                ParallelFor&& parallel_for) {
  const int64_t K = shape.components, D = shape.features, R = shape.rank;
  std::vector<int32_t> owner;
  std::vector<int64_t> slot;
  for (int64_t i = 0; i < tokens * slots; ++i)
    if (components[i] >= 0 && weights[i] != 0) owner.push_back(components[i]), slot.push_back(i);
  const ByComponent by(owner.data(), static_cast<int64_t>(owner.size()), K);
  const int64_t chunks = std::min<int64_t>(K, 64);  // fixed, so that sums do not depend on the thread count
  std::vector<double> partial(shape.per_component ? 0 : chunks * D);
  parallel_for(chunks, [&](int64_t begin, int64_t end) {
    ComponentSums<T> sums(shape);
    std::vector<double> inverse;
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t k = K * chunk / chunks; k < K * (chunk + 1) / chunks; ++k) {
        if (by.offsets[k] == by.offsets[k + 1]) continue;
        const T *own = rows + k * shape.component_stride<T>(), *own_chol = chol + k * R * R;
        sums.clear();
        by.for_groups(k, [&]<int G>(std::integral_constant<int, G>, const int64_t* some) {
          const T* token[G];
          double weight[G];
          for (int g = 0; g < G; ++g) {
            token[g] = x + slot[some[g]] / slots * D;
            weight[g] = weights[slot[some[g]]];
          }
          sums.template add<G>(shape, own, own_chol, token, weight, lam);
        });
        double* noise_sums = shape.per_component ? out.squares + k * D : partial.data() + chunk * D;
        sums.flush(shape, k, own, own_chol, lam, out, noise_sums, inverse);
      }
  });
  for (int64_t chunk = 0; !shape.per_component && chunk < chunks; ++chunk)
    for (int64_t d = 0; d < D; ++d) out.squares[d] += partial[chunk * D + d];
}

}  // namespace mfa
