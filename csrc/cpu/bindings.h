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

// Calls at::empty, whose header alone takes a compiler longer than most of the kernels do.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Asks for huge pages: fresh memory costs a page fault per 4 kB, as much as writing it several times over.
Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options);

// Raises where a tensor is not what a kernel, which reads raw memory, takes it for.
void check(const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const char* name);
void check_range(const Tensor& index, int64_t low, int64_t high, const char* name);
void check_scan(const mfa::Shape& shape, const Tensor& x, const Tensor& rows, const Tensor& lam);

mfa::Shape shape_of(const Tensor& means, int64_t rank, bool per_component);
mfa::Shape shape_of_rows(const Tensor& rows, int64_t features, bool per_component);
std::vector<int64_t> noise_sizes(const mfa::Shape& shape);
int64_t width(const Tensor& like);

// The functions of the Python module. Where arguments are many they are a struct, whose fields Python hands over one by
// one, in their order.
Tensor zeros_like(const Tensor& like);
std::tuple<Tensor, Tensor, Tensor> woodbury(const Tensor& means, const Tensor& loadings, const Tensor& noise);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& rows, const Tensor& constants,
                                                        const Tensor& lam, bool per_component, double threshold,
                                                        int64_t slots, bool keep);

struct ScanCandidates {
  const Tensor &x, &candidates, &rows, &constants, &lam;
  bool per_component;
  double threshold;
  int64_t slots;
};
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_candidates(const ScanCandidates& a);

Tensor top_scores(const Tensor& left, const Tensor& right, const Tensor& offsets, int64_t count,
                  const std::optional<Tensor>& starts, const std::optional<Tensor>& lists);

Tensor dense(const Tensor& x, const Tensor& rows, const Tensor& constants, const Tensor& lam, bool per_component);
Tensor latents(const Tensor& x, const Tensor& tokens, const Tensor& components, const Tensor& rows, const Tensor& chol,
               const Tensor& lam, bool per_component);
Tensor decode(const Tensor& components, const Tensor& responsibilities, const Tensor& latents, const Tensor& means,
              const Tensor& loadings);
std::tuple<Tensor, Tensor, int64_t> nearest(const Tensor& x, const Tensor& centroids, const Tensor& center,
                                            const std::optional<Tensor>& basis, const std::optional<Tensor>& projected,
                                            double slack);
void cluster_sums(const Tensor& x, const Tensor& center, const Tensor& owner, const Tensor& distance,
                  const std::optional<Tensor>& weights, const Tensor& sums, const Tensor& mass, const Tensor& inertia);

struct Backward {
  const Tensor &x, &tokens, &components, &weights, &rows, &chol, &lam;
  bool per_component;
  const std::optional<Tensor> &grad_x, &grad_means, &grad_loadings, &grad_noise, &grad_log_weights;
};
void backward(const Backward& a);

struct Statistics {
  const Tensor &x, &components, &weights, &rows, &chol, &lam;
  bool per_component;
  const Tensor &mass, &shift, &latent, &second, &cross, &squares;
};
void statistics(const Statistics& a);

Tensor m_step_gains(const Tensor& rows, const Tensor& chol, const Tensor& lam, bool per_component);
Tensor m_step_traces(const Tensor& gains, const Tensor& spread, const Tensor& rows, const Tensor& chol,
                     const Tensor& lam, bool per_component);

// Of statistics: the sums of every component, double whatever the dtype of the tokens.
void check_sums(const mfa::Shape& shape, const Tensor& mass, const Tensor& shift, const Tensor& latent,
                const Tensor& second, const Tensor& cross);

struct MStep {
  const Tensor &gains, &spread, &rows, &chol, &lam;
  bool per_component;
  const Tensor& loadings;
  const Tensor &mass, &shift, &latent, &second, &cross, &left;  // the last is added to
  double strength, least;
};
std::tuple<Tensor, Tensor> m_step_solve(const MStep& a);

std::tuple<Tensor, Tensor, Tensor, Tensor> int8_rows(const Tensor& rows, const Tensor& scale8, const Tensor& center,
                                                     bool per_component);

struct ScanInt8 {
  const Tensor &x, &rows, &constants, &lam;
  const Tensor &rows8, &means8, &starts8, &terms8, &scale8, &center;  // of an Int8Rows
  bool per_component;
  double threshold;
  int64_t slots;
  bool keep;
};
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> scan_int8(const ScanInt8& a);
std::tuple<Tensor, Tensor> int8_bounds(const ScanInt8& a);

struct ScanScreened {
  const Tensor &x, &rows, &constants, &lam;
  const Tensor &center, &basis, &bound_rows, &starts, &terms;  // of a Screen
  double exact_slack, threshold;
  int64_t slots;
};
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_screened(const ScanScreened& a);

struct ScreenBounds {
  const Tensor &x, &constants, &lam;
  const Tensor &center, &basis, &bound_rows, &starts, &terms;
};
Tensor screen_bounds(const ScreenBounds& a);

struct Intervene {
  const Tensor &hidden, &coefficients, &shift, &rules, &thresholds;
  const std::optional<Tensor> &latents, &chosen, &passed, &log_prob, &components, &logits, &counts, &rows, &chol, &lam;
  bool per_component, spreads;
};
std::tuple<Tensor, Tensor> intervene(const Intervene& a);

}  // namespace binding
