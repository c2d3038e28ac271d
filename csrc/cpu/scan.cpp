// Binds scan.h to PyTorch.
#include "scan_bindings.h"

namespace binding {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                        const Tensor& lam, bool per_component, double threshold,
                                                        int64_t slots, bool keep) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  const ActiveTensors out(x, slots);
  AllLogits all(x, shape.components, keep);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan", [&] {
    const auto in = scan_input<scalar_t>(shape, x, rows, constants, lam);
    const auto pairs = out.pairs<scalar_t>(threshold);
    const bool wanted = keep && (in.tokens < mfa::kCrowdTokens || mfa::crowded(in, pairs, parallel_for));
    mfa::scan(in, pairs, parallel_for, wanted ? all.room<scalar_t>() : nullptr);
  });
  return {out.log_prob, out.components, out.logits, out.counts, all.logits};
}

Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  Tensor out = allocate({shape.components, x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense", [&] {
    mfa::dense(scan_input<scalar_t>(shape, x, rows, constants, lam), data<scalar_t>(out), parallel_for);
  });
  return out;
}

}  // namespace binding
