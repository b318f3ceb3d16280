// The kernel of moe_dispatch for many choices: a stable counting sort over a grid whose blocks exchange their counters.
//
// A block owns consecutive choices, a warp of it `rounds` times 32 consecutive ones. Masks give a choice its rank among
// equal experts of the round, a counter per warp and expert what came in the rounds before. Counters become prefixes
// over the warps of the block, over the blocks, and over the experts.
// - The blocks of a cluster write their counters into each other's shared memory.
// - Clusters that all run at once leave their sums in global memory and meet at the barrier of the grid.
// - Where more would be needed than run at once, the same kernel runs twice, once to count and once to place.
// All places are made empty before the exchange, which keeps that apart from filling them. Blocks of many choices sort
// their own by expert in shared memory: neighbours then write neighbours.
#pragma once
#include <cooperative_groups.h>

#include <utility>

#include "moe_dispatch_cluster.cuh"
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

enum class Exchange { kGrid, kCount, kPlace };

constexpr uint32_t kMostRounds = 15, kInFlight = 16;

struct ManyShape {
  uint32_t pairs, rows, rounds, threads;  // rows: warps that have choices, at most the warps
  uint32_t blocks, cluster;               // blocks, and how many of them are a cluster
  bool sorted;                            // whether blocks sort in shared memory
  __host__ __device__ uint32_t choices() const { return 32 * rows * rounds; }  // of a block
  __host__ __device__ uint32_t all_rows() const { return (rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce; }
};

// The parts of a block's shared memory, in words.
struct ManyMemory {
  uint32_t *sums, *local_sums;  // of 64 experts each
  uint32_t* counters;           // [rows][pairs], 16 bits an expert
  uint32_t* masks;              // [rows][2 * pairs]
  uint32_t* words;              // [choices]: ids, then expert << 16 | place among its expert's choices, or kNone
  uint32_t* sorted;             // [choices]: expert << 16 | choice of the block
  uint32_t *place, *local;      // next place of an expert in the outputs, and in `sorted`
  uint32_t* counts;             // [blocks of the cluster][pairs], 16 bits an expert
  uint32_t cleared, size;
  __host__ __device__ ManyMemory(uint32_t* memory, const ManyShape& m) {
    sums = memory, local_sums = sums + sums_of(m.pairs), counters = local_sums + sums_of(m.pairs);
    masks = counters + m.all_rows() * m.pairs;
    words = masks + 2 * m.all_rows() * m.pairs;
    cleared = static_cast<uint32_t>(words - memory);
    sorted = words + m.choices();
    place = sorted + (m.sorted ? m.choices() : 0);
    local = place + starts_of(m.pairs);
    counts = local + (m.sorted ? starts_of(m.pairs) : 0);
    size = static_cast<uint32_t>(counts - memory) + m.cluster * m.pairs;
  }
};

#ifdef __CUDACC__

// Copies a word into shared memory, asynchronously.
__device__ __forceinline__ void copy_word(uint32_t* to, const int32_t* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void rank_choices(const Args& a, const ManyShape& m, const ManyMemory& s, uint32_t first) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint16_t* counter = reinterpret_cast<uint16_t*>(s.counters + warp * m.pairs);
  uint32_t* masks = s.masks + 2 * warp * m.pairs;
#pragma unroll 1
  for (uint32_t i = warp * m.rounds * 32 + lane, end = i + 32 * m.rounds; i < end; i += 32) {
    const uint32_t expert = local_expert(a, first + i < a.choices ? static_cast<int32_t>(s.words[i]) : -1);
    const unsigned equal = equal_lanes(masks, expert);
    uint32_t place = __popc(equal & ((1u << lane) - 1));
    if (expert != kNone) place += counter[expert];
    __syncwarp();
    if (equal >> lane == 1) {  // the last of them
      counter[expert] = static_cast<uint16_t>(place + 1);
      masks[expert] = 0;
    }
    __syncwarp();
    s.words[i] = expert != kNone ? expert << 16 | place : kNone;
  }
}

// Sorts the block's choices by expert; their places become those in the block.
__device__ __forceinline__ void sort_block(const ManyShape& m, const ManyMemory& s, uint32_t count) {
  const uint32_t warp = threadIdx.x / 32;
  scan_pairs(m.pairs, s.local_sums, s.local, 0, count & 0xffff, count >> 16);
  if (warp >= m.rows) return;
  const uint16_t* counter = reinterpret_cast<const uint16_t*>(s.counters + warp * m.pairs);
#pragma unroll 2
  for (uint32_t i = warp * m.rounds * 32 + threadIdx.x % 32, end = i + 32 * m.rounds; i < end; i += 32) {
    const uint32_t word = s.words[i];
    if (word == kNone) continue;
    const uint32_t expert = word >> 16, place = (word & 0xffff) + counter[expert];
    s.words[i] = expert << 16 | place;
    s.sorted[s.local[expert] + place] = expert << 16 | i;
  }
}

// Two experts' choices, in all blocks and in the blocks before this one.
struct PairCounts {
  uint32_t low = 0, high = 0, low_before = 0, high_before = 0;
};

// Adds up what read() gives of `parts` parts, this one the rank-th. All reads of up to 16 are under way at once.
template <class Read>
__device__ __forceinline__ PairCounts add_counts(uint32_t parts, uint32_t rank, const Read& read) {
  PairCounts n;
#pragma unroll 1
  for (uint32_t base = 0; base < parts; base += kInFlight) {
    uint2 counts[kInFlight];
#pragma unroll
    for (uint32_t k = 0; k < kInFlight; k++) counts[k] = base + k < parts ? read(base + k) : make_uint2(0, 0);
#pragma unroll
    for (uint32_t k = 0; k < kInFlight; k++) {
      n.low += counts[k].x, n.high += counts[k].y;
      if (base + k < rank) n.low_before += counts[k].x, n.high_before += counts[k].y;
    }
  }
  return n;
}

template <Exchange X>
__global__ void __launch_bounds__(1024, 1)
    sort_many(const __grid_constant__ Args a, const __grid_constant__ ManyShape m) {
  extern __shared__ __align__(16) uint32_t memory[];
  const ManyMemory s(memory, m);
  const uint32_t warp = threadIdx.x / 32, first = blockIdx.x * m.choices();
  const bool has_pair = threadIdx.x < m.pairs;
  if (m.cluster > 1) cluster_arrive_first();
  // The ids that `place` reads before it waits were there before `count` let it start.
  if (X != Exchange::kPlace) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }

#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < m.choices(); i += blockDim.x) {
    if (first + i < a.choices) copy_word(s.words + i, a.ids + first + i);
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < s.cleared / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
  }
  if (X != Exchange::kPlace) {
    const uint32_t part = (a.places / gridDim.x + 4) / 4 * 4, begin = min(blockIdx.x * part, a.places);
    empty_places(a, begin, min(begin + part, a.places));
  }
  wait_for_copies();
  __syncthreads();
  if (warp < m.rows) rank_choices(a, m, s, first);
  __syncthreads();
  const uint32_t count = has_pair ? add_rows(s.counters, m.all_rows(), m.pairs) : 0;

  // Exchange
  PairCounts n{count & 0xffff, count >> 16, 0, 0};
  if (m.cluster > 1) {
    cluster_wait();
    if (has_pair) {
#pragma unroll 4
      for (uint32_t k = 0; k < m.cluster; k++) {
        write_remote(s.counts + rank_in_cluster() * m.pairs + threadIdx.x, k, count);
      }
    }
    cluster_arrive();
    cluster_wait();
    if (has_pair) {
      n = add_counts(m.cluster, rank_in_cluster(), [&](uint32_t k) {
        const uint32_t word = s.counts[k * m.pairs + threadIdx.x];
        return make_uint2(word & 0xffff, word >> 16);
      });
    }
  }
  uint2* const sums = reinterpret_cast<uint2*>(a.rows) + threadIdx.x;
  const uint32_t clusters = gridDim.x / m.cluster, cluster = blockIdx.x / m.cluster;
  if (X != Exchange::kPlace && has_pair && rank_in_cluster() == 0) {
    sums[cluster * m.pairs] = make_uint2(n.low, n.high);
  }
  if constexpr (X == Exchange::kCount) return;
  if constexpr (X == Exchange::kGrid) {
    const auto grid = cooperative_groups::this_grid();
    auto token = grid.barrier_arrive();
    if (m.sorted) sort_block(m, s, count);
    grid.barrier_wait(std::move(token));
  } else {
    if (m.sorted) sort_block(m, s, count);
    wait_for_previous_kernel();
  }
  if (has_pair) {
    const PairCounts all = add_counts(clusters, cluster, [&](uint32_t k) { return __ldcg(sums + k * m.pairs); });
    n = {all.low, all.high, n.low_before + all.low_before, n.high_before + all.high_before};
  }

  // First places of the experts
  scan_pairs(m.pairs, s.sums, s.place, first_place(a), padded(a, n.low), padded(a, n.high));
  const uint32_t total = s.place[2 * m.pairs];
  if (has_pair) {
    uint2* place = reinterpret_cast<uint2*>(s.place) + threadIdx.x;
    if (blockIdx.x == gridDim.x - 1) write_pair(a, n.low, n.high, place->x, place->y);
    *place = make_uint2(place->x + n.low_before, place->y + n.high_before);
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(total);
  __syncthreads();

  // Places of the choices
  if (m.sorted) {
    const uint32_t size = s.local[2 * m.pairs];
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
      const uint32_t word = s.sorted[i], expert = word >> 16;
      a.order[s.place[expert] + i - s.local[expert]] = static_cast<int32_t>(first + (word & 0xffff));
    }
  }
  if (warp < m.rows) {
    const uint16_t* counter = reinterpret_cast<const uint16_t*>(s.counters + warp * m.pairs);
#pragma unroll 2
    for (uint32_t i = warp * m.rounds * 32 + threadIdx.x % 32, end = i + 32 * m.rounds; i < end; i += 32) {
      if (first + i >= a.choices) break;
      const uint32_t word = s.words[i], expert = word == kNone ? kNone : word >> 16;
      uint32_t at = 0;
      if (expert != kNone) {
        at = s.place[expert] + (word & 0xffff);
        if (!m.sorted) {
          at += counter[expert];
          a.order[at] = static_cast<int32_t>(first + i);
        }
      }
      write_choice(a, first + i, expert, at);
    }
  }
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
#pragma unroll 1
  for (uint32_t b = blocks_of(a, total) + thread; b < a.blocks; b += threads) a.block_experts[b] = -1;
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
