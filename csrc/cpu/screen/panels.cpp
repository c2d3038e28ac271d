// Binds panels.h and neighbor_scan.h to PyTorch.
#include "neighbor_scan.h"

#include "../scan_bindings.h"

namespace binding {

// The fields of a Screen (mfa_kernels/ops/screen/types.py).
struct ScreenTensors {
  const Tensor &center, &basis, &marginal_rows, &log_det, &radii, &slack, &lines, &line_terms;

  template <class T>
  mfa::Screen<T> screen(const mfa::Shape& shape, const Tensor& constants, double exact_slack) const {
    const auto type = constants.scalar_type();
    const int64_t K = shape.components, p = basis.size(1), V = width(constants);
    check(basis, {shape.features, p}, type, "basis");
    TORCH_CHECK_VALUE(p >= 1 && p % V == 0 && p % 8 == 0, "basis must have a multiple of ", std::max<int64_t>(V, 8),
                      " columns, got ", p);
    check(center, {shape.features}, type, "center");
    check(marginal_rows, {K, p / V, shape.row_count(), V}, type, "marginal_rows");
    check(log_det, {K}, type, "log_det");
    check(radii, {K}, type, "radii");
    check(slack, {K}, type, "slack");
    const bool with_lines = lines.size(0) > 0;
    if (with_lines) check(lines, {K, p}, type, "lines");
    check(line_terms, {2, with_lines ? K : 0}, type, "line_terms");
    const T* terms = with_lines ? data<T>(line_terms) : nullptr;
    return {{K, p, shape.rank, false}, shape.features, data<T>(basis), data<T>(center), data<T>(marginal_rows),
            data<T>(constants), data<T>(log_det), data<T>(radii), data<T>(slack), with_lines ? data<T>(lines) : nullptr,
            terms, with_lines ? terms + K : nullptr, static_cast<T>(exact_slack)};
  }
};

// Takes the tensors of a Neighbors (mfa_kernels/ops/screen/neighbors.py).
template <class T>
mfa::NeighborLists<T> lists_of(int64_t K, int64_t p, const std::vector<Tensor>& tensors, double threshold) {
  TORCH_CHECK_VALUE(tensors.size() == 9, "neighbors must be 9 tensors, got ", tensors.size());
  TORCH_CHECK_VALUE(tensors[0].dim() == 2 && tensors[6].dim() == 2, "neighbors: centers and neighbors must be matrices");
  const int64_t G = tensors[0].size(0), M = tensors[6].size(1);
  const auto type = c10::CppTypeToScalarType<T>::value;
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
  const ScreenTensors tensors{center, basis, marginal_rows, log_det, radii, slack, lines, line_terms};
  const ActiveTensors found(x, slots);
  const Tensor dropped = empty({x.size(0)}, x.options());
  const Tensor evaluated = empty({x.size(0)}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "scan_screened", [&] {
    using T = scalar_t;
    const auto in = scan_input<T>(shape, x, rows, constants, lam);
    auto screen = tensors.screen<T>(shape, constants, exact_slack);
    if (!batches_by_lines && in.tokens > mfa::kFewScreened) screen.lines = nullptr;
    const mfa::ScreenedPairs<T> out{found.pairs<T>(threshold), data<T>(dropped), data<int32_t>(evaluated)};
    if (neighbors.empty()) return mfa::scan_screened(in, screen, out, parallel_for);
    const auto lists = lists_of<T>(shape.components, screen.coordinates(), neighbors, neighbor_threshold);
    mfa::scan_by_neighbors(in, screen, lists, out, parallel_for);
  });
  return {found.log_prob, found.components, found.logits, found.counts, dropped, evaluated};
}

Tensor screen_bounds(const Tensor& x, const Tensor& constants, const Tensor& lam, const Tensor& center,
                     const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii,
                     const Tensor& slack, const Tensor& lines, const Tensor& line_terms, bool by_lines) {
  const mfa::Shape shape{constants.size(0), x.size(1), marginal_rows.size(2) - 1, false};
  const ScreenTensors tensors{center, basis, marginal_rows, log_det, radii, slack, lines, line_terms};
  check(x, {x.size(0), shape.features}, x.scalar_type(), "x");
  check(lam, {shape.features}, x.scalar_type(), "scale");
  check(constants, {shape.components}, x.scalar_type(), "constants");
  Tensor out = allocate({x.size(0), shape.components}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "screen_bounds", [&] {
    using T = scalar_t;
    const auto screen = tensors.screen<T>(shape, constants, 0);
    TORCH_CHECK_VALUE(!by_lines || screen.lines, "by_lines needs a screen that has lines");
    const mfa::ScanInput<T> in{shape, data<T>(x), x.size(0), nullptr, data<T>(lam), data<T>(constants)};
    mfa::bounds(in, screen, by_lines, data<T>(out), parallel_for);
  });
  return out;
}

}  // namespace binding
