// Stage 0 of the int8 level: the rows of A in int8, the means in float, and what rounding can do to either.
//
// Symbols   s a scale per feature (lam where the noise is shared), c the center, y = s (x - c), m_k = s (mu_k - c).
//           rho_k = lam_k / s (1 where the noise is shared), B_k = A_k rho_k: v = rho_k (y - m_k), t = B_k (y - m_k).
//           B^ = quantum q the rows in int8, E = B - B^.
// Bounds    |B|_2 and |E|_2 from Gram matrices: the largest eigenvalue of G is at most |G^4|_inf^(1/4).
// Floor     `rows` read once, a third of that written. Measured by bench/scan_rates.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../gram.h"
#include "../layout.h"
#include "dot4.h"

namespace mfa {

constexpr int kInt8Most = 127;
constexpr int64_t kInt8Features = 40000;  // more could overflow a sum in int32
constexpr int64_t kInt8Tokens = 256;      // fewer take the scan in float
constexpr float kUnit = 0x1p-24f;         // of rounding in float

// What the int8 level reads of a mixture (mfa_kernels/ops/scan/README.md).
struct Int8Rows {
  Shape shape;
  int8_t* rows;         // [K, D'/4, R, 4], D' = D padded
  float* means;         // [K, 1 or 2, D']: m; rho too, where every component has its own noise
  int32_t* starts;      // [K, R] -kTokenOffset times the sum of a row, since tokens come with that added
  float* terms;         // [K, 2 R + kNorms]: quanta [R], offsets B m [R], norms
  const float* scale;   // s [D]
  const float* center;  // c [D]

  // After quanta and offsets: |B|_2, |E|_2 with the rounding of products, that of offsets, |m|, the largest rho.
  static constexpr int kNorms = 5;

  int64_t padded() const { return shape.padded<float>(); }
  int64_t mean_rows() const { return shape.per_component ? 2 : 1; }
  int64_t term_count() const { return 2 * shape.rank + kNorms; }
  int8_t* rows_of(int64_t k) const { return rows + k * padded() * shape.rank; }
  float* means_of(int64_t k) const { return means + k * mean_rows() * padded(); }
  int32_t* starts_of(int64_t k) const { return starts + k * shape.rank; }
  float* terms_of(int64_t k) const { return terms + k * term_count(); }
};

// square = m m for a symmetric m [R, R].
inline void square_of(const float* m, int64_t rank, float* square) {
  std::fill_n(square, rank * rank, 0.0f);
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t s = 0; s < rank; ++s)
      for (int64_t j = 0; j < rank; ++j) square[i * rank + j] += m[i * rank + s] * m[s * rank + j];
}

// At least the largest singular value of a [R, size], up to the rounding of float. products, square [R, R] are scratch.
inline double largest_singular_value(const float* a, int64_t rank, int64_t size, float* products, float* square) {
  gram(a, rank, size, size, products);
  float trace = 0;
  for (int64_t i = 0; i < rank; ++i) trace += products[i * rank + i];
  if (!(trace > 0) || !std::isfinite(trace)) return trace;
  const float unit = 1 / trace;
  if (!std::isfinite(unit)) return std::sqrt(static_cast<double>(trace));
  for (int64_t i = 0; i < rank * rank; ++i) products[i] *= unit;  // so that no power overflows
  square_of(products, rank, square);
  square_of(square, rank, products);
  float norm = 0;
  for (int64_t i = 0; i < rank; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < rank; ++j) sum += std::abs(products[i * rank + j]);
    norm = std::max(norm, sum);
  }
  return std::sqrt(trace * std::sqrt(std::sqrt(static_cast<double>(norm))));
}

// Computes what belongs to one component after another.
class Quantiser {
 public:
  explicit Quantiser(const Int8Rows& out)
      : out_(out), R_(out.shape.rank), P_(out.padded()), b_(R_ * P_), e_(R_ * P_), m_(P_), scale_(P_), center_(P_),
        most_(R_ * V),
        products_(R_ * R_), square_(R_ * R_) {
    std::copy_n(out.scale, out.shape.features, scale_.begin());
    std::copy_n(out.center, out.shape.features, center_.begin());
  }

  // From the rows (layout.h) of component k; those of the next, or null, are asked for meanwhile.
  void operator()(int64_t k, const float* rows, const float* next) {
    float *terms = out_.terms_of(k), *norms = terms + 2 * R_;
    const double radius = write_means(k, rows);
    float ratio = 1;
    if (out_.shape.per_component) {
      const float* own = out_.means_of(k) + P_;
      ratio = *std::max_element(own, own + P_);
    }
    double offsets = 0;
    for (int64_t r = 0; r < R_; ++r) {
      write_row(k, r, next);
      offsets += static_cast<double>(terms[R_ + r]) * terms[R_ + r];
    }
    // A Gram matrix is off by g of its trace, at most R times its largest eigenvalue, where g is the rounding of a chain
    // of D / V additions and some; 0.1% for the rest. Squares of less than 1e-17 underflow.
    const double root = std::sqrt(static_cast<double>(R_)), up = 1.001 + R_ * (P_ / V + 8) * kUnit;
    const double size = up * largest_singular_value(b_.data(), R_, P_, products_.data(), square_.data()) + 1e-17;
    const double error = up * largest_singular_value(e_.data(), R_, P_, products_.data(), square_.data()) + 1e-17;
    const double rounded = out_.shape.per_component ? 2 * kUnit * root : 1e-10;  // of B, and of sums in double
    norms[0] = static_cast<float>(size);
    norms[1] = static_cast<float>(error + 10 * kUnit * root * (size + error));
    norms[2] = static_cast<float>(8 * kUnit * std::sqrt(offsets) + rounded * size * radius);
    norms[3] = static_cast<float>(radius * (1 + 1e-5));
    norms[4] = ratio * (1 + 1e-5f);
  }

 private:
  static constexpr int V = kWidth<float>, W = kWidth<double>;

  // Writes m, and rho where it has a row, keeps B in b_ and its largest values in most_; returns |m|. The rows are read
  // once, as they lie.
  double write_means(int64_t k, const float* rows) {
    float *const mean = out_.means_of(k), *const rho = mean + P_;
    Vec<double> square = {};
    std::fill(most_.begin(), most_.end(), 0.0f);
    for (int64_t d = 0; d < P_; d += V, rows += out_.shape.block_stride<float>()) {
      for (int j = 0; j < V; j += W) {
        const Vec<double> m = (load_wide(rows + j) - load(center_.data() + d + j)) * load(scale_.data() + d + j);
        store<double>(m_.data() + d + j, m);
        store_narrow(mean + d + j, m);
        square += m * m;
      }
      if (out_.shape.per_component)
        for (int64_t j = 0; j < V; ++j)
          rho[d + j] = d + j < out_.shape.features ? rows[(1 + R_) * V + j] / out_.scale[d + j] : 0;
      for (int64_t r = 0; r < R_; ++r) {
        Floats value = load(rows + (1 + r) * V);
        if (out_.shape.per_component) value *= load(rho + d);
        store<float>(b_.data() + r * P_ + d, value);
        const Floats size = value < 0 ? -value : value, most = load(most_.data() + r * V);
        store<float>(most_.data() + r * V, size > most ? size : most);
      }
    }
    return std::sqrt(horizontal_sum<double>(square));
  }

  // Writes row r of B in int8, its quantum, start and offset; keeps its error in e_.
  void write_row(int64_t k, int64_t r, const float* next) {
    const float* const b = b_.data() + r * P_;
    float *const e = e_.data() + r * P_, *const terms = out_.terms_of(k);
    const Quantum quantum(largest_lane(load(most_.data() + r * V)), kInt8Most);
    int8_t* quads = out_.rows_of(k) + 4 * r;
    Ints total = {};
    Vec<double> offset = {};
    for (int64_t d = 0; d < P_; d += V) {
      for (int64_t ahead = r; next && ahead < out_.shape.row_count(); ahead += R_) prefetch(next + ahead * P_ + d, V);
      const Floats value = load(b + d), near = nearest(value * quantum.inverse);
      store<float>(e + d, value - near * quantum.size);
      const Ints q = __builtin_convertvector(near, Ints);
      total += q;
      for (int j = 0; j < V; j += W) offset += load_wide(b + d + j) * load(m_.data() + d + j);
      const auto bytes = __builtin_convertvector(q, Bytes);
      for (int quad = 0; quad < V / 4; ++quad, quads += 4 * R_)
        std::memcpy(quads, reinterpret_cast<const char*>(&bytes) + 4 * quad, 4);
    }
    out_.starts_of(k)[r] = -kTokenOffset * horizontal_sum<int32_t>(total);
    terms[r] = quantum.size;
    terms[R_ + r] = static_cast<float>(horizontal_sum<double>(offset));
  }

  const Int8Rows& out_;
  int64_t R_, P_;
  std::vector<float> b_, e_;
  std::vector<double> m_, scale_, center_;
  std::vector<float> most_, products_, square_;
};

// rows (layout.h) -> out
template <class ParallelFor>
void quantise(const Int8Rows& out, const float* rows, ParallelFor&& parallel_for) {
  parallel_for(out.shape.components, [&](int64_t begin, int64_t end) {
    Quantiser quantiser(out);
    for (int64_t k = begin; k < end; ++k) {
      const float* const own = rows + k * out.shape.component_stride<float>();
      quantiser(k, own, k + 1 < end ? own + out.shape.component_stride<float>() : nullptr);
    }
  });
}

}  // namespace mfa
