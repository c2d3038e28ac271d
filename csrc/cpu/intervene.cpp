#include "intervene.h"

#include "bindings.h"

namespace binding {

// Whether a tensor may be given to a batch of B rows and T tokens: (B', S, width) with B' dividing B, S 1 or T.
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

std::tuple<Tensor, Tensor> intervene(const Tensor& hidden, const Tensor& coefficients, const Tensor& shift,
                                     const Tensor& rules, const Tensor& thresholds,
                                     const std::optional<Tensor>& latents, const std::optional<Tensor>& chosen,
                                     const std::optional<Tensor>& passed, const std::optional<Tensor>& log_prob,
                                     const std::optional<Tensor>& components, const std::optional<Tensor>& logits,
                                     const std::optional<Tensor>& counts, const std::optional<Tensor>& rows,
                                     const std::optional<Tensor>& chol, const std::optional<Tensor>& lam,
                                     bool per_component, bool spreads) {
  const int64_t B = hidden.size(0), N = hidden.size(1), D = hidden.size(2), R = chol ? chol->size(2) : 0;
  const auto type = thresholds.scalar_type();
  const int64_t slots = log_prob ? components->size(1) : 0;
  check(hidden, {B, N, D}, hidden.scalar_type(), "hidden");
  if (log_prob) {
    check(*log_prob, {B * N}, type, "log_prob");
    check(*components, {B * N, slots}, at::kInt, "components");
    check(*logits, {B * N, slots}, type, "logits");
    check(*counts, {B * N}, at::kInt, "counts");
  }
  mfa::Shape shape{0, D, R, per_component};
  if (rows) {
    TORCH_CHECK_VALUE(log_prob, "log_prob and the active components must be given where rows are");
    shape = shape_of_rows(*rows, D, per_component);
    const int64_t V = width(thresholds);
    check(*rows, {shape.components, mfa::ceil_div(D, V), shape.row_count(), V}, type, "rows");
    check(*chol, {shape.components, R, R}, type, "cholesky");
    check(*lam, {D}, type, "scale");
    check_range(*components, -1, shape.components, "components");
  }
  Tensor out = empty({B, N, D}, hidden.options());
  Tensor tally = empty({B, N, 3}, thresholds.options());
  AT_DISPATCH_FLOATING_TYPES(type, "intervene", [&] {
    using T = scalar_t;
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<T>() : nullptr; };
    auto index = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<int32_t>() : nullptr; };
    const mfa::Seen<T> seen{slots,         pointer(log_prob), index(components), pointer(logits),
                            index(counts), pointer(rows),     pointer(chol),     pointer(lam)};
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "intervene", [&] {
      using H = scalar_t;
      using A = std::conditional_t<std::is_same_v<H, double>, double, T>;
      const mfa::Edit<T, A> edit{B,
                                 N,
                                 per_token<A>(coefficients, B, N, 3, "coefficients"),
                                 per_token<A>(shift, B, N, D, "shift"),
                                 per_token<int32_t>(rules, B, 1, 3, "rules"),
                                 per_token<T>(thresholds, B, 1, 1, "thresholds"),
                                 per_token<T>(latents, B, N, R, "latents"),
                                 per_token<bool>(chosen, B, N, 1, "chosen"),
                                 per_token<bool>(passed, B, N, 1, "passed"),
                                 spreads};
      mfa::intervene<H, T, A>(shape, edit, seen, data<H>(hidden), data<H>(out), data<T>(tally), parallel_for);
    });
  });
  return {out, tally};
}

}  // namespace binding
