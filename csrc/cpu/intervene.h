// Steering: one pass over the hidden states, from the active pairs to the rounded result.
//
//   x -> scale x + shift + sum_c r_c (weight mu_k + W_k (z + spread E[z | x, k])),   k the component of slot c
//
// for every token that the gate of its batch row lets through; the others keep their bits. H: dtype of the hidden
// states, T: of the mixture, A: the wider of the two, at least float. A token is added up in A and rounded to H once.
//
// Both terms of W_k come from the rows that the scan reads, with u = spread t + L^T z:
//   W E[z | x, k] = lam^-1 W~ L^-T t = lam^-1 A^T t,   W z = lam^-1 A^T L^T z      (W~ = lam W = A^T L^T)
// so there is no substitution, and one block of memory per active component, its features contiguous.
// Never materialised: E[z | x, k], W_k z, responsibilities, masks: those of a token are on the stack of its thread.
// Floor: hidden states read and written once, the rows of the active components once (they stay in cache).
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "residual.h"

namespace mfa {

// Values [rows, steps, width] for a batch of tokens: row b of the batch takes entry b / (batch / rows), and token t
// takes step t, or the only one.
template <class U>
struct PerToken {
  const U* data;  // may be null
  int64_t rows, steps, width;
  const U* at(int64_t b, int64_t batch, int64_t t) const {
    return data + ((b * rows / batch) * steps + (steps > 1 ? t : 0)) * width;
  }
};

enum GateKind { kAlways, kResponsibility, kNotResponsibility, kDensity, kNotDensity, kNever };

// The edit of each token.
template <class T, class A>
struct Edit {
  int64_t batch, tokens;
  PerToken<A> coefficients, shift;  // [3] scale, weight, spread; [D]
  PerToken<int32_t> rules;          // [3] kind of gate, region, 1 where the norm is kept
  PerToken<T> thresholds, latents;  // [1]; z [R], or null
  PerToken<bool> chosen, passed;    // [1] each, or null
  bool spreads;                     // some spread is not 0
};

// The active pairs of the tokens, and the mixture that they are of.
template <class T>
struct Evidence {
  int64_t slots;              // S
  const T* log_prob;          // [N], or null where no token was scanned
  const int32_t* components;  // [N, S]
  const T* logits;            // [N, S]
  const int32_t* counts;      // [N]
  const T *rows, *chol, *lam;  // null where no responsibility weighs anything
};

// True where a gate of this kind lets a token through.
template <class T>
bool passes(int32_t kind, T responsibility, T log_prob, T threshold) {
  if (kind == kAlways) return true;
  if (kind == kNever || log_prob != log_prob) return false;
  const bool over = (kind <= kNotResponsibility ? responsibility : log_prob) > threshold;
  return over == (kind == kResponsibility || kind == kDensity);
}

// Writes r_c of one token: a softmax, because log_prob carries its own rounding; only where slots overflow is log_prob
// needed as the normaliser.
template <class T>
void responsibilities(const Evidence<T>& found, int64_t n, T* r) {
  const T* logits = found.logits + n * found.slots;
  if (found.counts[n] > found.slots) {
    for (int64_t c = 0; c < found.slots; ++c) r[c] = std::exp(logits[c] - found.log_prob[n]);
    return;
  }
  T best = -std::numeric_limits<T>::infinity(), sum = 0;
  for (int64_t c = 0; c < found.slots; ++c) best = std::max(best, logits[c]);
  for (int64_t c = 0; c < found.slots; ++c) sum += r[c] = std::exp(logits[c] - best);  // NaN where none is active
  for (int64_t c = 0; c < found.slots; ++c) r[c] /= sum;
}

// Adds r (weight mu_k + lam^-1 A_k^T u) to a token; u may be null.
template <class T, class A>
void add_component(const Shape& shape, const T* own, const T* lam, A weight, T r, const T* u, A* out) {
  constexpr int V = kWidth<T>;
  for (int64_t b = 0; b < shape.blocks<T>(); ++b) {
    const T* mean = own + b * shape.block_stride<T>();
    const int64_t d = b * V, lanes = std::min<int64_t>(V, shape.features - d);
    Vec<T> sum = {};
    for (int64_t j = 0; u && j < shape.rank; ++j) sum += load(mean + (1 + j) * V) * u[j];
    T moved[V];
    store<T>(moved, sum);
    const T* scale = shape.per_component ? mean + (1 + shape.rank) * V : lam + d;
    for (int64_t j = 0; j < lanes; ++j) out[d + j] += r * (weight * mean[j] + moved[j] / scale[j]);
  }
}

// Returns |values|^2, added in eight lanes.
template <class A>
double squared_length(const A* values, int64_t count) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lane[j] += double(values[i + j]) * double(values[i + j]);
  for (; i < count; ++i) lane[i % 8] += double(values[i]) * double(values[i]);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// hidden [B, T, D] -> out [B, T, D] and tally [B, T, 3]: 1 where the token is changed; the responsibility of its
// region; 1 where that is known.
template <class H, class T, class A, class ParallelFor>
void intervene(const Shape& shape, const Edit<T, A>& edit, const Evidence<T>& found, const H* hidden, H* out, T* tally,
               ParallelFor&& parallel_for) {
  const int64_t D = shape.features, R = shape.rank, C = found.slots, B = edit.batch;
  parallel_for(B * edit.tokens, [&](int64_t begin, int64_t end) {
    std::vector<T> r(C), x, v(found.rows ? shape.padded<T>() : 0), t(R), u(R);
    std::vector<A> sum(D), before(D);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / edit.tokens, at = n % edit.tokens;
      const int32_t* rule = edit.rules.at(b, B, 0);
      const int32_t* components = found.components + n * C;
      const bool chosen = !edit.chosen.data || *edit.chosen.at(b, B, at);
      T responsibility = 0, log_prob = 0;
      if (found.log_prob) {
        responsibilities(found, n, r.data());
        log_prob = found.log_prob[n];
        if (C && r[0] != r[0]) responsibility = r[0];
        for (int64_t c = 0; c < C; ++c)
          if (components[c] == rule[1]) responsibility += r[c];
      }
      const bool known = chosen && found.log_prob && rule[1] >= 0 && responsibility == responsibility;
      const bool reached = chosen && (!edit.passed.data || *edit.passed.at(b, B, at)) &&
                           passes(rule[0], responsibility, log_prob, *edit.thresholds.at(b, B, 0));
      tally[3 * n] = reached;
      tally[3 * n + 1] = known ? responsibility : T(0);
      tally[3 * n + 2] = known;
      const H* token = hidden + n * D;
      if (!reached) {
        std::memcpy(out + n * D, token, D * sizeof(H));
        continue;
      }
      const A *c = edit.coefficients.at(b, B, at), *shift = edit.shift.at(b, B, at);
      for (int64_t d = 0; d < D; ++d) {
        before[d] = static_cast<A>(token[d]);
        sum[d] = c[0] * before[d] + shift[d];
      }
      if (found.rows) {
        const T* z = edit.latents.data ? edit.latents.at(b, B, at) : nullptr;
        if (edit.spreads) x.assign(before.begin(), before.end());
        for (int64_t i = 0; i < C; ++i) {
          if (r[i] != r[i]) std::fill(sum.begin(), sum.end(), A(r[i]));  // a token that is not finite
          if (components[i] < 0 || r[i] == 0) continue;
          const T* own = found.rows + components[i] * shape.component_stride<T>();
          std::fill(u.begin(), u.end(), T(0));
          if (edit.spreads) {
            const T* all = x.data();
            project<T, 1>(shape, &all, own, found.lam, v.data(), t.data());
            for (int64_t j = 0; j < R; ++j) u[j] = static_cast<T>(c[2]) * t[j];
          }
          const T* L = found.chol + components[i] * R * R;
          for (int64_t row = 0; z && row < R; ++row)
            for (int64_t j = 0; j <= row; ++j) u[j] += L[row * R + j] * z[row];
          add_component(shape, own, found.lam, c[1], r[i], edit.spreads || z ? u.data() : nullptr, sum.data());
        }
      }
      if (rule[2]) {
        const double after = squared_length(sum.data(), D);
        const A factor = after > 0 ? static_cast<A>(std::sqrt(squared_length(before.data(), D) / after)) : A(1);
        for (int64_t d = 0; d < D; ++d) sum[d] *= factor;
      }
      for (int64_t d = 0; d < D; ++d) out[n * D + d] = static_cast<H>(sum[d]);
    }
  });
}

}  // namespace mfa
