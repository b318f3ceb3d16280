#include "expert_mlp.h"
namespace moe::mlp {
__attribute__((weak)) int64_t wgmma_counters(int64_t) { return 0; }
__attribute__((weak)) cudaError_t launch_wgmma(const GroupedCall&) { return cudaErrorNotSupported; }
__attribute__((weak)) cudaError_t launch_mma(const GroupedCall&) { return cudaErrorNotSupported; }
__attribute__((weak)) bool stream_takes(const StreamCall&) { return false; }
__attribute__((weak)) size_t stream_scratch(const StreamCall&) { return 0; }
__attribute__((weak)) cudaError_t launch_stream(const StreamCall&) { return cudaErrorNotSupported; }
}  // namespace moe::mlp
