// Binds statistics.h to PyTorch.
#include "statistics.h"

#include "bindings.h"

namespace binding {

void check_sums(const mfa::Shape& shape, const Tensor& mass, const Tensor& shift, const Tensor& latent,
                const Tensor& second, const Tensor& cross) {
  const int64_t K = shape.components, D = shape.features, R = shape.rank;
  check(mass, {K}, at::kDouble, "mass");
  check(shift, {K, D}, at::kDouble, "shift");
  check(latent, {K, R}, at::kDouble, "latent");
  check(second, {K, R, R}, at::kDouble, "second");
  check(cross, {K, R, D}, at::kDouble, "cross");
}

// Adds to the outputs, which are double whatever the dtype of x.
void statistics(const Statistics& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), a.per_component);
  const int64_t K = shape.components, R = shape.rank;
  check_scan(shape, a.x, a.rows, a.lam);
  check(a.components, {a.x.size(0), a.components.size(1)}, at::kInt, "components");
  check(a.weights, a.components.sizes(), a.x.scalar_type(), "weights");
  check(a.chol, {K, R, R}, a.x.scalar_type(), "cholesky");
  check_range(a.components, -1, K, "components");
  check_sums(shape, a.mass, a.shift, a.latent, a.second, a.cross);
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
