// Binds marginals.h to PyTorch.
#include "marginals.h"

#include "../bindings.h"

namespace binding {

// Stage 0 of screening (mfa_kernels/ops/screen/op.py): rows [K, p/V, R+1, V], radii and slack [K], lines [K, p] and
// line_terms [2, K], and, if they are to be kept, the projections [K, R+1, p]; `known` [K, R+1, at most p] are those on
// the first columns.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> screen_marginals(
    const ScreenMarginals& a) {
  const auto shape = shape_of(a.means, a.loadings.size(2), false);
  const int64_t K = shape.components, D = shape.features, R = shape.rank, p = a.projection.size(1), V = width(a.means);
  const int64_t columns = a.known ? a.known->size(2) : 0, strip = std::max<int64_t>(V, mfa::kTileColumns);
  const auto type = a.means.scalar_type();
  check(a.means, {K, D}, type, "means");
  check(a.loadings, {K, D, R}, type, "loadings");
  check(a.cholesky, {K, R, R}, type, "cholesky");
  check(a.center, {D}, type, "center");
  check(a.scale, {D}, at::kDouble, "scale");
  check(a.projection, {D, p}, at::kDouble, "projection");
  check(a.middle, {p}, at::kDouble, "middle");
  TORCH_CHECK_VALUE(p >= 1 && p % strip == 0, "projection must have a multiple of ", strip, " columns, got ", p);
  if (a.known) check(*a.known, {K, R + 1, columns}, at::kDouble, "known");
  TORCH_CHECK_VALUE(columns <= p && columns % strip == 0, "known must have a multiple of ", strip, " columns up to ", p,
                    ", got ", columns);
  Tensor rows = allocate({K, p / V, R + 1, V}, a.means.options());
  Tensor radii = empty({K}, a.means.options()), slack = empty({K}, a.means.options());
  Tensor lines = allocate({K, p}, a.means.options()), line_terms = empty({2, K}, a.means.options());
  std::optional<Tensor> kept;
  if (a.keep) kept = allocate({K, R + 1, p}, a.projection.options());
  AT_DISPATCH_FLOATING_TYPES(type, "screen_marginals", [&] {
    mfa::Marginals<scalar_t> job{};
    job.means = data<scalar_t>(a.means), job.loadings = data<scalar_t>(a.loadings);
    job.cholesky = data<scalar_t>(a.cholesky), job.center = data<scalar_t>(a.center);
    job.scale = data<double>(a.scale), job.projection = data<double>(a.projection), job.features = p;
    if (a.known) job.known = data<double>(*a.known), job.columns = columns;
    if (kept) job.kept = data<double>(*kept);
    job.rounding = a.rounding, job.base = a.base, job.norm = a.norm, job.up = a.up;
    job.middle = data<double>(a.middle);
    job.rows = data<scalar_t>(rows), job.radii = data<scalar_t>(radii), job.slack = data<scalar_t>(slack);
    job.lines = data<scalar_t>(lines), job.offsets = data<scalar_t>(line_terms), job.shares = job.offsets + K;
    mfa::marginals(shape, job, parallel_for);
  });
  return {rows, radii, slack, lines, line_terms, kept};
}

}  // namespace binding
