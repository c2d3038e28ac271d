// The dtypes in which tokens arrive. Kernels read them as they are, without a converted copy.
#pragma once
#include "arguments.h"
#include "device.cuh"

namespace mfa::gpu {

template <Dtype>
struct Element {
  using Storage = uint16_t;
};
template <>
struct Element<Dtype::kFloat32> {
  using Storage = float;
};

template <Dtype X>
__device__ __forceinline__ float load_element(const void* x, int64_t i) {
  const auto value = static_cast<const typename Element<X>::Storage*>(x)[i];
  if constexpr (X == Dtype::kFloat32)
    return value;
  else if constexpr (X == Dtype::kFloat16)
    return from_half(value);
  else
    return from_bfloat16(value);
}

// body(load), with load(i) = x[i]. One branch on the dtype, outside the loops.
template <class Body>
__device__ __forceinline__ void with_elements(const void* x, Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32)
    body([x](int64_t i) { return load_element<Dtype::kFloat32>(x, i); });
  else if (dtype == Dtype::kFloat16)
    body([x](int64_t i) { return load_element<Dtype::kFloat16>(x, i); });
  else
    body([x](int64_t i) { return load_element<Dtype::kBFloat16>(x, i); });
}

}  // namespace mfa::gpu
