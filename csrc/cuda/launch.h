// The launches of every kernel, on the current device: kernels.cu has them, bindings.cpp calls them.
#pragma once
#include <cuda_runtime_api.h>

#include "arguments.h"

namespace mfa::gpu {

cudaError_t launch_woodbury(const WoodburyArguments& arguments, cudaStream_t stream);
cudaError_t launch_scan(const ScanArguments& arguments, cudaStream_t stream);
cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream);

}  // namespace mfa::gpu
