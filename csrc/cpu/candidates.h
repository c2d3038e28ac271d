// Pairs that bounds leave, their logits in full, and the active pairs that come of them.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "scan.h"

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

// The candidates of one token while components stream by.
class Shortlist {
 public:
  // Where there is no room above the bar either, the list overflows and takes no more.
  void add(int32_t component, float bound, float bar, size_t most) {
    if (overflows_) return;
    if (entries_.size() >= most) keep(bar);
    overflows_ = entries_.size() >= most;
    if (!overflows_) entries_.push_back({component, bound});
  }
  // Forgets what is below the bar.
  void keep(float bar) {
    std::erase_if(entries_, [&](const Entry& entry) {
      if (!(entry.bound < bar)) return false;  // as where either is NaN
      left_out_ = std::max(left_out_, entry.bound);
      return true;
    });
  }
  bool overflows() const { return overflows_; }
  float left_out() const { return left_out_; }  // the largest bound of what was forgotten

  struct Entry {
    int32_t component;
    float bound;
  };
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
  float left_out_ = -std::numeric_limits<float>::infinity();
  bool overflows_ = false;
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

// Active pairs, and a certificate of what was left out.
template <class T>
struct ScreenedPairs : ActivePairs<T> {
  T* dropped;          // [N] bound on the responsibility, all together, of the components whose logit was not computed
  int32_t* evaluated;  // [N] how many logits were computed; -1 where the token took the dense scan
};

// Runs the rest of a scan on one thread, that of the caller.
struct Serially {
  static int64_t threads() { return 1; }
  template <class Body>
  void operator()(int64_t count, Body&& body) const {
    body(int64_t(0), count);
  }
};

// Computes what is left of the tokens that bounds settled, one by one, and writes their active pairs.
template <class T, class ParallelFor>
void collect(const ScanInput<T>& in, Pairs<T>& left, const ScreenedPairs<T>& out, ParallelFor&& parallel_for) {
  evaluate(in, left, parallel_for);
  std::vector<int64_t> first;
  const std::vector<int64_t> order = counting_sort(left.tokens, in.tokens, first);
  parallel_for(in.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (out.evaluated[n] < 0) continue;
      TokenState<T> state;
      for (int64_t i = first[n]; i < first[n + 1]; ++i) {
        const int64_t pair = order[i];
        if (left.logits[pair] < state.best - out.threshold) continue;  // NaN is offered
        state.offer(left.logits[pair], left.components[pair], out.of(n));
      }
      state.finish(out, n);
    }
  });
}

// Runs another scan, run(in, out), for the tokens that bounds did not settle, on a copy of them.
template <class T, class Run>
void scan_rest(const ScanInput<T>& in, const ScreenedPairs<T>& out, Run&& run) {
  std::vector<int64_t> rest;
  for (int64_t n = 0; n < in.tokens; ++n)
    if (out.evaluated[n] < 0) rest.push_back(n);
  if (rest.empty()) return;
  const int64_t count = static_cast<int64_t>(rest.size()), D = in.shape.features, S = out.slots;
  std::vector<T> x(count * D), log_prob(count), logits(count * S), dropped(count);
  std::vector<int32_t> components(count * S), counts(count), evaluated(count, -1);
  for (int64_t i = 0; i < count; ++i) std::copy_n(in.x + rest[i] * D, D, x.data() + i * D);
  ScanInput<T> own = in;
  own.x = x.data(), own.tokens = count;
  run(own, ScreenedPairs<T>{{out.threshold, S, log_prob.data(), components.data(), logits.data(), counts.data()},
                            dropped.data(), evaluated.data()});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = rest[i];
    out.log_prob[n] = log_prob[i], out.counts[n] = counts[i];
    out.dropped[n] = dropped[i], out.evaluated[n] = evaluated[i];
    std::copy_n(components.data() + i * S, S, out.components + n * S);
    std::copy_n(logits.data() + i * S, S, out.logits + n * S);
  }
}

}  // namespace mfa
