#include "pairs.h"

#include "bindings.h"

namespace binding {

void check_pairs(const mfa::Shape& shape, const Tensor& x, const Tensor& tokens, const Tensor& components,
                 const Tensor& chol) {
  check(tokens, {tokens.size(0)}, at::kLong, "tokens");
  check(components, {tokens.size(0)}, at::kInt, "components");
  check(chol, {shape.components, shape.rank, shape.rank}, x.scalar_type(), "cholesky");
  check_range(tokens, 0, x.size(0), "tokens");
  check_range(components, 0, shape.components, "components");
}

Tensor latents(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& rows, const Tensor& chol,
               const Tensor& lam, bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check_pairs(shape, x, tokens, components, chol);
  Tensor out = empty({tokens.size(0), shape.rank}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "latents", [&] {
    mfa::latents<scalar_t>(shape, data<scalar_t>(x), data<int64_t>(tokens), data<int32_t>(components), tokens.size(0),
                           data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(lam),
                           data<scalar_t>(out), parallel_for);
  });
  return out;
}

// Adds to the tensors given; an undefined one (None) is not computed.
void backward(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& weights,
              const Tensor& rows, const Tensor& chol, const Tensor& lam, bool per_component,
              const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_means,
              const std::optional<Tensor>& grad_loadings, const std::optional<Tensor>& grad_noise,
              const std::optional<Tensor>& grad_log_weights) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  check_scan(shape, x, rows, lam);
  check_pairs(shape, x, tokens, components, chol);
  check(weights, {tokens.size(0)}, x.scalar_type(), "weights");
  auto written = [&](const std::optional<Tensor>& t, at::IntArrayRef sizes, const char* name) {
    if (t) check(*t, sizes, x.scalar_type(), name);
  };
  const int64_t K = shape.components, D = shape.features;
  written(grad_x, {x.size(0), D}, "grad_x");
  written(grad_means, {K, D}, "grad_means");
  written(grad_loadings, {K, D, shape.rank}, "grad_loadings");
  if (per_component)
    written(grad_noise, {K, D}, "grad_noise");
  else
    written(grad_noise, {D}, "grad_noise");
  written(grad_log_weights, {K}, "grad_log_weights");
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "backward", [&] {
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<scalar_t>() : nullptr; };
    const mfa::Gradients<scalar_t> grad{pointer(grad_x), pointer(grad_means), pointer(grad_loadings),
                                        pointer(grad_noise), pointer(grad_log_weights)};
    mfa::backward<scalar_t>(shape, data<scalar_t>(x), data<int64_t>(tokens), data<int32_t>(components),
                            data<scalar_t>(weights), tokens.size(0), data<scalar_t>(rows), data<scalar_t>(chol),
                            data<scalar_t>(lam), grad, parallel_for);
  });
}

Tensor decode(const Tensor& components, const Tensor& responsibilities, const Tensor& latents, const Tensor& means,
              const Tensor& loadings) {
  const auto shape = shape_of(means, loadings.size(2), false);
  const auto type = means.scalar_type();
  check(means, {shape.components, shape.features}, type, "means");
  check(loadings, {shape.components, shape.features, shape.rank}, type, "loadings");
  check(components, {components.size(0), components.size(1)}, at::kInt, "components");
  check(responsibilities, components.sizes(), type, "responsibilities");
  check(latents, {components.size(0), components.size(1), shape.rank}, type, "latents");
  check_range(components, -1, shape.components, "components");
  Tensor out = empty({components.size(0), shape.features}, means.options());
  AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "decode", [&] {
    mfa::decode<scalar_t>(shape, data<int32_t>(components), data<scalar_t>(responsibilities), data<scalar_t>(latents),
                          components.size(0), components.size(1), data<scalar_t>(means), data<scalar_t>(loadings),
                          data<scalar_t>(out), parallel_for);
  });
  return out;
}

}  // namespace binding
