// What the blocks of a cluster do with each other: meet, and write into each other's shared memory. Before sm_90 there
// are no clusters to launch, and nothing here is called.
#pragma once
#include <cstdint>

#include "hopper.cuh"

namespace moe::dispatch {

#ifdef __CUDACC__

#if __CUDA_ARCH__ >= 900

// The address of the same thing in another block.
__device__ __forceinline__ uint32_t address_in(uint32_t block, const void* at) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(hopper::shared_address(at)), "r"(block));
  return address;
}

__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All blocks meet between arriving and waiting. The first time nothing has to be seen by the others, only that a block
// is there to be written to, and a release of everything takes its time.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_first() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Writes the same word of another block.
__device__ __forceinline__ void write_remote(uint32_t* word, uint32_t block, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address_in(block, word)), "r"(value) : "memory");
}

// Writes the same four words of another block, whose barrier counts their bytes.
__device__ __forceinline__ void send(uint32_t* words, uint64_t* barrier, uint32_t block, uint4 values) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in(block, words)),
               "r"(values.x), "r"(values.y), "r"(values.z), "r"(values.w), "r"(address_in(block, barrier))
               : "memory");
}
#else

__device__ __forceinline__ uint32_t rank_in_cluster() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_first() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void write_remote(uint32_t*, uint32_t, uint32_t) {}

#endif

#endif  // __CUDACC__

}  // namespace moe::dispatch
