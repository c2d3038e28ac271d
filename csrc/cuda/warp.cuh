// Loads in flight, and sums and maxima over a warp or a block, in a fixed order.
//
// The same input gives the same bits.
#pragma once
#include "device.cuh"

namespace mfa::gpu {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {  // ignores NaN
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Returns the total, in every lane.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask >>= 1) value = combine(value, __shfl_xor_sync(kFullWarp, value, mask));
  return value;
}

// Returns the total, in every thread. `scratch` holds one T per warp, and may be written again after the next
// __syncthreads().
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine, T* scratch) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = scratch[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) value = combine(value, scratch[w]);
  return value;
}

// Calls use(d, load(d)) for d = first, first + step, ... < end, with U loads on their way together: a plain loop, even
// unrolled, waits for each before it knows whether there is another.
template <int U, class Load, class Use>
__device__ __forceinline__ void strided(int first, int step, int end, const Load& load, const Use& use) {
  for (int base = first; base < end; base += U * step) {
    decltype(load(0)) values[U] = {};
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (base + u * step < end) values[u] = load(base + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (base + u * step < end) use(base + u * step, values[u]);
  }
}

}  // namespace mfa::gpu
