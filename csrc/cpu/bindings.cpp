// The Python module, and the checks that all bindings share.
#include "bindings.h"

#include "int8/rows.h"

#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace binding {

mfa::Shape shape_of(const Tensor& means, int64_t rank, bool per_component) {
  return {means.size(0), means.size(1), rank, per_component};
}

Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // failure does not matter
#endif
  return t;
}

Tensor zeros_like(const Tensor& like) { return allocate(like.sizes(), like.options()).zero_(); }

std::vector<int64_t> noise_sizes(const mfa::Shape& shape) {
  return shape.per_component ? std::vector{shape.components, shape.features} : std::vector{shape.features};
}

int64_t width(const Tensor& like) { return mfa::kVectorBytes / like.element_size(); }

void check(const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_contiguous() && t.device().is_cpu(), name, " must be contiguous and on the CPU");
}

void check_range(const Tensor& index, int64_t low, int64_t high, const char* name) {
  if (index.numel() == 0) return;
  const auto [least, largest] = at::aminmax(index);
  TORCH_CHECK_INDEX(least.item<int64_t>() >= low && largest.item<int64_t>() < high, name, " must be in [", low, ", ",
                    high, "), got values from ", least.item<int64_t>(), " to ", largest.item<int64_t>());
}

mfa::Shape shape_of_rows(const Tensor& rows, int64_t features, bool per_component) {
  return {rows.size(0), features, rows.size(2) - 1 - (per_component ? 1 : 0), per_component};
}

void check_scan(const mfa::Shape& shape, const Tensor& x, const Tensor& rows, const Tensor& lam) {
  const int64_t V = width(x);
  check(x, {x.size(0), shape.features}, x.scalar_type(), "x");
  check(rows, {shape.components, mfa::ceil_div(shape.features, V), shape.row_count(), V}, x.scalar_type(), "rows");
  check(lam, {shape.features}, x.scalar_type(), "scale");
}

}  // namespace binding

using GilReleased = pybind11::call_guard<pybind11::gil_scoped_release>;

// Defines a function of one struct by the types of its fields.
template <class... Fields, class Result, class Struct>
void def_by_fields(pybind11::module_& m, const char* name, Result (*function)(const Struct&)) {
  m.def(name, [function](const Fields&... fields) { return function({fields...}); }, GilReleased());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using T = at::Tensor;
  using Maybe = std::optional<T>;
  m.attr("vector_bytes") = mfa::kVectorBytes;
  m.attr("multiplies_int8") = mfa::kHasDot4;
  m.attr("int8_rate") = mfa::kInt8Rate;
  m.attr("int8_offset") = mfa::kTokenOffset;
  m.attr("int8_features") = mfa::kInt8Features;
  m.attr("int8_tokens") = mfa::kInt8Tokens;
  m.def("zeros_like", &binding::zeros_like, GilReleased());
  m.def("woodbury", &binding::woodbury, GilReleased());
  m.def("scan", &binding::scan, GilReleased());
  m.def("int8_rows", &binding::int8_rows, GilReleased());
  def_by_fields<T, T, T, T, T, T, T, T, T, T, bool, double, int64_t, bool>(m, "scan_int8", &binding::scan_int8);
  def_by_fields<T, T, T, T, T, T, T, T, T, T, bool, double, int64_t, bool>(m, "int8_bounds", &binding::int8_bounds);
  def_by_fields<T, T, T, T, T, bool, double, int64_t>(m, "scan_candidates", &binding::scan_candidates);
  m.def("top_scores", &binding::top_scores, GilReleased());
  m.def("dense", &binding::dense, GilReleased());
  m.def("latents", &binding::latents, GilReleased());
  m.def("decode", &binding::decode, GilReleased());
  m.def("nearest", &binding::nearest, GilReleased());
  m.def("cluster_sums", &binding::cluster_sums, GilReleased());
  m.def("m_step_gains", &binding::m_step_gains, GilReleased());
  m.def("m_step_traces", &binding::m_step_traces, GilReleased());
  def_by_fields<T, T, T, T, T, bool, T, T, T, T, T, T, T, double, double>(m, "m_step_solve", &binding::m_step_solve);
  def_by_fields<T, T, T, T, T, T, T, bool, Maybe, Maybe, Maybe, Maybe, Maybe>(m, "backward", &binding::backward);
  def_by_fields<T, T, T, T, T, T, bool, T, T, T, T, T, T>(m, "statistics", &binding::statistics);
  def_by_fields<T, T, T, T, T, T, T, T, T, double, double, int64_t>(m, "scan_screened", &binding::scan_screened);
  def_by_fields<T, T, T, T, T, T, T, T>(m, "screen_bounds", &binding::screen_bounds);
  def_by_fields<T, T, T, T, T, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, Maybe, bool, bool>(
      m, "intervene", &binding::intervene);
}
