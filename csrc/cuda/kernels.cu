// Every kernel, instantiated: the only file here that nvcc compiles.
#include "woodbury.cuh"
#include "few_tokens.cuh"
#include "finish.cuh"
#include "launch.h"

namespace mfa::gpu {

cudaError_t launch_woodbury(const WoodburyArguments& arguments, cudaStream_t stream) {
  return woodbury(arguments, current_chip(), stream);
}

cudaError_t launch_scan(const ScanArguments& arguments, cudaStream_t stream) {
  return scan_few_tokens(arguments, current_chip(), stream);
}

cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream) {
  return finish_few_tokens(arguments, stream);
}

}  // namespace mfa::gpu
