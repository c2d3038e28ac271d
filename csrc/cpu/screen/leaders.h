// The best known pair of each token of a stretch.
#pragma once
#include "../candidates.h"
#include "projection.h"

namespace mfa {

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
