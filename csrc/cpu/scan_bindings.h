// Tensors of the scans as their kernels take them: inputs checked, outputs allocated.
#pragma once
#include "bindings.h"
#include "scan.h"

namespace binding {

template <class T>
mfa::ScanInput<T> scan_input(const mfa::Shape& shape, const Tensor& x, const Tensor& rows, const Tensor& constants,
                             const Tensor& lam) {
  check_scan(shape, x, rows, lam);
  check(constants, {shape.components}, x.scalar_type(), "constants");
  return {shape, data<T>(x), x.size(0), data<T>(rows), data<T>(lam), data<T>(constants)};
}

struct ActiveTensors {
  Tensor log_prob, components, logits, counts;

  ActiveTensors(const Tensor& x, int64_t slots) {
    TORCH_CHECK_VALUE(slots >= 1, "slots must be at least 1, got ", slots);
    log_prob = empty({x.size(0)}, x.options());
    components = empty({x.size(0), slots}, x.options().dtype(at::kInt));
    logits = empty({x.size(0), slots}, x.options());
    counts = empty({x.size(0)}, x.options().dtype(at::kInt));
  }
  template <class T>
  mfa::ActivePairs<T> pairs(double threshold) const {
    return {static_cast<T>(threshold), logits.size(1),  data<T>(log_prob), data<int32_t>(components),
            data<T>(logits),           data<int32_t>(counts)};
  }
};

// Every logit [K, N], if it is asked for and not too large; else of size 0.
struct AllLogits {
  Tensor logits;

  AllLogits(const Tensor& x, int64_t components, bool keep)
      : logits(empty({0, x.size(0)}, x.options())), components_(components), keep_(keep) {}
  template <class T>
  T* room() {
    if (!keep_ || components_ * logits.size(1) > kMostKept) return nullptr;
    logits = allocate({components_, logits.size(1)}, logits.options());
    return data<T>(logits);
  }

 private:
  static constexpr int64_t kMostKept = int64_t(1) << 28;  // a gigabyte in float; beyond, they are computed again
  int64_t components_;
  bool keep_;
};

}  // namespace binding
