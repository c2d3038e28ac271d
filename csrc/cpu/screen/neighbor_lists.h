// Stage 0 of the scan by neighbors: lists of the components that can be active beside each.
//
// A list is sorted by how far from component j a token is when component k begins to matter.
// Symbols   m_k [p], and S_k = I + V_k V_k^T, the marginal of component k on p directions. d_k(x) is the Mahalanobis
//           distance of a token from component k, in all D features. For any direction u,
//             d_k(x) >= |u.(y - m_k)| / sqrt(u^T S_k u) >= alpha - beta d_j(x),
//             alpha = |u.(m_j - m_k)| / sqrt(u^T S_k u),   beta = sqrt(u^T S_j u / u^T S_k u),
//           because |u.(y - m_j)| <= sqrt(u^T S_j u) d_j(x). Where d_j(x) = s, the logit of j is constant_j - s^2 / 2,
//           and k is below it by more than T as long as (alpha - beta s)^2 > s^2 + 2 (constant_k - constant_j + T): for
//           all s below the `onset` of k, the root. u = (S_j + S_k)^-1 (m_k - m_j), the discriminant between the two.
// Never materialised: K x K of anything but the onsets of up to kSquare components. A block of components j meets V
//           components k at a time, one to a SIMD lane.
// Exact     for any direction u, so also for the rounded one; its products with m and V are bounded, rounding included,
//           from the side that keeps an onset from being too large (mfa_kernels/ops/screen/README.md, "Rounding").
// Floor     K^2 p (R^2 + 7 R) multiply-adds, half of them up to kSquare components. Measured by bench/bench_screen.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../vec.h"

namespace mfa {

// Arguments of `find_neighbors`. V_k = E_k L_k^T with L L^T = 2 I + V^T V, so that |E_k| < 1.
template <class T>
struct Pairing {
  int64_t components, features, rank;  // K, p, R
  const T* means;                      // m [K, p]
  const T* whitened;                   // E [K, R, p]
  const T* cholesky;                   // L [K, R, R]
  const T* constants;                  // [K], raised
  const T* offs;                       // [K] what |V^T u| / |u| may be off by
  double norm;                         // largest eigenvalue of Q^T Q, at most
  double threshold;                    // T, nats
  int64_t length;                      // M
  int32_t* neighbors;                  // [K, M] by rising onset
  T* onsets;                           // [K, M]
  T* horizons;                         // [K] the first onset that was left out
};

// out [A, B] = sums over the coordinates of a [p, stride] (one component, broadcast) times b [p, columns, V] (lanes).
template <class T, int A, int B>
void pair_products(const T* a, int64_t stride, const T* b, int64_t columns, int64_t p, Vec<T>* out,
                   int64_t out_stride) {
  Vec<T> sum[A][B] = {};
  for (int64_t c = 0; c < p; ++c)
#pragma GCC unroll 12
    for (int i = 0; i < A; ++i)
#pragma GCC unroll 5
      for (int j = 0; j < B; ++j) sum[i][j] += a[c * stride + i] * load(b + (c * columns + j) * kWidth<T>);
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) out[i * out_stride + j] = sum[i][j];
}

// out [B] = sums over the coordinates of a [p, V] times b [p, columns, V], lane by lane.
template <class T, int B>
void lane_products(const Vec<T>* a, const T* b, int64_t columns, int64_t p, Vec<T>* out) {
  Vec<T> sum[B] = {};
  for (int64_t c = 0; c < p; ++c)
#pragma GCC unroll 12
    for (int j = 0; j < B; ++j) sum[j] += a[c] * load(b + (c * columns + j) * kWidth<T>);
  for (int j = 0; j < B; ++j) out[j] = sum[j];
}

// out [p, V] = v - a_j b_j - a_k b_k over B columns of a_j [p, columns], broadcast, and of a_k [p, columns, V].
template <class T, int B>
void subtract_products(const Vec<T>* v, const T* a_j, const Vec<T>* b_j, const T* a_k, const Vec<T>* b_k,
                       int64_t columns, int64_t p, Vec<T>* out) {
  Vec<T> j[B], k[B];
  for (int i = 0; i < B; ++i) j[i] = b_j[i], k[i] = b_k[i];
  for (int64_t c = 0; c < p; ++c) {
    Vec<T> from = v[c], too = {};
#pragma GCC unroll 12
    for (int i = 0; i < B; ++i) {
      from -= a_j[c * columns + i] * j[i];
      too += load(a_k + (c * columns + i) * kWidth<T>) * k[i];
    }
    out[c] = from - too;
  }
}

// One component j, broadcast, against V components k, one to a lane.
template <class T>
struct PairTile {
  static constexpr int V = kWidth<T>, kSide = kRegisters >= 32 ? 5 : 3, kColumns = kRegisters >= 32 ? 12 : 6;
  static constexpr int kUnrolled = 12;
  int64_t p, R;
  std::vector<T> memory;
  Vec<T>*cross, *schur, *left, *right, *spare, *difference, *direction;  // [R, R] twice, [R] thrice, [p] twice

  PairTile(int64_t features, int64_t rank) : p(features), R(rank), memory((2 * R * R + 3 * R + 2 * p) * V) {
    cross = reinterpret_cast<Vec<T>*>(memory.data());
    schur = cross + R * R, left = schur + R * R, right = left + R, spare = right + R;
    difference = spare + R, direction = difference + p;
  }

  // out [R] = E_j^T v and E_k^T v for v [p].
  void project(const Vec<T>* v, const T* e_j, const T* e_k, Vec<T>* of_j, Vec<T>* of_k) const {
    const T* lanes = reinterpret_cast<const T*>(v);
    for (int64_t r = 0, count; r < R; r += count) {
      count = std::min<int64_t>(kColumns, R - r);
      with_constant<kColumns>(count, [&]<int B>(std::integral_constant<int, B>) {
        lane_products<T, B>(v, e_k + r * V, R, p, of_k + r);
        pair_products<T, B, 1>(e_j + r, R, lanes, 1, p, of_j + r, 1);
      });
    }
  }

  // Solves left, right = [I, C; C^T, I]^-1 [left; right] by I - C^T C = F F^T. N is the rank, or 0 where the compiler
  // need not know it: short loops over small matrices cost several times as much then.
  template <int N>
  void solve() {
    const int64_t rank = N ? N : R;
    Vec<T> registers[N ? 2 * N : 1];
    Vec<T>*const row = N ? registers : spare, *const y = N ? registers + N : right;
    for (int64_t s = 0; s < N; ++s) y[s] = right[s];
    for (int64_t r = 0; r < rank; ++r)
#pragma GCC unroll 16
      for (int64_t s = 0; s < rank; ++s) y[s] -= cross[r * rank + s] * left[r];
#pragma GCC unroll 16
    for (int64_t s = 0; s < rank; ++s) {
#pragma GCC unroll 16
      for (int64_t t = 0; t <= s; ++t) row[t] = broadcast<T>(s == t);
      for (int64_t r = 0; r < rank; ++r)
#pragma GCC unroll 16
        for (int64_t t = 0; t <= s; ++t) row[t] -= cross[r * rank + s] * cross[r * rank + t];
#pragma GCC unroll 16
      for (int64_t t = 0; t < s; ++t) {
        row[t] *= schur[t * rank + t];
#pragma GCC unroll 16
        for (int64_t q = t + 1; q < s; ++q) row[q] -= row[t] * schur[q * rank + t];
        row[s] -= row[t] * row[t];
        y[s] -= row[t] * y[t];
        schur[s * rank + t] = row[t];
      }
      T pivot[V];
      store<T>(pivot, row[s]);  // a pivot that rounding makes negative may be any other: u may be any direction
      for (int lane = 0; lane < V; ++lane) pivot[lane] = 1 / std::sqrt(std::max(pivot[lane], T(1e-6)));
      schur[s * rank + s] = load(pivot);  // one over it
      y[s] *= load(pivot);
    }
#pragma GCC unroll 16
    for (int64_t t = rank - 1; t >= 0; --t) {
      y[t] *= schur[t * rank + t];
#pragma GCC unroll 16
      for (int64_t s = 0; s < t; ++s) y[s] -= schur[t * rank + s] * y[t];
    }
#pragma GCC unroll 16
    for (int64_t s = 0; s < rank; ++s) {
      right[s] = y[s];
      for (int64_t r = 0; r < rank; ++r) left[r] -= cross[r * rank + s] * y[s];
    }
  }

  // Computes u in every lane, (S_j + S_k)^-1 (m_k - m_j) up to scale, from [I, C; C^T, I] [a; b] = [E_j^T v; E_k^T v]
  // with C = E_j^T E_k.
  void direct(const T* m_j, const T* e_j, const T* m_k, const T* e_k) {
    for (int64_t i = 0; i < R; i += kSide)
      for (int64_t j = 0; j < R; j += kSide)
        with_constant<kSide>(std::min<int64_t>(kSide, R - i), [&]<int A>(std::integral_constant<int, A>) {
          with_constant<kSide>(std::min<int64_t>(kSide, R - j), [&]<int B>(std::integral_constant<int, B>) {
            pair_products<T, A, B>(e_j + i, R, e_k + j * V, R, p, cross + i * R + j, R);
          });
        });
    for (int64_t c = 0; c < p; ++c) difference[c] = load(m_k + c * V) - m_j[c];
    project(difference, e_j, e_k, left, right);
    if (R > kUnrolled)
      solve<0>();
    else
      with_constant<kUnrolled>(R, [&]<int N>(std::integral_constant<int, N>) { solve<N>(); });
    if (!R) std::copy_n(reinterpret_cast<const T*>(difference), p * V, reinterpret_cast<T*>(direction));
    for (int64_t r = 0, count; r < R; r += count) {
      count = std::min<int64_t>(kColumns, R - r);
      with_constant<kColumns>(count, [&]<int B>(std::integral_constant<int, B>) {
        subtract_products<T, B>(r ? direction : difference, e_j + r, left + r, e_k + r * V, right + r, R, p, direction);
      });
    }
  }

  // Bounds, from u, the deviations of u.y under components j and k, and how far their means are apart, [V] each.
  void measure(const Pairing<T>& in, const T* e_j, const T* l_j, T off_j, T size_j, const T* e_k, const T* l_k,
               const T* off_k, const T* size_k, double* sigma_j, double* sigma_k, double* apart) {
    const double error = (p + 8) * double(std::numeric_limits<T>::epsilon()) / 2;  // of a sum of p products
    project(direction, e_j, e_k, left, right);
    Vec<T> square = {}, gap = {};
    for (int64_t c = 0; c < p; ++c) square += direction[c] * direction[c], gap += direction[c] * difference[c];
    Vec<T> own_j = {}, own_k = {};
    for (int64_t r = 0; r < R; ++r) {
      Vec<T> sum_j = {}, sum_k = {};
      for (int64_t s = 0; s <= r; ++s) {
        sum_j += left[s] * l_j[r * R + s];
        sum_k += right[s] * load(l_k + (r * R + s) * V);
      }
      own_j += sum_j * sum_j, own_k += sum_k * sum_k;
    }
    T squares[V], gaps[V], of_j[V], of_k[V];
    store<T>(squares, square), store<T>(gaps, gap), store<T>(of_j, own_j), store<T>(of_k, own_k);
    const double up = 1 + 4 * error, norm = in.norm;
    for (int lane = 0; lane < V; ++lane) {
      const double length = std::sqrt(double(squares[lane])) * up;
      const double loaded_j = std::sqrt(double(of_j[lane])) * up + off_j * length;
      const double loaded_k = std::sqrt(double(of_k[lane])) * up + off_k[lane] * length;
      sigma_j[lane] = std::sqrt(norm * length * length + loaded_j * loaded_j) * up;
      sigma_k[lane] = std::sqrt(norm * length * length + loaded_k * loaded_k) * up;
      apart[lane] = std::abs(double(gaps[lane])) - error * length * (double(size_j) + size_k[lane]);
    }
  }
};

// Returns the onset of k for tokens of j, where the constant of k exceeds that of j by `more`.
template <class T>
T onset(double sigma_j, double sigma_k, double apart, double more, double threshold) {
  const double alpha = std::max(apart, 0.0) / sigma_k, beta = sigma_j / sigma_k, g = 2 * (more + threshold);
  const double start = g < 0 ? std::sqrt(-g) : 0;  // a nearer token is decided by the constants alone
  const double root = std::sqrt(std::max(alpha * alpha + (beta * beta - 1) * g, 0.0));
  const double crossing = (alpha * alpha - g) / (alpha * beta + root);
  const double found = (alpha > beta * start ? std::max(start, crossing) : start) * (1 - 1e-6) - 1e-12 * alpha;
  return found > 0 ? static_cast<T>(found) : T(0);  // NaN is not
}

constexpr int64_t kSquare = 8192;  // components up to which all onsets are held, so that every pair is met once

// Lists, for every component, the M components with the smallest onsets.
template <class T, class ParallelFor>
void find_neighbors(const Pairing<T>& in, ParallelFor&& parallel_for) {
  constexpr int V = kWidth<T>;
  constexpr int64_t kBlock = 8;  // components j that share what they read of a tile
  const int64_t K = in.components, p = in.features, R = in.rank, M = in.length, tiles = ceil_div(K, V);
  // A component to a lane; those past the last are copies of it.
  std::vector<T> means(tiles * p * V), whitened(tiles * p * R * V), cholesky(tiles * R * R * V);
  std::vector<T> offs(tiles * V), sizes(tiles * V), constants(tiles * V);
  parallel_for(tiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * V; i < end * V; ++i) {
      const int64_t k = std::min(i, K - 1), tile = i / V, lane = i % V;
      double square = 0;
      for (int64_t c = 0; c < p; ++c) {
        const T value = in.means[k * p + c];
        means[(tile * p + c) * V + lane] = value;
        square += double(value) * value;
        for (int64_t r = 0; r < R; ++r)
          whitened[((tile * p + c) * R + r) * V + lane] = in.whitened[(k * R + r) * p + c];
      }
      for (int64_t r = 0; r < R * R; ++r) cholesky[(tile * R * R + r) * V + lane] = in.cholesky[k * R * R + r];
      sizes[i] = static_cast<T>(std::sqrt(square) * (1 + 1e-6));
      offs[i] = in.offs[k];
      constants[i] = in.constants[k];
    }
  });
  // One direction serves both ways: a pair is met once where K x K onsets can be held, twice where they cannot.
  const bool both = K <= kSquare;
  const int64_t blocks = ceil_div(K, kBlock), stride = tiles * V;
  std::vector<T> square(both ? K * stride : 0);
  auto list = [&](int64_t j, T* own, std::vector<int32_t>& order) {  // own [K], the onsets for tokens of j
    own[j] = std::numeric_limits<T>::infinity();  // not its own neighbor
    auto nearer = [own](int32_t a, int32_t b) { return own[a] != own[b] ? own[a] < own[b] : a < b; };
    order.resize(K);
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + M, order.end(), nearer);  // M < K: j itself is last
    std::sort(order.begin(), order.begin() + M, nearer);
    in.horizons[j] = own[order[M]];
    for (int64_t m = 0; m < M; ++m) {
      in.neighbors[j * M + m] = order[m];
      in.onsets[j * M + m] = own[order[m]];
    }
  };
  parallel_for(blocks, [&](int64_t begin, int64_t end) {
    PairTile<T> pairs(p, R);
    std::vector<T> e(kBlock * p * R), some(both ? 0 : kBlock * stride);
    std::vector<int32_t> order;
    double sigma_j[V], sigma_k[V], apart[V];
    for (int64_t i = begin; i < end; ++i) {
      // First and last blocks alternate, because the first meet the most where pairs are met once.
      const int64_t block = i % 2 ? blocks - 1 - i / 2 : i / 2;
      const int64_t j0 = block * kBlock, here = std::min(kBlock, K - j0);
      T* const onsets = both ? square.data() + j0 * stride : some.data();
      for (int64_t b = 0; b < here; ++b)
        for (int64_t c = 0; c < p; ++c)
          for (int64_t r = 0; r < R; ++r) e[(b * p + c) * R + r] = in.whitened[((j0 + b) * R + r) * p + c];
      for (int64_t tile = both ? j0 / V : 0; tile < tiles; ++tile) {
        const T* e_k = whitened.data() + tile * p * R * V;
        for (int64_t b = 0; b < here; ++b) {
          const int64_t j = j0 + b;
          pairs.direct(in.means + j * p, e.data() + b * p * R, means.data() + tile * p * V, e_k);
          pairs.measure(in, e.data() + b * p * R, in.cholesky + j * R * R, offs[j], sizes[j], e_k,
                        cholesky.data() + tile * R * R * V, offs.data() + tile * V, sizes.data() + tile * V, sigma_j,
                        sigma_k, apart);
          for (int lane = 0; lane < V; ++lane) {
            const int64_t k = tile * V + lane;
            const double more = double(constants[k]) - constants[j];
            const double sum = std::abs(double(constants[k])) + std::abs(double(constants[j]));
            const double rounding = std::isfinite(sum) ? 4e-15 * sum : 0;  // -inf where a component has no weight
            if (both && (k <= j || k >= K)) continue;
            onsets[b * stride + k] =
                onset<T>(sigma_j[lane], sigma_k[lane], apart[lane], more + rounding, in.threshold);
            if (both)
              square[k * stride + j] =
                  onset<T>(sigma_k[lane], sigma_j[lane], apart[lane], rounding - more, in.threshold);
          }
        }
      }
      for (int64_t b = 0; b < here && !both; ++b) list(j0 + b, some.data() + b * stride, order);
    }
  });
  if (both)
    parallel_for(K, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> order;
      for (int64_t j = begin; j < end; ++j) list(j, square.data() + j * stride, order);
    });
}

}  // namespace mfa
