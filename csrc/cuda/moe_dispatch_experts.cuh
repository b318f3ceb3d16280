// The kernel of moe_dispatch for more experts than shared memory has counters: one block, the order of the choices kept
// 1024 at a time.
#pragma once
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

#ifdef __CUDACC__

__global__ void __launch_bounds__(1024, 1) sort_many_experts(const __grid_constant__ Args a, uint32_t* next) {
  __shared__ uint32_t carry, partial[32];
  __shared__ uint32_t experts[1024];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (uint32_t i = threadIdx.x; i < a.places; i += 1024) a.order[i] = static_cast<int32_t>(a.choices);
  for (uint32_t e = threadIdx.x; e < a.experts; e += 1024) next[e] = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < a.choices; i += 1024) {
    const uint32_t expert = local_expert(a, a.ids[i]);
    if (expert != kNone) atomicAdd(next + expert, 1u);
  }
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (uint32_t base = 0; base < a.experts; base += 1024) {
    const uint32_t e = base + threadIdx.x, count = e < a.experts ? next[e] : 0, size = padded(a, count);
    const uint32_t after = inclusive_sum(size);
    if (lane == 31) partial[warp] = after;
    __syncthreads();
    uint32_t place = carry + after - size;
    for (uint32_t w = 0; w < warp; w++) place += partial[w];
    __syncthreads();
    if (e < a.experts) {
      a.counts[e] = static_cast<int32_t>(count);
      a.offsets[e] = static_cast<int32_t>(place);
      next[e] = place;
    }
    if (threadIdx.x == 1023) carry = place + size;
    __syncthreads();
  }
  if (threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(carry);
  for (uint32_t b = blocks_of(a, carry) + threadIdx.x; b < a.blocks; b += 1024) a.block_experts[b] = -1;
  for (uint32_t base = 0; base < a.choices; base += 1024) {
    const uint32_t choice = base + threadIdx.x, expert = local_expert(a, load_id(a, choice));
    experts[threadIdx.x] = expert;
    __syncthreads();
    uint32_t rank = 0, equal = 0;
    for (uint32_t i = 0; i < 1024 && expert != kNone; i++) {
      const bool same = experts[i] == expert;
      equal += same;
      rank += same && i < threadIdx.x;
    }
    const uint32_t at = expert != kNone ? next[expert] + rank : 0;
    __syncthreads();
    if (expert != kNone && rank == 0) next[expert] += equal;
    if (expert != kNone) a.order[at] = static_cast<int32_t>(choice);
    if (choice < a.choices) write_choice(a, choice, expert, at);
    __syncthreads();
  }
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
