#include "marginals.h"

#include "../bindings.h"

namespace binding {

// Stage 0 of screening (mfa_kernels/ops/screen/op.py): rows [K, p/V, R+1, V], radii and slack [K], lines [K, p] and
// line_terms [2, K], and, if they are to be kept, the projections [K, R+1, p]; `known` [K, R+1, at most p] are those on
// the first columns.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> screen_marginals(
    const Tensor& means, const Tensor& loadings, const Tensor& cholesky, const Tensor& center, const Tensor& scale,
    const Tensor& projection, const std::optional<Tensor>& known, bool keep, double rounding, double base, double norm,
    const Tensor& middle, double up) {
  const auto shape = shape_of(means, loadings.size(2), false);
  const int64_t K = shape.components, D = shape.features, R = shape.rank, p = projection.size(1), V = width(means);
  const int64_t columns = known ? known->size(2) : 0, strip = std::max<int64_t>(V, mfa::kTileColumns);
  const auto type = means.scalar_type();
  check(means, {K, D}, type, "means");
  check(loadings, {K, D, R}, type, "loadings");
  check(cholesky, {K, R, R}, type, "cholesky");
  check(center, {D}, type, "center");
  check(scale, {D}, at::kDouble, "scale");
  check(projection, {D, p}, at::kDouble, "projection");
  check(middle, {p}, at::kDouble, "middle");
  TORCH_CHECK_VALUE(p >= 1 && p % strip == 0, "projection must have a multiple of ", strip, " columns, got ", p);
  if (known) check(*known, {K, R + 1, columns}, at::kDouble, "known");
  TORCH_CHECK_VALUE(columns <= p && columns % strip == 0, "known must have a multiple of ", strip, " columns up to ", p,
                    ", got ", columns);
  Tensor rows = allocate({K, p / V, R + 1, V}, means.options());
  Tensor radii = empty({K}, means.options()), slack = empty({K}, means.options());
  Tensor lines = allocate({K, p}, means.options()), line_terms = empty({2, K}, means.options());
  std::optional<Tensor> kept;
  if (keep) kept = allocate({K, R + 1, p}, projection.options());
  AT_DISPATCH_FLOATING_TYPES(type, "screen_marginals", [&] {
    mfa::Marginals<scalar_t> job{};
    job.means = data<scalar_t>(means), job.loadings = data<scalar_t>(loadings);
    job.cholesky = data<scalar_t>(cholesky), job.center = data<scalar_t>(center);
    job.scale = data<double>(scale), job.projection = data<double>(projection), job.features = p;
    if (known) job.known = data<double>(*known), job.columns = columns;
    if (kept) job.kept = data<double>(*kept);
    job.rounding = rounding, job.base = base, job.norm = norm, job.up = up;
    job.middle = data<double>(middle);
    job.rows = data<scalar_t>(rows), job.radii = data<scalar_t>(radii), job.slack = data<scalar_t>(slack);
    job.lines = data<scalar_t>(lines), job.offsets = data<scalar_t>(line_terms), job.shares = job.offsets + K;
    mfa::marginals(shape, job, parallel_for);
  });
  return {rows, radii, slack, lines, line_terms, kept};
}

}  // namespace binding
