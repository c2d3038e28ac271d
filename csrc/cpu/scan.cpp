#include "scan.h"

#include "bindings.h"

namespace binding {

std::tuple<Tensor, Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                  const Tensor& lam, bool per_component,
                                                  double threshold, int64_t slots) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check(constants, {shape.components}, x.scalar_type(), "constants");
  TORCH_CHECK_VALUE(slots >= 1, "slots must be at least 1, got ", slots);
  const int64_t N = x.size(0);
  Tensor log_prob = empty({N}, x.options());
  Tensor components = empty({N, slots}, x.options().dtype(at::kInt));
  Tensor logits = empty({N, slots}, x.options());
  Tensor counts = empty({N}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan", [&] {
    mfa::scan<scalar_t>(shape, data<scalar_t>(x), N, data<scalar_t>(rows), data<scalar_t>(constants),
                          data<scalar_t>(lam), static_cast<scalar_t>(threshold), slots,
                          data<scalar_t>(log_prob), data<int32_t>(components), data<scalar_t>(logits),
                          data<int32_t>(counts), at::get_num_threads(), parallel_for);
  });
  return {log_prob, components, logits, counts};
}

Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam,
             bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check(constants, {shape.components}, x.scalar_type(), "constants");
  Tensor out = allocate({shape.components, x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense", [&] {
    mfa::dense<scalar_t>(shape, data<scalar_t>(x), x.size(0), data<scalar_t>(rows), data<scalar_t>(constants),
                         data<scalar_t>(lam), data<scalar_t>(out), at::get_num_threads(),
                         parallel_for);
  });
  return out;
}

}  // namespace binding
