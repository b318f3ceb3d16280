// What the sorting kernels of moe_dispatch share: their arguments, ids to local experts, ranks, padding and prefixes.
//
// Numbers of choices, places and blocks are below 2^31, so that sums of two of them fit 32 bits without a sign.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "programmatic.cuh"

namespace moe::dispatch {

struct Args {
  const int32_t* ids;
  int32_t *order, *inverse, *counts, *offsets, *block_experts;
  uint32_t* rows;  // scratch: counters of the blocks of the grid
  uint32_t choices, places, blocks;
  uint32_t experts, first_expert;
  uint32_t experts_before;  // sorted already: places begin at offsets[0], and what is written elsewhere stays
  uint32_t block_size, block_magic, block_shift;  // block_size 1 where places are not padded
};

constexpr unsigned kAll = 0xffffffffu;
constexpr uint32_t kNone = 0xffffffffu;  // in place of a local expert
constexpr uint32_t kManyExperts = 1024;  // more do not fit, and are sorted so many at a time
constexpr uint32_t kRowsAtOnce = 8;

// Words of shared memory for the sums of 64 experts each, and for what scan_pairs makes of the pairs.
__host__ __device__ constexpr uint32_t sums_of(uint32_t pairs) { return (pairs + 127) / 128 * 4; }
__host__ __device__ constexpr uint32_t starts_of(uint32_t pairs) { return (2 * pairs + 4) / 4 * 4; }

#ifdef __CUDACC__

// n / block_size for n < 2^31 by a multiplication: 2n * ceil(2^(31 + shift) / block_size) / 2^(32 + shift).
__device__ __forceinline__ uint32_t blocks_of(const Args& a, uint32_t n) {
  return __umulhi(2 * n, a.block_magic) >> a.block_shift;
}

__device__ __forceinline__ uint32_t padded(const Args& a, uint32_t count) {
  return blocks_of(a, count + a.block_size - 1) * a.block_size;
}

__device__ __forceinline__ int32_t load_id(const Args& a, uint32_t choice) {
  return choice < a.choices ? a.ids[choice] : -1;
}

__device__ __forceinline__ uint32_t local_expert(const Args& a, int32_t id) {
  const uint32_t expert = static_cast<uint32_t>(id) - a.first_expert;
  return id >= 0 && expert < a.experts ? expert : kNone;
}

// Where the first expert begins; after the wait for the kernel before.
__device__ __forceinline__ uint32_t first_place(const Args& a) {
  return a.experts_before > 0 ? static_cast<uint32_t>(__ldcg(a.offsets)) : 0;
}

// The lanes that have the same local expert; masks[experts] are the warp's own and 0. With 32 warps an atomic takes 60%
// of the time of a ballot per bit, and 40% of match_any.
__device__ __forceinline__ unsigned equal_lanes(uint32_t* masks, uint32_t expert) {
  if (expert != kNone) atomicOr(masks + expert, 1u << threadIdx.x % 32);
  __syncwarp();
  return expert != kNone ? masks[expert] : 0;
}

__device__ __forceinline__ uint32_t inclusive_sum(uint32_t value) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, value, lanes);
    if (lane >= lanes) value += other;
  }
  return value;
}

// Makes places [begin, end) empty, by a block.
__device__ __forceinline__ void empty_places(const Args& a, uint32_t begin, uint32_t end) {
  if (a.experts_before > 0) return;
  const int32_t empty = static_cast<int32_t>(a.choices);
  if (reinterpret_cast<uintptr_t>(a.order + begin) % 16 == 0) {
    const uint32_t vectors = begin < end ? (end - begin) / 4 : 0;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      reinterpret_cast<int4*>(a.order + begin)[i] = make_int4(empty, empty, empty, empty);
    }
    begin += 4 * vectors;
  }
#pragma unroll 1
  for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) a.order[i] = empty;
}

// Counters [rows][pairs] of this thread's pair become exclusive prefixes over the rows; returns the sum.
__device__ __forceinline__ uint32_t add_rows(uint32_t* counters, uint32_t rows, uint32_t pairs) {
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t row = 0; row < rows; row += kRowsAtOnce) {
    uint32_t* at = counters + row * pairs + threadIdx.x;
    uint32_t counts[kRowsAtOnce];
#pragma unroll
    for (uint32_t k = 0; k < kRowsAtOnce; k++) counts[k] = at[k * pairs];
#pragma unroll
    for (uint32_t k = 0; k < kRowsAtOnce; k++) {
      at[k * pairs] = sum;
      sum += counts[k];
    }
  }
  return sum;
}

// The sum of the sizes of the threads before, of `threads` that have one; sums[] is 0 and used up. Only their warps
// work, for integer instructions are what a full block runs short of.
__device__ __forceinline__ uint32_t sum_before(uint32_t threads, uint32_t* sums, uint32_t size) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool works = warp * 32 < threads;
  uint32_t before = 0;
  if (works) {
    const uint32_t after = inclusive_sum(size);
    before = after - size;
    if (lane == 31) sums[warp] = after;
  }
  __syncthreads();
  if (works) {
#pragma unroll 1
    for (uint32_t k = 0; k < warp; k += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(sums + k);
      before += four.x;
      if (k + 1 < warp) before += four.y;
      if (k + 2 < warp) before += four.z;
      if (k + 3 < warp) before += four.w;
    }
  }
  return before;
}

// A thread has the sizes of a pair of experts, 0 beyond the pairs: start[] becomes where they begin, the first of them
// at `first`, and after the last pair where all end.
__device__ __forceinline__ void scan_pairs(uint32_t pairs, uint32_t* sums, uint32_t* start, uint32_t first,
                                           uint32_t low, uint32_t high) {
  const uint32_t before = first + sum_before(pairs, sums, low + high);
  if (threadIdx.x < pairs) reinterpret_cast<uint2*>(start)[threadIdx.x] = make_uint2(before, before + low);
  if (threadIdx.x == pairs - 1) start[2 * pairs] = before + low + high;
  __syncthreads();
}

// Writes where a choice went, `at` only where it has a local expert. The first place of every used block has a choice,
// which names the block's expert.
__device__ __forceinline__ void write_choice(const Args& a, uint32_t choice, uint32_t expert, uint32_t at) {
  if (expert != kNone || a.experts_before == 0) a.inverse[choice] = expert != kNone ? static_cast<int32_t>(at) : -1;
  if (expert == kNone || a.blocks == 0) return;
  const uint32_t block = blocks_of(a, at);
  if (block * a.block_size != at || block >= a.blocks) return;
  a.block_experts[block] = static_cast<int32_t>(a.experts_before + expert);
}

// Counts and first places of this thread's pair of experts.
__device__ __forceinline__ void write_pair(const Args& a, uint32_t low, uint32_t high, uint32_t begin,
                                           uint32_t middle) {
  const uint32_t e = 2 * threadIdx.x;
  a.counts[e] = static_cast<int32_t>(low);
  a.offsets[e] = static_cast<int32_t>(begin);
  if (e + 1 == a.experts) return;
  a.counts[e + 1] = static_cast<int32_t>(high);
  a.offsets[e + 1] = static_cast<int32_t>(middle);
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
