// Tokens as the int8 level reads them: a panel in float and in int8, and how far the one is from the other.
#pragma once
#include "../panel_distances.h"
#include "rows.h"

namespace mfa {

constexpr int kLanes = kPanel<float>;  // tokens per panel

// What the bounds know of a panel of tokens.
struct PanelNorms {
  float quantum[kLanes];  // y^ = quantum q
  float norm[kLanes];     // |y^|
  float error[kLanes];    // |y - y^|, rounding of y included
  float reach[kLanes];    // rounding of y: |y| 2.1 u
};

// Packs tokens x[order[i]], of count kLanes at most: y [D', kLanes], quads [D'/4, kLanes, 4] with kTokenOffset added. scratch [D'].
inline void pack_tokens(const Int8Rows& rows, const float* x, const int64_t* order, int64_t count, float* y,
                        uint8_t* quads, PanelNorms& norms, float* scratch) {
  constexpr int V = kWidth<float>;
  const int64_t D = rows.shape.features, P = rows.padded();
  for (int64_t n = 0; n < kLanes; ++n) {
    const float* own = n < count ? x + order[n] * D : nullptr;
    for (int64_t d = 0; d < P; ++d) scratch[d] = own && d < D ? (own[d] - rows.center[d]) * rows.scale[d] : 0;
    Floats most = {};
    for (int64_t d = 0; d < P; d += V) {
      const Floats value = load(scratch + d), size = value < 0 ? -value : value;
      most = size > most ? size : most;
    }
    const Quantum quantum(largest_lane(most), kTokenMost);
    Floats square = {}, lost = {}, rounded = {};
    for (int64_t d = 0; d < P; d += V) {
      const Floats value = load(scratch + d), near = nearest(value * quantum.inverse), off = value - near * quantum.size;
      square += value * value;
      lost += off * off;
      rounded += near * near;
      const auto bytes = __builtin_convertvector(__builtin_convertvector(near, Ints) + kTokenOffset, Bytes);
      for (int quad = 0; quad < V / 4; ++quad)
        std::memcpy(quads + (d + 4 * quad) * kLanes + 4 * n, reinterpret_cast<const char*>(&bytes) + 4 * quad, 4);
      for (int lane = 0; lane < V; ++lane) y[(d + lane) * kLanes + n] = value[lane];
    }
    const float size = std::sqrt(horizontal_sum<float>(square)) * 1.001f;
    norms.quantum[n] = quantum.size;
    norms.norm[n] = std::sqrt(horizontal_sum<float>(rounded)) * quantum.size * 1.0001f + 1e-17f;
    norms.error[n] = std::sqrt(horizontal_sum<float>(lost)) * 1.001f + 4 * kUnit * size + 1e-17f;
    norms.reach[n] = 2.1f * kUnit * size + 1e-17f;
  }
}

}  // namespace mfa
