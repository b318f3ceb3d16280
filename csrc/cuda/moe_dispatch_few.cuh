// The kernels of moe_dispatch for few choices: every block sorts all of them and writes its own part of the outputs, so
// that no block waits for another. Such a batch costs latency: a trip to memory, barriers, and instructions that nobody
// has fetched yet, so that loops stay loops. Places are emptied while the ids are on their way and filled later by the
// same block.
#pragma once
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

// Up to 32 choices: every warp sorts all of them in its lanes, writes 128 places, and what is its own of the experts. A
// block is a warp, for integer instructions of several would wait for each other.
constexpr uint32_t kTinyChoices = 32, kTinyPlaces = 128;

// More: one choice a thread. Masks and counters have a row per warp of choices, counters 16 bits an expert, so that two
// experts add as one word.
constexpr uint32_t kFewChoices = 1024;
struct FewShape {
  uint32_t pairs, rows, threads;
  __host__ __device__ FewShape(uint32_t choices, uint32_t experts)
      : pairs((experts + 1) / 2),
        rows((choices + 32 * kRowsAtOnce - 1) / (32 * kRowsAtOnce) * kRowsAtOnce),
        threads(((choices > pairs ? choices : pairs) + 31) / 32 * 32) {}
  __host__ __device__ uint32_t cleared() const { return sums_of(pairs) + 3 * rows * pairs; }
  __host__ __device__ uint32_t words() const { return cleared() + starts_of(pairs); }
};

#ifdef __CUDACC__

__global__ void __launch_bounds__(32) sort_tiny(const __grid_constant__ Args a) {
  __shared__ __align__(16) uint32_t list[kTinyChoices];
  __shared__ uint32_t masks[kManyExperts];
  const uint32_t lane = threadIdx.x, thread = blockIdx.x * 32 + lane, begin = blockIdx.x * kTinyPlaces;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int32_t id = load_id(a, lane);
  const uint32_t first = first_place(a);
#pragma unroll
  for (uint32_t k = 0; k < kTinyPlaces; k += 32) {
    const uint32_t place = begin + k + lane;
    if (place < a.places && a.experts_before == 0) a.order[place] = static_cast<int32_t>(a.choices);
  }
  const uint32_t expert = local_expert(a, id);
  if (expert != kNone) masks[expert] = 0;
  __syncwarp();
  const unsigned equal = equal_lanes(masks, expert);
  const uint32_t rank = __popc(equal & ((1u << lane) - 1)), count = __popc(equal);
  // The first choice of an expert stands for all of them: expert, blocks and choices, at most 32, in one word.
  const bool stands = rank == 0 && expert != kNone;
  list[lane] = (stands ? expert << 12 | blocks_of(a, count + a.block_size - 1) << 6 | count : kNone << 12);
  __syncwarp();
  const uint32_t word_of_expert = expert << 12, word_of_thread = thread << 12;
  uint32_t before_expert = 0, before_thread = 0, of_thread = 0, all = 0;
#pragma unroll 1
  for (uint32_t j = 0; j < a.choices; j += 4) {
    const uint4 words = *reinterpret_cast<const uint4*>(list + j);
    const uint32_t four[] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (const uint32_t word : four) {
      const uint32_t sums = word & 0xfff;
      if (word < word_of_expert) before_expert += sums;
      if (word < word_of_thread) before_thread += sums;
      if (word - word_of_thread < 0x1000) of_thread = sums;
      all += sums;
    }
  }
  if (thread <= a.experts) a.offsets[thread] = static_cast<int32_t>(first + (before_thread >> 6) * a.block_size);
  if (thread < a.experts) a.counts[thread] = static_cast<int32_t>(of_thread & 0x3f);
  const uint32_t at = first + (before_expert >> 6) * a.block_size + rank;
  if (expert != kNone && at - begin < kTinyPlaces) a.order[at] = static_cast<int32_t>(lane);
  if (thread < a.choices) write_choice(a, lane, expert, at);
  if (thread >= blocks_of(a, first) + (all >> 6) && thread < a.blocks) a.block_experts[thread] = -1;
}

__global__ void __launch_bounds__(1024, 1) sort_few(const __grid_constant__ Args a, uint32_t places_of_block) {
  extern __shared__ __align__(16) uint32_t memory[];
  const FewShape shape(a.choices, a.experts);
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, pairs = shape.pairs, choice = threadIdx.x;
  const bool has_pair = threadIdx.x < pairs, last_block = blockIdx.x == gridDim.x - 1;
  uint32_t *sums = memory, *counters = sums + sums_of(pairs), *masks = counters + shape.rows * pairs;
  uint32_t* start = memory + shape.cleared();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int32_t id = load_id(a, choice);
  const uint32_t first = first_place(a);
  const uint32_t begin = blockIdx.x * places_of_block, end = min(begin + places_of_block, a.places);
  empty_places(a, begin, end);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < shape.cleared() / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const uint32_t expert = local_expert(a, id);
  const unsigned equal = equal_lanes(masks + 2 * warp * pairs, expert);
  const uint32_t rank = __popc(equal & ((1u << lane) - 1));
  uint16_t* counter = reinterpret_cast<uint16_t*>(counters + warp * pairs) + expert;
  if (equal >> lane == 1) *counter = static_cast<uint16_t>(rank + 1);
  __syncthreads();
  const uint32_t count = has_pair ? add_rows(counters, shape.rows, pairs) : 0, low = count & 0xffff, high = count >> 16;
  scan_pairs(pairs, sums, start, first, padded(a, low), padded(a, high));
  const uint32_t at = expert != kNone ? start[expert] + *counter + rank : 0;
  if (expert != kNone && at >= begin && at < end) a.order[at] = static_cast<int32_t>(choice);
  if (!last_block) return;
  const uint32_t total = start[2 * pairs];
  if (choice < a.choices) write_choice(a, choice, expert, at);
  if (has_pair) write_pair(a, low, high, start[2 * threadIdx.x], start[2 * threadIdx.x + 1]);
  if (threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(total);
#pragma unroll 1
  for (uint32_t b = blocks_of(a, total) + threadIdx.x; b < a.blocks; b += blockDim.x) a.block_experts[b] = -1;
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
