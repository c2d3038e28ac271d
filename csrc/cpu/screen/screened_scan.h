// Stage 1 below the flops of the dense scan: bounds of all logits in int8, then those that can matter in full.
//
// Never materialised: N x K. A stretch of tokens meets a chunk of components at a time; what a token keeps of it are the
//           components whose bound reaches its bar, the best logit known so far less the threshold.
// Exact     because the logit of every component that could come within the threshold of the best is computed in full. A
//           token for which that is too much work takes the dense scan.
// Floor     (D + R p) / 4 products of four a pair of a token and a component. Measured by bench/bench_screen.py.
#pragma once
#include <algorithm>
#include <bit>

#include "../candidates.h"
#include "bounds.h"

namespace mfa {

constexpr int64_t kStretch = 512;   // tokens that share one read of a chunk
constexpr int64_t kChunk = 480;     // components at a time: their bounds and the tokens stay near a core
constexpr int64_t kPilot = 128;     // tokens that decide whether screening pays; so few meet all components at once
constexpr int64_t kDenseShare = 4;  // a token that keeps more than K over this takes the dense scan

// A scan through bounds.
template <class T>
struct ScreenedInput {
  const ScanInput<T>& in;
  const Screen& screen;
  const T* center;               // c [D]
  std::vector<float> constants;  // those of `in`, in float
  const ScreenedPairs<T>& out;

  int64_t components() const { return in.shape.components; }
  // A token has so many computed in full at most.
  size_t most() const { return static_cast<size_t>(std::max<int64_t>(out.slots, components() / kDenseShare)); }
  // A token keeps so many at most while components stream by and its bar is not final.
  size_t room() const { return 2 * most(); }
};

// Tokens [begin, end) of a scan, which are screened together.
template <class T>
class Stretch {
 public:
  template <class ParallelFor>
  Stretch(const ScreenedInput<T>& of, int64_t begin, int64_t end, ParallelFor&& parallel_for)
      : of_(of), begin_(begin), tokens_(end - begin), few_(of.in.tokens <= kFewScreened),
        lanes_(few_ ? tokens_ : kScreenLanes), panels_(ceil_div(tokens_, lanes_)), slots_(panels_ * lanes_),
        best_(slots_, -kInf), owners_(slots_, -1), bars_(slots_, kInf), left_out_(slots_, -kInf), norms_(slots_),
        reached_(tokens_, -std::numeric_limits<T>::infinity()), lists_(tokens_) {
    std::fill_n(bars_.begin(), tokens_, -kInf);
    ScanInput<T> own = of.in;
    own.x += begin * of.in.shape.features, own.tokens = tokens_;
    if (few_) {
      small_.emplace_back(own, of.screen, of.center, parallel_for);
      for (int64_t n = 0; n < tokens_; ++n) norms_[n] = small_[0].terms.reach[n];
      return;
    }
    packed_.resize(panels_);
    parallel_for(panels_, [&](int64_t first, int64_t last) {
      std::vector<float> y(of.in.shape.features * kScreenLanes), z(of.screen.coordinates * kScreenLanes);
      for (int64_t i = first; i < last; ++i) {
        const int64_t n = i * kScreenLanes;
        packed_[i].pack(own, of.screen, of.center, own.x + n * of.in.shape.features,
                        std::min<int64_t>(kScreenLanes, tokens_ - n), y.data(), z.data());
        std::copy_n(packed_[i].terms.reach, kScreenLanes, norms_.data() + n);
      }
    });
  }

  // All components, in chunks.
  template <class ParallelFor>
  void run(int64_t chunk, ParallelFor&& parallel_for) {
    std::vector<float> bounds(std::min(chunk, of_.components()) * slots_);
    for (int64_t k0 = 0; k0 < of_.components(); k0 += chunk) {
      const int64_t k1 = std::min(of_.components(), k0 + chunk);
      const std::vector<float> before(best_);
      bound_all(k0, k1, bounds.data(), parallel_for);
      challenge(before, parallel_for);
      parallel_for(panels_, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
          few_ ? sweep_few(k0, k1, bounds.data()) : sweep_panel(i, k0, k1, bounds.data());
      });
    }
  }

  // Bounds of the components [k0, k1): [panels, k1 - k0, lanes].
  template <class ParallelFor>
  void bound_all(int64_t k0, int64_t k1, float* bounds, ParallelFor&& parallel_for) {
    const int64_t count = k1 - k0, threads = parallel_for.threads();
    const int64_t ranges = threads == 1 ? 1 : std::clamp<int64_t>(count / kRangeComponents, 1, 4 * threads);
    std::vector<float> best(ranges * slots_, -kInf);
    std::vector<int32_t> owners(ranges * slots_, -1);
    parallel_for(ranges, [&](int64_t first, int64_t last) {
      for (int64_t range = first; range < last; ++range) {
        const int64_t a = count * range / ranges / kProducts * kProducts;  // no tile is cut
        const int64_t b = range + 1 == ranges ? count : count * (range + 1) / ranges / kProducts * kProducts;
        float* const own = best.data() + range * slots_;
        int32_t* const own_owners = owners.data() + range * slots_;
        if (few_) {
          FewBounds(of_.screen, small_[0], tokens_)(of_.constants.data(), k0 + a, b - a, bounds + a * lanes_, own,
                                                    own_owners);
          continue;
        }
        const int64_t size = of_.screen.blocks() * kScreenBlock;
        for (int64_t k = a; k < b; k += kProducts)  // so that rows are read once for all panels
          for (int64_t i = 0; i < panels_; ++i) {
            const int64_t ahead = std::min<int64_t>(kProducts, b - k - kProducts) * size;
            if (ahead > 0)
              prefetch(of_.screen.rows_of(k0 + k + kProducts) + ahead * i / panels_, ceil_div(ahead, panels_));
            panel_bounds(of_.screen, of_.constants.data(), k0 + k, std::min<int64_t>(kProducts, b - k), packed_[i],
                         bounds + (i * count + k) * lanes_, own + i * lanes_, own_owners + i * lanes_);
          }
      }
    });
    for (int64_t range = 0; range < ranges; ++range)
      for (int64_t n = 0; n < tokens_; ++n)
        if (best[range * slots_ + n] > best_[n])
          best_[n] = best[range * slots_ + n], owners_[n] = owners[range * slots_ + n];
  }

  float bound_of(int64_t n, int64_t k, int64_t count, const float* bounds) const {
    return bounds[(n / lanes_ * count + k) * lanes_ + n % lanes_];
  }

  // Appends what is left, and writes `evaluated` and `dropped`.
  void finish(Pairs<T>& left) {
    const int64_t K = of_.components();
    for (int64_t n = 0; n < tokens_; ++n) {
      lists_[n].keep(bars_[n]);
      const auto& entries = lists_[n].entries();
      const int64_t kept = static_cast<int64_t>(entries.size());
      const bool known = reached_[n] > -std::numeric_limits<T>::infinity();
      const bool settled = known && !lists_[n].overflows() && entries.size() <= of_.most();
      const double left_out = std::max(left_out_[n], lists_[n].left_out());
      const double share = (K - kept) * std::exp(left_out - static_cast<double>(reached_[n])) * (1 + 1e-6);
      of_.out.evaluated[begin_ + n] = settled ? static_cast<int32_t>(kept) : -1;
      of_.out.dropped[begin_ + n] = settled && kept < K ? static_cast<T>(share) : T(0);
      if (settled)
        for (const auto& entry : entries) left.add(begin_ + n, entry.component);
    }
  }

 private:
  static constexpr float kInf = std::numeric_limits<float>::infinity();

  // Computes the logits of the components with new best estimates: what they are at least raises the bars.
  template <class ParallelFor>
  void challenge(const std::vector<float>& before, ParallelFor&& parallel_for) {
    Pairs<T> pairs;
    for (int64_t n = 0; n < tokens_; ++n)
      if (!lists_[n].overflows() && best_[n] > before[n]) pairs.add(begin_ + n, owners_[n]);
    evaluate(of_.in, pairs, parallel_for);
    for (int64_t i = 0; i < pairs.size(); ++i) {
      const int64_t n = pairs.tokens[i] - begin_;
      const T reached = of_.screen.reached(pairs.logits[i], pairs.components[i], norms_[n]);
      if (!(reached > reached_[n])) continue;
      reached_[n] = reached;
      const T bar = reached - of_.out.threshold;
      bars_[n] = static_cast<float>(bar);
      if (bars_[n] > bar) bars_[n] = std::nextafter(bars_[n], -kInf);
    }
  }

  // Lists what reaches the bars of a panel.
  void sweep_panel(int64_t panel, int64_t k0, int64_t k1, const float* bounds) {
    constexpr int V = kWidth<float>, L = kScreenLanes;
    const int64_t n0 = panel * L;
    const float* own = bounds + n0 * (k1 - k0);
    Floats bars[kTokenVectors], left_out[kTokenVectors];
    for (int n = 0; n < kTokenVectors; ++n)
      bars[n] = load(bars_.data() + n0 + n * V), left_out[n] = load(left_out_.data() + n0 + n * V);
    const uint64_t here = tokens_ - n0 >= L ? ~uint64_t(0) : (uint64_t(1) << (tokens_ - n0)) - 1;
    for (int64_t k = k0; k < k1; ++k, own += L) {
      uint64_t reached = 0;
      for (int n = 0; n < kTokenVectors; ++n) {
        const Floats value = load(own + n * V), below = value < bars[n] ? value : Floats{} - kInf;
        left_out[n] = below > left_out[n] ? below : left_out[n];
        reached |= not_below(value, bars[n]) << (n * V);
      }
      for (reached &= here; reached; reached &= reached - 1) {
        const int64_t i = std::countr_zero(reached);
        list(n0 + i, k, own[i]);
      }
    }
    for (int n = 0; n < kTokenVectors; ++n) store<float>(left_out_.data() + n0 + n * V, left_out[n]);
  }

  // The same of a few tokens.
  void sweep_few(int64_t k0, int64_t k1, const float* bounds) {
    for (int64_t k = k0; k < k1; ++k, bounds += lanes_)
      for (int64_t n = 0; n < tokens_; ++n) {
        if (!(bounds[n] < bars_[n]))
          list(n, k, bounds[n]);
        else
          left_out_[n] = std::max(left_out_[n], bounds[n]);
      }
  }

  void list(int64_t n, int64_t k, float bound) {
    lists_[n].add(static_cast<int32_t>(k), bound, bars_[n], of_.room());
  }

  const ScreenedInput<T>& of_;
  const int64_t begin_, tokens_;
  const bool few_;
  const int64_t lanes_, panels_, slots_;
  std::vector<TokenPanel> packed_;
  std::vector<FewTokens> small_;
  std::vector<float> best_;      // estimates of the best logits so far, [slots]
  std::vector<int32_t> owners_;  // and their components
  std::vector<float> bars_;      // [slots]
  std::vector<float> left_out_;  // [slots] the largest bound below the bar when it was met
  std::vector<float> norms_;     // [slots] |y|
  std::vector<T> reached_;       // what the best logits are at least
  std::vector<Shortlist> lists_;
};

// Does what `scan` does, for shared noise.
template <class T, class ParallelFor>
void scan_screened(const ScanInput<T>& in, const Screen& screen, const T* center, const ScreenedPairs<T>& out,
                   ParallelFor&& parallel_for) {
  const int64_t N = in.tokens, pilot = std::min(N, kPilot), rest = N - pilot;
  if (N == 0) return;
  const ScreenedInput<T> of{in, screen, center, {in.constants, in.constants + in.shape.components}, out};
  Pairs<T> left;
  Stretch<T> first(of, 0, pilot, parallel_for);
  first.run(in.shape.components, parallel_for);
  first.finish(left);
  if (2 * std::count(out.evaluated, out.evaluated + pilot, -1) > pilot) {  // the rest would take the dense scan too
    std::fill(out.evaluated + pilot, out.evaluated + N, -1);
    std::fill(out.dropped + pilot, out.dropped + N, T(0));
  } else {
    const int64_t threads = parallel_for.threads();  // as few stretches as feed all of them alike
    const int64_t stretches = std::max<int64_t>(1, ceil_div(rest, threads * kStretch) * threads);
    const int64_t step = std::max<int64_t>(1, ceil_div(rest, stretches * kScreenLanes)) * kScreenLanes;
    std::vector<Pairs<T>> parts(ceil_div(rest, step));
    parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Stretch<T> stretch(of, pilot + i * step, std::min(N, pilot + (i + 1) * step), Serially{});
        stretch.run(kChunk, Serially{});
        stretch.finish(parts[i]);
      }
    });
    for (const Pairs<T>& part : parts) left.append(part);
  }
  if (std::count(out.evaluated, out.evaluated + N, -1) == N) return scan(in, out, parallel_for);
  collect(in, left, out, parallel_for);
  scan_rest(in, out, [&](const ScanInput<T>& own, const ScreenedPairs<T>& own_out) {
    scan<T>(own, own_out, parallel_for);
  });
}

// Writes every bound, on request: out [N, K]. Up to kFewScreened tokens go along their features, as in a scan.
template <class T, class ParallelFor>
void screen_bounds(const ScanInput<T>& in, const Screen& screen, const T* center, const ScreenedPairs<T>& none,
                   float* out, ParallelFor&& parallel_for) {
  const int64_t K = in.shape.components;
  const ScreenedInput<T> of{in, screen, center, {in.constants, in.constants + K}, none};
  for (int64_t begin = 0; begin < in.tokens; begin += kPilot) {
    const int64_t end = std::min(in.tokens, begin + kPilot);
    Stretch<T> stretch(of, begin, end, parallel_for);
    std::vector<float> bounds(ceil_div(end - begin, kScreenLanes) * kScreenLanes * K);
    stretch.bound_all(0, K, bounds.data(), parallel_for);
    for (int64_t n = 0; n < end - begin; ++n)
      for (int64_t k = 0; k < K; ++k) out[(begin + n) * K + k] = stretch.bound_of(n, k, K, bounds.data());
  }
}

}  // namespace mfa
