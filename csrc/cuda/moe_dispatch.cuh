// What the kernels of moe_dispatch are called with.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../ops.h"

namespace moe::dispatch {

// How kernels of one dispatch follow each other and the kernel before them. The default is what moe_dispatch uses on
// sm_90; plain uses neither programmatic launch nor blocks that wait for each other.
enum class Chain { kDefault, kPlain, kOverlapped, kCooperative, kClusters };

// Bytes of scratch that launch() needs, of any content.
size_t scratch_bytes(const MoeDispatch& p, int sm_count, Chain chain = Chain::kDefault);

// Enqueues the op. `path` becomes the name of what was taken.
cudaError_t launch(const MoeDispatch& p, int sm_count, void* scratch, cudaStream_t stream, const char** path,
                   Chain chain = Chain::kDefault);

}  // namespace moe::dispatch
