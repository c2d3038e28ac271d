// Binds pairs.h to PyTorch.
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

// Adds to the gradients that are given; None is not computed.
void backward(const Backward& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), a.per_component);
  check_scan(shape, a.x, a.rows, a.lam);
  check_pairs(shape, a.x, a.tokens, a.components, a.chol);
  check(a.weights, {a.tokens.size(0)}, a.x.scalar_type(), "weights");
  auto written = [&](const std::optional<Tensor>& t, at::IntArrayRef sizes, const char* name) {
    if (t) check(*t, sizes, a.x.scalar_type(), name);
  };
  const int64_t K = shape.components, D = shape.features;
  written(a.grad_x, {a.x.size(0), D}, "grad_x");
  written(a.grad_means, {K, D}, "grad_means");
  written(a.grad_loadings, {K, D, shape.rank}, "grad_loadings");
  written(a.grad_noise, noise_sizes(shape), "grad_noise");
  written(a.grad_log_weights, {K}, "grad_log_weights");
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "backward", [&] {
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<scalar_t>() : nullptr; };
    const mfa::Gradients<scalar_t> grad{pointer(a.grad_x), pointer(a.grad_means), pointer(a.grad_loadings),
                                        pointer(a.grad_noise), pointer(a.grad_log_weights)};
    mfa::backward<scalar_t>(shape, data<scalar_t>(a.x), data<int64_t>(a.tokens), data<int32_t>(a.components),
                            data<scalar_t>(a.weights), a.tokens.size(0), data<scalar_t>(a.rows), data<scalar_t>(a.chol),
                            data<scalar_t>(a.lam), grad, parallel_for);
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
