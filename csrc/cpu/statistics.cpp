#include "statistics.h"

#include "bindings.h"

namespace binding {

// Adds to the outputs, which are double whatever the dtype of x.
void statistics(const Tensor& x, const Tensor& components, const Tensor& weights, const Tensor& rows,
                const Tensor& chol, const Tensor& lam, bool per_component, const Tensor& mass, const Tensor& shift,
                const Tensor& latent, const Tensor& second, const Tensor& cross, const Tensor& squares) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  const int64_t K = shape.components, D = shape.features, R = shape.rank;
  check_scan(shape, x, rows, lam);
  check(components, {x.size(0), components.size(1)}, at::kInt, "components");
  check(weights, components.sizes(), x.scalar_type(), "weights");
  check(chol, {K, R, R}, x.scalar_type(), "cholesky");
  check_range(components, -1, K, "components");
  check(mass, {K}, at::kDouble, "mass");
  check(shift, {K, D}, at::kDouble, "shift");
  check(latent, {K, R}, at::kDouble, "latent");
  check(second, {K, R, R}, at::kDouble, "second");
  check(cross, {K, R, D}, at::kDouble, "cross");
  if (per_component)
    check(squares, {K, D}, at::kDouble, "squares");
  else
    check(squares, {D}, at::kDouble, "squares");
  const mfa::Sums out{data<double>(mass),   data<double>(shift), data<double>(latent),
                      data<double>(second), data<double>(cross), data<double>(squares)};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "statistics", [&] {
    mfa::statistics<scalar_t>(shape, data<scalar_t>(x), data<int32_t>(components), data<scalar_t>(weights), x.size(0),
                              components.size(1), data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(lam),
                              out, parallel_for);
  });
}

}  // namespace binding
