// Every kernel, instantiated: the only file here that nvcc compiles.
#include "factors.cuh"
#include "few_tokens.cuh"
#include "finish.cuh"
#include "launch.h"

namespace mfa::gpu {

cudaError_t launch_factors(const FactorsArguments& arguments, cudaStream_t stream) {
  return factors(arguments, current_chip(), stream);
}

cudaError_t launch_scan(const ScanArguments& arguments, cudaStream_t stream) {
  return scan_few_tokens(arguments, current_chip(), stream);
}

cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream) {
  return finish_few_tokens(arguments, stream);
}

}  // namespace mfa::gpu
