// Binds intervene.h to PyTorch.
#include "intervene.h"

#include "bindings.h"

namespace binding {

// Takes a tensor (B', S, width) for a batch of B rows and T tokens: B' must divide B, and S must be 1 or T.
template <class T>
mfa::PerToken<T> per_token(const std::optional<Tensor>& t, int64_t batch, int64_t tokens, int64_t width,
                           const char* name) {
  if (!t) return {nullptr, 1, 1, width};
  const int64_t rows = t->size(0), steps = t->dim() > 1 ? t->numel() / std::max<int64_t>(1, rows * width) : 1;
  TORCH_CHECK_VALUE(rows >= 1 && batch % rows == 0 && (steps == 1 || steps == tokens) &&
                        t->numel() == rows * steps * width,
                    name, " does not fit a batch of ", batch, " rows of ", tokens, " tokens, got ", t->sizes());
  check(*t, t->sizes(), c10::CppTypeToScalarType<T>::value, name);
  return {t->data_ptr<T>(), rows, steps, width};
}

std::tuple<Tensor, Tensor> intervene(const Intervene& a) {
  const int64_t B = a.hidden.size(0), N = a.hidden.size(1), D = a.hidden.size(2), R = a.chol ? a.chol->size(2) : 0;
  const auto type = a.thresholds.scalar_type();
  const int64_t slots = a.log_prob ? a.components->size(1) : 0;
  check(a.hidden, {B, N, D}, a.hidden.scalar_type(), "hidden");
  if (a.log_prob) {
    check(*a.log_prob, {B * N}, type, "log_prob");
    check(*a.components, {B * N, slots}, at::kInt, "components");
    check(*a.logits, {B * N, slots}, type, "logits");
    check(*a.counts, {B * N}, at::kInt, "counts");
  }
  mfa::Shape shape{0, D, R, a.per_component};
  if (a.rows) {
    TORCH_CHECK_VALUE(a.log_prob, "log_prob and the active components must be given where rows are");
    shape = shape_of_rows(*a.rows, D, a.per_component);
    const int64_t V = width(a.thresholds);
    check(*a.rows, {shape.components, mfa::ceil_div(D, V), shape.row_count(), V}, type, "rows");
    check(*a.chol, {shape.components, R, R}, type, "cholesky");
    check(*a.lam, {D}, type, "scale");
    check_range(*a.components, -1, shape.components, "components");
  }
  Tensor out = empty({B, N, D}, a.hidden.options());
  Tensor tally = empty({B, N, 3}, a.thresholds.options());
  AT_DISPATCH_FLOATING_TYPES(type, "intervene", [&] {
    using T = scalar_t;
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<T>() : nullptr; };
    auto index = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<int32_t>() : nullptr; };
    const mfa::Evidence<T> found{slots,         pointer(a.log_prob), index(a.components), pointer(a.logits),
                                 index(a.counts), pointer(a.rows),     pointer(a.chol),     pointer(a.lam)};
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.hidden.scalar_type(), "intervene", [&] {
      using H = scalar_t;
      using A = std::conditional_t<std::is_same_v<H, double>, double, T>;
      const mfa::Edit<T, A> edit{
          B, N, per_token<A>(a.coefficients, B, N, 3, "coefficients"), per_token<A>(a.shift, B, N, D, "shift"),
          per_token<int32_t>(a.rules, B, 1, 3, "rules"), per_token<T>(a.thresholds, B, 1, 1, "thresholds"),
          per_token<T>(a.latents, B, N, R, "latents"), per_token<bool>(a.chosen, B, N, 1, "chosen"),
          per_token<bool>(a.passed, B, N, 1, "passed"), a.spreads};
      mfa::intervene<H, T, A>(shape, edit, found, data<H>(a.hidden), data<H>(out), data<T>(tally), parallel_for);
    });
  });
  return {out, tally};
}

}  // namespace binding
