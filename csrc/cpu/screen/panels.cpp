#include "neighbor_scan.h"

#include "../bindings.h"

namespace binding {

// The tensors of a Screen (mfa_kernels/ops/screen/op.py) and the constants of its mixture.
template <class T>
mfa::Screen<T> screen_of(const mfa::Shape& shape, const Tensor& x, const Tensor& constants, const Tensor& center,
                         const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii,
                         const Tensor& slack, const Tensor& lines, const Tensor& line_terms, double exact_slack) {
  const auto type = x.scalar_type();
  const int64_t K = shape.components, p = basis.size(1), V = width(x);
  check(basis, {shape.features, p}, type, "basis");
  TORCH_CHECK_VALUE(p >= 1 && p % V == 0 && p % 8 == 0, "basis must have a multiple of ", std::max<int64_t>(V, 8),
                    " columns, got ", p);
  check(center, {shape.features}, type, "center");
  check(marginal_rows, {K, p / V, shape.row_count(), V}, type, "marginal_rows");
  check(constants, {K}, type, "constants");
  check(log_det, {K}, type, "log_det");
  check(radii, {K}, type, "radii");
  check(slack, {K}, type, "slack");
  const bool with_lines = lines.size(0) > 0;
  if (with_lines) check(lines, {K, p}, type, "lines");
  check(line_terms, {2, with_lines ? K : 0}, type, "line_terms");
  const T* terms = with_lines ? data<T>(line_terms) : nullptr;
  return {p, data<T>(basis), data<T>(center), data<T>(marginal_rows), data<T>(constants), data<T>(log_det),
          data<T>(radii), data<T>(slack), with_lines ? data<T>(lines) : nullptr, terms, with_lines ? terms + K : nullptr,
          static_cast<T>(exact_slack)};
}

// The tensors of a Neighbors (mfa_kernels/ops/screen/neighbors.py).
template <class T>
mfa::Near<T> near_of(const mfa::Shape& shape, const Tensor& basis, const std::vector<Tensor>& tensors, double threshold) {
  TORCH_CHECK_VALUE(tensors.size() == 9, "neighbors must be 9 tensors, got ", tensors.size());
  TORCH_CHECK_VALUE(tensors[0].dim() == 2 && tensors[6].dim() == 2, "neighbors: centers and neighbors must be matrices");
  const int64_t K = shape.components, p = basis.size(1), G = tensors[0].size(0), M = tensors[6].size(1);
  const auto type = basis.scalar_type();
  check(tensors[0], {G, p}, type, "neighbors: centers");
  check(tensors[1], {G}, type, "neighbors: center_halves");
  check(tensors[2], {G + 1}, at::kInt, "neighbors: starts");
  check(tensors[3], {K}, at::kInt, "neighbors: members");
  check(tensors[4], {K, p}, type, "neighbors: means");
  check(tensors[5], {K}, type, "neighbors: mean_halves");
  check(tensors[6], {K, M}, at::kInt, "neighbors: neighbors");
  check(tensors[7], {K, M}, type, "neighbors: onsets");
  check(tensors[8], {K}, type, "neighbors: horizons");
  return {K, G, data<T>(tensors[0]), data<T>(tensors[1]), data<int32_t>(tensors[2]), data<int32_t>(tensors[3]),
          data<T>(tensors[4]), data<T>(tensors[5]), M, data<int32_t>(tensors[6]), data<T>(tensors[7]),
          data<T>(tensors[8]), threshold};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_screened(
    const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, const Tensor& center,
    const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii, const Tensor& slack,
    const Tensor& lines, const Tensor& line_terms, bool batches_by_lines, const std::vector<Tensor>& neighbors,
    double neighbor_threshold, double exact_slack, double threshold, int64_t slots) {
  const auto shape = shape_of_rows(rows, x.size(1), false);
  check_scan(shape, x, rows, lam);
  TORCH_CHECK_VALUE(slots >= 1, "slots must be at least 1, got ", slots);
  const int64_t N = x.size(0);
  Tensor log_prob = empty({N}, x.options());
  Tensor components = empty({N, slots}, x.options().dtype(at::kInt));
  Tensor logits = empty({N, slots}, x.options());
  Tensor counts = empty({N}, x.options().dtype(at::kInt));
  Tensor dropped = empty({N}, x.options());
  Tensor evaluated = empty({N}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan_screened", [&] {
    auto screen = screen_of<scalar_t>(shape, x, constants, center, basis, marginal_rows, log_det, radii, slack, lines,
                                      line_terms, exact_slack);
    if (!batches_by_lines && N > mfa::kFewScreened) screen.lines = nullptr;
    const mfa::Selection<scalar_t> out{data<scalar_t>(log_prob), data<int32_t>(components), data<scalar_t>(logits),
                                       data<int32_t>(counts)};
    auto run = [&](auto&& scan, auto&&... tables) {
      scan(shape, screen, tables..., data<scalar_t>(x), N, data<scalar_t>(rows), data<scalar_t>(constants),
           data<scalar_t>(lam), static_cast<scalar_t>(threshold), slots, out, data<scalar_t>(dropped),
           data<int32_t>(evaluated), at::get_num_threads(), parallel_for);
    };
    if (neighbors.empty())
      run([](auto&&... all) { mfa::scan_screened<scalar_t>(all...); });
    else
      run([](auto&&... all) { mfa::scan_near<scalar_t>(all...); },
          near_of<scalar_t>(shape, basis, neighbors, neighbor_threshold));
  });
  return {log_prob, components, logits, counts, dropped, evaluated};
}

Tensor screen_bounds(const Tensor& x, const Tensor& constants, const Tensor& lam, const Tensor& center,
                     const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii,
                     const Tensor& slack, const Tensor& lines, const Tensor& line_terms, bool by_lines) {
  const mfa::Shape shape{constants.size(0), x.size(1), marginal_rows.size(2) - 1, false};
  check(x, {x.size(0), shape.features}, x.scalar_type(), "x");
  check(lam, {shape.features}, x.scalar_type(), "scale");
  Tensor out = allocate({x.size(0), shape.components}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "screen_bounds", [&] {
    const auto screen =
        screen_of<scalar_t>(shape, x, constants, center, basis, marginal_rows, log_det, radii, slack, lines, line_terms,
                            0);
    TORCH_CHECK_VALUE(!by_lines || screen.lines, "by_lines needs a screen that has lines");
    mfa::bounds<scalar_t>(shape, screen, data<scalar_t>(x), x.size(0), data<scalar_t>(lam), by_lines,
                          data<scalar_t>(out), at::get_num_threads(), parallel_for);
  });
  return out;
}

}  // namespace binding
