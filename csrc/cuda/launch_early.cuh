// Launches a kernel that keeps to programmatic.cuh.
#pragma once
#include <cuda_runtime.h>

#include "programmatic.cuh"

namespace moe {

// kernel<<<grid, threads, shared, stream>>>(args...), started before the kernel in front of it has ended where `early`
// (compute capability 9.0 and up).
template <class... Parameters, class... Args>
cudaError_t launch_early(bool early, void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared,
                         cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...);
}

}  // namespace moe
