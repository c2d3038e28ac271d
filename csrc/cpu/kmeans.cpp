// Binds kmeans.h to PyTorch.
#include "kmeans.h"

#include "bindings.h"

namespace binding {

// x [N, D] against centroids [K, D]; basis [D, P] with projected [K, P], or neither.
std::tuple<Tensor, Tensor, int64_t> nearest(const Tensor& x, const Tensor& centroids, const Tensor& center,
                                            const std::optional<Tensor>& basis, const std::optional<Tensor>& projected,
                                            double slack) {
  const auto type = x.scalar_type();
  const int64_t N = x.size(0), K = centroids.size(0), D = centroids.size(1), V = width(x);
  check(x, {N, D}, type, "x");
  check(centroids, {K, D}, type, "centroids");
  check(center, {D}, type, "center");
  const int64_t P = basis ? basis->size(1) : 0;
  if (basis) {
    TORCH_CHECK_VALUE(P >= V && P % V == 0, "basis must have a multiple of ", V, " columns, got ", P);
    TORCH_CHECK_VALUE(projected, "projected is missing");
    check(*basis, {D, P}, type, "basis");
    check(*projected, {K, P}, type, "projected");
  }
  Tensor owner = empty({N}, x.options().dtype(at::kLong));
  Tensor distance = empty({N}, x.options());
  int64_t pairs = 0;
  AT_DISPATCH_FLOATING_TYPES(type, "nearest", [&] {
    using T = scalar_t;
    const T* c = data<T>(centroids);
    const mfa::Centroids<T> all{K, D, c, data<T>(center), basis ? P : D, basis ? data<T>(*basis) : nullptr,
                                basis ? data<T>(*projected) : c, static_cast<T>(slack)};
    pairs = mfa::nearest<T>(all, data<T>(x), N, data<int64_t>(owner), data<T>(distance), parallel_for);
  });
  return {owner, distance, pairs};
}

// Adds to sums [K, D], mass [K] and inertia [K].
void cluster_sums(const Tensor& x, const Tensor& center, const Tensor& owner, const Tensor& distance,
                  const std::optional<Tensor>& weights, const Tensor& sums, const Tensor& mass, const Tensor& inertia) {
  const int64_t N = x.size(0), D = x.size(1), K = sums.size(0);
  check(x, {N, D}, x.scalar_type(), "x");
  check(center, {D}, x.scalar_type(), "center");
  check(owner, {N}, at::kLong, "owner");
  check(distance, {N}, x.scalar_type(), "distance");
  check(sums, {K, D}, at::kDouble, "sums");
  check(mass, {K}, at::kDouble, "mass");
  check(inertia, {K}, at::kDouble, "inertia");
  if (weights) check(*weights, {N}, at::kDouble, "weights");
  check_range(owner, 0, K + 1, "owner");
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "cluster_sums", [&] {
    mfa::cluster_sums<scalar_t>(data<scalar_t>(x), N, D, data<scalar_t>(center), data<int64_t>(owner),
                                data<scalar_t>(distance), weights ? data<double>(*weights) : nullptr, K,
                                data<double>(sums), data<double>(mass), data<double>(inertia), parallel_for);
  });
}

}  // namespace binding
