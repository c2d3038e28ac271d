// Bindings of the CPU kernels: Torch tensors in, raw pointers out.
//
// Every stage has a source file, so that they compile side by side. These know Torch, the kernels' headers do not, and
// only bindings.cpp includes pybind11.
#pragma once
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#include <optional>
#include <tuple>
#include <vector>

#include "layout.h"

namespace binding {

using at::Tensor;

// Calls body(begin, end) on parts of [0, count), on PyTorch's threads.
struct ParallelFor {
  static int64_t threads() { return at::get_num_threads(); }
  template <class Body>
  void operator()(int64_t count, const Body& body) const {
#ifdef _OPENMP
    // Clang's OpenMP runtime is another one than PyTorch's, and does not know what torch.set_num_threads said.
    omp_set_num_threads(at::get_num_threads());
#endif
    at::parallel_for(0, count, 1, body);
  }
};
inline constexpr ParallelFor parallel_for;

template <class T>
T* data(const Tensor& t) {
  return t.defined() ? t.data_ptr<T>() : nullptr;
}

// at::empty, whose header alone takes a compiler longer than most of the kernels do.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Fresh memory costs a page fault per 4 kB, as much as writing it several times over: ask for huge pages.
Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options);

// The kernels read raw memory: whatever is handed over must be what they take it for.
void check(const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name);
void check_range(const Tensor& index, int64_t low, int64_t high, const char* name);
void check_scan(const mfa::Shape& shape, const Tensor& x, const Tensor& rows, const Tensor& lam);

mfa::Shape shape_of(const Tensor& means, int64_t rank, bool per_component);
mfa::Shape shape_of_rows(const Tensor& rows, int64_t features, bool per_component);
int64_t width(const Tensor& like);

// What Python calls.
Tensor zeros_like(const Tensor& like);
std::tuple<Tensor, Tensor, Tensor> woodbury(const Tensor& means, const Tensor& loadings, const Tensor& noise);
std::tuple<Tensor, Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                const Tensor& lam, bool per_component, double threshold,
                                                int64_t slots);
Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, bool per_component);
Tensor latents(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& rows, const Tensor& chol,
               const Tensor& lam, bool per_component);
void backward(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& weights,
              const Tensor& rows, const Tensor& chol, const Tensor& lam, bool per_component,
              const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_means,
              const std::optional<Tensor>& grad_loadings, const std::optional<Tensor>& grad_noise,
              const std::optional<Tensor>& grad_log_weights);
Tensor decode(const Tensor& components, const Tensor& responsibilities, const Tensor& latents, const Tensor& means,
              const Tensor& loadings);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> screen_marginals(
    const Tensor& means, const Tensor& loadings, const Tensor& cholesky, const Tensor& center, const Tensor& scale,
    const Tensor& projection, const std::optional<Tensor>& known, bool keep, double rounding, double base, double norm,
    const Tensor& middle, double up);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_screened(
    const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, const Tensor& center,
    const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii, const Tensor& slack,
    const Tensor& lines, const Tensor& line_terms, bool batches_by_lines, const std::vector<Tensor>& neighbors,
    double neighbor_threshold, double exact_slack, double threshold, int64_t slots);
std::tuple<Tensor, Tensor, Tensor> screen_neighbors(const Tensor& means, const Tensor& whitened, const Tensor& cholesky,
                                                    const Tensor& constants, const Tensor& offs, double norm,
                                                    double threshold, int64_t length);
Tensor screen_bounds(const Tensor& x, const Tensor& constants, const Tensor& lam, const Tensor& center,
                     const Tensor& basis, const Tensor& marginal_rows, const Tensor& log_det, const Tensor& radii,
                     const Tensor& slack, const Tensor& lines, const Tensor& line_terms, bool by_lines);
std::tuple<Tensor, Tensor, int64_t> nearest(const Tensor& x, const Tensor& centroids, const Tensor& center,
                                            const std::optional<Tensor>& basis, const std::optional<Tensor>& projected,
                                            double slack);
void cluster_sums(const Tensor& x, const Tensor& center, const Tensor& owner, const Tensor& distance,
                  const std::optional<Tensor>& weights, const Tensor& sums, const Tensor& mass, const Tensor& inertia);
void statistics(const Tensor& x, const Tensor& components, const Tensor& weights, const Tensor& rows,
                const Tensor& chol, const Tensor& lam, bool per_component, const Tensor& mass, const Tensor& shift,
                const Tensor& latent, const Tensor& second, const Tensor& cross, const Tensor& squares);
std::tuple<Tensor, Tensor> intervene(const Tensor& hidden, const Tensor& coefficients, const Tensor& shift,
                                     const Tensor& rules, const Tensor& thresholds,
                                     const std::optional<Tensor>& latents, const std::optional<Tensor>& chosen,
                                     const std::optional<Tensor>& passed, const std::optional<Tensor>& log_prob,
                                     const std::optional<Tensor>& components, const std::optional<Tensor>& logits,
                                     const std::optional<Tensor>& counts, const std::optional<Tensor>& rows,
                                     const std::optional<Tensor>& chol, const std::optional<Tensor>& lam,
                                     bool per_component, bool spreads);

}  // namespace binding
