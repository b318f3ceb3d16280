// How the streaming kernels of the expert MLP are launched: one block of threads per multiprocessor.
#pragma once
#include "expert_mlp.h"
#include "launch_early.cuh"

namespace moe::mlp {

// Cooperative, because blocks wait for each other: all of them have to run at once, whatever another context has on the
// device. Programmatic, so that they start while the last ones of the kernel before are still at work, which saves
// about 0.7 us.
template <class Args>
cudaError_t launch_streaming(void (*kernel)(Args), int threads, int shared, int most_shared, const StreamCall& call,
                             const Args& args) {
  // Every time, as it is the device's; and not `shared`, as another thread may be about to launch with more.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  if (error != cudaSuccess) return error;
  return launch_shape(kernel,
                      {.blocks = static_cast<unsigned>(call.sm_count),
                       .threads = static_cast<unsigned>(threads),
                       .shared = static_cast<size_t>(shared),
                       .stream = call.stream,
                       .early = true,
                       .cooperative = true},
                      args);
}

}  // namespace moe::mlp
