// Binds scan.h to PyTorch.
#include "scan_bindings.h"

namespace binding {

std::tuple<Tensor, Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                const Tensor& lam, bool per_component, double threshold,
                                                int64_t slots) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  const ActiveTensors out(x, slots);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan", [&] {
    mfa::scan(scan_input<scalar_t>(shape, x, rows, constants, lam), out.pairs<scalar_t>(threshold), parallel_for);
  });
  return {out.log_prob, out.components, out.logits, out.counts};
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
