// Arguments of the kernels, as structs of pointers to contiguous device memory.
//
// They are plain C++, for nvcc, for the host's compiler and for the emulation alike.
#pragma once
#include <cstdint>

namespace mfa::gpu {

constexpr int kMaxRank = 64;
constexpr int kFewTokens = 16;   // the most that one call of the scan for few tokens takes
constexpr int kCandidates = 16;  // components per token that are computed exactly

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

struct WoodburyArguments {
  const float* means;     // [K, D]
  const float* loadings;  // [K, D, R]
  const float* noise;     // [D], or [K, D]
  float* rows;            // [K, R + 1, D]: mu, A; [K, R + 2, D] with lam where the noise is per component
  float* cholesky;        // [K, R, R]
  float* log_det;         // [K]
  int64_t components;
  int features;
  int rank;
  bool per_component;
  int tile;  // set by the launch: features in shared memory at a time, a multiple of 4
};

struct ScanArguments {
  const void* x;              // [N, D]
  const float* scale;         // [D] s
  const float* center;        // [D] c
  const uint16_t* rows;       // [ceil(K / 64), R + 1, 64, D'] fp16, D' = D rounded up to a multiple of 64; zero-padded
  const float* row_scales;    // [3, K'] beta, sigma, (tau); K' = K rounded up to a multiple of 64
  const float* offsets;       // [ceil(K / 64), R, 64] B m / beta
  const double* squares;      // [K] |m|^2
  const float* row_bounds;    // [7, K'] M1, M2, E1, E2, E3, (N1, N2)
  const float* constants;     // [K]
  float* logits;              // [N, K]
  float* bounds;              // [N, K]
  int32_t* arrivals;          // [N], set to zero for finish.cuh
  Dtype dtype;                // of x
  int tokens, components, features, padded, rank;
  int group, splits;          // set by the launch (ScanPlan)
};

struct FinishArguments {
  const void* x;           // [N, D]
  const float* scale;      // [D] lam
  const float* rows;       // [K, R + 1, D] fp32: mu, A
  const float* constants;  // [K]
  const float* logits;     // [N, K], less |y|^2 / 2
  const float* bounds;     // [N, K]
  float* exact;            // [N, kCandidates], between blocks
  int32_t* arrivals;       // [N], zero
  float* log_prob;         // [N]
  int32_t* components;     // [N, slots]
  float* active_logits;    // [N, slots]
  int32_t* counts;         // [N]
  Dtype dtype;             // of x
  int tokens, count, features, rank, slots;  // count is K
  float threshold;                           // T
};

}  // namespace mfa::gpu
