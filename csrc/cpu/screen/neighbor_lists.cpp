// Binds neighbor_lists.h to PyTorch.
#include "neighbor_lists.h"

#include "../bindings.h"

namespace binding {

// Lists of neighbors (mfa_kernels/ops/screen/neighbors.py): neighbors and onsets [K, length], horizons [K].
std::tuple<Tensor, Tensor, Tensor> screen_neighbors(const Tensor& means, const Tensor& whitened, const Tensor& cholesky,
                                                    const Tensor& constants, const Tensor& offs, double norm,
                                                    double threshold, int64_t length) {
  const int64_t K = means.size(0), p = means.size(1), R = whitened.size(1);
  const auto type = means.scalar_type();
  check(means, {K, p}, type, "means");
  check(whitened, {K, R, p}, type, "whitened");
  check(cholesky, {K, R, R}, type, "cholesky");
  check(constants, {K}, type, "constants");
  check(offs, {K}, type, "offs");
  TORCH_CHECK_VALUE(0 <= length && length < std::max<int64_t>(K, 1), "length must be in [0, K), got ", length);
  Tensor neighbors = allocate({K, length}, means.options().dtype(at::kInt));
  Tensor onsets = allocate({K, length}, means.options()), horizons = empty({K}, means.options());
  AT_DISPATCH_FLOATING_TYPES(type, "screen_neighbors", [&] {
    const mfa::Pairing<scalar_t> job{
        K, p, R, data<scalar_t>(means), data<scalar_t>(whitened), data<scalar_t>(cholesky), data<scalar_t>(constants),
        data<scalar_t>(offs), norm, threshold, length, data<int32_t>(neighbors), data<scalar_t>(onsets),
        data<scalar_t>(horizons)};
    mfa::find_neighbors(job, parallel_for);
  });
  return {neighbors, onsets, horizons};
}

}  // namespace binding
