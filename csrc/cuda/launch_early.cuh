// Launches a kernel, with what <<<>>> has no words for.
#pragma once
#include <cuda_runtime.h>

#include "programmatic.cuh"

namespace moe {

struct LaunchShape {
  unsigned blocks, threads;
  size_t shared;
  cudaStream_t stream;
  bool early = false;        // before the kernel in front of it has ended: for kernels that keep to programmatic.cuh
  bool cooperative = false;  // all blocks at once
  unsigned cluster = 1;      // blocks of a cluster; these and `early` from compute capability 9.0 on
};

template <class... Parameters, class... Args>
cudaError_t launch_shape(void (*kernel)(Parameters...), const LaunchShape& shape, const Args&... args) {
  cudaLaunchAttribute attributes[3]{};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks, config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared, config.stream = shape.stream, config.attrs = attributes;
  const auto add = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
    attributes[config.numAttrs].id = id;
    return attributes[config.numAttrs++].val;
  };
  if (shape.early) {
    add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cooperative) add(cudaLaunchAttributeCooperative).cooperative = 1;
  if (shape.cluster > 1) {
    auto& dim = add(cudaLaunchAttributeClusterDimension).clusterDim;
    dim.x = shape.cluster, dim.y = dim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...);
}

// Lets blocks of a kernel, which has no static shared memory, have all that a block of this device may have. Every
// time, as it is the device's; and not what one launch needs, as another thread may be about to launch with more.
template <class... Parameters>
cudaError_t allow_most_shared(void (*kernel)(Parameters...)) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// kernel<<<grid, threads, shared, stream>>>(args...), started before the kernel in front of it has ended where `early`.
template <class... Parameters, class... Args>
cudaError_t launch_early(bool early, void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared,
                         cudaStream_t stream, const Args&... args) {
  return launch_shape(kernel, {grid, threads, shared, stream, early}, args...);
}

}  // namespace moe
