// Binds screened_scan.h to PyTorch.
#include "screened_scan.h"

#include "../scan_bindings.h"

namespace binding {

namespace {

// Takes the tensors of a Screen from the arguments of a function.
template <class Arguments>
mfa::Screen screen_of(const mfa::Shape& shape, const Arguments& a, double exact_slack) {
  const int64_t p = a.basis.size(1);
  const mfa::Screen screen{shape, p, data<float>(a.basis), data<int8_t>(a.bound_rows), data<int32_t>(a.starts),
                           data<float>(a.terms), static_cast<float>(exact_slack)};
  check(a.basis, {shape.features, p}, at::kFloat, "basis");
  TORCH_CHECK_VALUE(p >= 16 && p % 16 == 0, "basis must have a multiple of 16 columns, got ", p);
  TORCH_CHECK_VALUE(shape.features <= mfa::kInt8Features, "D must be at most ", mfa::kInt8Features, ", got ",
                    shape.features);
  check(a.bound_rows, {shape.components, screen.blocks(), mfa::kScreenBlock}, at::kChar, "bound_rows");
  check(a.starts, {shape.components, shape.rank + 1}, at::kInt, "starts");
  check(a.terms, {shape.components, screen.term_count()}, at::kFloat, "terms");
  check(a.center, {shape.features}, a.x.scalar_type(), "center");
  return screen;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_screened(const ScanScreened& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), false);
  const ActiveTensors found(a.x, a.slots);
  const Tensor dropped = empty({a.x.size(0)}, a.x.options());
  const Tensor evaluated = empty({a.x.size(0)}, a.x.options().dtype(at::kInt));
  const auto screen = screen_of(shape, a, a.exact_slack);
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "scan_screened", [&] {
    using T = scalar_t;
    const auto in = scan_input<T>(shape, a.x, a.rows, a.constants, a.lam);
    const mfa::ScreenedPairs<T> out{found.pairs<T>(a.threshold), data<T>(dropped), data<int32_t>(evaluated)};
    mfa::scan_screened(in, screen, data<T>(a.center), out, parallel_for);
  });
  return {found.log_prob, found.components, found.logits, found.counts, dropped, evaluated};
}

Tensor screen_bounds(const ScreenBounds& a) {
  const mfa::Shape shape{a.constants.size(0), a.x.size(1), a.starts.size(1) - 1, false};
  check(a.x, {a.x.size(0), shape.features}, a.x.scalar_type(), "x");
  check(a.lam, {shape.features}, a.x.scalar_type(), "scale");
  check(a.constants, {shape.components}, a.x.scalar_type(), "constants");
  Tensor out = allocate({a.x.size(0), shape.components}, a.basis.options());
  const auto screen = screen_of(shape, a, 0);
  AT_DISPATCH_FLOATING_TYPES(a.x.scalar_type(), "screen_bounds", [&] {
    using T = scalar_t;
    const mfa::ScanInput<T> in{shape, data<T>(a.x), a.x.size(0), nullptr, data<T>(a.lam), data<T>(a.constants)};
    mfa::screen_bounds(in, screen, data<T>(a.center), {}, data<float>(out), parallel_for);
  });
  return out;
}

}  // namespace binding
