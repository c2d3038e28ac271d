// The CUDA that csrc/cuda uses, on a CPU, in place of device.cuh: g++ compiles the kernels' own sources.
//
//  A block is a set of fibers (ucontext), one per thread: deterministic, and a barrier or an exchange between lanes
// that not all come to is found and reported, not hung on. Three things make mistakes visible: shared memory is filled
// with NaN before every block; a warp runs as far ahead of the others as barriers let it; and warps and blocks take
// their turns in ascending or descending order, as the caller asks, and odd blocks in the other one than even blocks. A
// missing barrier, or a result that depends on who comes first, gives different results. Tensor instructions follow the
// fragment layouts of the PTX manual. Asynchronous copies happen when they are waited for.
#ifndef MFA_CUDA_DEVICE_CUH
#define MFA_CUDA_DEVICE_CUH
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define MFA_SHARED_MEMORY(name) unsigned char* name = emulation::shared_memory()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulation: %s (block %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  std::abort();
}

// A place where `expected` threads meet.
struct Meeting {
  int arrived = 0;
  int64_t round = 0;
};

struct Warp {
  Meeting meeting;
  const char* operation[2][kWarp] = {};  // what each lane came for, two rounds by turns
  double sent[2][kWarp][8] = {};
};

struct Copy {
  float* target;
  const float* source;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;
  bool ended = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting all, teams[16];
  bool any = false;
  int64_t progress = 0;
  std::vector<uint4> shared;
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Block* block;

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(block->shared.data()); }

inline void yield() {
  const unsigned thread = threadIdx.x;
  swapcontext(&block->fibers[thread].context, &block->scheduler);
  threadIdx.x = thread;
}

inline void meet(Meeting& meeting, int expected) {
  const int64_t round = meeting.round;
  if (++meeting.arrived > expected) fail("more threads at a barrier than it expects");
  if (meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.round;
    ++block->progress;
  }
  while (meeting.round == round) yield();
}

// Sends `count` values to the warp; returns what every lane sent. All lanes must come, for the same operation.
inline const double (*exchange(const char* operation, const double* values, int count))[8] {
  Warp& warp = block->warps[threadIdx.x / kWarp];
  const int set = warp.meeting.round % 2, lane = threadIdx.x % kWarp;
  std::copy(values, values + count, warp.sent[set][lane]);
  warp.operation[set][lane] = operation;
  meet(warp.meeting, kWarp);
  for (const char* other : warp.operation[set])
    if (other != operation) fail("lanes of a warp met for different operations");
  return warp.sent[set];
}

inline void enter() {
  block->body();
  block->fibers[threadIdx.x].ended = true;
  ++block->progress;
}

inline void run_block(int threads, bool descending) {
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = block->fibers[t];
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &block->scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  const int warps = threads / kWarp;
  for (int left = threads; left > 0;) {
    const int64_t before = block->progress;
    for (int i = 0; i < warps; ++i) {
      // A warp runs as far ahead of the others as barriers let it.
      for (int64_t seen = -1; seen != block->progress;) {
        seen = block->progress;
        for (int j = 0; j < kWarp; ++j) {
          const int t = descending ? threads - 1 - (i * kWarp + j) : i * kWarp + j;
          if (block->fibers[t].ended) continue;
          threadIdx.x = t;
          swapcontext(&block->scheduler, &block->fibers[t].context);
          left -= block->fibers[t].ended;
        }
      }
    }
    if (block->progress == before) fail("deadlock: some threads wait where the others never come");
  }
  for (const Fiber& fiber : block->fibers)
    if (!fiber.copies.empty()) fail("an asynchronous copy was never waited for");
}

inline bool descending_order = false;

inline void run(dim3 grid, int threads, size_t shared, std::function<void()> body) {
  Block here;
  block = &here;
  here.body = std::move(body);
  here.fibers.resize(threads);
  for (Fiber& fiber : here.fibers) fiber.stack.reset(new char[kStack]);
  blockDim = dim3(threads);
  gridDim = grid;
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = descending_order ? blocks - 1 - i : i;
    blockIdx = dim3(b % grid.x, b / grid.x);
    here.warps.assign(threads / kWarp, Warp());
    here.all = Meeting();
    std::fill(here.teams, here.teams + 16, Meeting());
    here.shared.assign(shared / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
    run_block(threads, descending_order != (b % 2 == 1));  // two blocks never see the same order
  }
  block = nullptr;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block->all, blockDim.x); }
inline int __syncthreads_or(int predicate) {
  emulation::Block& block = *emulation::block;
  if (block.all.arrived == 0) block.any = false;
  block.any |= predicate != 0;
  __syncthreads();
  const bool any = block.any;
  __syncthreads();
  return any;
}
inline void __syncwarp() { emulation::exchange("syncwarp", nullptr, 0); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const double sent = value;
  return T(emulation::exchange("shuffle", &sent, 1)[(threadIdx.x % emulation::kWarp) ^ mask][0]);
}
inline int atomicAdd(int* target, int value) {
  *target += value;
  return *target - value;
}
inline void __threadfence() {}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

namespace mfa::gpu {

inline float from_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}
inline uint16_t to_half(float value) {
  const _Float16 rounded = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline uint4 load_streaming(const uint16_t* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) emulation::fail("a 16-byte load from an unaligned address");
  uint4 value;
  std::memcpy(&value, source, 16);
  return value;
}
inline void store_streaming(float* target, float value) { *target = value; }
inline float load_shared_between_blocks(const float* source) { return *source; }
inline void copy_async(float* target, const float* source) {
  emulation::block->fibers[threadIdx.x].copies.push_back({target, source});
}
inline void copy_async_wait() {
  auto& copies = emulation::block->fibers[threadIdx.x].copies;
  for (const auto& copy : copies) *copy.target = *copy.source;
  copies.clear();
}

inline void multiply_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const double own[6] = {double(a[0]), double(a[1]), double(a[2]), double(a[3]), double(b0), double(b1)};
  const auto sent = emulation::exchange("multiply_fp16", own, 6);
  auto half_of = [](double word, int which) { return from_half(uint16_t(uint32_t(word) >> (16 * which))); };
  const int lane = threadIdx.x % emulation::kWarp;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const double a_value = half_of(sent[row % 8 * 4 + quad][row / 8 + 2 * (k / 8)], k % 2);
      sum += a_value * half_of(sent[column * 4 + quad][4 + k / 8], k % 2);
    }
    c[e] = float(c[e] + sum);
  }
}
inline void multiply_fp64(double (&c)[2], double a, double b) {
  const double own[2] = {a, b};
  const auto sent = emulation::exchange("multiply_fp64", own, 2);
  const int lane = threadIdx.x % emulation::kWarp;
  for (int e = 0; e < 2; ++e)
    for (int k = 0; k < 4; ++k) c[e] += sent[lane / 4 * 4 + k][0] * sent[(2 * (lane % 4) + e) * 4 + k][1];
}
inline void team_barrier(int id, int threads) {
  if (id < 1 || id > 15) emulation::fail("a team barrier outside 1..15");
  emulation::meet(emulation::block->teams[id], threads);
}

struct Chip {
  int processors, shared_per_block, shared_per_processor;
};
struct Stream {};
using Status = int;

template <class Arguments>
Status launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared, Stream, const Arguments& arguments) {
  if (grid.x == 0 || grid.y == 0) return 9;  // cudaErrorInvalidConfiguration
  emulation::run(grid, threads, shared, [&] { kernel(arguments); });
  return 0;
}

}  // namespace mfa::gpu
#endif
