// Binds panels.h and neighbor_scan.h to PyTorch.
#include "neighbor_scan.h"

#include "../scan_bindings.h"

namespace binding {

// Takes the tensors of a Screen from the arguments of a function.
template <class T, class Arguments>
mfa::Screen<T> screen_of(const mfa::Shape& shape, const Arguments& a, double exact_slack) {
  const auto type = a.constants.scalar_type();
  const int64_t K = shape.components, p = a.basis.size(1), V = width(a.constants);
  check(a.basis, {shape.features, p}, type, "basis");
  TORCH_CHECK_VALUE(p >= 1 && p % V == 0 && p % 8 == 0, "basis must have a multiple of ", std::max<int64_t>(V, 8),
                    " columns, got ", p);
  check(a.center, {shape.features}, type, "center");
  check(a.marginal_rows, {K, p / V, shape.row_count(), V}, type, "marginal_rows");
  check(a.log_det, {K}, type, "log_det");
  check(a.radii, {K}, type, "radii");
  check(a.slack, {K}, type, "slack");
  const bool with_lines = a.lines.size(0) > 0;
  if (with_lines) check(a.lines, {K, p}, type, "lines");
  check(a.line_terms, {2, with_lines ? K : 0}, type, "line_terms");
  const T* terms = with_lines ? data<T>(a.line_terms) : nullptr;
  return {{K, p, shape.rank, false}, shape.features, data<T>(a.basis), data<T>(a.center), data<T>(a.marginal_rows),
          data<T>(a.constants), data<T>(a.log_det), data<T>(a.radii), data<T>(a.slack),
          with_lines ? data<T>(a.lines) : nullptr, terms, with_lines ? terms + K : nullptr,
          static_cast<T>(exact_slack)};
}

// Takes the tensors of a Neighbors (mfa_kernels/ops/screen/neighbors.py).
template <class T>
mfa::NeighborLists<T> lists_of(int64_t K, int64_t p, const std::vector<Tensor>& tensors, double threshold) {
  TORCH_CHECK_VALUE(tensors.size() == 9, "neighbors must be 9 tensors, got ", tensors.size());
  TORCH_CHECK_VALUE(tensors[0].dim() == 2 && tensors[6].dim() == 2,
                    "neighbors: centers and neighbors must be matrices");
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_screened(const ScanScreened& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), false);
  const ActiveTensors found(a.x, a.slots);
  const Tensor dropped = empty({a.x.size(0)}, a.x.options());
  const Tensor evaluated = empty({a.x.size(0)}, a.x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "scan_screened", [&] {
    using T = scalar_t;
    const auto in = scan_input<T>(shape, a.x, a.rows, a.constants, a.lam);
    auto screen = screen_of<T>(shape, a, a.exact_slack);
    if (!a.batches_by_lines && in.tokens > mfa::kFewScreened) screen.lines = nullptr;
    const mfa::ScreenedPairs<T> out{found.pairs<T>(a.threshold), data<T>(dropped), data<int32_t>(evaluated)};
    if (a.neighbors.empty()) return mfa::scan_screened(in, screen, out, parallel_for);
    const auto lists = lists_of<T>(shape.components, screen.coordinates(), a.neighbors, a.neighbor_threshold);
    mfa::scan_by_neighbors(in, screen, lists, out, parallel_for);
  });
  return {found.log_prob, found.components, found.logits, found.counts, dropped, evaluated};
}

Tensor screen_bounds(const ScreenBounds& a) {
  const mfa::Shape shape{a.constants.size(0), a.x.size(1), a.marginal_rows.size(2) - 1, false};
  check(a.x, {a.x.size(0), shape.features}, a.x.scalar_type(), "x");
  check(a.lam, {shape.features}, a.x.scalar_type(), "scale");
  check(a.constants, {shape.components}, a.x.scalar_type(), "constants");
  Tensor out = allocate({a.x.size(0), shape.components}, a.x.options());
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "screen_bounds", [&] {
    using T = scalar_t;
    const auto screen = screen_of<T>(shape, a, 0);
    TORCH_CHECK_VALUE(!a.by_lines || screen.lines, "by_lines needs a screen that has lines");
    const mfa::ScanInput<T> in{shape, data<T>(a.x), a.x.size(0), nullptr, data<T>(a.lam), data<T>(a.constants)};
    mfa::bounds(in, screen, a.by_lines, data<T>(out), parallel_for);
  });
  return out;
}

}  // namespace binding
