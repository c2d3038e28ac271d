// Stage 1 for a few tokens, the end: from logits and their bounds to log p(x) and the active pairs.
//
// Symbols   best = max_k (logit - bound); a candidate has logit + bound >= best - T; no other component is active.
//           v = (x - mu_k) lam,  t = A_k v,  logit_k = constant_k - (|v|^2 - |t|^2) / 2 in float32, from differences.
// Blocks    (candidate, token): each finds its token's candidates (one read of 2 K values) and computes one of them.
//           The last block of a token to arrive sorts and sums; its results depend on the values alone.
// Undecided more than 16 candidates: counts = -1, and the caller treats that token densely.
// Never materialised: v and t outside a block.
// Measured: not yet on a GPU. Checked by tests/ops/common/test_cuda.py.
#pragma once
#include "element.cuh"
#include "warp.cuh"

namespace mfa::gpu {

constexpr int kFinishThreads = 512;

// The fixed part of a block's shared memory; v [D] follows: first x, then v.
struct FinishState {
  float scratch[kFinishThreads / kWarp];
  float t[kMaxRank];
  float logits[kCandidates];
  int32_t found[kCandidates], candidates[kCandidates];  // as they came; by component
  int32_t counter;
  bool last;
};

__host__ __device__ constexpr size_t finish_shared(int features) {
  return (sizeof(FinishState) + 15) / 16 * 16 + size_t(features) * sizeof(float);
}

// a . v over a warp, in every lane.
__device__ inline float warp_dot(const float* a, const float* v, int features) {
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  if (features % 4 == 0) {
    const float4* a4 = reinterpret_cast<const float4*>(a);
    const float4* v4 = reinterpret_cast<const float4*>(v);
    float sums[4] = {};
    strided<8>(lane, kWarp, features / 4, [&](int d) { return a4[d]; }, [&](int d, const float4& p) {
      const float4 q = v4[d];
      sums[0] += p.x * q.x, sums[1] += p.y * q.y, sums[2] += p.z * q.z, sums[3] += p.w * q.w;
    });
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  } else {
    strided<8>(lane, kWarp, features, [&](int d) { return a[d]; }, [&](int d, float value) { sum += value * v[d]; });
  }
  return warp_reduce(sum, Sum());
}

// The output row of a token without pairs: NaN, and counts = 0; or undecided, counts = -1.
__device__ inline void write_empty(const FinishArguments& a, int64_t n, int32_t count) {
  for (int s = threadIdx.x; s < a.slots; s += blockDim.x) {
    a.components[n * a.slots + s] = -1;
    a.active_logits[n * a.slots + s] = -INFINITY;
  }
  if (threadIdx.x == 0) {
    a.log_prob[n] = NAN;
    a.counts[n] = count;
  }
}

// One warp: `found` logits in state.logits, their components in ascending order in state.candidates.
__device__ inline void write_active(const FinishArguments& a, int64_t n, int found, const FinishState& state) {
  const int lane = threadIdx.x % kWarp;
  float best = -INFINITY;
  bool invalid = false;
  for (int c = 0; c < found; ++c) {
    best = fmaxf(best, state.logits[c]);
    invalid |= isnan(state.logits[c]);
  }
  invalid |= best == -INFINITY;
  int active = 0;
  float sum = 0;
  for (int c = 0; c < found; ++c)
    if (state.logits[c] >= best - a.threshold) {
      ++active;
      sum += expf(state.logits[c] - best);
    }
  if (invalid) {
    if (lane == 0) a.log_prob[n] = NAN, a.counts[n] = 0;
    active = 0;
  } else if (lane == 0) {
    a.log_prob[n] = best + logf(sum);
    a.counts[n] = active > a.slots ? a.slots + 1 : active;
  }
  for (int s = active + lane; s < a.slots; s += kWarp) {
    a.components[n * a.slots + s] = -1;
    a.active_logits[n * a.slots + s] = -INFINITY;
  }
  if (active == 0 || lane >= found || !(state.logits[lane] >= best - a.threshold)) return;
  int rank = 0;
  for (int c = 0; c < found; ++c)
    rank += state.logits[c] > state.logits[lane] || (state.logits[c] == state.logits[lane] && c < lane);
  if (rank < a.slots) {
    a.components[n * a.slots + rank] = state.candidates[lane];
    a.active_logits[n * a.slots + rank] = state.logits[lane];
  }
}

__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const FinishArguments a) {
  MFA_SHARED_MEMORY(shared);
  FinishState& state = *reinterpret_cast<FinishState*>(shared);
  float* v = reinterpret_cast<float*>(shared + finish_shared(0));
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int mine = blockIdx.x;
  const int64_t n = blockIdx.y;
  const float* logits = a.logits + n * a.count;
  const float* bounds = a.bounds + n * a.count;

  bool broken = false;
  with_elements(a.x, a.dtype, [&](const auto& x) {
    strided<8>(thread, kFinishThreads, a.features, [&](int d) { return x(n * a.features + d); },
               [&](int d, float value) {
                 v[d] = value;
                 broken |= !isfinite(value);
               });
  });
  if (__syncthreads_or(broken)) {
    if (mine == 0) write_empty(a, n, 0);
    return;
  }

  float best = -INFINITY;
  strided<8>(thread, kFinishThreads, a.count, [&](int k) { return logits[k] - bounds[k]; },
             [&](int, float lower) { best = fmaxf(best, lower); });
  if (thread == 0) state.counter = 0;
  best = block_reduce(best, Max(), state.scratch);
  strided<8>(thread, kFinishThreads, a.count, [&](int k) { return logits[k] + bounds[k]; }, [&](int k, float upper) {
    // A logit that overflowed counts as possible: the exact one decides.
    if (!(upper < best - a.threshold)) {
      const int at = atomicAdd(&state.counter, 1);
      if (at < kCandidates) state.found[at] = k;
    }
  });
  __syncthreads();
  const int found = state.counter;
  if (found > kCandidates) {
    if (mine == 0) write_empty(a, n, -1);
    return;
  }
  if (mine >= found) return;
  // By component: the order in which threads arrived is not one to rely on.
  if (thread < found) {
    int rank = 0;
    for (int c = 0; c < found; ++c) rank += state.found[c] < state.found[thread];
    state.candidates[rank] = state.found[thread];
  }
  __syncthreads();

  const int64_t k = state.candidates[mine];
  const float* rows = a.rows + k * (a.rank + 1) * a.features;
  float length = 0;
  strided<8>(thread, kFinishThreads, a.features, [&](int d) { return (v[d] - rows[d]) * a.scale[d]; },
             [&](int d, float value) {
               v[d] = value;
               length += value * value;
             });
  length = block_reduce(length, Sum(), state.scratch);
  for (int r = warp; r < a.rank; r += kFinishThreads / kWarp) {
    const float t = warp_dot(rows + int64_t(1 + r) * a.features, v, a.features);
    if (lane == 0) state.t[r] = t;
  }
  __syncthreads();
  if (thread == 0) {
    float explained = 0;
    for (int r = 0; r < a.rank; ++r) explained += state.t[r] * state.t[r];
    a.exact[n * kCandidates + mine] = a.constants[k] - 0.5f * (length - explained);
    __threadfence();
    state.last = atomicAdd(a.arrivals + n, 1) == found - 1;
    __threadfence();
  }
  __syncthreads();
  if (!state.last || warp > 0) return;
  if (lane < found) state.logits[lane] = load_shared_between_blocks(a.exact + n * kCandidates + lane);
  __syncwarp();
  write_active(a, n, found, state);
}

inline Status finish_few_tokens(const FinishArguments& a, Stream stream) {
  const dim3 grid(kCandidates, unsigned(a.tokens));
  return launch(finish_kernel, grid, kFinishThreads, finish_shared(a.features), stream, a);
}

}  // namespace mfa::gpu
