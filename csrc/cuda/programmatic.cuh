// Programmatic dependent launch: a kernel that is launched with the attribute starts when all blocks of the kernel
// before it in the stream have called let_next_kernel_start() or ended, so that its own start overlaps with their end.
//
// Such a kernel writes nothing, and reads nothing that the kernel before it may write, before it has called
// wait_for_previous_kernel(): that returns when the kernel before is over and its writes are seen. It calls
// let_next_kernel_start() after its own wait, so that whatever was written before it began may be read by the next
// kernel at once. Where every kernel keeps to this the order of the stream holds, whatever stands next to each other.
// Without the attribute both calls do nothing.
#pragma once

namespace moe {

#ifdef __CUDACC__

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // __CUDACC__

}  // namespace moe
