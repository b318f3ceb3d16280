// The kernel of moe_dispatch for many choices: a stable counting sort over a grid whose blocks exchange their counters.
//
// A block owns consecutive choices, a warp of it `rounds` times 32 consecutive ones. Ballots give a choice its rank among
// equal experts of the round, a counter per warp and expert what came in the rounds before. Counters become prefixes over
// the warps of the block, over the blocks, and over the experts. While the other blocks' counters are on their way, a
// block sorts its own choices by expert in shared memory: neighbours then write neighbours.
// - Blocks of one cluster write their counters into each other's shared memory.
// - More blocks, all running at once, leave them in global memory and meet at the barrier of the grid.
// - More than run at once: the same kernel twice, once to count and once to place.
#pragma once
#include <cooperative_groups.h>

#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

enum class Exchange { kCluster, kGrid, kCount, kPlace };

constexpr uint32_t kClusterBlocks = 16, kMostRounds = 15, kRowsInFlight = 4;

struct ManyShape {
  uint32_t pairs, rows, rounds, threads, blocks;  // rows: warps that have choices, at most the warps
  __host__ __device__ uint32_t choices() const { return 32 * rows * rounds; }  // of a block
  __host__ __device__ uint32_t counters() const { return (rows + kRowsAtOnce - 1) / kRowsAtOnce * kRowsAtOnce * pairs; }
  __host__ __device__ uint32_t cleared() const { return 2 * sums_of(pairs) + 3 * counters() + 4 * ((pairs + 1) / 2 * 2); }
};

// The parts of a block's shared memory, in words.
struct ManyMemory {
  uint32_t *sums, *local_sums;      // of 64 experts each
  uint32_t *counters, *masks;       // [rows][pairs], 16 bits an expert; [rows][2 * pairs]
  uint32_t *all, *before;           // choices of all blocks and of the blocks before this one
  uint32_t *local, *place, *pad;    // first place in `sorted`; next place in the outputs; where padding begins
  uint32_t *words, *sorted;         // expert << 16 | place, by choice; expert << 16 | choice, by expert
  uint32_t *counts;                 // [blocks of the cluster][pairs]
  uint32_t size;
  __host__ __device__ ManyMemory(uint32_t* memory, const ManyShape& m, bool cluster) {
    const uint32_t experts = (m.pairs + 1) / 2 * 4;
    sums = memory, local_sums = sums + sums_of(m.pairs);
    counters = local_sums + sums_of(m.pairs);
    masks = counters + m.counters();
    all = masks + 2 * m.counters(), before = all + experts;
    local = before + experts, place = local + experts, pad = place + experts;
    words = pad + experts, sorted = words + m.choices();
    counts = sorted + m.choices();
    size = static_cast<uint32_t>(counts - memory) + (cluster ? kClusterBlocks * m.pairs : 0);
  }
};

#ifdef __CUDACC__

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// Writes to the same word of another block of the cluster.
__device__ __forceinline__ void write_remote(uint32_t* word, uint32_t block, uint32_t value) {
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.u32 [remote], %2;\n"
      "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(word))),
      "r"(block), "r"(value)
      : "memory");
}
#else
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void write_remote(uint32_t*, uint32_t, uint32_t) {}
#endif

// Copies a word into shared memory, asynchronously.
__device__ __forceinline__ void copy_word(uint32_t* to, const int32_t* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// words[i] becomes expert << 16 | place among its expert's choices of the warp, or kNone; counters hold the warps' counts.
__device__ __forceinline__ void rank_choices(const Args& a, const ManyShape& m, const ManyMemory& s, uint32_t first) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint16_t* counter = reinterpret_cast<uint16_t*>(s.counters + warp * m.pairs);
  uint32_t* masks = s.masks + 2 * warp * m.pairs;
#pragma unroll 1
  for (uint32_t r = 0; r < m.rounds; r++) {
    const uint32_t i = (warp * m.rounds + r) * 32 + lane;
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

// Sorts the block's choices by expert; their places become those in the block. Returns how many there are.
__device__ __forceinline__ uint32_t sort_block(const ManyShape& m, const ManyMemory& s, uint32_t count) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t total = scan_pairs(m.pairs, s.local_sums, s.local, count & 0xffff, count >> 16);
  const uint16_t* counter = reinterpret_cast<const uint16_t*>(s.counters + warp * m.pairs);
  if (warp < m.rows) {
#pragma unroll 1
    for (uint32_t r = 0; r < m.rounds; r++) {
      const uint32_t i = (warp * m.rounds + r) * 32 + lane, word = s.words[i];
      if (word == kNone) continue;
      const uint32_t expert = word >> 16, place = (word & 0xffff) + counter[expert];
      s.words[i] = expert << 16 | place;
      s.sorted[s.local[expert] + place] = expert << 16 | i;
    }
  }
  return total;
}

// all[] and before[] from the counters of all blocks in global memory. A team of threads has every so many-th block.
__device__ __forceinline__ void add_blocks(const Args& a, const ManyShape& m, const ManyMemory& s) {
  const uint32_t teams = blockDim.x / m.pairs, team = threadIdx.x / m.pairs, pair = threadIdx.x - team * m.pairs;
  if (team < teams) {
    uint32_t low = 0, high = 0, low_before = 0, high_before = 0;
#pragma unroll 1
    for (uint32_t base = team; base < gridDim.x; base += teams * kRowsInFlight) {
      uint32_t counts[kRowsInFlight], sum = 0, sum_before = 0;
#pragma unroll
      for (uint32_t k = 0; k < kRowsInFlight; k++) {
        const uint32_t block = base + k * teams;
        counts[k] = block < gridDim.x ? __ldcg(a.rows + block * m.pairs + pair) : 0;
      }
#pragma unroll
      for (uint32_t k = 0; k < kRowsInFlight; k++) {
        sum += counts[k];
        if (base + k * teams < blockIdx.x) sum_before += counts[k];
      }
      low += sum & 0xffff, high += sum >> 16, low_before += sum_before & 0xffff, high_before += sum_before >> 16;
    }
    atomicAdd(s.all + 2 * pair, low);
    atomicAdd(s.all + 2 * pair + 1, high);
    atomicAdd(s.before + 2 * pair, low_before);
    atomicAdd(s.before + 2 * pair + 1, high_before);
  }
  __syncthreads();
}

template <Exchange X>
__global__ void __launch_bounds__(1024, 1)
    sort_many(const __grid_constant__ Args a, const __grid_constant__ ManyShape m) {
  extern __shared__ __align__(16) uint32_t memory[];
  const ManyMemory s(memory, m, X == Exchange::kCluster);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * m.choices();
  const bool has_pair = threadIdx.x < m.pairs;
  if (X == Exchange::kCluster) cluster_arrive();  // that others may write here
  // What `place` reads before it waits for `count` was there before `count` let it start.
  if (X != Exchange::kPlace) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }

#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < m.choices(); i += blockDim.x) {
    if (first + i < a.choices) copy_word(s.words + i, a.ids + first + i);
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < m.cleared() / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
  }
  wait_for_copies();
  __syncthreads();
  if (warp < m.rows) rank_choices(a, m, s, first);
  __syncthreads();
  const uint32_t count = has_pair ? add_rows(s.counters, m.counters() / m.pairs, m.pairs) : 0;

  // Exchange
  uint32_t size = 0, low = 0, high = 0, low_before = 0, high_before = 0;
  if constexpr (X == Exchange::kCluster) {
    cluster_wait();
    if (has_pair) {
#pragma unroll 1
      for (uint32_t block = 0; block < kClusterBlocks; block++) {
        write_remote(s.counts + blockIdx.x * m.pairs + threadIdx.x, block, count);
      }
    }
    cluster_arrive();
    size = sort_block(m, s, count);
    cluster_wait();
    if (has_pair) {
#pragma unroll
      for (uint32_t block = 0; block < kClusterBlocks; block++) {
        const uint32_t counts = s.counts[block * m.pairs + threadIdx.x];
        low += counts & 0xffff, high += counts >> 16;
        if (block < blockIdx.x) low_before += counts & 0xffff, high_before += counts >> 16;
      }
    }
  } else {
    if (X != Exchange::kPlace && has_pair) a.rows[blockIdx.x * m.pairs + threadIdx.x] = count;
    if constexpr (X == Exchange::kCount) return;
    if constexpr (X == Exchange::kGrid) {
      const auto grid = cooperative_groups::this_grid();
      auto token = grid.barrier_arrive();
      size = sort_block(m, s, count);
      grid.barrier_wait(std::move(token));
    } else {
      size = sort_block(m, s, count);
      wait_for_previous_kernel();
    }
    add_blocks(a, m, s);
    if (has_pair) {
      low = s.all[2 * threadIdx.x], high = s.all[2 * threadIdx.x + 1];
      low_before = s.before[2 * threadIdx.x], high_before = s.before[2 * threadIdx.x + 1];
    }
  }

  // First places of the experts
  const uint32_t total = scan_pairs(m.pairs, s.sums, s.place, padded(a, low), padded(a, high));
  if (has_pair) {
    const uint2 start = reinterpret_cast<const uint2*>(s.place)[threadIdx.x];
    if (blockIdx.x == gridDim.x - 1) write_pair(a, s.place, low, high);
    reinterpret_cast<uint2*>(s.pad)[threadIdx.x] = make_uint2(start.x + low, start.y + high);
    reinterpret_cast<uint2*>(s.place)[threadIdx.x] = make_uint2(start.x + low_before, start.y + high_before);
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(total);
  __syncthreads();

  // Outputs
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < m.choices(); i += blockDim.x) {
    const uint32_t word = s.words[i], expert = word == kNone ? kNone : word >> 16;
    if (first + i < a.choices) write_choice(a, first + i, expert, expert != kNone ? s.place[expert] + (word & 0xffff) : 0);
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
    const uint32_t word = s.sorted[i], expert = word >> 16;
    a.order[s.place[expert] + i - s.local[expert]] = static_cast<int32_t>(first + (word & 0xffff));
  }
  const uint32_t warps = blockDim.x / 32, thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
#pragma unroll 1
  for (uint32_t e = warp * gridDim.x + blockIdx.x; e < a.experts; e += warps * gridDim.x) {
    const uint32_t begin = s.pad[e], end = padded(a, begin);
    for (uint32_t place = begin + lane; place < end; place += 32) a.order[place] = static_cast<int32_t>(a.choices);
  }
#pragma unroll 1
  for (uint32_t place = total + thread; place < a.places; place += threads) a.order[place] = static_cast<int32_t>(a.choices);
#pragma unroll 1
  for (uint32_t b = blocks_of(a, total) + thread; b < a.blocks; b += threads) a.block_experts[b] = -1;
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
