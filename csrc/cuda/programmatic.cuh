// Programmatic dependent launch: a kernel that is launched with the attribute starts when all blocks of the kernel
// before it in the stream have called let_next_kernel_start() or ended, so that its own start overlaps with that
// kernel's end.
//
// It must call wait_for_previous_kernel() before it writes anything, or reads what that kernel or one before it may
// have written: the call returns when that kernel is over and its writes are seen. Where every kernel keeps to this the
// order of the stream holds, whatever kernels stand next to each other. Two kernels of one op may agree on more: where
// the first lets the second start only after its own wait, the second may at once read what was there before the first
// began. Without the attribute both calls do nothing.
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
