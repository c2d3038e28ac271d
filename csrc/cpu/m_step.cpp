// Binds m_step.h to PyTorch.
#include "m_step.h"

#include "bindings.h"

namespace binding {

template <class T>
mfa::Factors<T> factors(const mfa::Shape& shape, const Tensor& rows, const Tensor& chol, const Tensor& lam) {
  check(rows, {shape.components, shape.blocks<T>(), shape.row_count(), mfa::kWidth<T>}, lam.scalar_type(), "rows");
  check(chol, {shape.components, shape.rank, shape.rank}, lam.scalar_type(), "cholesky");
  check(lam, {shape.features}, lam.scalar_type(), "scale");
  return {shape, data<T>(rows), data<T>(chol), data<T>(lam)};
}

Tensor m_step_gains(const Tensor& rows, const Tensor& chol, const Tensor& lam, bool per_component) {
  const auto shape = shape_of_rows(rows, lam.size(0), per_component);
  Tensor out = allocate({shape.components, shape.rank, shape.features}, lam.options());
  AT_DISPATCH_FLOATING_TYPES(lam.scalar_type(), "m_step_gains", [&] {
    mfa::m_step_gains(factors<scalar_t>(shape, rows, chol, lam), data<scalar_t>(out), parallel_for);
  });
  return out;
}

Tensor m_step_traces(const Tensor& gains, const Tensor& spread, const Tensor& rows, const Tensor& chol,
                     const Tensor& lam, bool per_component) {
  const auto shape = shape_of_rows(rows, lam.size(0), per_component);
  for (const auto& t : {gains, spread})
    check(t, {shape.components, shape.rank, shape.features}, lam.scalar_type(), "gains, spread");
  Tensor out = empty({shape.components}, lam.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(lam.scalar_type(), "m_step_traces", [&] {
    mfa::m_step_traces(factors<scalar_t>(shape, rows, chol, lam), data<scalar_t>(gains), data<scalar_t>(spread),
                       data<double>(out), parallel_for);
  });
  return out;
}

std::tuple<Tensor, Tensor> m_step_solve(const MStep& a) {
  const auto shape = shape_of_rows(a.rows, a.lam.size(0), a.per_component);
  const int64_t K = shape.components, D = shape.features, R = shape.rank;
  const auto type = a.lam.scalar_type();
  check(a.gains, {K, R, D}, type, "gains");
  check(a.spread, {K, R, D}, type, "spread");
  check(a.loadings, {K, D, R}, type, "loadings");
  check_sums(shape, a.mass, a.shift, a.latent, a.second, a.cross);
  check(a.left, noise_sizes(shape), at::kDouble, "left");
  const mfa::MStepSums sums{data<double>(a.mass), data<double>(a.shift), data<double>(a.latent), data<double>(a.second),
                            data<double>(a.cross)};
  Tensor loadings = allocate(a.loadings.sizes(), a.loadings.options()), change = allocate({K, D}, a.mass.options());
  bool solved = true;
  AT_DISPATCH_FLOATING_TYPES(type, "m_step_solve", [&] {
    const mfa::MStepResults<scalar_t> out{data<scalar_t>(loadings), data<double>(change), data<double>(a.left)};
    solved = mfa::m_step_solve(factors<scalar_t>(shape, a.rows, a.chol, a.lam), sums, data<scalar_t>(a.gains),
                               data<scalar_t>(a.spread), a.strength, a.least, data<scalar_t>(a.loadings), out,
                               parallel_for);
  });
  TORCH_CHECK_LINALG(solved, "the M-step of a component has no solution: its statistics are not positive definite");
  return {change, loadings};
}

}  // namespace binding
