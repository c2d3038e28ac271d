// Binds top_scores.h to PyTorch.
#include "top_scores.h"

#include "bindings.h"

namespace binding {

// left [N, F], right [K, S + 1, F], offsets [K, S + 1] -> components [N, count]; of groups that begin at starts [G + 1]
// and are listed for every token in lists [N, P], or neither.
Tensor top_scores(const Tensor& left, const Tensor& right, const Tensor& offsets, int64_t count,
                  const std::optional<Tensor>& starts, const std::optional<Tensor>& lists) {
  const auto type = left.scalar_type();
  const int64_t N = left.size(0), F = left.size(1), K = right.size(0), rows = right.size(1);
  check(left, {N, F}, type, "left");
  check(right, {K, rows, F}, type, "right");
  check(offsets, {K, rows}, type, "offsets");
  TORCH_CHECK_VALUE(rows > 0, "right must have a row for each component, got none");
  TORCH_CHECK_VALUE(F <= mfa::kMostCoordinates, "at most ", mfa::kMostCoordinates, " coordinates, got ", F);
  TORCH_CHECK_VALUE(count > 0, "count must be positive, got ", count);
  mfa::Groups groups;
  if (starts) {
    TORCH_CHECK_VALUE(lists, "lists is missing");
    groups.count = starts->size(0) - 1, groups.listed = lists->size(1);
    check(*starts, {groups.count + 1}, at::kLong, "starts");
    check(*lists, {N, groups.listed}, at::kInt, "lists");
    check_range(*lists, -1, groups.count, "lists");
    groups.starts = data<int64_t>(*starts), groups.lists = data<int32_t>(*lists);
    for (int64_t g = 0; g < groups.count; ++g)
      TORCH_CHECK_VALUE(groups.starts[g] <= groups.starts[g + 1], "starts must not fall");
    TORCH_CHECK_VALUE(groups.starts[0] == 0 && groups.starts[groups.count] == K, "starts must be from 0 to ", K);
  }
  Tensor out = empty({N, count}, left.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(type, "top_scores", [&] {
    mfa::top_scores<scalar_t>(data<scalar_t>(left), data<scalar_t>(right), data<scalar_t>(offsets), N, K, rows - 1, F,
                              groups, count, data<int32_t>(out), parallel_for);
  });
  return out;
}

}  // namespace binding
