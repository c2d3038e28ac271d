// PTX and CUDA's runtime: what the kernels need of the device and plain C++ does not have.
//
// tests/cuda_emulation/cuda_on_cpu.h defines the same names for g++, so that the kernels' own sources run on a CPU;
// it takes this include guard. Everything else in the kernel headers is plain C++.
#ifndef MFA_CUDA_DEVICE_CUH
#define MFA_CUDA_DEVICE_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// A block's dynamic shared memory, the only kind in use.
#define MFA_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace mfa::gpu {

// fp16 and bf16 travel as their bits.
__device__ __forceinline__ float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// Loads 16 bytes that this kernel reads once: past the first-level cache, whole lines into the second.
__device__ __forceinline__ uint4 load_streaming(const uint16_t* source) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source));
  return v;
}

// Stores a value that is not read soon, so that it leaves the caches first.
__device__ __forceinline__ void store_streaming(float* target, float value) { __stcs(target, value); }

// Loads a value that another block wrote to global memory, past this processor's own cache.
__device__ __forceinline__ float load_shared_between_blocks(const float* source) { return __ldcg(source); }

// Copies 4 bytes from global to shared memory, without a register; they are there after copy_async_wait() and
// __syncthreads().
__device__ __forceinline__ void copy_async(float* target, const float* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(uint32_t(__cvta_generic_to_shared(target))),
               "l"(source)
               : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// c [16, 8] += a [16, 16] b [16, 8], fp16 products, fp32 sums. With g = lane / 4 and q = lane % 4 a lane holds
// a: (g, 2q..), (g + 8, 2q..), (g, 2q + 8..), (g + 8, 2q + 8..), two values each; b: (2q.., g), (2q + 8.., g);
// c: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
__device__ __forceinline__ void multiply_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [8, 8] += a [8, 4] b [4, 8] in double. A lane holds a: (g, q); b: (q, g); c: (g, 2q), (g, 2q + 1).
__device__ __forceinline__ void multiply_fp64(double (&c)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
}

// A barrier of some warps of a block; `id` is 1..15 (0 is __syncthreads).
__device__ __forceinline__ void team_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The sizes by which launches are planned.
struct Chip {
  int processors;            // streaming multiprocessors
  int shared_per_block;      // bytes a block may ask for
  int shared_per_processor;  // bytes that its resident blocks share
};

inline Chip current_chip() {
  int device = 0;
  Chip chip{};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&chip.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&chip.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&chip.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return chip;
}

using Stream = cudaStream_t;
using Status = cudaError_t;

template <class Arguments>
Status launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared, Stream stream,
              const Arguments& arguments) {
  const Status status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (status != cudaSuccess) return status;
  kernel<<<grid, threads, shared, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace mfa::gpu
#endif
