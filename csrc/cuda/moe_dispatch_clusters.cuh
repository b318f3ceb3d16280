// The kernel of moe_dispatch for thousands of choices: clusters that all count every choice and write a part of the
// outputs each, so that no cluster waits for another.
//
// The choices are cut into a slice per block of a cluster, a slice into a piece per cluster, and a piece has a choice
// per thread. A block counts its slice: the pieces before and after its own by atomics, its own by ranks. The blocks of
// a cluster then send each other the counts of their slices, by stores that a barrier of the receiver counts. A place
// is written once: it is taken, padding, or behind the last expert.
#pragma once
#include "moe_dispatch_cluster.cuh"
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

constexpr uint32_t kClusterBlocks = 16, kMostClusters = 8, kLeastOfPiece = 128, kMostOfPiece = 1024;

struct ClustersShape {
  uint32_t pairs, clusters, piece, threads;
  // Of counters: what is before the block's piece, a row per warp of it, what is after.
  __host__ __device__ uint32_t rows() const { return (piece / 32 + 2 + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce; }
};

// The parts of a block's shared memory, in words.
struct ClustersMemory {
  uint64_t* barrier;
  uint32_t* sums;         // of 64 experts each
  uint32_t* count;        // of the slice, 16 bits an expert
  uint32_t* counters;     // [rows][pairs], 16 bits an expert
  uint32_t* masks;        // [warps of the piece][2 * pairs]
  uint32_t* counts;       // [slices][stride], as `count`
  uint32_t *place, *end;  // of the experts: where the piece's choices go, and behind all choices
  uint32_t* total;
  uint32_t stride, cleared, size;
  __host__ __device__ ClustersMemory(uint32_t* memory, const ClustersShape& c) {
    stride = (c.pairs + 3) / 4 * 4;
    barrier = reinterpret_cast<uint64_t*>(memory);
    sums = memory + 4, count = sums + sums_of(c.pairs), counters = count + stride;
    masks = counters + c.rows() * c.pairs;
    counts = masks + (c.piece / 32 * 2 * c.pairs + 3) / 4 * 4;
    cleared = static_cast<uint32_t>(counts - sums);
    place = counts + kClusterBlocks * stride;
    end = place + 2 * c.pairs, total = end + 2 * c.pairs;
    size = static_cast<uint32_t>(total - memory) + 1;
  }
};

#ifdef __CUDACC__

__global__ void __launch_bounds__(1024, 1)
    sort_clusters(const __grid_constant__ Args a, const __grid_constant__ ClustersShape c) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) uint32_t memory[];
  const ClustersMemory s(memory, c);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t slice = blockIdx.x % kClusterBlocks, piece = blockIdx.x / kClusterBlocks;
  const uint32_t first = slice * c.clusters * c.piece + threadIdx.x, choice = first + piece * c.piece;
  const bool has_choice = threadIdx.x < c.piece, has_pair = threadIdx.x < c.pairs;
  const uint32_t barrier = hopper::shared_address(s.barrier);
  if (threadIdx.x == 0) {
    hopper::barrier_init(barrier, 1);
    hopper::fence_barrier_init();
  }
  cluster_arrive_first();
  wait_for_previous_kernel();
  let_next_kernel_start();

  int32_t ids[kMostClusters];
#pragma unroll
  for (uint32_t k = 0; k < kMostClusters; k++) {
    ids[k] = has_choice && k < c.clusters ? load_id(a, first + k * c.piece) : -1;
  }
  const uint32_t begin_of_all = first_place(a);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < s.cleared / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(s.sums)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  if (threadIdx.x == 0) hopper::barrier_arrive_expect(barrier, kClusterBlocks * s.stride * 4);  // some may be here

  // Counts of the slice
  int32_t id = -1;
#pragma unroll
  for (uint32_t k = 0; k < kMostClusters; k++) id = k == piece ? ids[k] : id;
  const uint32_t expert = local_expert(a, id);
  uint32_t rank = 0;
  uint16_t* const counter = reinterpret_cast<uint16_t*>(s.counters + (1 + warp) * c.pairs) + expert;
  if (has_choice) {
    const unsigned equal = equal_lanes(s.masks + 2 * warp * c.pairs, expert);
    rank = __popc(equal & ((1u << lane) - 1));
    if (equal >> lane == 1) *counter = static_cast<uint16_t>(rank + 1);
    uint32_t* const after = s.counters + (1 + c.piece / 32) * c.pairs;
#pragma unroll
    for (uint32_t k = 0; k < kMostClusters; k++) {
      const uint32_t other = local_expert(a, ids[k]);
      if (k != piece && other != kNone) {
        atomicAdd((k < piece ? s.counters : after) + other / 2, other % 2 == 0 ? 1u : 1u << 16);
      }
    }
  }
  __syncthreads();
  if (has_pair) s.count[threadIdx.x] = add_rows(s.counters, c.rows(), c.pairs);
  __syncthreads();

  // Counts of all slices, and of those before this one
  cluster_wait();
#pragma unroll 1
  for (uint32_t block = warp; block < kClusterBlocks; block += blockDim.x / 32) {
#pragma unroll 1
    for (uint32_t i = 4 * lane; i < s.stride; i += 128) {  // a warp to one block: to many is three times as slow
      send(s.counts + slice * s.stride + i, s.barrier, block, *reinterpret_cast<const uint4*>(s.count + i));
    }
  }
  uint32_t low = 0, high = 0, low_before = 0, high_before = 0;
  if (has_pair) {
    hopper::barrier_wait(barrier, 0);
    uint32_t words[kClusterBlocks];
#pragma unroll
    for (uint32_t k = 0; k < kClusterBlocks; k++) words[k] = s.counts[k * s.stride + threadIdx.x];
#pragma unroll
    for (uint32_t base = 0; base < kClusterBlocks; base += 4) {
      uint32_t all = 0, before = 0;  // of four slices 16 bits hold
#pragma unroll
      for (uint32_t k = base; k < base + 4; k++) {
        all += words[k];
        before += words[k] & (k < slice ? kAll : 0);
      }
      low += all & 0xffff, high += all >> 16;
      low_before += before & 0xffff, high_before += before >> 16;
    }
  }

  // First places of the experts
  const uint32_t low_size = padded(a, low), high_size = padded(a, high);
  const uint32_t begin = begin_of_all + sum_before(c.pairs, s.sums, low_size + high_size);
  const uint32_t middle = begin + low_size;
  if (has_pair) {
    reinterpret_cast<uint2*>(s.place)[threadIdx.x] = make_uint2(begin + low_before, middle + high_before);
    reinterpret_cast<uint2*>(s.end)[threadIdx.x] = make_uint2(begin + low, middle + high);
    if (threadIdx.x == c.pairs - 1) *s.total = middle + high_size;
  }
  __syncthreads();

  // Outputs
  const uint32_t total = *s.total, thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  if (has_choice && choice < a.choices) {
    uint32_t at = 0;
    if (expert != kNone) {
      at = s.place[expert] + *counter + rank;
      a.order[at] = static_cast<int32_t>(choice);
    }
    write_choice(a, choice, expert, at);
  }
  // Padding, 128 places a warp
  const int32_t empty = static_cast<int32_t>(a.choices);
#pragma unroll 1
  for (uint32_t e = thread / 32, skip = 0;; e += threads / 32) {
    for (; e >= a.experts && skip < a.block_size - 1; e -= a.experts) skip += 128;
    if (skip >= a.block_size - 1) break;
    const uint32_t end = s.end[e], next = padded(a, end);
#pragma unroll
    for (uint32_t k = 0; k < 128; k += 32) {
      const uint32_t place = end + skip + k + lane;
      if (place < next) a.order[place] = empty;
    }
  }
#pragma unroll 1
  for (uint32_t i = total + thread; i < a.places; i += threads) a.order[i] = empty;
#pragma unroll 1
  for (uint32_t b = blocks_of(a, total) + thread; b < a.blocks; b += threads) a.block_experts[b] = -1;
  if (blockIdx.x != gridDim.x - 1) return;
  if (has_pair) write_pair(a, low, high, begin, middle);
  if (threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(total);
#endif
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
