// Binds statistics.h to PyTorch.
#include "statistics.h"

#include "bindings.h"

namespace binding {

// Adds to the outputs, which are double whatever the dtype of x.
void statistics(const Statistics& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), a.per_component);
  const int64_t K = shape.components, D = shape.features, R = shape.rank;
  check_scan(shape, a.x, a.rows, a.lam);
  check(a.components, {a.x.size(0), a.components.size(1)}, at::kInt, "components");
  check(a.weights, a.components.sizes(), a.x.scalar_type(), "weights");
  check(a.chol, {K, R, R}, a.x.scalar_type(), "cholesky");
  check_range(a.components, -1, K, "components");
  check(a.mass, {K}, at::kDouble, "mass");
  check(a.shift, {K, D}, at::kDouble, "shift");
  check(a.latent, {K, R}, at::kDouble, "latent");
  check(a.second, {K, R, R}, at::kDouble, "second");
  check(a.cross, {K, R, D}, at::kDouble, "cross");
  check(a.squares, noise_sizes(shape), at::kDouble, "squares");
  const mfa::Sums out{data<double>(a.mass),   data<double>(a.shift), data<double>(a.latent),
                      data<double>(a.second), data<double>(a.cross), data<double>(a.squares)};
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "statistics", [&] {
    mfa::statistics<scalar_t>(shape, data<scalar_t>(a.x), data<int32_t>(a.components), data<scalar_t>(a.weights),
                              a.x.size(0), a.components.size(1), data<scalar_t>(a.rows), data<scalar_t>(a.chol),
                              data<scalar_t>(a.lam), out, parallel_for);
  });
}

}  // namespace binding
