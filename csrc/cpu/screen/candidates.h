// Pairs that the bounds leave, their logits in full, and the best known pair of each token.
#pragma once
#include <numeric>

#include "projection.h"

namespace mfa {

// Pairs of a token and a component; their logits, once they are computed.
template <class T>
struct Pairs {
  std::vector<int64_t> tokens;
  std::vector<int32_t> components;
  std::vector<T> logits;

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  void add(int64_t token, int32_t component) {
    tokens.push_back(token);
    components.push_back(component);
  }
  void append(const Pairs& other) {
    tokens.insert(tokens.end(), other.tokens.begin(), other.tokens.end());
    components.insert(components.end(), other.components.begin(), other.components.end());
    logits.insert(logits.end(), other.logits.begin(), other.logits.end());
  }
};

// The pairs that screening leaves of some tokens.
template <class T>
struct Candidates {
  Pairs<T> leaders;  // the best known pair of every token, in order, with its logit
  Pairs<T> others;   // no logits yet
};

// Returns the order that brings equal keys together, earlier entries first; first [keys + 1] is where each key begins.
template <class Key>
std::vector<int64_t> counting_sort(const std::vector<Key>& of, int64_t keys, std::vector<int64_t>& first) {
  first.assign(keys + 1, 0);
  for (Key key : of) ++first[key + 1];
  for (int64_t key = 0; key < keys; ++key) first[key + 1] += first[key];
  std::vector<int64_t> next(first), order(of.size());
  for (size_t i = 0; i < of.size(); ++i) order[next[of[i]]++] = static_cast<int64_t>(i);
  return order;
}

// Returns the same order; where entries are few, as for a token that comes alone, it does not count every key.
template <class Key>
std::vector<int64_t> grouped(const std::vector<Key>& of, int64_t keys) {
  if (16 * static_cast<int64_t>(of.size()) > keys) {
    std::vector<int64_t> first;
    return counting_sort(of, keys, first);
  }
  std::vector<int64_t> order(of.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of[a] < of[b]; });
  return order;
}

// Returns how many of order[i], order[i + 1], ... up to `most` have the same key as the first.
template <class Key>
int64_t run_length(const std::vector<Key>& of, const std::vector<int64_t>& order, int64_t i, int64_t most) {
  int64_t length = 1;
  while (length < most && of[order[i + length]] == of[order[i]]) ++length;
  return length;
}

// Computes the logits, component by component, so that its rows are read once for up to eight tokens.
template <class T, class ParallelFor>
void evaluate(const ScanInput<T>& in, Pairs<T>& pairs, ParallelFor&& parallel_for) {
  constexpr int64_t G = 8;  // tokens to a group
  const Shape& shape = in.shape;
  const int64_t chunk_size = std::clamp<int64_t>(pairs.size() / 16, G, 64);  // pairs per task, whatever the threads
  const std::vector<int64_t> order = grouped(pairs.components, shape.components);
  pairs.logits.resize(pairs.size());
  parallel_for(ceil_div(pairs.size(), chunk_size), [&](int64_t begin, int64_t end) {
    std::vector<T> v(shape.padded<T>() * G), t(shape.rank * G);
    const T* group[G];
    T out[G];
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t i = chunk * chunk_size, stop = std::min(pairs.size(), i + chunk_size), count; i < stop;
           i += count) {
        const int64_t k = pairs.components[order[i]];
        const int64_t left = run_length(pairs.components, order, i, std::min(G, stop - i));
        count = left >= G ? G : left >= 2 ? 2 : 1;
        for (int64_t g = 0; g < count; ++g) group[g] = in.x + pairs.tokens[order[i + g]] * shape.features;
        const auto kernel = count == G ? distances<T, G> : count == 2 ? distances<T, 2> : distances<T, 1>;
        kernel(shape, group, in.rows_of(k), in.lam, v.data(), t.data(), out);
        for (int64_t g = 0; g < count; ++g) pairs.logits[order[i + g]] = in.constants[k] - out[g] / 2;
      }
  });
}

// The best known pair of each token of a stretch, with a lower bound of its exact logit.
template <class T>
struct Leaders {
  const ScanInput<T>& in;
  const Stretch<T>& stretch;
  Pairs<T> pairs;
  std::vector<T> reached;

  // Takes the first pairs, one a token in order, without logits.
  template <class ParallelFor>
  void start(Pairs<T> first, ParallelFor&& parallel_for) {
    pairs = std::move(first);
    evaluate(in, pairs, parallel_for);
    reached.resize(pairs.size());
    for (int64_t n = 0; n < pairs.size(); ++n) reached[n] = reach(pairs, n);
  }

  // Computes the logits of other pairs; one that reaches more than the leader of its token changes places with it.
  template <class ParallelFor>
  void challenge(Pairs<T>& others, ParallelFor&& parallel_for) {
    evaluate(in, others, parallel_for);
    for (int64_t i = 0; i < others.size(); ++i) {
      const int64_t n = others.tokens[i] - stretch.begin;
      const T own = reach(others, i);
      if (!(own > reached[n])) continue;
      reached[n] = own;
      std::swap(pairs.components[n], others.components[i]);
      std::swap(pairs.logits[n], others.logits[i]);
    }
  }

 private:
  T reach(const Pairs<T>& of, int64_t i) const {
    return stretch.screen.reached(of.logits[i], of.components[i], stretch.norms[of.tokens[i] - stretch.begin]);
  }
};

}  // namespace mfa
