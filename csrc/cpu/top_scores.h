// The components whose scores are largest for each token: what a token without candidates looks at first.
//
// Symbols   score_k = o_k0 + y . p_k0 + 1/2 sum over s of (o_ks + y . p_ks)^2, of tokens y in a few coordinates; what
//           they are is the caller's (mfa_kernels/ops/scan). Components come in groups, and a token looks at some.
// In int8   y and every p are read as multiples of a 63rd of their largest coordinate: who is listed is a guess anyway,
//           and no worse for it. The same ones on every processor.
// Never materialised: N x K. The scores of a tile are compared while they are in registers.
// Floor     N K (S + 1) F multiply-adds of int8 for the K that a token looks at. A block of components is read once for
//           the kScoredTokens tokens of a task; which are kept costs a comparison a vector of scores, and little more.
#pragma once
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "int8/dot4.h"

namespace mfa {

constexpr int kScoreRows = 8;               // tokens per micro-tile, by one vector of components
constexpr int64_t kScoredTokens = 1024;     // of a task at most, and of two micro-tiles at least
constexpr int64_t kMostCoordinates = 65536;  // more could overflow a sum in int32

// Groups of neighbouring components, and the groups that every token looks at; null: one of all, and all tokens do.
struct Groups {
  int64_t count = 1, listed = 0;    // G, P
  const int64_t* starts = nullptr;  // [G + 1]
  const int32_t* lists = nullptr;   // [N, P]; -1 is none, none twice
};

// Rows in integers: row = quantum q. A quantum is NaN where not all of the row is finite.
template <class T>
class FewBits {
 public:
  explicit FewBits(int64_t coordinates) : F_(coordinates), row_(padded(coordinates)) {}

  static int64_t padded(int64_t coordinates) { return ceil_div(coordinates, kStep) * kStep; }

  // Calls write(f, q) with the integers of features [f, f + V), to the padded end; returns the quantum.
  template <class Write>
  float operator()(const T* row, Write&& write) {
    std::copy_n(row, F_, row_.data());
    Floats most = {}, none = {};
    for (size_t f = 0; f < row_.size(); f += V) {
      const Floats value = load(row_.data() + f), size = value < 0 ? -value : value;
      most = size > most ? size : most;
      none += value * 0.0f;  // NaN where it is infinite too
    }
    const Quantum quantum(largest_lane(most), kFewBits);
    for (size_t f = 0; f < row_.size(); f += V)
      write(f, __builtin_convertvector(nearest(load(row_.data() + f) * quantum.inverse), Ints));
    return quantum.size + horizontal_sum<float>(none);
  }

 private:
  static constexpr int64_t V = kWidth<float>, kStep = V < 8 ? 8 : V;  // two quads, and whole vectors
  int64_t F_;
  std::vector<float> row_;  // zeros behind the coordinates
};

template <class T>
class TopScores {
 public:
  // right [K, S + 1, F], offsets [K, S + 1]
  template <class ParallelFor>
  TopScores(const T* right, const T* offsets, int64_t components, int64_t squares, int64_t coordinates,
            const Groups& groups, ParallelFor&& parallel_for)
      : components_(components), F_(coordinates), P_(FewBits<T>::padded(coordinates)), rows_(squares + 1),
        groups_(groups) {
    blocks_.push_back(0);
    for (int64_t g = 0; g < groups.count; ++g)
      blocks_.push_back(blocks_.back() + ceil_div(stop(g, components) - start(g), V));
    const int64_t lanes = blocks_.back() * rows_ * V;
    columns_.resize(lanes * P_), starts_.resize(lanes), quanta_.resize(lanes);
    offsets_.resize(lanes, -std::numeric_limits<float>::infinity());  // lanes of no component are above no bar
    parallel_for(components, [&](int64_t begin, int64_t end) {
      FewBits<T> read(F_);
      for (int64_t k = begin, g = 0; k < end; ++k) {
        while (k >= stop(g, components)) ++g;
        const int64_t place = blocks_[g] * V + k - start(g);
        for (int64_t r = 0; r < rows_; ++r) {
          const int64_t at = place / V * rows_ + r;
          pack(read, right + (k * rows_ + r) * F_, at, place % V);
          offsets_[at * V + place % V] = static_cast<float>(offsets[k * rows_ + r]);
        }
      }
    });
  }

  // Tokens [begin, end) of left [N, F], those of a task -> out [N, count]: largest score first, then lowest
  // index; -1 where no component is left whose score is a number above -infinity.
  void operator()(const T* left, int64_t begin, int64_t end, int64_t count, int32_t* out) const {
    const Tokens own(left + begin * F_, end - begin, F_, P_);
    Best best(end - begin, std::min(count, components_));
    std::vector<int64_t> first(groups_.count + 1), tokens;
    list(begin, end, first, tokens);
    for (int64_t g = 0; g < groups_.count; ++g)
      for (int64_t b = blocks_[g]; b < blocks_[g + 1]; ++b)
        for (int64_t i = first[g]; i < first[g + 1]; i += kScoreRows) {
          const int64_t here = std::min<int64_t>(kScoreRows, first[g + 1] - i);
          int64_t tile[kScoreRows];
          for (int64_t j = 0; j < kScoreRows; ++j) tile[j] = tokens[i + std::min(j, here - 1)];
          alignas(kVectorBytes) Floats scores[kScoreRows];
          score(own, tile, b, scores);
          for (int64_t j = 0; j < here; ++j) best.offer(tile[j], scores[j], start(g) + (b - blocks_[g]) * V);
        }
    for (int64_t n = begin; n < end; ++n) best.write(n - begin, count, out + n * count);
  }

 private:
  static constexpr int64_t V = kWidth<float>;

  struct Tokens {
    std::vector<uint8_t> bytes;  // [N, F padded], with kTokenOffset added
    std::vector<float> quanta;   // [N]
    Tokens(const T* left, int64_t count, int64_t coordinates, int64_t padded) : bytes(count * padded), quanta(count) {
      FewBits<T> read(coordinates);
      for (int64_t n = 0; n < count; ++n)
        quanta[n] = read(left + n * coordinates, [&](int64_t f, Ints q) {
          const auto narrow = __builtin_convertvector(q + kTokenOffset, Bytes);
          std::memcpy(bytes.data() + n * padded + f, &narrow, V);
        });
    }
  };

  // The best components of a few tokens while blocks stream by. A key is a score and a component: the larger, the better.
  class Best {
   public:
    Best(int64_t tokens, int64_t wanted)
        : wanted_(wanted), room_(2 * wanted + V), keys_(tokens * room_), sizes_(tokens),
          bars_(tokens, -std::numeric_limits<float>::infinity()) {}

    // Collects what is above the token's bar, which rises to the last score that can still be wanted when enough is
    // there. Blocks come in order: what is at the bar has a higher index.
    void offer(int64_t token, Floats scores, int64_t first) {
      uint64_t bits = ~not_below(broadcast(bars_[token]), scores) & ((uint64_t(1) << V) - 1);
      if (bits == 0) return;
      int64_t *const keys = keys_.data() + token * room_, size = sizes_[token];
      for (; bits != 0; bits &= bits - 1) {
        const int64_t lane = __builtin_ctzll(bits);
        keys[size++] = key(scores[lane], static_cast<int32_t>(first + lane));
      }
      if (size >= 2 * wanted_) {
        std::nth_element(keys, keys + (wanted_ - 1), keys + size, std::greater<>());
        size = wanted_, bars_[token] = score(keys[wanted_ - 1]);
      }
      sizes_[token] = size;
    }

    void write(int64_t token, int64_t count, int32_t* out) {
      int64_t *const keys = keys_.data() + token * room_, size = std::min(sizes_[token], wanted_);
      std::partial_sort(keys, keys + size, keys + sizes_[token], std::greater<>());
      for (int64_t i = 0; i < count; ++i) out[i] = i < size ? ~static_cast<int32_t>(keys[i]) : -1;
    }

   private:
    // The bits of a float, where those of negative ones are turned around, have its order.
    static int32_t turned(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
    static int64_t key(float score, int32_t component) {
      score += 0.0f;  // no -0, which would be below 0
      int32_t bits;
      std::memcpy(&bits, &score, 4);
      return int64_t(turned(bits)) * (int64_t(1) << 32) + static_cast<uint32_t>(~component);
    }
    static float score(int64_t key) {
      const int32_t bits = turned(static_cast<int32_t>(key >> 32));
      float found;
      std::memcpy(&found, &bits, 4);
      return found;
    }

    int64_t wanted_, room_;
    std::vector<int64_t> keys_, sizes_;  // [tokens, room], [tokens]
    std::vector<float> bars_;            // [tokens]
  };

  int64_t start(int64_t g) const { return groups_.starts == nullptr ? 0 : groups_.starts[g]; }
  int64_t stop(int64_t g, int64_t components) const {
    return groups_.starts == nullptr ? components : groups_.starts[g + 1];
  }

  // Writes a row of right to a lane of columns `at`.
  void pack(FewBits<T>& read, const T* row, int64_t at, int64_t lane) {
    Ints total = {};
    quanta_[at * V + lane] = read(row, [&](int64_t f, Ints q) {
      total += q;
      const auto narrow = __builtin_convertvector(q, Bytes);
      for (int64_t quad = 0; quad < V / 4; ++quad)
        std::memcpy(columns_.data() + (at * P_ + f + 4 * quad) * V + 4 * lane,
                    reinterpret_cast<const char*>(&narrow) + 4 * quad, 4);
    });
    starts_[at * V + lane] = -kTokenOffset * horizontal_sum<int32_t>(total);
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
  void score(const Tokens& tokens, const int64_t* tile, int64_t b, Floats* out) const {
    const uint8_t* rows[kScoreRows];
    for (int j = 0; j < kScoreRows; ++j) rows[j] = tokens.bytes.data() + tile[j] * P_;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t at = b * rows_ + r;
      const Ints start = load(starts_.data() + at * V);
      Ints sums[kScoreRows];
      for (int j = 0; j < kScoreRows; ++j) sums[j] = start;
      for (int64_t f = 0; f < P_; f += 8) {
        const Ints s0 = quads(at * P_ + f), s1 = quads(at * P_ + f + 4);
#pragma GCC unroll 8
        for (int j = 0; j < kScoreRows; ++j)
          sums[j] = dot8(sums[j], broadcast(quad(rows[j] + f)), s0, broadcast(quad(rows[j] + f + 4)), s1);
      }
      const Floats offset = load(offsets_.data() + at * V), quanta = load(quanta_.data() + at * V);
      for (int j = 0; j < kScoreRows; ++j) {
        const Floats value = offset + to_float(sums[j]) * quanta * tokens.quanta[tile[j]];
        out[j] = r == 0 ? value : out[j] + value * value * 0.5f;
      }
    }
  }

  Ints quads(int64_t at) const { return load(reinterpret_cast<const int32_t*>(columns_.data() + at * V)); }

  static int32_t quad(const uint8_t* bytes) {
    int32_t found;
    std::memcpy(&found, bytes, 4);
    return found;
  }

  int64_t components_, F_, P_, rows_;
  Groups groups_;
  std::vector<int64_t> blocks_;           // the first of every group, and their number
  std::vector<int8_t> columns_;           // [blocks, S + 1, P / 4, V, 4]
  std::vector<int32_t> starts_;           // [blocks, S + 1, V]: -kTokenOffset times the sum of a row
  std::vector<float> quanta_, offsets_;   // [blocks, S + 1, V]
};

// left [N, F], right [K, S + 1, F], offsets [K, S + 1] -> out [N, count]
template <class T, class ParallelFor>
void top_scores(const T* left, const T* right, const T* offsets, int64_t tokens, int64_t components, int64_t squares,
                int64_t coordinates, const Groups& groups, int64_t count, int32_t* out, ParallelFor&& parallel_for) {
  const TopScores<T> of(right, offsets, components, squares, coordinates, groups, parallel_for);
  const int64_t share = ceil_div(tokens, 4 * parallel_for.threads());  // so that no thread waits long for another
  const int64_t size = std::clamp<int64_t>(share, 2 * kScoreRows, kScoredTokens);
  parallel_for(ceil_div(tokens, size), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      of(left, task * size, std::min(tokens, (task + 1) * size), count, out);
  });
}

}  // namespace mfa
