// Stage 1 with an int8 first level: bounds of all logits, then those that can matter in full.
//
// Never materialised: N x K. A token keeps its candidates, the components whose upper bound reaches the largest lower
//           bound so far less the threshold; those that the final one rules out are forgotten.
// Exact     because every component that could be active has its logit computed from x - mu in float. A token with more
//           candidates than pay takes the scan in float, and so do all where a sample of them says that most would.
#pragma once
#include "../candidates.h"
#include "bounds.h"

namespace mfa {

constexpr int64_t kInt8Panels = 16;     // panels that share one read of the rows
constexpr int64_t kFewestKept = 32, kMostKept = 256;  // candidates of a token, K / 8 in between
constexpr int64_t kPairCost = 3;        // a logit by itself costs as much as so many in the scan in float
constexpr double kInt8Share = 0.5;      // what the bounds cost, of the scan in float

// The scan by int8 of some tokens of `in`.
template <class ParallelFor>
class Int8Scan {
 public:
  Int8Scan(const ScanInput<float>& in, const Int8Rows& rows, float threshold, const ParallelFor& parallel_for)
      : in_(in), rows_(rows), bounds_(rows), threshold_(threshold), parallel_for_(parallel_for),
        most_(std::clamp(in.shape.components / 8, kFewestKept, kMostKept)) {}

  // Appends the pairs that are left of the tokens order [count], and writes how many, or -1, to evaluated [N].
  void operator()(const int64_t* order, int64_t count, Pairs<float>& left, int32_t* evaluated) const {
    if (count == 0) return;
    Schedule plan = Schedule::of<float>(in_.shape, count, parallel_for_.threads());
    plan.cut(kInt8Panels, parallel_for_.threads());
    const int64_t padded = plan.panels * kLanes;
    std::vector<Shortlist> lists(padded * plan.splits);
    std::vector<float> best(padded * plan.splits, -std::numeric_limits<float>::infinity());
    parallel_for_(plan.blocks * plan.splits, [&](int64_t begin, int64_t end) {
      Block block(rows_, plan.panels_per_block);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p0 = task / plan.splits * plan.panels_per_block, split = task % plan.splits;
        block.pack(*this, order, count, p0, std::min(plan.panels, p0 + plan.panels_per_block));
        const int64_t at = split * padded + p0 * kLanes;
        run(block, plan.first(split), plan.first(split + 1), lists.data() + at, best.data() + at);
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      float top = best[i];
      bool overflows = false;
      for (int64_t at = i; at < padded * plan.splits; at += padded) {
        top = std::max(top, best[at]);
        overflows |= lists[at].overflows();
      }
      int64_t kept = 0;
      for (int64_t at = i; at < padded * plan.splits; at += padded) {
        lists[at].keep(top - threshold_);
        kept += static_cast<int64_t>(lists[at].entries().size());
      }
      overflows |= kept > most_;
      evaluated[order[i]] = overflows ? -1 : static_cast<int32_t>(kept);
      for (int64_t at = i; !overflows && at < padded * plan.splits; at += padded)
        for (const auto& entry : lists[at].entries()) left.add(order[i], entry.component);
    }
  }

 private:
  // Panels of tokens that are packed.
  struct Block {
    const Int8Rows& rows;
    int64_t first = -1, panels = 0;
    std::vector<float> y, scratch;
    std::vector<uint8_t> quads;
    std::vector<PanelNorms> norms;

    Block(const Int8Rows& rows, int64_t most)
        : rows(rows), y(most * size()), scratch(rows.padded()), quads(most * size()), norms(most) {}
    int64_t size() const { return rows.padded() * kLanes; }
    void pack(const Int8Scan& scan, const int64_t* order, int64_t count, int64_t p0, int64_t p1) {
      if (first == p0) return;
      first = p0, panels = p1 - p0;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t n = (p0 + p) * kLanes;
        pack_tokens(rows, scan.in_.x, order + n, std::min<int64_t>(kLanes, count - n), y.data() + p * size(),
                    quads.data() + p * size(), norms[p], scratch.data());
      }
    }
  };

  void run(const Block& block, int64_t k0, int64_t k1, Shortlist* lists, float* best) const {
    float squares[kSquares * kLanes];
    for (int64_t k = k0, count; k < k1; k += count) {
      count = k + kSquares <= k1 ? kSquares : 1;
      for (int64_t p = 0; p < block.panels; ++p) {
        bounds_.squares(k, count, block.y.data() + p * block.size(), squares);
        for (int64_t c = 0; c < count; ++c) {
          if (k + count + c < k1) bounds_.ahead(k + count + c, p, block.panels);
          LogitBounds bounds;
          bounds_(k + c, in_.constants[k + c], squares + c * kLanes, block.quads.data() + p * block.size(),
                  block.norms[p], bounds);
          visit(static_cast<int32_t>(k + c), bounds, lists + p * kLanes, best + p * kLanes);
        }
      }
    }
  }

  void visit(int32_t k, const LogitBounds& bounds, Shortlist* lists, float* best) const {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    int any = 0;
    for (int i = 0; i < kLanes; ++i) {
      const float low = bounds.low[i];
      best[i] = low > best[i] && low < kInf ? low : best[i];
      any |= !(bounds.high[i] < best[i] - threshold_);  // NaN counts too
    }
    if (!any) return;
    for (int i = 0; i < kLanes; ++i)
      if (!(bounds.high[i] < best[i] - threshold_)) lists[i].add(k, bounds.high[i], best[i] - threshold_, most_);
  }

  const ScanInput<float>& in_;
  const Int8Rows& rows_;
  const Int8Bounds bounds_;
  const float threshold_;
  const ParallelFor& parallel_for_;
  const int64_t most_;
};

// Does what `scan` does. Returns how many tokens took the scan in float. Where all of them do, room() says where every
// logit goes, or null.
template <class Room, class ParallelFor>
int64_t scan_int8(const ScanInput<float>& in, const Int8Rows& rows, const ActivePairs<float>& out, Room&& room,
                  ParallelFor&& parallel_for) {
  const int64_t N = in.tokens, K = in.shape.components;
  if (N < kInt8Tokens) return scan(in, out, parallel_for, room()), N;
  // A sample decides whether the bounds pay: a panel, or more where tokens are many, evenly spread.
  const int64_t sample = ceil_div(N, 64 * kLanes) * kLanes;
  std::vector<int64_t> order;
  std::vector<bool> sampled(N);
  for (int64_t i = 0; i < sample; ++i) order.push_back(N * i / sample), sampled[order.back()] = true;
  for (int64_t n = 0; n < N; ++n)
    if (!sampled[n]) order.push_back(n);
  Pairs<float> left;
  std::vector<int32_t> evaluated(N, -1);
  std::vector<float> dropped(N);
  const Int8Scan select(in, rows, out.threshold, parallel_for);
  select(order.data(), sample, left, evaluated.data());
  int64_t whole = 0;
  for (int64_t i = 0; i < sample; ++i) whole += evaluated[order[i]] < 0;
  const double cost = kInt8Share + (static_cast<double>(kPairCost * left.size()) / K + whole) / sample;
  if (cost >= 1) return scan(in, out, parallel_for, room()), N;
  select(order.data() + sample, N - sample, left, evaluated.data());
  const ScreenedPairs<float> all{out, dropped.data(), evaluated.data()};
  collect(in, left, all, parallel_for);
  whole = std::count(evaluated.begin(), evaluated.end(), -1);
  scan_rest(in, all, [&](const ScanInput<float>& own, const ScreenedPairs<float>& own_out) {
    scan<float>(own, own_out, parallel_for);
  });
  return whole;
}

// Writes the bounds of every logit, on request: low, high [K, N].
template <class ParallelFor>
void int8_bounds(const ScanInput<float>& in, const Int8Rows& rows, float* low, float* high,
                 ParallelFor&& parallel_for) {
  const Int8Bounds bounds_of(rows);
  const int64_t size = rows.padded() * kLanes;
  parallel_for(ceil_div(in.tokens, kLanes), [&](int64_t begin, int64_t end) {
    std::vector<float> y(size), scratch(rows.padded());
    std::vector<uint8_t> quads(size);
    float squares[kLanes];
    PanelNorms norms;
    LogitBounds bounds;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t n = panel * kLanes, here = std::min<int64_t>(kLanes, in.tokens - n);
      int64_t order[kLanes];
      for (int64_t i = 0; i < here; ++i) order[i] = n + i;
      pack_tokens(rows, in.x, order, here, y.data(), quads.data(), norms, scratch.data());
      for (int64_t k = 0; k < in.shape.components; ++k) {
        bounds_of.squares(k, 1, y.data(), squares);
        bounds_of(k, in.constants[k], squares, quads.data(), norms, bounds);
        std::copy_n(bounds.low, here, low + k * in.tokens + n);
        std::copy_n(bounds.high, here, high + k * in.tokens + n);
      }
    }
  });
}

}  // namespace mfa
