// Every CPU kernel against its formula in double precision, and its bits against those on other numbers of threads.
//
// The program does without Torch, for compilers, instruction sets and sanitizers that Torch does not support.
//
// Prints a line for each check; the status is the number of those that failed.
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <string>

#include "candidate_scan.h"
#include "int8/int8_scan.h"
#include "intervene.h"
#include "kmeans.h"
#include "m_step.h"
#include "top_scores.h"
#include "screen/screened_scan.h"
#include "statistics.h"
#include "woodbury.h"

namespace {

using Doubles = std::vector<double>;

// at::parallel_for on so many threads, one after the other, the last first: nothing may depend on their order.
struct Threads {
  int64_t count;
  int64_t threads() const { return count; }
  template <class Body>
  void operator()(int64_t size, Body&& body) const {
    const int64_t chunk = size > 0 ? mfa::ceil_div(size, std::min(count, size)) : 0;
    for (int64_t i = count - 1; i >= 0; --i)
      if (i * chunk < size) body(i * chunk, std::min(size, (i + 1) * chunk));
  }
};

uint64_t state = 1;
double uniform() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 11) * 0x1p-53;
}
double normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

int failures = 0;
std::map<std::string, double> worst;  // errors in eps of their terms, by what was checked

void that(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Checks every entry to within 8 eps of the sum of the absolute values of its terms, as tests/helpers/budgets.py does.
template <class T>
void within(const T* found, const Doubles& exact, const Doubles& terms, const std::string& what) {
  double most = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double off = std::abs(found[i] - exact[i]) / (std::numeric_limits<T>::epsilon() * terms[i] + 1e-300);
    if (!(off <= most)) most = off;
  }
  worst[what] = std::max(worst[what], most);
  that(most <= 8, what + " is off by " + std::to_string(most) + " eps of its terms");
}

// Sums of many terms, for kernels that add in double precision themselves.
struct Sums {
  std::vector<std::vector<long double>> values;
  template <size_t N>
  explicit Sums(const int64_t (&sizes)[N]) {
    for (const int64_t size : sizes) values.emplace_back(size, 0.0L);
  }
  void add(int which, int64_t at, double value) { values[which][at] += value; }
  Doubles rounded(int which) const { return Doubles(values[which].begin(), values[which].end()); }
};

template <class T>
struct Problem {
  int64_t N, K, D, R;
  mfa::Shape shape;
  std::vector<T> x, means, loadings, noise, constants, rows, chol, log_det, lam;
  // In double precision: v and t of every pair, A, L, z, logits; and what is added in t and z and a logit.
  Doubles a, lower, v, t, z, logit, t_terms, z_terms, logit_terms;

  Problem(int64_t N, int64_t K, int64_t D, int64_t R, bool own_noise, double spread)
      : N(N), K(K), D(D), R(R), shape{K, D, R, own_noise}, x(N * D), means(K * D), loadings(K * D * R),
        noise(own_noise ? K * D : D), constants(K), rows(K * shape.component_stride<T>()), chol(K * R * R), log_det(K),
        lam(D, T(1)), a(K * R * D), lower(K * R * R), v(N * K * D), t(N * K * R), z(t), logit(N * K), t_terms(t),
        z_terms(t), logit_terms(logit) {
    for (T& value : means) value = T(spread * normal());
    for (T& value : loadings) value = T(normal() * 3 / std::sqrt(double(D)));
    for (T& value : noise) value = T(0.5 + uniform());
    for (int64_t n = 0; n < N; ++n)
      for (int64_t d = 0; d < D; ++d) x[n * D + d] = T(means[n % K * D + d] + normal());
    if (!own_noise)
      for (int64_t d = 0; d < D; ++d) lam[d] = T(1 / std::sqrt(noise[d]));
    mfa::woodbury<T>(shape, means.data(), loadings.data(), noise.data(), rows.data(), chol.data(), log_det.data(),
                    Threads{3});
    for (int64_t k = 0; k < K; ++k) constants[k] = T(-std::log(double(K)) - 0.5 * (D * std::log(2 * M_PI) + log_det[k]));
    formula();
  }

  mfa::ScanInput<T> input() const { return {shape, x.data(), N, rows.data(), lam.data(), constants.data()}; }
  double threshold() const { return std::log(double(K) / std::numeric_limits<T>::epsilon()); }
  double scale(int64_t k, int64_t d) const { return 1 / std::sqrt(double(noise[shape.per_component ? k * D + d : d])); }

  void formula() {
    Doubles log_dets(K), log_det_terms(K), lower_terms(lower.size());
    for (int64_t k = 0; k < K; ++k) {
      Doubles white(R * D), gram(R * R);
      for (int64_t d = 0; d < D; ++d) {
        const double own = std::log(double(noise[shape.per_component ? k * D + d : d]));
        log_dets[k] += own, log_det_terms[k] += std::abs(own);
        for (int64_t r = 0; r < R; ++r) white[r * D + d] = scale(k, d) * loadings[(k * D + d) * R + r];
      }
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          double sum = i == j;
          for (int64_t d = 0; d < D; ++d) sum += white[i * D + d] * white[j * D + d];
          for (int64_t s = 0; s < j; ++s) sum -= gram[i * R + s] * gram[j * R + s];
          gram[i * R + j] = i == j ? std::sqrt(sum) : sum / gram[j * R + j];
        }
      for (int64_t i = 0; i < R; ++i) {
        log_dets[k] += 2 * std::log(gram[i * R + i]), log_det_terms[k] += 1 + 2 * std::log(gram[i * R + i]);
        for (int64_t d = 0; d < D; ++d) {
          double sum = white[i * D + d];
          for (int64_t j = 0; j < i; ++j) sum -= gram[i * R + j] * a[(k * R + j) * D + d];
          a[(k * R + i) * D + d] = sum / gram[i * R + i];
        }
      }
      std::copy(gram.begin(), gram.end(), lower.begin() + k * R * R);
      for (int64_t i = 0; i < R; ++i) {  // a row of L is as long as the root of what it is the factor of
        double square = 0;
        for (int64_t j = 0; j <= i; ++j) square += gram[i * R + j] * gram[i * R + j];
        for (int64_t j = 0; j <= i; ++j) lower_terms[(k * R + i) * R + j] = std::sqrt(square);
      }
    }
    within(log_det.data(), log_dets, log_det_terms, "log-determinants");
    within(chol.data(), lower, lower_terms, "Cholesky factors");
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) {
        const int64_t p = n * K + k;
        double square = 0, explained = 0;
        for (int64_t d = 0; d < D; ++d) {
          v[p * D + d] = (double(x[n * D + d]) - means[k * D + d]) * scale(k, d);
          square += v[p * D + d] * v[p * D + d];
        }
        double terms = square / 2;
        for (int64_t r = 0; r < R; ++r) {
          for (int64_t d = 0; d < D; ++d) {
            t[p * R + r] += a[(k * R + r) * D + d] * v[p * D + d];
            t_terms[p * R + r] += std::abs(a[(k * R + r) * D + d] * v[p * D + d]);
          }
          explained += t[p * R + r] * t[p * R + r];
          terms += std::abs(t[p * R + r]) * t_terms[p * R + r];
        }
        logit[p] = -std::log(double(K)) - 0.5 * (D * std::log(2 * M_PI) + log_dets[k] + square - explained);
        logit_terms[p] = std::log(double(K)) + 0.5 * (D * std::log(2 * M_PI) + log_det_terms[k]) + terms;
        const double* L = lower.data() + k * R * R;
        for (int64_t i = R - 1; i >= 0; --i) {
          double sum = t[p * R + i], size = t_terms[p * R + i];
          for (int64_t j = i + 1; j < R; ++j) {
            sum -= L[j * R + i] * z[p * R + j];
            size += std::abs(L[j * R + i]) * z_terms[p * R + j];
          }
          z[p * R + i] = sum / L[i * R + i];
          z_terms[p * R + i] = size / L[i * R + i];
        }
      }
  }

  double log_prob(int64_t n, double* terms) const {
    const double best = *std::max_element(logit.begin() + n * K, logit.begin() + (n + 1) * K);
    double sum = 0, size = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double r = std::exp(logit[n * K + k] - best);
      sum += r, size += r * logit_terms[n * K + k];
    }
    *terms = size / sum + std::abs(best + std::log(sum));
    return best + std::log(sum);
  }
};

template <class T>
struct Found {
  std::vector<T> log_prob, logits, dropped;
  std::vector<int32_t> components, counts, evaluated;
  Found(int64_t N, int64_t S) : log_prob(N), logits(N * S), dropped(N), components(N * S), counts(N), evaluated(N) {}
  mfa::ScreenedPairs<T> out(double threshold) {
    return {{T(threshold), int64_t(logits.size() / counts.size()), log_prob.data(), components.data(), logits.data(),
             counts.data()},
            dropped.data(),
            evaluated.data()};
  }
  bool operator==(const Found& other) const = default;
};

constexpr int64_t kThreads[] = {1, 2, 3, 5, 6, 7, 8, 16, 33};

// Returns what `run(threads)` finds on one thread, and checks that other numbers of threads find the same.
template <class Run>
auto same(const std::string& what, Run&& run) {
  auto first = run(Threads{1});
  for (const int64_t count : kThreads)
    that(run(Threads{count}) == first, what + ": other bits on " + std::to_string(count) + " threads");
  return first;
}

template <class T>
void check_active(const Problem<T>& p, const Found<T>& found, int64_t slots, const std::string& what) {
  const int64_t N = int64_t(found.counts.size());  // the first of the problem
  Doubles exact(N), terms(N);
  for (int64_t n = 0; n < N; ++n) exact[n] = p.log_prob(n, &terms[n]);
  within(found.log_prob.data(), exact, terms, what + ", log p(x)");
  for (int64_t n = 0; n < N; ++n) {
    const double* own = p.logit.data() + n * p.K;
    const double best = *std::max_element(own, own + p.K), room = 1e-3;
    int64_t surely = 0, possibly = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      surely += own[k] > best - p.threshold() + room;
      possibly += own[k] > best - p.threshold() - room;
    }
    that(found.counts[n] >= std::min(surely, slots + 1) && found.counts[n] <= std::min(possibly, slots + 1),
         what + ": wrong number of active components");
    for (int64_t s = 0; s < std::min<int64_t>(slots, found.counts[n]); ++s) {
      const int64_t k = found.components[n * slots + s];
      const double budget = 8 * std::numeric_limits<T>::epsilon() * p.logit_terms[n * p.K + k];  // as of `within`
      that(std::abs(found.logits[n * slots + s] - own[k]) <= budget, what + ": a logit that is not its component's");
    }
  }
}

template <class T>
void scans(const Problem<T>& p) {
  for (const int64_t slots : {int64_t(2), int64_t(16)}) {
    const auto found = same("scan", [&](const Threads& threads) {
      Found<T> f(p.N, slots);
      mfa::scan<T>(p.input(), f.out(p.threshold()), threads);
      return f;
    });
    check_active(p, found, slots, "scan");
  }
  const auto logits = same("dense", [&](const Threads& threads) {
    std::vector<T> out(p.K * p.N);
    mfa::dense(p.input(), out.data(), threads);
    return out;
  });
  Doubles exact(p.K * p.N), terms(exact);
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t k = 0; k < p.K; ++k)
      exact[k * p.N + n] = p.logit[n * p.K + k], terms[k * p.N + n] = p.logit_terms[n * p.K + k];
  within(logits.data(), exact, terms, "dense");
}

template <class T>
void candidates(const Problem<T>& p) {
  const int64_t C = 9, S = 4;
  std::vector<int32_t> given(p.N * C);
  for (int32_t& k : given) k = int32_t(uniform() * double(p.K + 1)) - 1;
  std::vector<T> all(p.N * C);
  const auto found = same("scan of candidates", [&](const Threads& threads) {
    Found<T> f(p.N, S);
    mfa::scan_candidates<T>(p.input(), given.data(), C, f.out(p.threshold()), all.data(), threads);
    f.dropped = all;  // so that they are compared too
    return f;
  });
  Doubles exact, terms, log_prob, log_prob_terms;
  std::vector<T> computed, total;
  for (int64_t n = 0; n < p.N; ++n) {
    std::set<int32_t> known{-1};
    double sum = 0, size = 0, best = -std::numeric_limits<double>::infinity();
    for (int64_t i = n * C; i < (n + 1) * C; ++i) {
      const bool counts = known.insert(given[i]).second;
      that(counts == std::isfinite(all[i]), "scan of candidates: a logit of no candidate, or none of one");
      if (!counts) continue;
      const int64_t at = n * p.K + given[i];
      exact.push_back(p.logit[at]), terms.push_back(p.logit_terms[at]), computed.push_back(all[i]);
      best = std::max(best, p.logit[at]);
    }
    if (known.size() == 1) {
      that(std::isnan(found.log_prob[n]) && found.counts[n] == 0, "scan of candidates: pairs of a token without any");
      continue;
    }
    known.erase(-1);
    for (const int32_t k : known) {
      const double r = std::exp(p.logit[n * p.K + k] - best);
      sum += r, size += r * p.logit_terms[n * p.K + k];
    }
    log_prob.push_back(best + std::log(sum)), total.push_back(found.log_prob[n]);
    log_prob_terms.push_back(size / sum + std::abs(log_prob.back()));
  }
  within(computed.data(), exact, terms, "scan of candidates");
  within(total.data(), log_prob, log_prob_terms, "scan of candidates, log p(x)");
}

// The value of a pair does not depend on the pairs beside it, which the number of threads may change.
template <class T>
void neighbours(const Problem<T>& p) {
  constexpr int G = 8;
  if (p.N < G) return;
  std::vector<T> v(p.shape.template padded<T>() * G), t(p.R * G + 1);
  T together[G], alone[G], of_two[2];
  const T* x[G];
  for (int g = 0; g < G; ++g) x[g] = p.x.data() + g * p.D;
  for (int64_t k = 0; k < p.K; ++k) {
    const T* own = p.input().rows_of(k);
    mfa::distances<T, G>(p.shape, x, own, p.lam.data(), v.data(), t.data(), together);
    for (int g = 0; g < G; ++g) mfa::distances<T, 1>(p.shape, x + g, own, p.lam.data(), v.data(), t.data(), alone + g);
    mfa::distances<T, 2>(p.shape, x + 2, own, p.lam.data(), v.data(), t.data(), of_two);
    that(std::equal(alone, alone + G, together) && of_two[0] == alone[2] && of_two[1] == alone[3],
         "a distance depends on the tokens beside it");
  }
}

template <class T>
void pairs(const Problem<T>& p) {
  const int64_t N = p.N, K = p.K, D = p.D, R = p.R, P = N * K;
  std::vector<int64_t> tokens(P);
  std::vector<int32_t> components(P);
  std::vector<T> weights(P);
  for (int64_t i = 0; i < P; ++i) tokens[i] = i / K, components[i] = int32_t(i % K), weights[i] = T(normal());
  const auto z = same("latents", [&](const Threads& threads) {
    std::vector<T> out(P * R);
    mfa::latents<T>(p.shape, p.x.data(), tokens.data(), components.data(), P, p.rows.data(), p.chol.data(),
                    p.lam.data(), out.data(), threads);
    return out;
  });
  within(z.data(), p.z, p.z_terms, "latents");

  const int64_t noise = p.shape.per_component ? K * D : D;
  const int64_t sizes[] = {N * D, K * D, K * D * R, noise, K};
  const auto found = same("backward", [&](const Threads& threads) {
    std::vector<std::vector<T>> g;
    for (const int64_t size : sizes) g.emplace_back(size);
    mfa::backward<T>(p.shape, p.x.data(), tokens.data(), components.data(), weights.data(), P, p.rows.data(),
                     p.chol.data(), p.lam.data(), {g[0].data(), g[1].data(), g[2].data(), g[3].data(), g[4].data()},
                     threads);
    return g;
  });
  Sums exact(sizes), terms(sizes);
  auto add = [&](int which, int64_t at, double value, double size) {
    exact.add(which, at, value), terms.add(which, at, std::abs(size));
  };
  for (int64_t k = 0; k < K; ++k) {
    Doubles inverse;
    mfa::invert_lower(R, p.lower.data() + k * R * R, inverse);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t i = n * K + k;
      const double w = weights[i];
      add(4, k, w, w);
      for (int64_t d = 0; d < D; ++d) {
        double q = p.v[i * D + d], size = std::abs(q), own = 1;
        for (int64_t r = 0; r < R; ++r) {
          const double a = p.a[(k * R + r) * D + d];
          q -= a * p.t[i * R + r], size += std::abs(a) * p.t_terms[i * R + r], own -= a * a;
        }
        const double lam = p.scale(k, d);
        add(0, n * D + d, -w * lam * q, w * lam * size);
        add(1, k * D + d, w * lam * q, w * lam * size);
        add(3, p.shape.per_component ? k * D + d : d, w * lam * lam * (q * q - own) / 2,
            w * lam * lam * (size * size + 2) / 2);
        for (int64_t r = 0; r < R; ++r) {
          double prior = 0, prior_size = 0;
          for (int64_t m = r; m < R; ++m) {
            prior += p.a[(k * R + m) * D + d] * inverse[m * R + r];
            prior_size += std::abs(p.a[(k * R + m) * D + d] * inverse[m * R + r]);
          }
          add(2, (k * D + d) * R + r, w * lam * (q * p.z[i * R + r] - prior),
              w * lam * (size * p.z_terms[i * R + r] + prior_size));
        }
      }
    }
  }
  const char* names[] = {"x", "means", "loadings", "noise", "log weights"};
  for (int i = 0; i < 5; ++i) within(found[i].data(), exact.rounded(i), terms.rounded(i), std::string("gradient of ") + names[i]);

  std::vector<T> given(N * K * R);
  for (T& value : given) value = T(normal());
  const auto decoded = same("decode", [&](const Threads& threads) {
    std::vector<T> out(N * D);
    mfa::decode<T>(p.shape, components.data(), weights.data(), given.data(), N, K, p.means.data(), p.loadings.data(),
                   out.data(), threads);
    return out;
  });
  Doubles sums(N * D), sum_terms(N * D);
  for (int64_t i = 0; i < P; ++i)
    for (int64_t d = 0; d < D; ++d) {
      const int64_t k = components[i], n = tokens[i];
      double value = p.means[k * D + d], size = std::abs(value);
      for (int64_t r = 0; r < R; ++r) {
        const double part = double(p.loadings[(k * D + d) * R + r]) * given[i * R + r];
        value += part, size += std::abs(part);
      }
      sums[n * D + d] += weights[i] * value, sum_terms[n * D + d] += std::abs(weights[i]) * size;
    }
  within(decoded.data(), sums, sum_terms, "decode");
}

template <class T>
void statistics(const Problem<T>& p) {
  const int64_t N = p.N, K = p.K, D = p.D, R = p.R, noise = p.shape.per_component ? K * D : D;
  std::vector<int32_t> components(N * K);
  std::vector<T> weights(N * K);
  for (int64_t i = 0; i < N * K; ++i) components[i] = int32_t(i % K), weights[i] = T(uniform());
  const int64_t sizes[] = {K, K * D, K * R, K * R * R, K * R * D, noise};
  const auto found = same("statistics", [&](const Threads& threads) {
    std::vector<Doubles> s;
    for (const int64_t size : sizes) s.emplace_back(size);
    mfa::statistics<T>(p.shape, p.x.data(), components.data(), weights.data(), N, K, p.rows.data(), p.chol.data(),
                       p.lam.data(), {s[0].data(), s[1].data(), s[2].data(), s[3].data(), s[4].data(), s[5].data()},
                       threads);
    return s;
  });
  Sums exact(sizes), terms(sizes);
  auto add = [&](int which, int64_t at, double value, double size) {
    exact.add(which, at, value), terms.add(which, at, std::abs(size));
  };
  for (int64_t k = 0; k < K; ++k) {
    Doubles inverse;
    mfa::invert_lower(R, p.lower.data() + k * R * R, inverse);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t i = n * K + k;
      const double w = weights[i];
      add(0, k, w, w);
      for (int64_t d = 0; d < D; ++d) {
        const double y = double(p.x[n * D + d]) - p.means[k * D + d];
        add(1, k * D + d, w * y, w * y);
        add(5, p.shape.per_component ? k * D + d : d, w * y * y, w * y * y);
        for (int64_t r = 0; r < R; ++r)
          add(4, (k * R + r) * D + d, w * p.z[i * R + r] * y, w * p.z_terms[i * R + r] * y);
      }
      for (int64_t r = 0; r < R; ++r) {
        add(2, k * R + r, w * p.z[i * R + r], w * p.z_terms[i * R + r]);
        for (int64_t s = 0; s < R; ++s) {
          double own = 0, size = 1;  // of M^-1, and of the rounding of L in it
          for (int64_t m = std::max(r, s); m < R; ++m) {
            own += inverse[m * R + r] * inverse[m * R + s];
            size += 4 * std::abs(inverse[m * R + r] * inverse[m * R + s]);
          }
          add(3, (k * R + r) * R + s, w * (p.z[i * R + r] * p.z[i * R + s] + own),
              w * (p.z_terms[i * R + r] * p.z_terms[i * R + s] + size));
        }
      }
    }
  }
  const char* names[] = {"mass", "shift", "latent", "second", "cross", "squares"};
  // The sums are in double precision, of values in T.
  for (int i = 0; i < 6; ++i) {
    std::vector<T> narrow(found[i].begin(), found[i].end());
    within(narrow.data(), exact.rounded(i), terms.rounded(i), std::string("statistics, ") + names[i]);
  }
}

// F = Q^-1 P is checked by Q F = P, with P and Q written out.
template <class T>
void m_step(const Problem<T>& p) {
  const int64_t K = p.K, D = p.D, R = p.R, N1 = R + 1;
  const double nu = 3.5;
  const mfa::Factors<T> in{p.shape, p.rows.data(), p.chol.data(), p.lam.data()};
  const auto gains = same("gains", [&](const Threads& threads) {
    std::vector<T> out(K * R * D);
    mfa::m_step_gains<T>(in, out.data(), threads);
    return out;
  });
  Doubles exact(K * R * D), terms(exact);
  for (int64_t k = 0; k < K; ++k) {
    Doubles inverse;  // of what the kernel reads: an error of L is no error of its own
    mfa::invert_lower(R, p.chol.data() + k * R * R, inverse);
    constexpr int64_t V = mfa::kWidth<T>;
    for (int64_t r = 0; r < R; ++r)
      for (int64_t d = 0; d < D; ++d)
        for (int64_t s = r; s < R; ++s) {
          const T a = p.rows[k * p.shape.template component_stride<T>() +
                             d / V * p.shape.template block_stride<T>() + (1 + s) * V + d % V];
          const double value = inverse[s * R + r] * a * p.scale(k, d);
          exact[(k * R + r) * D + d] += value, terms[(k * R + r) * D + d] += std::abs(value);
        }
  }
  within(gains.data(), exact, terms, "gains");
  std::vector<T> spread(gains), loadings(p.loadings);  // of a covariance that is diagonal
  for (int64_t i = 0; i < K * R * D; ++i) spread[i] *= T(1 + (i % D) % 3);
  const auto traces = same("traces", [&](const Threads& threads) {
    Doubles out(K);
    mfa::m_step_traces<T>(in, gains.data(), spread.data(), out.data(), threads);
    return out;
  });
  Doubles mass(K), shift(K * D), latent(K * R), second(K * R * R), cross(K * R * D);
  for (double& value : mass) value = 1 + 9 * uniform();
  mass[K - 1] = 0;  // keeps its parameters
  for (double& value : shift) value = normal();
  for (double& value : cross) value = normal();
  for (int64_t k = 0; k < K; ++k)
    for (int64_t r = 0; r < R; ++r) second[(k * R + r) * R + r] = 2 + uniform();
  const int64_t noise = p.shape.per_component ? K * D : D;
  const auto found = same("m_step", [&](const Threads& threads) {
    std::vector<T> w(K * D * R);
    Doubles change(K * D), left(noise);
    const bool solved = mfa::m_step_solve<T>(
        in, {mass.data(), shift.data(), latent.data(), second.data(), cross.data()}, gains.data(), spread.data(), nu,
        0.5, loadings.data(), {w.data(), change.data(), left.data()}, threads);
    that(solved, "m_step: no solution");
    return std::tuple(w, change, left);
  });
  // By name: before version 16, clang lets no lambda take over a structured binding.
  const std::vector<T>& w = std::get<0>(found);
  const Doubles &change = std::get<1>(found), &left = std::get<2>(found);
  std::vector<T> narrow_traces(traces.begin(), traces.end()), narrow_left(left.begin(), left.end()), residual;
  Doubles trace(K), trace_terms(K), of_left(noise), left_terms(noise), expected, sizes;
  for (int64_t k = 0; k < K; ++k) {
    Doubles inverse, q(N1 * N1), P(N1 * D);
    mfa::invert_lower(R, p.chol.data() + k * R * R, inverse);
    const T* L = p.chol.data() + k * R * R;
    for (int64_t r = 0; r < R; ++r)
      for (int64_t s = 0; s < R; ++s) {
        double product = 0, size = 0, posterior = 0, m = 0;
        for (int64_t d = 0; d < D; ++d) {
          const double value = double(spread[(k * R + r) * D + d]) * gains[(k * R + s) * D + d];
          product += value, size += std::abs(value);
        }
        for (int64_t i = std::max(r, s); i < R; ++i) posterior += inverse[i * R + r] * inverse[i * R + s];
        for (int64_t i = 0; i <= std::min(r, s); ++i) m += double(L[r * R + i]) * L[s * R + i];
        trace[k] += product * m, trace_terms[k] += size * std::abs(m);
        q[r * N1 + s] = second[(k * R + r) * R + s] + nu * (product + posterior);
      }
    q[R * N1 + R] = mass[k];
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t r = 0; r < R; ++r)
        P[r * D + d] = cross[(k * R + r) * D + d] + nu * double(spread[(k * R + r) * D + d]);
      P[R * D + d] = shift[k * D + d];
      auto f = [&](int64_t r) { return r < R ? double(w[(k * D + d) * R + r]) : change[k * D + d]; };
      for (int64_t i = 0; i < N1; ++i) {
        double product = 0, size = std::abs(P[i * D + d]);
        for (int64_t j = 0; j < N1; ++j) product += q[i * N1 + j] * f(j), size += std::abs(q[i * N1 + j] * f(j));
        const int64_t at = p.shape.per_component ? k * D + d : d;
        of_left[at] -= f(i) * (2 * P[i * D + d] - product), left_terms[at] += std::abs(f(i)) * (2 * size);
        if (mass[k] > 0) residual.push_back(T(product)), expected.push_back(P[i * D + d]);
        if (mass[k] > 0) sizes.push_back(double(N1) * size);  // L^-T L^-1 P has chains of so many additions
      }
      for (int64_t r = 0; r < R && mass[k] == 0; ++r)
        that(w[(k * D + d) * R + r] == p.loadings[(k * D + d) * R + r] && change[k * D + d] == 0,
             "m_step: a component without tokens has moved");
    }
  }
  within(narrow_traces.data(), trace, trace_terms, "traces");
  within(residual.data(), expected, sizes, "m_step, Q F");
  within(narrow_left.data(), of_left, left_terms, "m_step, what is left");
  if (R == 0 || K == 1) return;
  second[0] = -1e6;
  std::vector<T> other(K * D * R);
  Doubles moved(K * D), rest(noise);
  that(!mfa::m_step_solve<T>(in, {mass.data(), shift.data(), latent.data(), second.data(), cross.data()},
                             gains.data(), spread.data(), nu, 0.5, loadings.data(),
                             {other.data(), moved.data(), rest.data()}, Threads{2}),
       "m_step: statistics of no tokens were taken");
}

template <class T>
void kmeans(int64_t N, int64_t K, int64_t D, int64_t P) {
  std::vector<T> x(N * D), centroids(K * D), center(D), basis(D * P), projected(K * P);
  for (T& value : centroids) value = T(normal());
  for (int64_t n = 0; n < N; ++n)
    for (int64_t d = 0; d < D; ++d) x[n * D + d] = T(centroids[n % K * D + d] + 0.7 * normal());
  for (int64_t d = 0; d < D; ++d) {
    center[d] = T(0.1 * normal());
    for (int64_t p = 0; p < P; ++p) basis[d * P + p] = T(d == p);  // any orthonormal columns do
  }
  for (int64_t k = 0; k < K; ++k) std::copy_n(centroids.data() + k * D, P, projected.data() + k * P);
  for (const bool screened : {false, true}) {
    const mfa::Centroids<T> all{
        K, D, centroids.data(), center.data(), screened ? P : D, screened ? basis.data() : nullptr,
        screened ? projected.data() : centroids.data(),
        T((600 + D) * std::sqrt(double(D)) * std::numeric_limits<T>::epsilon())};
    const auto found = same("nearest", [&](const Threads& threads) {
      std::pair<std::vector<int64_t>, std::vector<T>> out{std::vector<int64_t>(N), std::vector<T>(N)};
      mfa::nearest<T>(all, x.data(), N, out.first.data(), out.second.data(), threads);
      return out;
    });
    Doubles least(N, 1e300);
    for (int64_t n = 0; n < N; ++n) {
      double own = 0;
      for (int64_t k = 0; k < K; ++k) {
        double gap = 0;
        for (int64_t d = 0; d < D; ++d) gap += std::pow(double(T(x[n * D + d] - center[d])) - centroids[k * D + d], 2);
        least[n] = std::min(least[n], gap);
        if (k == found.first[n]) own = gap;
      }
      that(own <= least[n] * (1 + 16 * std::numeric_limits<T>::epsilon()), "nearest: another centroid is nearer");
    }
    within(found.second.data(), least, least, "squared distances");
    const auto sums = same("cluster_sums", [&](const Threads& threads) {
      std::vector<Doubles> out{Doubles(K * D), Doubles(K), Doubles(K)};
      mfa::cluster_sums<T>(x.data(), N, D, center.data(), found.first.data(), found.second.data(), nullptr, K,
                           out[0].data(), out[1].data(), out[2].data(), threads);
      return out;
    });
    that(std::accumulate(sums[1].begin(), sums[1].end(), 0.0) == double(N), "cluster_sums: a row is missing");
  }
}

// The rows [n, F] as multiples of a 63rd of their largest number.
template <class T>
Doubles few_bits(const std::vector<T>& rows, int64_t F) {
  Doubles found(rows.size());
  for (size_t first = 0; first < rows.size(); first += F) {
    float most = 0;
    for (int64_t f = 0; f < F; ++f) most = std::max(most, std::abs(static_cast<float>(rows[first + f])));
    const float quantum = most / 63, inverse = 1 / quantum;
    for (int64_t f = 0; f < F; ++f)
      found[first + f] = double(quantum) * std::nearbyint(static_cast<float>(rows[first + f]) * inverse);
  }
  return found;
}

template <class T>
void top_scores(int64_t N, int64_t K, int64_t S, int64_t F, int64_t count) {
  std::vector<T> left(N * F), right(K * (S + 1) * F), offsets(K * (S + 1));
  for (T& value : left) value = T(normal());
  for (T& value : right) value = T(normal());
  for (T& value : offsets) value = T(normal());
  const int64_t own = (S + 1) * F;
  offsets[K / 2 * (S + 1)] = std::numeric_limits<T>::quiet_NaN();
  offsets[0] = -std::numeric_limits<T>::infinity();
  std::copy_n(right.data() + own, own, right.data() + (K - 1) * own);  // twins: the first of them comes first
  std::copy_n(offsets.data() + S + 1, S + 1, offsets.data() + (K - 1) * (S + 1));
  const auto found = same("top_scores", [&](const Threads& threads) {
    std::vector<int32_t> out(N * count, -7);
    mfa::top_scores<T>(left.data(), right.data(), offsets.data(), N, K, S, F, {}, count, out.data(), threads);
    return out;
  });
  const std::vector<int64_t> starts{0, K / 3, K / 3, K - 2, K};  // one of them is empty
  std::vector<int32_t> lists(N * 3);
  for (int64_t n = 0; n < N; ++n) lists[3 * n] = n % 4, lists[3 * n + 1] = -1, lists[3 * n + 2] = (n + 1 + n % 3) % 4;
  const auto some = same("top_scores, groups", [&](const Threads& threads) {
    std::vector<int32_t> out(N * count, -7);
    mfa::top_scores<T>(left.data(), right.data(), offsets.data(), N, K, S, F, {4, 3, starts.data(), lists.data()},
                       count, out.data(), threads);
    return out;
  });
  std::vector<int32_t> every(N * K);
  mfa::top_scores<T>(left.data(), right.data(), offsets.data(), N, K, S, F, {}, K, every.data(), Threads{1});
  for (int64_t n = 0; n < N; ++n) {
    std::vector<int32_t> expected;
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j : {0, 2}) {
        const int64_t k = every[n * K + i], g = lists[3 * n + j];
        if (k >= starts[g] && k < starts[g + 1]) expected.push_back(k);
      }
    expected.resize(count, -1);
    that(std::equal(expected.begin(), expected.end(), some.begin() + n * count), "top_scores: other than in groups");
  }
  const Doubles y = few_bits(left, F), p = few_bits(right, F);
  for (int64_t n = 0; n < N; ++n) {
    Doubles scores(K), terms(K);
    for (int64_t k = 0; k < K; ++k)
      for (int64_t s = 0; s <= S; ++s) {
        const double offset = offsets[k * (S + 1) + s];
        const double dot = std::inner_product(y.begin() + n * F, y.begin() + (n + 1) * F,
                                              p.begin() + (k * (S + 1) + s) * F, 0.0);
        const double value = offset + dot, size = std::abs(offset) + std::abs(dot);
        scores[k] += s == 0 ? value : value * value / 2, terms[k] += s == 0 ? size : size * size;
      }
    const int32_t* mine = found.data() + n * count;
    const double unit = 8 * std::numeric_limits<float>::epsilon();  // products of integers are exact
    std::vector<char> is_listed(K);
    for (int64_t i = 0; i < count; ++i) {
      if (i >= K - 2) {
        that(mine[i] == -1, "top_scores: a component that has no score");
        continue;
      }
      that(mine[i] > 0 && mine[i] != K / 2 && mine[i] < K && !is_listed[mine[i]], "top_scores: twice, or no score");
      is_listed[mine[i]] = true;
      if (i > 0)
        that(scores[mine[i]] <= scores[mine[i - 1]] + unit * (terms[mine[i]] + terms[mine[i - 1]]),
             "top_scores: not in order");
    }
    that(!is_listed[K - 1] || is_listed[1], "top_scores: the second of two that are equal");
    if (count >= K - 2) continue;
    const int32_t last = mine[count - 1];
    for (int64_t k = 1; k < K; ++k)
      that(k == K / 2 || is_listed[k] || scores[k] <= scores[last] + unit * (terms[k] + terms[last]),
           "top_scores: a larger score was left out");
  }
}

double square_of(const Doubles& values) {
  return std::inner_product(values.begin(), values.end(), values.begin(), 0.0);
}

// The tensors of a Screen, as mfa_kernels/ops/screen/stage_0.py makes them, in plain loops.
template <class T>
struct PlainScreen {
  mfa::Screen view;
  std::vector<T> center;
  std::vector<float> basis, terms;
  std::vector<int8_t> rows;
  std::vector<int32_t> starts;
  Doubles unrounded, reaches;  // [N, K]: the bounds in double precision, without int8; |y| + |m|

  PlainScreen(const Problem<T>& m, int64_t p)
      : view{m.shape, p, nullptr, nullptr, nullptr, nullptr, 0}, center(m.D), basis(m.D * p),
        terms(m.K * view.term_count()), rows(m.K * view.blocks() * mfa::kScreenBlock), starts(m.K * (m.R + 1)),
        unrounded(m.N * m.K), reaches(m.N * m.K) {
    view.basis = basis.data(), view.rows = rows.data(), view.starts = starts.data(), view.terms = terms.data();
    // logit_slack of mfa_kernels/ops/screen/rounding.py.
    const double unit = std::numeric_limits<T>::epsilon() / 2, chain = double(mfa::ceil_div(m.D, 4) + 8);
    const double products = (6 + (chain + 1) * std::sqrt(std::max<double>(m.R, 1))) * unit;
    const double sums = 2 * (chain + m.R + 8) * unit;
    view.exact_slack = up(0.505 * (12 * unit + 2 * products + products * products + sums) + 8 * unit);

    for (int64_t d = 0; d < m.D; ++d) {
      double sum = 0;
      for (int64_t k = 0; k < m.K; ++k) sum += m.means[k * m.D + d];
      center[d] = T(sum / m.K);
    }
    const double skew = make_basis(m.D);
    Doubles inside, norms;  // Q^T y, |y|
    for (int64_t n = 0; n < m.N; ++n) {
      const Doubles y = whitened(m, m.x.data() + n * m.D), z = projected(y);
      inside.insert(inside.end(), z.begin(), z.end());
      norms.push_back(std::sqrt(square_of(y)));
    }
    for (int64_t k = 0; k < m.K; ++k) {
      const Doubles mean = whitened(m, m.means.data() + k * m.D), mean_inside = projected(mean);
      Doubles t(m.R * p);
      for (int64_t r = 0; r < m.R; ++r) {  // B = A Q
        const double* own = m.a.data() + (k * m.R + r) * m.D;
        const Doubles b = projected(Doubles(own, own + m.D));
        std::copy(b.begin(), b.end(), t.begin() + r * p);
      }
      const double b_square = square_of(t), nu = make_rows(m, k, skew, t);
      for (int64_t n = 0; n < m.N; ++n) {
        unrounded[n * m.K + k] = bound(m, n * m.K + k, nu, t, inside.data() + n * p, mean_inside);
        reaches[n * m.K + k] = norms[n] + std::sqrt(square_of(mean));
      }
      write(m, k, skew, nu, mean, mean_inside, t, b_square);
    }
  }

 private:
  static float up(double value) { return float(value * (1 + 1e-6)); }

  // Takes the first columns of a reflection for Q: none is a feature alone. Returns |Q^T Q - I|, as floats round Q.
  double make_basis(int64_t D) {
    const int64_t p = view.coordinates;
    Doubles mirror(D);
    for (double& value : mirror) value = normal();
    const double twice = 2 / square_of(mirror);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t c = 0; c < p; ++c) basis[d * p + c] = float((d == c) - twice * mirror[d] * mirror[c]);
    double off = 0;
    for (int64_t i = 0; i < p; ++i)
      for (int64_t j = 0; j < p; ++j) {
        double sum = i == j ? -1 : 0;
        for (int64_t d = 0; d < D; ++d) sum += double(basis[d * p + i]) * basis[d * p + j];
        off += sum * sum;
      }
    return std::sqrt(off);
  }

  // lam (x - c)
  Doubles whitened(const Problem<T>& m, const T* x) const {
    Doubles y(m.D);
    for (int64_t d = 0; d < m.D; ++d) y[d] = (double(x[d]) - center[d]) * m.scale(0, d);
    return y;
  }

  // Q^T y
  Doubles projected(const Doubles& y) const {
    Doubles z(view.coordinates);
    for (size_t d = 0; d < y.size(); ++d)
      for (size_t c = 0; c < z.size(); ++c) z[c] += double(basis[d * z.size() + c]) * y[d];
    return z;
  }

  // B -> T [R, p] of component k; returns nu.
  double make_rows(const Problem<T>& m, int64_t k, double skew, Doubles& t) const {
    const int64_t D = m.D, R = m.R, p = view.coordinates;
    const double* a = m.a.data() + k * R * D;
    Doubles rest(R * R);  // A A^T - B B^T, and what an inexact Q may add to it
    double nu = 0;        // more than its largest eigenvalue
    for (int64_t i = 0; i < R; ++i) {
      double size = 0;
      for (int64_t j = 0; j < R; ++j) {
        double sum = i == j ? 2 * skew + 1e-9 : 0;
        for (int64_t d = 0; d < D; ++d) sum += a[i * D + d] * a[j * D + d];
        for (int64_t c = 0; c < p; ++c) sum -= t[i * p + c] * t[j * p + c];
        rest[i * R + j] = sum, size += std::abs(sum);
      }
      nu = std::max(nu, size);
    }
    nu += 0.25;
    // F F^T = I - rest / nu, where `rest` was; T = F^-1 B.
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        double sum = (i == j) - rest[i * R + j] / nu;
        for (int64_t s = 0; s < j; ++s) sum -= rest[i * R + s] * rest[j * R + s];
        rest[i * R + j] = i == j ? std::sqrt(sum) : sum / rest[j * R + j];
      }
      for (int64_t c = 0; c < p; ++c) {
        double sum = t[i * p + c];
        for (int64_t j = 0; j < i; ++j) sum -= rest[i * R + j] * t[j * p + c];
        t[i * p + c] = sum / rest[i * R + i];
      }
    }
    return nu;
  }

  // The bound of a pair in double precision.
  double bound(const Problem<T>& m, int64_t pair, double nu, const Doubles& t, const double* z,
               const Doubles& mean_inside) const {
    const int64_t p = view.coordinates;
    double above = 0;  // nu (|v|^2 - |Q^T v|^2) + |T Q^T v|^2 - |A v|^2
    for (int64_t d = 0; d < m.D; ++d) above += nu * std::pow(m.v[pair * m.D + d], 2);
    for (int64_t c = 0; c < p; ++c) above -= nu * std::pow(z[c] - mean_inside[c], 2);
    for (int64_t r = 0; r < m.R; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < p; ++c) sum += t[r * p + c] * (z[c] - mean_inside[c]);
      above += sum * sum - std::pow(m.t[pair * m.R + r], 2);
    }
    return m.logit[pair] + above / 2;
  }

  // Writes a row in int8, its blocks `next` bytes apart, and its start; returns its quantum, and leaves what is lost.
  static float quantise(double* values, int64_t count, int8_t* out, int64_t next, int32_t& start) {
    double most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, std::abs(values[i]));
    const float quantum = float(most / mfa::kInt8Most);
    start = 0;
    for (int64_t i = 0; i < count && quantum > 0; ++i) {
      const double near = std::round(values[i] / quantum);
      out[i / mfa::kScreenBlock * next + i % mfa::kScreenBlock] = int8_t(near);
      start -= mfa::kTokenOffset * int32_t(near);
      values[i] -= near * quantum;
    }
    return quantum;
  }

  // Writes component k; t is scratch afterwards.
  void write(const Problem<T>& m, int64_t k, double skew, double nu, const Doubles& mean, const Doubles& mean_inside,
             Doubles& t, double b_square) {
    const int64_t D = m.D, R = m.R, p = view.coordinates;
    float *const quanta = terms.data() + k * view.term_count(), *const offsets = quanta + R;
    int8_t* const bytes = rows.data() + k * view.blocks() * mfa::kScreenBlock;
    int32_t* const first = starts.data() + k * (R + 1);
    Doubles w(mean), products(R);  // w; T Q^T m
    for (int64_t d = 0; d < D; ++d) {
      double sum = mean[d];
      for (int64_t c = 0; c < p; ++c) sum -= basis[d * p + c] * mean_inside[c];
      w[d] -= nu * sum;
    }
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t c = 0; c < p; ++c) products[r] += t[r * p + c] * mean_inside[c];
      offsets[r] = float(products[r]);
    }
    // bound_slack of mfa_kernels/ops/screen/rounding.py; a Frobenius norm is at least that of the operator.
    const double square = square_of(mean), inside_square = square_of(mean_inside), gain = square_of(t);
    const double unit = mfa::kUnit, chain = double(mfa::kFlush + mfa::ceil_div(D, mfa::kFlush) + 8);
    const double rest = std::abs(1 - nu), all = 1 + rest + nu + gain;
    const double rounded = chain * (rest + nu) + (10 * std::sqrt(std::max<double>(R, 1)) + R + 8) * gain + 24 * all;
    const double of_basis = 2.1 * mfa::projection_unit(view) * nu + skew * (2 * nu + 2.5 * gain);
    mfa::Screen::Terms own{};
    own.size = float(inside_square + (1 - nu) * (square - inside_square));
    own.rest = float(1 - nu);
    own.mean = up(std::sqrt(square_of(w)));
    own.quantum = quantise(w.data(), D, bytes, mfa::kScreenBlock, first[0]);
    own.lost = up(std::sqrt(square_of(w)));
    own.rows = up(std::sqrt(gain));
    for (int64_t r = 0; r < R; ++r)
      quanta[r] = quantise(t.data() + r * p, p, bytes + (view.feature_blocks() + r) * mfa::kScreenBlock,
                           R * mfa::kScreenBlock, first[1 + r]);
    own.lost_rows = up(std::sqrt(square_of(t)));
    own.offset = up(2 * unit * std::sqrt(square_of(products)));
    own.radius = up(std::sqrt(square));
    own.slack = up(0.505 * (rounded * unit + of_basis) + 1e-9 * all);
    own.raise = up(4 * unit * (std::abs(double(m.constants[k])) + std::abs(double(m.log_det[k])) + 2 * D));
    own.half = float(square / 2);
    own.share = float(b_square / std::max(gain, 1e-300));
    std::memcpy(offsets + R, &own, sizeof own);
  }
};

// Bounds by way of int8, of panels and of a few tokens, against the logits in double precision; and the scans that
// begin with them, which leave out nearly all components where bounds are `tight`.
template <class T>
void screening(const Problem<T>& m, int64_t p, bool tight) {
  const PlainScreen<T> made(m, p);
  const double most_dropped = m.K * std::exp(-m.threshold()) * 1.001;  // logits near the bar are rounded
  for (const int64_t tokens : std::set<int64_t>{1, 2, 3, mfa::kFewScreened, m.N}) {
    if (tokens > m.N) continue;
    mfa::ScanInput<T> in = m.input();
    in.tokens = tokens;
    const auto bounds = same("screen_bounds", [&](const Threads& threads) {
      std::vector<float> out(tokens * m.K);
      mfa::screen_bounds(in, made.view, made.center.data(), {}, out.data(), threads);
      return out;
    });
    bool hold = true, near = true;
    for (int64_t i = 0; i < tokens * m.K; ++i) {
      hold = hold && bounds[i] >= m.logit[i];
      near = near && bounds[i] <= made.unrounded[i] + 0.1 * std::pow(made.reaches[i], 2);
    }
    that(hold, "screen_bounds: a logit is above its bound");
    that(near, "screen_bounds: a bound is higher than int8 makes it");
    for (const int64_t slots : {2, 8}) {
      const auto found = same("scan_screened", [&](const Threads& threads) {
        Found<T> f(tokens, slots);
        mfa::scan_screened(in, made.view, made.center.data(), f.out(m.threshold()), threads);
        return f;
      });
      check_active(m, found, slots, "scan_screened");
      int64_t evaluated = 0;
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t own = found.evaluated[n];
        evaluated += own < 0 ? m.K : own;
        that(own == -1 || (own >= 1 && own <= m.K), "scan_screened: a number of logits that cannot be");
        that(found.dropped[n] >= 0 && found.dropped[n] <= most_dropped, "scan_screened: too much may be left out");
        Doubles logits(m.logit.begin() + n * m.K, m.logit.begin() + (n + 1) * m.K);
        std::sort(logits.begin(), logits.end());
        double least_dropped = 0;  // of so many components, those with the smallest logits
        for (int64_t k = 0; own > 0 && k < m.K - own; ++k) least_dropped += std::exp(logits[k] - found.log_prob[n]);
        that(found.dropped[n] >= least_dropped * 0.999 - std::numeric_limits<T>::min(),
             "scan_screened: more is left out than `dropped` says");
      }
      that(!tight || 8 * evaluated <= tokens * m.K, "scan_screened: bounds leave too little out");
    }
  }
}

// x <- 0.8 x + shift + sum r (0.3 mu + W (z + 0.5 E[z | x, k])), all slots with a responsibility of their softmax.
template <class T>
void steering(const Problem<T>& p) {
  const int64_t N = p.N, D = p.D, R = p.R, C = std::min<int64_t>(p.K, 3);
  std::vector<T> shift(D), given(R + 1), log_prob(N, T(0)), logits(N * C), threshold(1, T(0));
  std::vector<int32_t> components(N * C), counts(N, int32_t(C)), rule{mfa::kAlways, 0, 0};
  const T coefficients[] = {T(0.8), T(0.3), T(0.5)};
  for (T& value : shift) value = T(normal());
  for (T& value : given) value = T(normal());
  for (int64_t i = 0; i < N * C; ++i) components[i] = int32_t((i + i / C) % p.K), logits[i] = T(-uniform());
  const mfa::Edit<T, T> edit{
      1, N, {coefficients, 1, 1, 3}, {shift.data(), 1, 1, D}, {rule.data(), 1, 1, 3}, {threshold.data(), 1, 1, 1},
      {given.data(), 1, 1, R}, {nullptr, 1, 1, 1}, {nullptr, 1, 1, 1}, true};
  const mfa::Evidence<T> evidence{C, log_prob.data(), components.data(), logits.data(),
                                  counts.data(), p.rows.data(), p.chol.data(), p.lam.data()};
  const auto found = same("intervene", [&](const Threads& threads) {
    std::pair<std::vector<T>, std::vector<T>> out{std::vector<T>(N * D), std::vector<T>(3 * N)};
    mfa::intervene<T, T, T>(p.shape, edit, evidence, p.x.data(), out.first.data(), out.second.data(), threads);
    return out;
  });
  Doubles exact(N * D), terms(N * D);
  for (int64_t n = 0; n < N; ++n) {
    double total = 0;
    for (int64_t c = 0; c < C; ++c) total += std::exp(double(logits[n * C + c]));
    for (int64_t d = 0; d < D; ++d) {
      exact[n * D + d] = double(coefficients[0]) * p.x[n * D + d] + shift[d];
      terms[n * D + d] = std::abs(double(coefficients[0]) * p.x[n * D + d]) + std::abs(shift[d]);
      for (int64_t c = 0; c < C; ++c) {
        const int64_t k = components[n * C + c], i = n * p.K + k;
        const double r = std::exp(double(logits[n * C + c])) / total, mean = double(coefficients[1]) * p.means[k * D + d];
        exact[n * D + d] += r * mean, terms[n * D + d] += 3 * r * std::abs(mean);
        // W z = lam^-1 A^T L^T z, whose sums are what the kernel adds.
        for (int64_t j = 0; j < R; ++j) {
          double u = coefficients[2] * p.t[i * R + j], size = std::abs(coefficients[2]) * p.t_terms[i * R + j];
          for (int64_t s = j; s < R; ++s) {
            const double part = p.lower[(k * R + s) * R + j] * given[s];
            u += part, size += std::abs(part);
          }
          const double a = p.a[(k * R + j) * D + d] / p.scale(k, d);
          exact[n * D + d] += r * a * u, terms[n * D + d] += 3 * r * std::abs(a) * size;
        }
      }
    }
  }
  within(found.first.data(), exact, terms, "steering");
}

// The terms of a mixture in int8, whoever holds their memory.
struct Int8Terms {
  std::vector<int8_t> rows;
  std::vector<float> means, terms;
  std::vector<int32_t> starts;
  explicit Int8Terms(const mfa::Int8Rows& sizes)
      : rows(sizes.shape.components * sizes.shape.rank * sizes.padded()),
        means(sizes.shape.components * sizes.mean_rows() * sizes.padded()),
        terms(sizes.shape.components * sizes.term_count()), starts(sizes.shape.components * sizes.shape.rank) {}
  mfa::Int8Rows view(const mfa::Int8Rows& like) {
    return {like.shape, rows.data(), means.data(), starts.data(), terms.data(), like.scale, like.center};
  }
  bool operator==(const Int8Terms& other) const = default;
};

// Bounds of every logit by way of int8, against the logits in double precision; and the scan that begins with them.
void int8_level(const Problem<float>& p) {
  const int64_t N = p.N, K = p.K, D = p.D;
  std::vector<float> scale(p.lam), center(D);
  for (int64_t d = 0; d < D; ++d) {
    if (p.shape.per_component) scale[d] = static_cast<float>(p.scale(K - 1, d));
    for (int64_t k = 0; k < K; ++k) center[d] += p.means[k * D + d] / K;
  }
  const mfa::Int8Rows like{p.shape, nullptr, nullptr, nullptr, nullptr, scale.data(), center.data()};
  auto terms = same("int8 rows", [&](const Threads& threads) {
    Int8Terms own(like);
    mfa::quantise(own.view(like), p.rows.data(), threads);
    return own;
  });
  const mfa::Int8Rows rows = terms.view(like);
  const auto bounds = same("int8 bounds", [&](const Threads& threads) {
    std::pair<std::vector<float>, std::vector<float>> of(K * N, K * N);
    mfa::int8_bounds(p.input(), rows, of.first.data(), of.second.data(), threads);
    return of;
  });
  bool hold = true, tell = false;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < K; ++k) {
      const double logit = p.logit[n * K + k], room = 8 * 1.2e-7 * p.logit_terms[n * K + k];
      const double low = bounds.first[k * N + n], high = bounds.second[k * N + n];
      hold = hold && low <= logit + room && high >= logit - room;
      tell = tell || high - low < 100;
    }
  that(hold, "int8 bounds: a logit is outside");
  that(tell, "int8 bounds: all so wide that they tell nothing");
  for (const int64_t slots : {int64_t(2), int64_t(16)}) {
    const auto found = same("scan by int8", [&](const Threads& threads) {
      Found<float> f(N, slots);
      mfa::scan_int8(p.input(), rows, f.out(p.threshold()), [] { return static_cast<float*>(nullptr); }, threads);
      return f;
    });
    check_active(p, found, slots, "scan by int8");
  }
}

template <class T>
void all() {
  // (N, K, D, R): few tokens, panels, ragged ones; components in one range and in several; ranks in one pass and in more.
  const int64_t shapes[][4] = {{1, 1, 1, 1}, {1, 150, 33, 3},  {3, 5, 16, 0},  {4, 67, 50, 10},
                               {9, 13, 71, 2}, {37, 131, 90, 1}, {70, 40, 67, 13}, {260, 37, 40, 4},
                               {9, 6, 467, 37}};  // three blocks of features and of rows, the last ones ragged
  for (const auto& [N, K, D, R] : shapes)
    for (const bool own_noise : {false, true})
      for (const double spread : {2.0, 0.05}) {
        const Problem<T> p(N, K, D, R, own_noise, spread);
        scans(p);
        candidates(p);
        m_step(p);
        neighbours(p);
        steering(p);
        if (N * K < 3000) pairs(p), statistics(p);
        if (!own_noise && D >= 16)
          for (const int64_t width : std::set<int64_t>{16, D / 16 * 16})
            screening(p, width, spread > 1 && K > 8 && width + 16 > D);
        if constexpr (sizeof(T) == 4)
          if (R > 0) int8_level(p);
      }
  // More than a chunk of components; tokens after the pilot, some of which take the dense scan.
  screening(Problem<T>(500, 490, 24, 2, false, 2.0), 16, false);
  kmeans<T>(75, 60, 50, 16);
  kmeans<T>(33, 7, 40, 16);
  top_scores<T>(1100, 300, 2, 20, 9);
  top_scores<T>(90, 40, 1, 773, 6);
  top_scores<T>(33, 7, 0, 3, 12);
}

}  // namespace

int main() {
  all<float>();
  all<double>();
  std::printf("%d-byte vectors\n", mfa::kVectorBytes);
  for (const auto& [what, most] : worst) std::printf("%8.3f eps  %s\n", most, what.c_str());
  std::printf(failures ? "%d checks failed\n" : "all checks hold\n", failures);
  return std::min(failures, 100);
}
