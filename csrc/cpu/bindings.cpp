// Torch tensors in, raw pointers out: the only file here that knows Torch. Shapes are checked by the Python callers.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "factors.h"
#include "pairs.h"
#include "scan.h"

namespace binding {

using at::Tensor;

template <class Body>
void parallel(int64_t count, const Body& body) {
  at::parallel_for(0, count, 1, body);
}
constexpr auto parallel_for = [](int64_t count, auto&& body) { parallel(count, body); };

mfa::Shape shape_of(const Tensor& means, int64_t rank, bool per_component) {
  return {means.size(0), means.size(1), rank, per_component};
}

template <class T>
T* data(const Tensor& t) {
  return t.defined() ? t.data_ptr<T>() : nullptr;
}

// Fresh memory costs a page fault per 4 kB, as much as writing it several times over: ask for huge pages.
Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may not be taken
#endif
  return t;
}

Tensor zeros_like(const Tensor& like) { return allocate(like.sizes(), like.options()).zero_(); }

int64_t width(const Tensor& like) { return mfa::kVectorBytes / like.element_size(); }

std::tuple<Tensor, Tensor, Tensor> factors(const Tensor& means, const Tensor& loadings, const Tensor& noise,
                                           const Tensor& center) {
  const auto shape = shape_of(means, loadings.size(2), noise.dim() == 2);
  const int64_t V = width(means);
  Tensor rows = allocate({shape.components, mfa::ceil_div(shape.features, V), shape.row_count(), V}, means.options());
  Tensor chol = at::empty({shape.components, shape.rank, shape.rank}, means.options());
  Tensor log_det = at::empty({shape.components}, means.options());
  AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "factors", [&] {
    mfa::factors<scalar_t>(shape, data<scalar_t>(means), data<scalar_t>(loadings), data<scalar_t>(noise),
                           data<scalar_t>(center), data<scalar_t>(rows), data<scalar_t>(chol),
                           data<scalar_t>(log_det), parallel_for);
  });
  return {rows, chol, log_det};
}

mfa::Shape shape_of_rows(const Tensor& rows, int64_t features, bool per_component) {
  return {rows.size(0), features, rows.size(2) - 1 - (per_component ? 1 : 0), per_component};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                  const Tensor& lam, const Tensor& center, bool per_component,
                                                  double threshold, int64_t slots) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  const int64_t N = x.size(0);
  Tensor log_prob = at::empty({N}, x.options());
  Tensor components = at::empty({N, slots}, x.options().dtype(at::kInt));
  Tensor logits = at::empty({N, slots}, x.options());
  Tensor counts = at::empty({N}, x.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "select", [&] {
    mfa::select<scalar_t>(shape, data<scalar_t>(x), N, data<scalar_t>(rows), data<scalar_t>(constants),
                          data<scalar_t>(lam), data<scalar_t>(center), static_cast<scalar_t>(threshold), slots,
                          data<scalar_t>(log_prob), data<int32_t>(components), data<scalar_t>(logits),
                          data<int32_t>(counts), at::get_num_threads(), parallel_for);
  });
  return {log_prob, components, logits, counts};
}

Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, const Tensor& center,
             bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  Tensor out = allocate({shape.components, x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "dense", [&] {
    mfa::dense<scalar_t>(shape, data<scalar_t>(x), x.size(0), data<scalar_t>(rows), data<scalar_t>(constants),
                         data<scalar_t>(lam), data<scalar_t>(center), data<scalar_t>(out), at::get_num_threads(),
                         parallel_for);
  });
  return out;
}

Tensor latents(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& rows, const Tensor& chol,
               const Tensor& lam, const Tensor& center, bool per_component) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  Tensor out = at::empty({tokens.size(0), shape.rank}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "latents", [&] {
    mfa::latents<scalar_t>(shape, data<scalar_t>(x), data<int64_t>(tokens), data<int32_t>(components), tokens.size(0),
                           data<scalar_t>(rows), data<scalar_t>(chol), data<scalar_t>(lam), data<scalar_t>(center),
                           data<scalar_t>(out), parallel_for);
  });
  return out;
}

// Adds to the tensors given; an undefined one (None) is not computed.
void backward(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& weights,
              const Tensor& rows, const Tensor& chol, const Tensor& lam, const Tensor& center, bool per_component,
              const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_means,
              const std::optional<Tensor>& grad_loadings, const std::optional<Tensor>& grad_noise,
              const std::optional<Tensor>& grad_log_weights) {
  const auto shape = shape_of_rows(rows, x.size(1), per_component);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "backward", [&] {
    auto pointer = [](const std::optional<Tensor>& t) { return t ? t->data_ptr<scalar_t>() : nullptr; };
    const mfa::Gradients<scalar_t> grad{pointer(grad_x), pointer(grad_means), pointer(grad_loadings),
                                        pointer(grad_noise), pointer(grad_log_weights)};
    mfa::backward<scalar_t>(shape, data<scalar_t>(x), data<int64_t>(tokens), data<int32_t>(components),
                            data<scalar_t>(weights), tokens.size(0), data<scalar_t>(rows), data<scalar_t>(chol),
                            data<scalar_t>(lam), data<scalar_t>(center), grad, parallel_for);
  });
}

Tensor decode(const Tensor& components, const Tensor& responsibilities, const Tensor& latents, const Tensor& means,
              const Tensor& loadings) {
  const auto shape = shape_of(means, loadings.size(2), false);
  Tensor out = at::empty({components.size(0), shape.features}, means.options());
  AT_DISPATCH_FLOATING_TYPES(means.scalar_type(), "decode", [&] {
    mfa::decode<scalar_t>(shape, data<int32_t>(components), data<scalar_t>(responsibilities), data<scalar_t>(latents),
                          components.size(0), components.size(1), data<scalar_t>(means), data<scalar_t>(loadings),
                          data<scalar_t>(out), parallel_for);
  });
  return out;
}

}  // namespace binding

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("vector_bytes") = mfa::kVectorBytes;
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("zeros_like", &binding::zeros_like, no_gil);
  m.def("factors", &binding::factors, no_gil);
  m.def("select", &binding::select, no_gil);
  m.def("dense", &binding::dense, no_gil);
  m.def("latents", &binding::latents, no_gil);
  m.def("backward", &binding::backward, no_gil);
  m.def("decode", &binding::decode, no_gil);
}
