// Bindings of the CUDA kernels: the only file here that knows Torch, and one that nvcc does not see.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>

#include "launch.h"

namespace binding {

using at::Tensor;
using namespace mfa::gpu;

// Raises where a tensor is not what a kernel, which reads raw memory, takes it for.
void check(const Tensor& t, at::IntArrayRef sizes, at::ScalarType type, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must have shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device(), name, " must be on the CUDA device ", like.device(),
                    ", got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
}

int small(int64_t value, const char* name) {
  TORCH_CHECK_VALUE(value <= std::numeric_limits<int>::max(), name, " must be below 2^31, got ", value);
  return static_cast<int>(value);
}

int rank_of(int64_t rank) {
  TORCH_CHECK_VALUE(rank <= kMaxRank, "the CUDA kernels take a rank of at most ", kMaxRank, ", got ", rank);
  return static_cast<int>(rank);
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "x must be float32, float16 or bfloat16, got ", x.scalar_type());
  }
}

std::tuple<Tensor, Tensor, Tensor> woodbury(const Tensor& means, const Tensor& loadings, const Tensor& noise) {
  const int64_t K = means.size(0), D = means.size(1), R = loadings.size(2);
  const bool per_component = noise.dim() == 2;
  check(means, {K, D}, at::kFloat, means, "means");
  check(loadings, {K, D, R}, at::kFloat, means, "loadings");
  if (per_component)
    check(noise, {K, D}, at::kFloat, means, "noise_variance");
  else
    check(noise, {D}, at::kFloat, means, "noise_variance");
  const c10::cuda::CUDAGuard guard(means.device());
  Tensor rows = at::empty({K, R + 1 + per_component, D}, means.options());
  Tensor cholesky = at::empty({K, R, R}, means.options());
  Tensor log_det = at::empty({K}, means.options());
  if (K > 0)
    C10_CUDA_CHECK(launch_woodbury({means.data_ptr<float>(), loadings.data_ptr<float>(), noise.data_ptr<float>(),
                                   rows.data_ptr<float>(), cholesky.data_ptr<float>(), log_det.data_ptr<float>(),
                                   small(K, "components"), small(D, "features"), rank_of(R), per_component, 0},
                                  c10::cuda::getCurrentCUDAStream()));
  return {rows, cholesky, log_det};
}

// logits [N, K] (less |y|^2 / 2), bounds [N, K], and arrivals [N], zeroed by the kernel.
std::tuple<Tensor, Tensor, Tensor> scan(const Tensor& x, const Tensor& scale, const Tensor& center,
                                        const Tensor& scan_rows, const Tensor& scan_scales, const Tensor& offsets,
                                        const Tensor& squares, const Tensor& bounds, const Tensor& constants) {
  const int64_t N = x.size(0), D = x.size(1), K = constants.size(0), R = offsets.size(1);
  const int64_t tiles = (K + 63) / 64, padded = (D + 63) / 64 * 64;
  TORCH_CHECK_VALUE(N <= kFewTokens, "x must hold at most ", kFewTokens, " tokens, got ", N);
  check(x, {N, D}, x.scalar_type(), x, "x");
  check(scale, {D}, at::kFloat, x, "scale");
  check(center, {D}, at::kFloat, x, "center");
  check(scan_rows, {tiles, R + 1, 64, padded}, at::kHalf, x, "scan_rows");
  check(scan_scales, {3, tiles * 64}, at::kFloat, x, "scan_scales");
  check(offsets, {tiles, R, 64}, at::kFloat, x, "offsets");
  check(squares, {K}, at::kDouble, x, "squares");
  check(bounds, {7, tiles * 64}, at::kFloat, x, "bounds");
  check(constants, {K}, at::kFloat, x, "constants");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(scan_rows.data_ptr()) % 16 == 0,
                    "scan_rows must be aligned to 16 bytes");
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor logits = at::empty({N, K}, constants.options());
  Tensor errors = at::empty({N, K}, constants.options());
  Tensor arrivals = at::empty({N}, constants.options().dtype(at::kInt));
  if (N > 0 && K > 0)
    C10_CUDA_CHECK(launch_scan(
        {x.data_ptr(), scale.data_ptr<float>(), center.data_ptr<float>(),
         static_cast<const uint16_t*>(scan_rows.data_ptr()), scan_scales.data_ptr<float>(), offsets.data_ptr<float>(),
         squares.data_ptr<double>(), bounds.data_ptr<float>(), constants.data_ptr<float>(), logits.data_ptr<float>(),
         errors.data_ptr<float>(), arrivals.data_ptr<int32_t>(), dtype_of(x), static_cast<int>(N),
         small(K, "components"), small(D, "features"), small(padded, "features"), rank_of(R), 0, 0},
        c10::cuda::getCurrentCUDAStream()));
  return {logits, errors, arrivals};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> few_tokens(
    const Tensor& x, const Tensor& rows, const Tensor& scale, const Tensor& center, const Tensor& scan_rows,
    const Tensor& scan_scales, const Tensor& offsets, const Tensor& squares, const Tensor& bounds,
    const Tensor& constants, double threshold, int64_t slots) {
  const int64_t N = x.size(0), D = x.size(1), K = constants.size(0), R = offsets.size(1);
  check(rows, {K, R + 1, D}, at::kFloat, x, "rows");
  TORCH_CHECK_VALUE(slots >= 1 && slots <= kCandidates, "slots must be in 1..", kCandidates, ", got ", slots);
  auto [logits, errors, arrivals] =
      scan(x, scale, center, scan_rows, scan_scales, offsets, squares, bounds, constants);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor exact = at::empty({N, kCandidates}, constants.options());
  Tensor log_prob = at::empty({N}, constants.options());
  Tensor components = at::empty({N, slots}, arrivals.options());
  Tensor active = at::empty({N, slots}, constants.options());
  Tensor counts = at::empty({N}, arrivals.options());
  if (N > 0 && K > 0)
    C10_CUDA_CHECK(launch_finish(
        {x.data_ptr(), scale.data_ptr<float>(), rows.data_ptr<float>(), constants.data_ptr<float>(),
         logits.data_ptr<float>(), errors.data_ptr<float>(), exact.data_ptr<float>(), arrivals.data_ptr<int32_t>(),
         log_prob.data_ptr<float>(), components.data_ptr<int32_t>(), active.data_ptr<float>(),
         counts.data_ptr<int32_t>(), dtype_of(x), static_cast<int>(N), static_cast<int>(K), static_cast<int>(D),
         static_cast<int>(R), static_cast<int>(slots), static_cast<float>(threshold)},
        c10::cuda::getCurrentCUDAStream()));
  return {log_prob, components, active, counts};
}

}  // namespace binding

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("max_rank") = mfa::gpu::kMaxRank;
  m.attr("max_tokens") = mfa::gpu::kFewTokens;
  m.attr("max_slots") = mfa::gpu::kCandidates;
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("woodbury", &binding::woodbury, no_gil);
  m.def("scan", &binding::scan, no_gil);
  m.def("few_tokens", &binding::few_tokens, no_gil);
}
