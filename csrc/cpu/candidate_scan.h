// Stage 1 on given candidates: the logits of some components of each token, in full, and the active pairs among them.
//
// What a truncated E-step scans: its cost depends on how many candidates a token has, and not on K.
// Floor     N C (R + 2) D multiply-adds, for C candidates each; rows of a component are read once for eight tokens.
#pragma once
#include "candidates.h"

namespace mfa {

// candidates [N, C]: -1 is none, and what a token has twice counts once. all [N, C]: logits, -inf where nothing counts.
template <class T, class ParallelFor>
void scan_candidates(const ScanInput<T>& in, const int32_t* candidates, int64_t count, const ActivePairs<T>& out, T* all,
                     ParallelFor&& parallel_for) {
  const int64_t N = in.tokens;
  std::fill_n(all, N * count, TokenState<T>::kNone);
  Pairs<T> pairs;
  std::vector<int64_t> cells;  // of the pairs, in `all`
  for (int64_t n = 0; n < N; ++n)
    for (const int32_t *first = candidates + n * count, *own = first; own < first + count; ++own)
      if (*own >= 0 && std::find(first, own, *own) == own) pairs.add(n, *own), cells.push_back(own - candidates);
  evaluate(in, pairs, parallel_for);
  for (int64_t i = 0; i < pairs.size(); ++i) all[cells[i]] = pairs.logits[i];
  parallel_for(N, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      TokenState<T> state;
      for (int64_t i = n * count; i < (n + 1) * count; ++i)
        if (!(all[i] < state.best - out.threshold) && all[i] != TokenState<T>::kNone)  // NaN is offered
          state.offer(all[i], candidates[i], out.of(n));
      state.finish(out, n);
    }
  });
}

}  // namespace mfa
