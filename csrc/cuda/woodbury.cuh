// Stage 0, woodbury: parameters -> rows, Cholesky factors, log-determinants. A block owns a component.
//
// Symbols   k component, lam = Psi^-1/2, W~ = lam W [D, R];
//           M = I + W~^T W~ = L L^T,  A = L^-1 W~^T,  log|C| = sum log Psi + 2 sum log diag L.
// Never materialised: W~, in any memory. The loadings stay in shared memory as they are, and are scaled when read.
// Exact because products, factorisation, log-determinant and substitution are in double: nearly collinear loadings cost
//           M its definiteness otherwise. A pivot that is not positive makes NaN, which runs into log_det, as on a CPU.
// One read  of the loadings that fit in shared memory (half a processor's: two blocks take turns at its memory and its
//           arithmetic). Beyond, the tile read last in the first pass is the first of the second, and the others are
//           read once more, mostly from the second-level cache.
// Gram      by double-precision tensor instructions, 8 x 8 outputs and 4 features at a time. W~^T W~ needs the same
//           value in the same lane for both operands: one register feeds both.
// Floor     K D (2 R + 2) values, read and written. README.md counts the double arithmetic against it.
// Measured: not yet on a GPU. Checked by tests/ops/common/test_cuda.py.
#pragma once
#include "arguments.h"
#include "warp.cuh"

namespace mfa::gpu {

constexpr int kGram = 8;  // side of an output tile of the Gram matrix

__host__ __device__ constexpr int max_factor_threads(int gram_tiles) { return gram_tiles > 3 ? 128 : 256; }

// The layout of a block's shared memory.
struct WoodburyLayout {
  int rank;
  // Row stride of M and L: even, so that two values load at once; not a multiple of 4, so that lanes on neighbouring
  // rows meet in few banks.
  __host__ __device__ int gram_stride() const { return rank + (6 - rank % 4) % 4; }
  // Stride of a feature's loadings: odd, so that lanes on neighbouring features never meet in a bank.
  __host__ __device__ int stage_stride() const { return rank | 1; }
  __host__ __device__ int doubles() const { return rank * gram_stride() + rank + kWarp; }  // L, 1 / diag L, scratch
  __host__ __device__ size_t bytes(int tile) const {
    return doubles() * sizeof(double) + size_t(tile) * (1 + stage_stride()) * sizeof(float);
  }
};

// In place, by one warp; gram [R, stride], the lower triangle only. As csrc/cpu/woodbury.h does it, step by step.
__device__ inline void factorize(double* gram, int rank, int stride) {
  const int lane = threadIdx.x % kWarp;
  for (int j = 0; j < rank; ++j) {
    for (int i = j + lane; i < rank; i += kWarp) {
      double sum = gram[i * stride + j];
      for (int s = 0; s < j; ++s) sum -= gram[i * stride + s] * gram[j * stride + s];
      gram[i * stride + j] = sum;
    }
    __syncwarp();
    const double square = gram[j * stride + j], pivot = sqrt(square < 1 ? 1 : square);
    __syncwarp();
    for (int i = j + lane; i < rank; i += kWarp) gram[i * stride + j] = i == j ? pivot : gram[i * stride + j] / pivot;
    __syncwarp();
  }
}

// Gram: its side in tiles of 8, ceil(R / 8).
template <int Gram>
__global__ void __launch_bounds__(max_factor_threads(Gram), 2) woodbury_kernel(const WoodburyArguments a) {
  constexpr int kTiles = Gram * (Gram + 1) / 2, kTogether = Gram <= 2 ? 2 : 1;
  MFA_SHARED_MEMORY(shared);
  const WoodburyLayout layout{a.rank};
  const int stride = layout.gram_stride(), step = layout.stage_stride();
  double* gram = reinterpret_cast<double*>(shared);  // [R, stride]
  double* reciprocal = gram + a.rank * stride;       // [R]
  double* scratch = reciprocal + a.rank;             // [warps]
  float* lam = reinterpret_cast<float*>(scratch + kWarp);  // [tile]
  float* stage = lam + a.tile;                             // [tile, step]

  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const int row = lane / 4, column = lane % 4;  // of this lane's Gram operands
  const int64_t k = blockIdx.x;
  const float* noise = a.noise + (a.per_component ? k * a.features : 0);
  const float* loadings = a.loadings + k * a.features * a.rank;
  const int tiles = (a.features + a.tile - 1) / a.tile;
  const uint32_t reciprocal_rank = 0xffffffffu / uint32_t(a.rank > 1 ? a.rank : 2) + 1;

  auto count_of = [&](int tile) { return min(a.tile, a.features - tile * a.tile); };
  auto load = [&](int tile) {
    const int first = tile * a.tile, count = count_of(tile);
    const float* source = loadings + int64_t(first) * a.rank;
    for (int e = thread; e < count * a.rank; e += threads) {
      const int d = a.rank > 1 ? __umulhi(e, reciprocal_rank) : 0;  // e / R, exact below 2^32 / R
      copy_async(stage + e + d * (step - a.rank), source + e);
    }
    for (int d = thread; d < count; d += threads) lam[d] = 1.0f / sqrtf(noise[first + d]);
    copy_async_wait();
    __syncthreads();
  };

  // First pass, last tile first: M, and sum log Psi.
  double sums[kTiles][2] = {};
  double log_noise = 0;
  for (int tile = tiles - 1; tile >= 0; --tile) {
    load(tile);
    const int first = tile * a.tile, count = count_of(tile);
    // One logarithm for four values: their product fits in a double. A negative value must not meet another one.
    for (int d = thread; d < count; d += 4 * threads) {
      double product = 1;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int e = d + j * threads;
        const float value = e < count ? noise[first + e] : 1.0f;
        product *= value < 0 ? nan("") : double(value);
      }
      log_noise += log(product);
    }
    if (a.rank > 0)
      for (int d = 4 * warp; d < count; d += 4 * warps) {
        const int own = d + column;
        double value[Gram];
#pragma unroll
        for (int t = 0; t < Gram; ++t) {
          const int r = kGram * t + row;
          value[t] = own < count && r < a.rank ? double(lam[own] * stage[own * step + r]) : 0.0;
        }
#pragma unroll
        for (int i = 0; i < Gram; ++i)
#pragma unroll
          for (int j = 0; j <= i; ++j) multiply_fp64(sums[i * (i + 1) / 2 + j], value[i], value[j]);
      }
    if (tile > 0) __syncthreads();  // before the next tile overwrites this one
  }
  log_noise = block_reduce(log_noise, Sum(), scratch);

  // Warp after warp, in order: deterministic.
  for (int w = 0; w < warps; ++w) {
    if (w == warp) {
#pragma unroll
      for (int ti = 0; ti < Gram; ++ti)
#pragma unroll
        for (int tj = 0; tj <= ti; ++tj)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = kGram * ti + row, j = kGram * tj + 2 * column + e;
            if (i < a.rank && j <= i) {
              const double before = w > 0 ? gram[i * stride + j] : i == j ? 1.0 : 0.0;
              gram[i * stride + j] = before + sums[ti * (ti + 1) / 2 + tj][e];
            }
          }
    }
    __syncthreads();
  }

  if (warp == 0) {
    factorize(gram, a.rank, stride);
    double log_diagonal = 0;
    for (int i = lane; i < a.rank; i += kWarp) {
      log_diagonal += log(gram[i * stride + i]);
      reciprocal[i] = 1 / gram[i * stride + i];
    }
    log_diagonal = warp_reduce(log_diagonal, Sum());
    if (lane == 0) a.log_det[k] = float(log_noise + 2 * log_diagonal);
  }
  __syncthreads();
  for (int e = thread; e < a.rank * a.rank; e += threads) {
    const int i = e / a.rank, j = e % a.rank;
    a.cholesky[k * a.rank * a.rank + e] = j <= i ? float(gram[i * stride + j]) : 0.0f;
  }

  // Second pass, from the tile that is still there: A by forward substitution, a thread per feature.
  float* rows = a.rows + k * (a.rank + 1 + a.per_component) * a.features;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile > 0) {
      __syncthreads();
      load(tile);
    }
    const int64_t first = int64_t(tile) * a.tile;
    const int count = count_of(tile);
    for (int d = thread; d < count; d += threads) {
      store_streaming(rows + first + d, a.means[k * a.features + first + d]);
      if (a.per_component) store_streaming(rows + int64_t(a.rank + 1) * a.features + first + d, lam[d]);
    }
    for (int d = thread; d < count; d += kTogether * threads) {
      double solved[kTogether][kGram * Gram];
#pragma unroll
      for (int i = 0; i < kGram * Gram; ++i) {
        if (i >= a.rank) break;
#pragma unroll
        for (int f = 0; f < kTogether; ++f) {
          const int own = d + f * threads;
          solved[f][i] = own < count ? double(lam[own] * stage[own * step + i]) : 0.0;
        }
#pragma unroll
        for (int j = 0; j < i; j += 2) {
          const double2 l = *reinterpret_cast<const double2*>(gram + i * stride + j);
#pragma unroll
          for (int f = 0; f < kTogether; ++f) {
            solved[f][i] -= l.x * solved[f][j];
            if (j + 1 < i) solved[f][i] -= l.y * solved[f][j + 1];
          }
        }
#pragma unroll
        for (int f = 0; f < kTogether; ++f) {
          solved[f][i] *= reciprocal[i];
          const int own = d + f * threads;
          if (own < count) store_streaming(rows + int64_t(1 + i) * a.features + first + own, float(solved[f][i]));
        }
      }
    }
  }
}

// Two blocks to a processor, each with as many features in shared memory as that leaves room for.
inline int woodbury_tile(const Chip& chip, int features, int rank) {
  constexpr int kReserved = 1024;  // bytes of shared memory that every block costs on top of its own
  const WoodburyLayout layout{rank};
  const int half = chip.shared_per_processor / 2 - kReserved;
  const int budget = (half < chip.shared_per_block ? half : chip.shared_per_block) - int(layout.bytes(0));
  const int fits = budget / int((1 + layout.stage_stride()) * sizeof(float)) / 4 * 4;
  const int needed = (features + 3) / 4 * 4;
  return fits < needed ? fits : needed;
}

inline Status woodbury(WoodburyArguments a, const Chip& chip, Stream stream) {
  using Kernel = void (*)(WoodburyArguments);
  constexpr Kernel kernels[] = {woodbury_kernel<1>, woodbury_kernel<2>, woodbury_kernel<3>, woodbury_kernel<4>,
                                woodbury_kernel<5>, woodbury_kernel<6>, woodbury_kernel<7>, woodbury_kernel<8>};
  const int gram_tiles = a.rank > kGram ? (a.rank + kGram - 1) / kGram : 1;
  const int most = max_factor_threads(gram_tiles), useful = a.features < 256 ? 64 : a.features < 1024 ? 128 : 256;
  a.tile = woodbury_tile(chip, a.features, a.rank);
  return launch(kernels[gram_tiles - 1], dim3(unsigned(a.components)), useful < most ? useful : most,
                WoodburyLayout{a.rank}.bytes(a.tile), stream, a);
}

}  // namespace mfa::gpu
