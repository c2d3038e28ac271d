// Binds woodbury.h to PyTorch.
#include "woodbury.h"

#include "bindings.h"

namespace binding {

std::tuple<Tensor, Tensor, Tensor> woodbury(const Tensor& means, const Tensor& loadings, const Tensor& noise) {
  const auto shape = shape_of(means, loadings.size(2), noise.dim() == 2);
  const int64_t V = width(means);
  const auto type = means.scalar_type();
  check(means, {shape.components, shape.features}, type, "means");
  check(loadings, {shape.components, shape.features, shape.rank}, type, "loadings");
  check(noise, noise_sizes(shape), type, "noise_variance");
  Tensor rows = allocate({shape.components, mfa::ceil_div(shape.features, V), shape.row_count(), V}, means.options());
  Tensor chol = empty({shape.components, shape.rank, shape.rank}, means.options());
  Tensor log_det = empty({shape.components}, means.options());
  AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "woodbury", [&] {
    mfa::woodbury<scalar_t>(shape, data<scalar_t>(means), data<scalar_t>(loadings), data<scalar_t>(noise),
                           data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(log_det), parallel_for);
  });
  return {rows, chol, log_det};
}

}  // namespace binding
