// Binds int8_scan.h to PyTorch.
#include "int8_scan.h"

#include "../scan_bindings.h"

namespace binding {

namespace {

mfa::Int8Rows rows_of(const mfa::Shape& shape, const Tensor& rows8, const Tensor& means8, const Tensor& starts8,
                      const Tensor& terms8, const Tensor& scale8, const Tensor& center) {
  mfa::Int8Rows of{shape,
                   data<int8_t>(rows8),
                   data<float>(means8),
                   data<int32_t>(starts8),
                   data<float>(terms8),
                   data<float>(scale8),
                   data<float>(center)};
  check(rows8, {shape.components, of.padded() / 4, shape.rank, 4}, at::kChar, "rows8");
  check(means8, {shape.components, of.mean_rows(), of.padded()}, at::kFloat, "means8");
  check(starts8, {shape.components, shape.rank}, at::kInt, "starts8");
  check(terms8, {shape.components, of.term_count()}, at::kFloat, "terms8");
  check(scale8, {shape.features}, at::kFloat, "scale8");
  check(center, {shape.features}, at::kFloat, "center");
  return of;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> int8_rows(const Tensor& rows, const Tensor& scale8, const Tensor& center,
                                                     bool per_component) {
  const auto shape = shape_of_rows(rows, scale8.size(0), per_component);
  TORCH_CHECK_VALUE(shape.features <= mfa::kInt8Features, "int8_rows: D must be at most ", mfa::kInt8Features, ", got ",
                    shape.features);
  check(rows, {shape.components, shape.blocks<float>(), shape.row_count(), mfa::kWidth<float>}, at::kFloat, "rows");
  mfa::Int8Rows sizes{shape};
  const auto floats = rows.options();
  const Tensor rows8 = allocate({shape.components, sizes.padded() / 4, shape.rank, 4}, floats.dtype(at::kChar));
  const Tensor means8 = allocate({shape.components, sizes.mean_rows(), sizes.padded()}, floats);
  const Tensor starts8 = empty({shape.components, shape.rank}, floats.dtype(at::kInt));
  const Tensor terms8 = empty({shape.components, sizes.term_count()}, floats);
  mfa::quantise(rows_of(shape, rows8, means8, starts8, terms8, scale8, center), data<float>(rows), parallel_for);
  return {rows8, means8, starts8, terms8};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> scan_int8(const ScanInt8& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), a.per_component);
  const ActiveTensors out(a.x, a.slots);
  const auto rows = rows_of(shape, a.rows8, a.means8, a.starts8, a.terms8, a.scale8, a.center);
  AllLogits all(a.x, shape.components, a.keep);
  const int64_t whole = mfa::scan_int8(scan_input<float>(shape, a.x, a.rows, a.constants, a.lam), rows,
                                       out.pairs<float>(a.threshold), [&] { return all.room<float>(); }, parallel_for);
  return {out.log_prob, out.components, out.logits, out.counts, all.logits, whole};
}

std::tuple<Tensor, Tensor> int8_bounds(const ScanInt8& a) {
  const auto shape = shape_of_rows(a.rows, a.x.size(1), a.per_component);
  const auto rows = rows_of(shape, a.rows8, a.means8, a.starts8, a.terms8, a.scale8, a.center);
  const Tensor low = allocate({shape.components, a.x.size(0)}, a.x.options());
  const Tensor high = allocate({shape.components, a.x.size(0)}, a.x.options());
  mfa::int8_bounds(scan_input<float>(shape, a.x, a.rows, a.constants, a.lam), rows, data<float>(low), data<float>(high),
                   parallel_for);
  return {low, high};
}

}  // namespace binding
