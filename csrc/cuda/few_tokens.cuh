// Stage 1 for a few tokens, the scan: bound by memory, so every row is read once, as fp16.
//
// Symbols   y_n = s (x_n - c), y^ its fp16 rounding times a power of two s_n; groups of rows g of component k:
//           g < R: B_r, times beta_k;  g = R: the mean m_k, times sigma_k (woodbury/triton_rows.py; with shared noise
//           B = A and w = 1);  t_r = beta_k (s_n y^.B_r - offset_r);  p = s_n sigma_k y^.m;
//           logit = constant_k - |m|^2 / 2 + p + |t|^2 / 2, which leaves out |y|^2 / 2, the same for all components.
// Out       logits and bounds [N, K]: the exact logit (less |y|^2 / 2) lies within bound of the computed one.
// Never materialised: the products; a component's are in registers of the warps that share it.
// Layout    tensor instructions of 16 rows x 8 tokens x 16 features. The rows of one component are the 16 (several
//           tiles of them for R > 15; 2, 4, 8 or 16 components to a tile for small R). In which order features meet is
//           free as long as it is the same for both operands: a lane takes 8 contiguous features, 16 bytes straight
//           from global memory, for two instructions.
// In flight every warp holds one batch of loads (8 of 16 bytes a lane) while it asks for the next, across the ends of
//           components: 16 warps x 32 lanes x 8 x 16 bytes = 64 KB per processor, times the share of a tile's 16 rows
//           in use: 44 KB for R = 10 where 4.3 TB/s x 1 us / 132 = 33 KB are needed. One persistent block per
//           processor.
// Balance   `splits` warps (a team) share a component, each on its own features, and add up in shared memory: chosen so
//           that the teams of the whole chip finish together (scan_plan), with K = 512 as with K = 32768.
// Not served: noise per component (a further group of rows against the squares of the tokens).
// Measured: not yet on a GPU. Checked by tests/ops/common/test_cuda.py.
#pragma once
#include "element.cuh"
#include "warp.cuh"

namespace mfa::gpu {

constexpr int kComponentTile = 64;  // of the rows' layout: TILE of woodbury/triton_rows.py
constexpr int kTokenTile = 8;       // tokens of one tensor instruction
constexpr int kRowTile = 16;        // rows of one tensor instruction
constexpr int kChunk = 32;          // features of one load: 4 lanes x 8
constexpr int kBatch = 4;           // chunks that a warp has in flight, for two rows a lane
constexpr int kScanWarps = 16;
constexpr int kTokenPadding = 32;   // halves between tokens in shared memory: neighbouring tokens in different banks

// Scales and norms of the tokens of a block.
struct TokenNorms {
  float scale[kFewTokens];  // s_n
  float a[kFewTokens];      // >= |y|
  float eta[kFewTokens];    // >= |y - s_n y^|
  float partial[2][kScanWarps];
};

// Returns the scale that brings the largest value into [32, 64): far below overflow, while values that underflow are
// below 2^-29 of it.
__device__ __forceinline__ float power_of_two_scale(float largest) {
  if (!(largest > 0) || largest == INFINITY) return 1;
  const int exponent = int(__float_as_uint(largest) >> 23) - 127 - 5;
  return __uint_as_float(uint32_t(min(max(exponent, -100), 100) + 127) << 23);
}

// Returns the relative error of float32 sums of D products, or squares, at most (common/triton_fp16.py: sum_error).
__device__ __forceinline__ float sum_error(int features) {
  int power = 64;
  while (power < features) power *= 2;
  return power * 0x1p-23f;
}

// tokens [count, padded + kTokenPadding] = fp16(y / s_n), and the norms. The warps share out the tokens.
template <class Load>
__device__ __forceinline__ void stage_tokens(const ScanArguments& args, const Load& load, int first, int count,
                                             uint16_t* tokens, TokenNorms& norms) {
  int held = 1;  // tokens at a time, a power of two
  while (held < count) held *= 2;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int share = kScanWarps / held, n = warp / share, start = (warp % share) * kWarp + lane, step = share * kWarp;
  const int64_t offset = int64_t(first + n) * args.features;
  auto y = [&](int d) { return args.scale[d] * (load(offset + d) - args.center[d]); };

  float largest = 0, length = 0;
  if (n < count)
    strided<8>(start, step, args.features, y, [&](int, float value) {
      largest = fmaxf(largest, fabsf(value));
      length += value * value;  // NaN and infinity stay
    });
  largest = warp_reduce(largest, Max());
  length = warp_reduce(length, Sum());
  if (lane == 0) norms.partial[0][warp] = largest, norms.partial[1][warp] = length;
  __syncthreads();
  length = largest = 0;
  for (int w = 0; w < share; ++w) {
    largest = fmaxf(largest, norms.partial[0][n * share + w]);
    length += norms.partial[1][n * share + w];
  }
  const float s = power_of_two_scale(largest), inverse = 1 / s;
  __syncthreads();

  float lost = 0;
  if (n < count) {
    uint16_t* row = tokens + n * (args.padded + kTokenPadding);
    strided<8>(start, step, args.features, y, [&](int d, float value) {
      const uint16_t rounded = to_half(value * inverse);
      const float error = value - from_half(rounded) * s;
      lost += error * error;
      row[d] = rounded;
    });
    for (int d = args.features + (warp % share) * kWarp + lane; d < args.padded; d += step) row[d] = 0;
  }
  lost = warp_reduce(lost, Sum());
  if (lane == 0) norms.partial[0][warp] = lost;
  __syncthreads();
  if (n < count && warp % share == 0 && lane == 0) {
    lost = 0;
    for (int w = 0; w < share; ++w) lost += norms.partial[0][warp + w];
    const float slack = 1 + 2 * sum_error(args.features), a = sqrtf(length) * slack;
    norms.scale[n] = s;
    norms.a[n] = a;
    norms.eta[n] = sqrtf(lost) * slack + a * 0x1p-20f;  // y carries two roundings of its own
  }
  __syncthreads();
}

// Returns the index of the row of group g and component k: tiles of 64 components, a group's 64 rows together.
__device__ __forceinline__ int64_t row_index(int k, int g, int groups) {
  return (int64_t(k / kComponentTile) * groups + g) * kComponentTile + k % kComponentTile;
}

// Returns the components, rounded up to whole tiles: scales and bounds have as many of each kind.
__device__ __forceinline__ int64_t padded_components(const ScanArguments& args) {
  return int64_t(args.components + kComponentTile - 1) / kComponentTile * kComponentTile;
}

// Bounds the distance of the computed logit from the exact one: the derivation is in scan/triton_scan.py.
__device__ __forceinline__ float rounding_bound(const ScanArguments& args, int k, float a, float eta, float p,
                                                float square) {
  const int64_t K = padded_components(args);
  const float* bound = args.row_bounds + k;
  const float constant = args.constants[k];
  if (constant == -INFINITY) return 0;  // no weight: the logit is -inf whatever the products are
  const float root = sqrtf(square);
  const float e = a * bound[2 * K] + eta * bound[3 * K] + bound[4 * K] + 0x1p-22f * root;
  const float sizes = fabsf(constant) + float(args.squares[k]) + fabsf(p) + square;
  const float delta = 0x1p-20f * sizes + e * (root + 0.5f * e) + a * bound[0] + eta * bound[K];
  return delta * (1 + 0x1p-10f);  // the roundings of delta itself
}

// Returns the rows of a component in a tile: a power of two up to 16.
__host__ __device__ inline int rows_per_component(int rank) {
  int rows = 1;
  while (rows < rank + 1 && rows < kRowTile) rows *= 2;
  return rows;
}

// The place of a team in its work: component by component, tile by tile of rows, batch by batch of features.
struct Cursor {
  int item, tile, chunk;
};

// TokenTiles: 8 tokens each.
template <int TokenTiles>
__global__ void __launch_bounds__(kScanWarps * kWarp, 1) scan_kernel(const ScanArguments args) {
  MFA_SHARED_MEMORY(shared);
  const int token_stride = args.padded + kTokenPadding;
  TokenNorms& norms = *reinterpret_cast<TokenNorms*>(shared);
  // [2, warps, lanes]: what the warps of a team hand to their first, two sets by turns
  using Products = float[TokenTiles][4];
  Products* handed = reinterpret_cast<Products*>(shared + sizeof(TokenNorms));
  uint16_t* tokens = reinterpret_cast<uint16_t*>(handed + (args.splits > 1 ? 2 * kScanWarps * kWarp : 0));

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = lane / 4, quad = lane % 4;
  const int first_token = blockIdx.y * args.group, count = min(args.group, args.tokens - first_token);
  const int groups = args.rank + 1, together = rows_per_component(args.rank), per_tile = kRowTile / together;
  const int row_tiles = (groups + kRowTile - 1) / kRowTile, items = (args.components + per_tile - 1) / per_tile;
  const int part = warp % args.splits, team = warp / args.splits, teams_here = kScanWarps / args.splits;
  const int teams = teams_here * gridDim.x, chunks = args.padded / kChunk;
  const int begin = int(int64_t(chunks) * part / args.splits), end = int(int64_t(chunks) * (part + 1) / args.splits);

  if (blockIdx.x == 0 && threadIdx.x < unsigned(count)) args.arrivals[first_token + threadIdx.x] = 0;

  // Row `half` (0: row, 1: row + 8) of this lane: its component and its group.
  auto component_of = [&](int item, int half) { return item * per_tile + (row + half * 8) / together; };
  auto group_of = [&](int tile, int half) { return tile * kRowTile + (row + half * 8) % together; };
  auto load = [&](const Cursor& at, uint4 (&batch)[2][kBatch]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = component_of(at.item, half), g = group_of(at.tile, half);
      const bool valid = at.item < items && k < args.components && g < groups;
      const uint16_t* source = args.rows + row_index(k, g, groups) * args.padded + 8 * quad;
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        batch[half][u] = valid && at.chunk + u < end ? load_streaming(source + (at.chunk + u) * kChunk)
                                                     : make_uint4(0, 0, 0, 0);
    }
  };

  // The products with rows `half` become t or p.
  auto add_rows = [&](const Cursor& at, int half, const float (&products)[TokenTiles][4],
                      float (&square)[TokenTiles][2], float (&p)[TokenTiles][2]) {
    const int k = component_of(at.item, half), g = group_of(at.tile, half);
    if (k >= args.components || g >= groups) return;
    const bool is_mean = g == args.rank;
    const float scale = args.row_scales[is_mean ? padded_components(args) + k : k];
    const float offset = is_mean ? 0.0f : args.offsets[row_index(k, g, args.rank)];
#pragma unroll
    for (int j = 0; j < TokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = j * kTokenTile + 2 * quad + e;
        if (n >= count) continue;
        const float t = scale * (norms.scale[n] * products[j][2 * half + e] - offset);
        p[j][e] += is_mean ? t : 0.0f;
        square[j][e] += is_mean ? 0.0f : t * t;
      }
  };
  // Adds up over the lanes that share component k, writes, and starts anew.
  auto write = [&](int k, float (&square)[TokenTiles][2], float (&p)[TokenTiles][2]) {
    const int lanes = min(together, 8);
#pragma unroll
    for (int j = 0; j < TokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        for (int apart = 1; apart < lanes; apart *= 2) {
          square[j][e] += __shfl_xor_sync(kFullWarp, square[j][e], 4 * apart);
          p[j][e] += __shfl_xor_sync(kFullWarp, p[j][e], 4 * apart);
        }
        const int n = j * kTokenTile + 2 * quad + e;
        if (row % lanes == 0 && n < count && k < args.components) {
          const int64_t out = int64_t(first_token + n) * args.components + k;
          const float base = float(double(args.constants[k]) - 0.5 * args.squares[k]);
          args.logits[out] = base + p[j][e] + 0.5f * square[j][e];
          args.bounds[out] = rounding_bound(args, k, norms.a[n], norms.eta[n], p[j][e], square[j][e]);
        }
        square[j][e] = p[j][e] = 0;
      }
  };

  Cursor at{int(blockIdx.x) * teams_here + team, 0, begin};
  uint4 current[2][kBatch], next[2][kBatch];
  load(at, current);  // on its way while the tokens are staged
  with_elements(args.x, args.dtype, [&](const auto& x) { stage_tokens(args, x, first_token, count, tokens, norms); });

  float products[TokenTiles][4] = {};
  float square[TokenTiles][2] = {}, p[TokenTiles][2] = {};  // |t|^2 and p of this lane's rows
  int set = 0;
  while (at.item < items) {
    Cursor then{at.item, at.tile, at.chunk + kBatch};
    const bool tile_ends = then.chunk >= end;
    if (tile_ends) then = Cursor{at.item, at.tile + 1, begin};
    const bool item_ends = then.tile == row_tiles;
    if (item_ends) then = Cursor{at.item + teams, 0, begin};
    load(then, next);

#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (at.chunk + u >= end) break;
      const uint4 low = current[0][u], high = current[1][u];
      const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int j = 0; j < TokenTiles; ++j) {
        const int n = j * kTokenTile + row;
        uint4 b = make_uint4(0, 0, 0, 0);
        const uint16_t* chunk = tokens + n * token_stride + (at.chunk + u) * kChunk;
        if (n < count) b = *reinterpret_cast<const uint4*>(chunk + 8 * quad);
        multiply_fp16(products[j], a[0], b.x, b.y);
        multiply_fp16(products[j], a[1], b.z, b.w);
      }
    }

    if (tile_ends) {
      if (args.splits > 1) {
        // The sets take turns: a warp fills this one again only after its first warp has come to the next barrier.
        Products* mine = handed + set * kScanWarps * kWarp + warp * kWarp + lane;
        set ^= 1;
#pragma unroll
        for (int j = 0; j < TokenTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) (*mine)[j][e] = products[j][e];
        team_barrier(1 + team, args.splits * kWarp);
        if (part == 0)
          for (int w = 1; w < args.splits; ++w)
#pragma unroll
            for (int j = 0; j < TokenTiles; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) products[j][e] += mine[w * kWarp][j][e];
      }
      if (part == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          add_rows(at, half, products, square, p);
          // Both halves are one component's, or a component's rows end with the half.
          if (item_ends && (half == 1 || together < kRowTile)) write(component_of(at.item, half), square, p);
        }
      }
#pragma unroll
      for (int j = 0; j < TokenTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) products[j][e] = 0;
    }

    at = then;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int u = 0; u < kBatch; ++u) current[half][u] = next[half][u];
  }
}

struct ScanPlan {
  int group;         // tokens per block
  int token_groups;  // blocks side by side on the same rows: all but the first find them in the second-level cache
  int blocks;        // per group of tokens
  int splits;        // warps per component
  size_t shared;     // bytes
};

inline ScanPlan scan_plan(const Chip& chip, int tokens, int components, int padded, int rank) {
  ScanPlan plan{tokens, 1, 1, 1, 0};
  auto bytes = [&](int group, int splits) {
    const int token_tiles = group > kTokenTile ? 2 : 1;
    const size_t handed = splits > 1 ? 2 * kScanWarps * kWarp * token_tiles * 4 * sizeof(float) : 0;
    return sizeof(TokenNorms) + handed + size_t(group) * (padded + kTokenPadding) * sizeof(uint16_t);
  };
  while (plan.group > 1 && bytes(plan.group, 2) > size_t(chip.shared_per_block)) plan.group = (plan.group + 1) / 2;
  plan.token_groups = (tokens + plan.group - 1) / plan.group;
  const int per_tile = kRowTile / rows_per_component(rank), items = (components + per_tile - 1) / per_tile;
  const int processors = chip.processors > plan.token_groups ? chip.processors / plan.token_groups : 1;
  // Rounds of work, in warps' time for a whole component. A component's end costs about 2% of that.
  double least = INFINITY;
  for (int splits = 1; splits <= kScanWarps && splits <= padded / kChunk; splits *= 2) {
    const int teams = processors * (kScanWarps / splits), rounds = (items + teams - 1) / teams;
    const double time = rounds * (1.0 / splits + 0.02);
    if (time < least) least = time, plan.splits = splits;
  }
  const int teams_here = kScanWarps / plan.splits, useful = (items + teams_here - 1) / teams_here;
  plan.blocks = useful < processors ? useful : processors;
  plan.shared = bytes(plan.group, plan.splits);
  return plan;
}

inline Status scan_few_tokens(ScanArguments a, const Chip& chip, Stream stream) {
  const ScanPlan plan = scan_plan(chip, a.tokens, a.components, a.padded, a.rank);
  a.group = plan.group;
  a.splits = plan.splits;
  return launch(plan.group > kTokenTile ? scan_kernel<2> : scan_kernel<1>,
                dim3(unsigned(plan.blocks), unsigned(plan.token_groups)), kScanWarps * kWarp, plan.shared, stream, a);
}

}  // namespace mfa::gpu
