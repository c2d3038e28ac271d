// The components whose scores are largest for each token: what a token without candidates looks at first.
//
// Symbols   score_k = o_k0 + y . p_k0 + 1/2 sum over s of (o_ks + y . p_ks)^2, of tokens y in a few coordinates; what
//           they are is the caller's (mfa_kernels/ops/scan). Components come in groups, and a token looks at some.
// Never materialised: N x K. The scores of a tile are compared while they are in registers.
// Floor     N K (S + 1) F multiply-adds for the K that a token looks at. A block of components is read once for the
//           kScoredTokens tokens of a task; which are kept costs a comparison a vector of scores, and little more.
#pragma once
#include "kmeans.h"

namespace mfa {

constexpr int kScoreRows = kRegisters >= 32 ? 16 : 12;  // tokens per micro-tile, by one vector of components
constexpr int64_t kScoredTokens = 1024;                 // of a task at most, and of two micro-tiles at least

// Groups of neighbouring components, and the groups that every token looks at; null: one of all, and all tokens do.
struct Groups {
  int64_t count = 1, listed = 0;    // G, P
  const int64_t* starts = nullptr;  // [G + 1]
  const int32_t* lists = nullptr;   // [N, P]; -1 is none, none twice
};

template <class T>
class TopScores {
 public:
  // right [K, S + 1, F], offsets [K, S + 1]
  TopScores(const T* right, const T* offsets, int64_t components, int64_t squares, int64_t coordinates,
            const Groups& groups)
      : F_(coordinates), rows_(squares + 1), groups_(groups) {
    constexpr int64_t V = kWidth<T>;
    blocks_.push_back(0);
    for (int64_t g = 0; g < groups.count; ++g)
      blocks_.push_back(blocks_.back() + ceil_div(stop(g, components) - start(g), V));
    columns_.assign(blocks_.back() * rows_ * F_ * V, T(0));
    offsets_.assign(blocks_.back() * rows_ * V, T(0));
    for (int64_t g = 0; g < groups.count; ++g)
      for (int64_t b = blocks_[g]; b < blocks_[g + 1]; ++b)
        for (int64_t i = 0; i < V; ++i) {
          const int64_t k = start(g) + (b - blocks_[g]) * V + i;
          if (k >= stop(g, components)) {
            offsets_[b * rows_ * V + i] = -std::numeric_limits<T>::infinity();  // of no component: never above a bar
            continue;
          }
          for (int64_t r = 0; r < rows_; ++r) {
            const int64_t at = b * rows_ + r;
            offsets_[at * V + i] = offsets[k * rows_ + r];
            for (int64_t f = 0; f < F_; ++f) columns_[(at * F_ + f) * V + i] = right[(k * rows_ + r) * F_ + f];
          }
        }
  }

  // Tokens [begin, end) of left [N, F], those of a task -> out [N, count]: largest score first, then lowest
  // index; -1 where no component is left whose score is a number above -infinity.
  void operator()(const T* left, int64_t begin, int64_t end, int64_t count, int32_t* out) const {
    std::vector<Best> best(end - begin);
    std::vector<int64_t> first(groups_.count + 1), tokens;
    list(begin, end, first, tokens);
    for (int64_t g = 0; g < groups_.count; ++g)
      for (int64_t b = blocks_[g]; b < blocks_[g + 1]; ++b)
        for (int64_t i = first[g]; i < first[g + 1]; i += kScoreRows) {
          const int64_t here = std::min<int64_t>(kScoreRows, first[g + 1] - i);
          const T* y[kScoreRows];
          for (int64_t j = 0; j < kScoreRows; ++j) y[j] = left + (begin + tokens[i + std::min(j, here - 1)]) * F_;
          alignas(kVectorBytes) Vec<T> scores[kScoreRows][1];
          score(y, b, scores);
          for (int64_t j = 0; j < here; ++j)
            best[tokens[i + j]].offer(scores[j][0], start(g) + (b - blocks_[g]) * kWidth<T>, count);
        }
    for (int64_t n = begin; n < end; ++n) best[n - begin].write(count, out + n * count);
  }

 private:
  // The best components of a token while blocks stream by.
  struct Best {
    struct Scored {
      T score;
      int32_t component;
      bool operator<(const Scored& other) const {
        return score > other.score || (score == other.score && component < other.component);
      }
    };
    std::vector<Scored> found;
    T bar = -std::numeric_limits<T>::infinity();

    // Collects what is above the bar, which rises to the last score that can still be wanted when enough is there.
    void offer(Vec<T> scores, int64_t first, int64_t wanted) {
      for (uint64_t bits = above(scores); bits != 0; bits &= bits - 1) {
        const int64_t i = __builtin_ctzll(bits);
        found.push_back({scores[i], static_cast<int32_t>(first + i)});
      }
      if (static_cast<int64_t>(found.size()) >= 3 * wanted) cut(wanted), bar = found.back().score;
    }

    void write(int64_t wanted, int32_t* out) {
      if (static_cast<int64_t>(found.size()) > wanted) cut(wanted);
      std::sort(found.begin(), found.end());
      for (int64_t i = 0; i < wanted; ++i) out[i] = i < static_cast<int64_t>(found.size()) ? found[i].component : -1;
    }

    void cut(int64_t wanted) {
      std::nth_element(found.begin(), found.begin() + (wanted - 1), found.end());
      found.resize(wanted);
    }

    // A bit for every lane above the bar; none where it is NaN. Blocks come in order: one at the bar has a higher index.
    uint64_t above(Vec<T> a) const {
      if constexpr (std::is_same_v<T, float>) {
        return ~not_below(broadcast(bar), a) & ((uint64_t(1) << kWidth<T>) - 1);
      } else {
        uint64_t bits = 0;
        for (int i = 0; i < kWidth<T>; ++i) bits |= uint64_t(a[i] > bar) << i;
        return bits;
      }
    }
  };

  int64_t start(int64_t g) const { return groups_.starts == nullptr ? 0 : groups_.starts[g]; }
  int64_t stop(int64_t g, int64_t components) const {
    return groups_.starts == nullptr ? components : groups_.starts[g + 1];
  }

  // The tokens of every group, less `begin`: those of g are tokens[first[g]], ..., tokens[first[g + 1] - 1].
  void list(int64_t begin, int64_t end, std::vector<int64_t>& first, std::vector<int64_t>& tokens) const {
    if (groups_.lists == nullptr) {
      tokens.resize(end - begin), first[1] = end - begin;
      std::iota(tokens.begin(), tokens.end(), int64_t(0));
      return;
    }
    const int32_t *lists = groups_.lists + begin * groups_.listed, *last = groups_.lists + end * groups_.listed;
    for (const int32_t* g = lists; g < last; ++g)
      if (*g >= 0) ++first[*g + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    tokens.resize(first.back());
    for (const int32_t* g = lists; g < last; ++g)
      if (*g >= 0) tokens[next[*g]++] = (g - lists) / groups_.listed;
  }

  // Scores of a few tokens and the components of block b.
  void score(const T* const* y, int64_t b, Vec<T> (&out)[kScoreRows][1]) const {
    constexpr int V = kWidth<T>;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t at = b * rows_ + r;
      alignas(kVectorBytes) Vec<T> dots[kScoreRows][1];
      dot_tile<T, 1>(y, F_, columns_.data() + at * F_ * V, dots);
      const Vec<T> offset = load(offsets_.data() + at * V);
      for (int j = 0; j < kScoreRows; ++j) {
        const Vec<T> value = offset + dots[j][0];
        out[j][0] = r == 0 ? value : out[j][0] + value * value * T(0.5);
      }
    }
  }

  int64_t F_, rows_;
  Groups groups_;
  std::vector<int64_t> blocks_;       // the first of every group, and their number
  std::vector<T> columns_, offsets_;  // [blocks, S + 1, F, V], [blocks, S + 1, V]
};

// left [N, F], right [K, S + 1, F], offsets [K, S + 1] -> out [N, count]
template <class T, class ParallelFor>
void top_scores(const T* left, const T* right, const T* offsets, int64_t tokens, int64_t components, int64_t squares,
                int64_t coordinates, const Groups& groups, int64_t count, int32_t* out, ParallelFor&& parallel_for) {
  const TopScores<T> of(right, offsets, components, squares, coordinates, groups);
  const int64_t share = ceil_div(tokens, 4 * parallel_for.threads());  // so that no thread waits long for another
  const int64_t size = std::clamp<int64_t>(share, 2 * kScoreRows, kScoredTokens);
  parallel_for(ceil_div(tokens, size), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      of(left, task * size, std::min(tokens, (task + 1) * size), count, out);
  });
}

}  // namespace mfa
