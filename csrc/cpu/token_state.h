// The active pairs of one token, found while the logits of the components stream by.
//
// Active    logit >= best - threshold, with threshold = log(K / eps): all components left out weigh, together, less
//           than eps of the responsibility. A token with more than S active components overflows its slots: it keeps
//           the S largest, and log p(x) comes from a running sum of all the active ones.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "layout.h"

namespace mfa {

// The slots of one token.
template <class T>
struct Slots {
  T threshold;          // nats below the largest logit: a component whose logit is lower is not active
  int64_t size;         // S
  int32_t* components;  // [S]
  T* logits;            // [S]
};

// The active pairs that a scan finds, a row per token.
template <class T>
struct ActivePairs {
  T threshold;          // of every token
  int64_t slots;        // S
  T* log_prob;          // [N]
  int32_t* components;  // [N, S], -1 in an empty slot
  T* logits;            // [N, S], -inf in an empty slot
  int32_t* counts;      // [N]; S + 1 marks an overflow

  Slots<T> of(int64_t n) const { return {threshold, slots, components + n * slots, logits + n * slots}; }
};

// The state of one token between logits; the caller hands over its slots with every call.
template <class T>
struct TokenState {
  static constexpr T kNone = -std::numeric_limits<T>::infinity();
  T best = kNone;
  T evicted = kNone;  // the largest logit that found no slot
  T base = 0;         // once a logit was evicted, all active ones so far sum to exp(base) * sum
  double sum = 0;
  int32_t count = 0;     // slots in use
  int64_t least = -1;    // the slot with the smallest logit, where all are in use and it is known
  bool invalid = false;  // a logit was NaN

  bool summing() const { return evicted > kNone; }

  // Takes a logit of at least best - threshold (which may round to best), or NaN; `summed` if it is in the sum already.
  void offer(T logit, int32_t component, const Slots<T>& slots, bool summed = false) {
    if (logit != logit) {
      invalid = true;
      return;
    }
    if (logit == kNone) return;
    best = std::max(best, logit);
    if (summing() && !summed) add(logit, 1);
    if (count == slots.size) {
      if (least < 0) least = std::min_element(slots.logits, slots.logits + count) - slots.logits;
      if (slots.logits[least] < best - slots.threshold) drop_inactive(slots);
    }
    if (count < slots.size) {
      slots.components[count] = component;
      slots.logits[count++] = logit;
      least = -1;
      return;
    }
    if (!summing()) {
      sum_slots(slots);
      add(logit, 1);
    }
    if (slots.logits[least] < logit) {
      std::swap(slots.logits[least], logit);
      slots.components[least] = component;
      least = -1;
    }
    evicted = std::max(evicted, logit);
  }

  // Takes over what another range of components found for the same token.
  void merge(const TokenState& other, const Slots<T>& slots, const Slots<T>& others) {
    invalid |= other.invalid;
    if (other.summing()) {  // its slots are in its sum, and are not added again below
      if (!summing()) sum_slots(slots);
      add(other.base, other.sum);
      evicted = std::max(evicted, other.evicted);
    }
    for (int32_t i = 0; i < other.count; ++i)
      if (!(others.logits[i] < best - slots.threshold))
        offer(others.logits[i], others.components[i], slots, other.summing());
  }

  // Writes row n: sorts the slots, largest first, empties the rest, and computes log p(x).
  void finish(const ActivePairs<T>& out, int64_t n) {
    const Slots<T> slots = out.of(n);
    drop_inactive(slots);
    sort(slots);
    for (int64_t i = count; i < slots.size; ++i) slots.components[i] = -1, slots.logits[i] = kNone;
    const bool overflows = summing() && evicted >= best - slots.threshold;  // an active component has no slot
    if (!overflows) sum_slots(slots);
    const bool unknown = invalid || count == 0;
    out.log_prob[n] = unknown ? std::numeric_limits<T>::quiet_NaN() : base + static_cast<T>(std::log(sum));
    out.counts[n] = overflows ? static_cast<int32_t>(slots.size + 1) : count;
  }

 private:
  void add(T other_base, double other_sum) {
    if (other_base <= base) {  // as nearly all are
      sum += other_sum * std::exp(static_cast<double>(other_base - base));
      return;
    }
    sum = sum * std::exp(static_cast<double>(base - other_base)) + other_sum;
    base = other_base;
  }

  void sum_slots(const Slots<T>& slots) {
    base = best;
    sum = 0;
    for (int32_t i = count - 1; i >= 0; --i) sum += std::exp(static_cast<double>(slots.logits[i] - base));
  }

  void drop_inactive(const Slots<T>& slots) {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i)
      if (slots.logits[i] >= best - slots.threshold) {
        slots.components[kept] = slots.components[i];
        slots.logits[kept++] = slots.logits[i];
      }
    count = kept;
  }

  // Equal logits are ordered by their components.
  void sort(const Slots<T>& slots) const {
    int32_t* const components = slots.components;
    T* const logits = slots.logits;
    if (count > 32) {
      std::vector<std::pair<T, int32_t>> pairs(count);
      for (int32_t i = 0; i < count; ++i) pairs[i] = {-logits[i], components[i]};
      std::sort(pairs.begin(), pairs.end());
      for (int32_t i = 0; i < count; ++i) logits[i] = -pairs[i].first, components[i] = pairs[i].second;
      return;
    }
    for (int32_t i = 1; i < count; ++i) {  // by insertion: there are a handful
      const T logit = logits[i];
      const int32_t component = components[i];
      int32_t j = i;
      for (; j > 0 && (logits[j - 1] < logit || (logits[j - 1] == logit && components[j - 1] > component)); --j)
        logits[j] = logits[j - 1], components[j] = components[j - 1];
      logits[j] = logit;
      components[j] = component;
    }
  }
};

}  // namespace mfa
