// The launches of every kernel: compiled by nvcc in kernels.cu, called by bindings.cpp. They use the current device.
#pragma once
#include <cuda_runtime_api.h>

#include "arguments.h"

namespace mfa::gpu {

cudaError_t launch_woodbury(const WoodburyArguments& arguments, cudaStream_t stream);
cudaError_t launch_scan(const ScanArguments& arguments, cudaStream_t stream);
cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream);

}  // namespace mfa::gpu
