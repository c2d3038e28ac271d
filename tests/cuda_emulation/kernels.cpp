// The launches of csrc/cuda on the CPU, for ctypes. `chip` is {processors, shared bytes per block, per processor}.
#include "cuda_on_cpu.h"

#include "woodbury.cuh"
#include "few_tokens.cuh"
#include "finish.cuh"

using namespace mfa::gpu;

extern "C" {

void emulate_descending(int descending) { emulation::descending_order = descending; }

int emulate_woodbury(const int* chip, const float* means, const float* loadings, const float* noise, float* rows,
                    float* cholesky, float* log_det, int components, int features, int rank, int per_component) {
  const WoodburyArguments a{means,   loadings,   noise,    rows, cholesky,           log_det,
                           components, features, rank, per_component != 0, 0};
  return woodbury(a, {chip[0], chip[1], chip[2]}, {});
}

int woodbury_tile_of(const int* chip, int features, int rank) {
  return woodbury_tile({chip[0], chip[1], chip[2]}, features, rank);
}

int emulate_scan(const int* chip, int dtype, const void* x, const float* scale, const float* center,
                 const uint16_t* rows, const float* row_scales, const float* offsets, const double* squares,
                 const float* row_bounds, const float* constants, float* logits, float* bounds, int32_t* arrivals,
                 int tokens, int components, int features, int padded, int rank) {
  const ScanArguments a{x,      scale,  center,   rows,         row_scales, offsets,    squares,  row_bounds, constants,
                        logits, bounds, arrivals, Dtype(dtype), tokens,     components, features, padded,     rank,
                        0,      0};
  return scan_few_tokens(a, {chip[0], chip[1], chip[2]}, {});
}

// plan: group, token_groups, blocks, splits, shared
void scan_plan_of(const int* chip, int tokens, int components, int padded, int rank, int64_t* plan) {
  const ScanPlan p = scan_plan({chip[0], chip[1], chip[2]}, tokens, components, padded, rank);
  const int64_t values[] = {p.group, p.token_groups, p.blocks, p.splits, int64_t(p.shared)};
  std::copy(values, values + 5, plan);
}

int emulate_finish(int dtype, const void* x, const float* scale, const float* rows, const float* constants,
                   const float* logits, const float* bounds, float* exact, int32_t* arrivals, float* log_prob,
                   int32_t* components, float* active_logits, int32_t* counts, int tokens, int count, int features,
                   int rank, int slots, float threshold) {
  const FinishArguments a{x,      scale, rows,     constants,  logits,        bounds, exact,
                          arrivals, log_prob, components, active_logits, counts, Dtype(dtype), tokens,
                          count,  features, rank, slots, threshold};
  return finish_few_tokens(a, {});
}

}  // extern "C"
