// The kernels of moe_dispatch and which of them sort what.
//
// A stable counting sort. A warp owns consecutive choices, 32 a round: a ballot per bit of the expert gives a choice its
// rank among equal experts of the round (match_any takes 270 cycles), a counter per warp and expert in shared memory
// what came in the rounds before. Counters become first places by a prefix over the warps of a block, over the blocks,
// and over the experts.
// - Few choices: every block sorts all of them, redundantly, and writes its own slice of the outputs; one kernel.
// - More: `count` writes a row of counters per block (and the empty value to all places), `place` adds up the rows of
//   the blocks before it. With programmatic dependent launch `place` sorts within its block while `count` still runs.
// - More than kManyExperts experts: one block goes through the choices, 1024 at a time.
// Rows are copied token by token: read once, written to each of the token's places; then empty places are cleared.
//
// Limits: 2^31 - 1 places. Ids that are not local, negative ones included, get inverse -1. No arithmetic on values.
// Counters are integers, so that no order of additions shows.
#include <cooperative_groups.h>

#include <algorithm>

#include "moe_dispatch.cuh"

namespace moe::dispatch {

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kManyExperts = 2048;
constexpr int kSharedBytes = 39 * 1024;  // beside the slice of sort_few under 48 KB
constexpr int kFewChoices = 1024;
constexpr int kManyWarps = 16;  // of a block where choices are many, and twice that where they are very many
constexpr int kSlice = 2048;  // places per block where choices are few

struct Args {
  const int32_t* ids;
  int32_t *order, *inverse, *counts, *offsets, *block_experts;
  uint32_t* rows;  // scratch: [blocks of the grid, row_words()], two counters of 16 bits in a word
  int64_t choices, places, blocks;
  int32_t experts, first_expert, block_size;
  int32_t bits;   // of an expert, and of -1 apart from all experts
  int32_t shift;  // block_size = 1 << shift, or -1
  bool staged;
};

__device__ int local_expert(const Args& a, int64_t choice) {
  if (choice >= a.choices) return -1;
  const int32_t id = a.ids[choice];
  const int64_t expert = static_cast<int64_t>(id) - a.first_expert;
  return id >= 0 && expert >= 0 && expert < a.experts ? static_cast<int>(expert) : -1;
}

__device__ uint32_t blocks_of(const Args& a, uint32_t places) {
  return a.shift >= 0 ? places >> a.shift : places / static_cast<uint32_t>(a.block_size);
}

__device__ uint32_t padded(const Args& a, uint32_t count) {
  const uint32_t block = static_cast<uint32_t>(a.block_size);
  return block > 0 ? blocks_of(a, count + block - 1) * block : count;
}

// Shared memory of a block: counters [warps, experts] of 16 bits, then two words per expert and the scan's 33.
struct Shared {
  uint16_t* counters;
  uint32_t *before, *start, *partial;
  __device__ Shared(uint32_t* memory, int warps, int experts) {
    before = memory;
    start = before + experts;
    partial = start + experts;
    counters = reinterpret_cast<uint16_t*>(partial + 34);
  }
};
int shared_bytes(int warps, int experts) { return 4 * (2 * experts + 34) + 2 * warps * ((experts + 1) / 2 * 2); }

// Experts and places within the block of this thread's Rounds choices; counters end as exclusive prefixes over the
// warps, `before` as the block's counts.
template <int Rounds, int MaxWarps>
__device__ void sort_block(const Args& a, const Shared& s, int64_t first, int* expert, int* place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int stride = (a.experts + 1) / 2 * 2;
  const int64_t begin = first + static_cast<int64_t>(warp) * 32 * Rounds + lane;
#pragma unroll
  for (int r = 0; r < Rounds; r++) expert[r] = local_expert(a, begin + r * 32);
  uint32_t* words = reinterpret_cast<uint32_t*>(s.counters);
  for (int i = threadIdx.x; i < warps * stride / 2; i += blockDim.x) words[i] = 0;
  __syncthreads();
  uint16_t* mine = s.counters + warp * stride;
  unsigned equal[Rounds];
#pragma unroll
  for (int r = 0; r < Rounds; r++) equal[r] = kAll;
  for (int b = 0; b < a.bits; b++) {
#pragma unroll
    for (int r = 0; r < Rounds; r++) {
      const bool set = (expert[r] >> b & 1) != 0;
      const unsigned lanes = __ballot_sync(kAll, set);
      equal[r] &= set ? lanes : ~lanes;
    }
  }
#pragma unroll
  for (int r = 0; r < Rounds; r++) {
    const int rank = __popc(equal[r] & ((1u << lane) - 1));
    const int so_far = expert[r] >= 0 ? mine[expert[r]] : 0;
    place[r] = so_far + rank;
    __syncwarp();
    if (rank == 0 && expert[r] >= 0) mine[expert[r]] = static_cast<uint16_t>(so_far + __popc(equal[r]));
    __syncwarp();
  }
  __syncthreads();
  // A thread takes a pair of experts: a word adds as two counters.
  const int pairs = stride / 2;
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    uint32_t count[MaxWarps], sum = 0;
#pragma unroll
    for (int w = 0; w < MaxWarps; w++) count[w] = w < warps ? words[w * pairs + i] : 0;
#pragma unroll
    for (int w = 0; w < MaxWarps; w++) {
      if (w < warps) words[w * pairs + i] = sum;
      sum += count[w];
    }
    s.before[2 * i] = sum & 0xffffu;
    if (2 * i + 1 < a.experts) s.before[2 * i + 1] = sum >> 16;
  }
  __syncthreads();
}

// start[e] holds counts and becomes first places; returns the total. Every thread owns consecutive experts.
template <bool Padded>
__device__ uint32_t scan_experts(const Args& a, const Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int each = (a.experts + blockDim.x - 1) / blockDim.x;
  const int begin = min(static_cast<int>(threadIdx.x) * each, a.experts), end = min(begin + each, a.experts);
  uint32_t sum = 0;
  for (int e = begin; e < end; e++) sum += Padded ? padded(a, s.start[e]) : s.start[e];
  uint32_t inclusive = sum;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, inclusive, lanes);
    if (lane >= lanes) inclusive += other;
  }
  if (lane == 31) s.partial[warp] = inclusive;
  __syncthreads();
  uint32_t parts = lane < warps ? s.partial[lane] : 0;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, parts, lanes);
    if (lane >= lanes) parts += other;
  }
  const uint32_t total = __shfl_sync(kAll, parts, 31);
  const uint32_t base = warp > 0 ? __shfl_sync(kAll, parts, warp - 1) : 0;
  uint32_t place = base + inclusive - sum;
  for (int e = begin; e < end; e++) {
    const uint32_t count = s.start[e];
    s.start[e] = place;
    place += Padded ? padded(a, count) : count;
  }
  __syncthreads();
  return total;
}

// Counts, offsets and block experts of expert e; `thread` of `threads` share its blocks.
__device__ void write_expert(const Args& a, const Shared& s, int e, uint32_t total, int thread, int threads) {
  const uint32_t begin = s.start[e], end = e + 1 < a.experts ? s.start[e + 1] : total;
  if (thread == 0) a.offsets[e] = static_cast<int32_t>(begin);
  if (a.block_size > 0) {
    for (uint32_t b = blocks_of(a, begin) + thread; b < blocks_of(a, end); b += threads) {
      if (b < a.blocks) a.block_experts[b] = e;
    }
  }
}

// Few choices: every block sorts all of them and writes its slice of `order`.
template <int MaxWarps>
__global__ void __launch_bounds__(32 * MaxWarps, 1) sort_few(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) uint32_t memory[];
  __shared__ __align__(16) int32_t slice[kSlice];
  const int warps = blockDim.x / 32;
  const Shared s(memory, warps, a.experts);
  const int32_t empty = static_cast<int32_t>(a.choices);
  for (int i = threadIdx.x; i < kSlice; i += blockDim.x) slice[i] = empty;
  int expert[1], place[1];
  sort_block<1, MaxWarps>(a, s, 0, expert, place);
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) {
    s.start[e] = s.before[e];
    if (blockIdx.x == 0) a.counts[e] = static_cast<int32_t>(s.before[e]);
  }
  __syncthreads();
  const uint32_t total = scan_experts<true>(a, s);
  const int stride = (a.experts + 1) / 2 * 2;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSlice;
  const int choice = static_cast<int>(threadIdx.x);
  int64_t at = -1;
  if (expert[0] >= 0) {
    at = static_cast<int64_t>(s.start[expert[0]]) + s.counters[threadIdx.x / 32 * stride + expert[0]] + place[0];
    if (at >= begin && at < begin + kSlice) slice[at - begin] = choice;
  }
  if (blockIdx.x == 0 && choice < a.choices) a.inverse[choice] = static_cast<int32_t>(at);
  __syncthreads();
  const int size = static_cast<int>(min(static_cast<int64_t>(kSlice), a.places - begin));
  for (int i = threadIdx.x; i < size; i += blockDim.x) a.order[begin + i] = slice[i];
  const int last = static_cast<int>(gridDim.x) - 1;
  if (static_cast<int>(blockIdx.x) == last) {
    const int team = max(1, static_cast<int>(blockDim.x) / a.experts);
    const int teams = static_cast<int>(blockDim.x) / team;
    for (int e = static_cast<int>(threadIdx.x) / team; e < a.experts && static_cast<int>(threadIdx.x) / team < teams; e += teams) {
      write_expert(a, s, e, total, threadIdx.x % team, team);
    }
    if (threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(total);
    if (a.block_size > 0) {
      for (int64_t b = blocks_of(a, total) + threadIdx.x; b < a.blocks; b += blockDim.x) a.block_experts[b] = -1;
    }
  }
}

__device__ void fill_order(const Args& a) {
  const int32_t empty = static_cast<int32_t>(a.choices);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (reinterpret_cast<uintptr_t>(a.order) % 16 == 0) {
    int4* vectors = reinterpret_cast<int4*>(a.order);
    for (int64_t i = thread; i < a.places / 4; i += threads) vectors[i] = make_int4(empty, empty, empty, empty);
    for (int64_t i = a.places / 4 * 4 + thread; i < a.places; i += threads) a.order[i] = empty;
  } else {
    for (int64_t i = thread; i < a.places; i += threads) a.order[i] = empty;
  }
}

__host__ __device__ inline int row_words(int experts) { return (experts + 3) / 4 * 2; }

__device__ void write_row(const Args& a, const Shared& s) {
  const int words = row_words(a.experts);
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    const uint32_t low = 2 * i < a.experts ? s.before[2 * i] : 0, high = 2 * i + 1 < a.experts ? s.before[2 * i + 1] : 0;
    a.rows[blockIdx.x * words + i] = low | high << 16;
  }
}

// Adds up the rows: before[e] = choices of blocks before this one, start[e] = choices of all. A thread takes four
// experts of every so many-th row, kFlight rows at once and added as pairs of 16 bits: one trip to the L2 cache is all
// that most batches need.
template <int Rounds, int Warps>
__device__ void add_rows(const Args& a, const Shared& s) {
  constexpr int kMost = 65535 / (32 * Rounds * Warps), kWanted = Warps > kManyWarps ? 8 : 16;
  constexpr int kFlight = kMost < kWanted ? kMost : kWanted;
  const int columns = row_words(a.experts) / 2, threads = blockDim.x;
  for (int e = threadIdx.x; e < a.experts; e += threads) s.before[e] = s.start[e] = 0;
  __syncthreads();
  const int teams = max(1, threads / columns), team = min(static_cast<int>(threadIdx.x) / columns, teams);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  for (int i = threadIdx.x - team * columns; team < teams && i < columns; i += threads) {
    uint32_t before[4] = {}, all[4] = {};
    for (int base = team; base < blocks; base += kFlight * teams) {
      const uint2* at = reinterpret_cast<const uint2*>(a.rows) + base * columns + i;
      uint2 words[kFlight], sum = {}, sum_before = {};
#pragma unroll
      for (int k = 0; k < kFlight; k++) {
        words[k] = base + k * teams < blocks ? __ldcg(at + k * teams * columns) : make_uint2(0, 0);
      }
#pragma unroll
      for (int k = 0; k < kFlight; k++) {
        const bool earlier = base + k * teams < block;
        sum.x += words[k].x;
        sum.y += words[k].y;
        sum_before.x += earlier ? words[k].x : 0;
        sum_before.y += earlier ? words[k].y : 0;
      }
      all[0] += sum.x & 0xffffu, all[1] += sum.x >> 16, all[2] += sum.y & 0xffffu, all[3] += sum.y >> 16;
      before[0] += sum_before.x & 0xffffu, before[1] += sum_before.x >> 16;
      before[2] += sum_before.y & 0xffffu, before[3] += sum_before.y >> 16;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (4 * i + e >= a.experts || all[e] == 0) continue;
      atomicAdd(s.before + 4 * i + e, before[e]);
      atomicAdd(s.start + 4 * i + e, all[e]);
    }
  }
  __syncthreads();
}

// Where shared memory holds it, a block's choices are put in order there first: neighbours then write neighbours. A word
// is an expert and the choice's number in the block.
constexpr int kChoiceBits = 14;

struct Staging {
  uint32_t *local, *words;  // [experts]: first of each expert in `words`; null: no staging
  uint32_t size;
};

template <int Rounds>
__device__ Staging stage_block(const Args& a, const Shared& s, uint32_t* memory, const int* expert, const int* place) {
  const int warp = threadIdx.x / 32, stride = (a.experts + 1) / 2 * 2;
  Staging staging{memory, memory + a.experts, 0};
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) s.start[e] = s.before[e];
  __syncthreads();
  staging.size = scan_experts<false>(a, s);
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) staging.local[e] = s.start[e];
#pragma unroll
  for (int r = 0; r < Rounds; r++) {
    if (expert[r] < 0) continue;
    const uint32_t at = s.start[expert[r]] + s.counters[warp * stride + expert[r]] + place[r];
    staging.words[at] = static_cast<uint32_t>(expert[r]) << kChoiceBits | ((warp * Rounds + r) * 32 + threadIdx.x % 32);
  }
  __syncthreads();
  return staging;
}

template <int Rounds, int Warps>
__device__ void place_block(const Args& a, const Shared& s, int64_t first, const int* expert, const int* place,
                            const Staging& staging) {
  add_rows<Rounds, Warps>(a, s);
  for (int e = blockIdx.x + gridDim.x * threadIdx.x; e < a.experts; e += gridDim.x * blockDim.x) {
    a.counts[e] = static_cast<int32_t>(s.start[e]);
  }
  __syncthreads();
  const uint32_t total = scan_experts<true>(a, s);
  const int stride = (a.experts + 1) / 2 * 2, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) s.before[e] += s.start[e];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Rounds; r++) {
    const int64_t choice = first + (warp * Rounds + r) * 32 + threadIdx.x % 32;
    int64_t at = -1;
    if (expert[r] >= 0) {
      at = static_cast<int64_t>(s.before[expert[r]]) + s.counters[warp * stride + expert[r]] + place[r];
      if (staging.local == nullptr && at < a.places) a.order[at] = static_cast<int32_t>(choice);
    }
    if (choice < a.choices) a.inverse[choice] = static_cast<int32_t>(at);
  }
  for (uint32_t i = threadIdx.x; i < staging.size; i += blockDim.x) {
    const uint32_t word = staging.words[i], e = word >> kChoiceBits;
    const int64_t at = static_cast<int64_t>(s.before[e]) + (i - staging.local[e]);
    if (at < a.places) a.order[at] = static_cast<int32_t>(first + (word & ((1u << kChoiceBits) - 1)));
  }
  const int warps = blockDim.x / 32;
  for (int e = static_cast<int>(blockIdx.x) * warps + warp; e < a.experts; e += static_cast<int>(gridDim.x) * warps) {
    write_expert(a, s, e, total, threadIdx.x % 32, 32);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(total);
  if (a.block_size > 0) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t b = blocks_of(a, total) + thread; b < a.blocks; b += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      a.block_experts[b] = -1;
    }
  }
}

constexpr int kStagedRounds = 6;

enum class Phase { kCount, kPlace, kPlaceOverlapped, kBoth };

template <int Rounds, int Warps, Phase P>
__global__ void __launch_bounds__(32 * Warps, 32 / Warps) sort_many(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) uint32_t memory[];
  const Shared s(memory, blockDim.x / 32, a.experts);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x * Rounds;
  int expert[Rounds], place[Rounds];
#if __CUDA_ARCH__ >= 900
  if (P == Phase::kCount) cudaTriggerProgrammaticLaunchCompletion();
#endif
  sort_block<Rounds, Warps>(a, s, first, expert, place);
  if (P == Phase::kCount || P == Phase::kBoth) {
    write_row(a, s);
    fill_order(a);
  }
  Staging staging{};
  if (P != Phase::kCount && Rounds > 1 && Rounds <= kStagedRounds) {
    __syncthreads();
    uint32_t* memory_left = reinterpret_cast<uint32_t*>(s.counters) + blockDim.x / 32 * ((a.experts + 1) / 2);
    if (a.staged) staging = stage_block<Rounds>(a, s, memory_left, expert, place);
  }
  if (P == Phase::kBoth) cooperative_groups::this_grid().sync();
#if __CUDA_ARCH__ >= 900
  if (P == Phase::kPlaceOverlapped) cudaGridDependencySynchronize();
#endif
  if (P != Phase::kCount) place_block<Rounds, Warps>(a, s, first, expert, place, staging);
}

// More experts than shared memory counts: one block, the order of the choices kept 1024 at a time.
__global__ void __launch_bounds__(1024, 1) sort_many_experts(const __grid_constant__ Args a, uint32_t* next) {
  __shared__ uint32_t carry, partial[32];
  __shared__ int32_t experts[1024];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_order(a);
  for (int e = threadIdx.x; e < a.experts; e += 1024) next[e] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.choices; i += 1024) {
    const int expert = local_expert(a, i);
    if (expert >= 0) atomicAdd(next + expert, 1u);
  }
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (int base = 0; base < a.experts; base += 1024) {
    const int e = base + static_cast<int>(threadIdx.x);
    const uint32_t count = e < a.experts ? next[e] : 0, size = padded(a, count);
    uint32_t inclusive = size;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const uint32_t other = __shfl_up_sync(kAll, inclusive, lanes);
      if (lane >= lanes) inclusive += other;
    }
    if (lane == 31) partial[warp] = inclusive;
    __syncthreads();
    uint32_t place = carry + inclusive - size;
    for (int w = 0; w < warp; w++) place += partial[w];
    __syncthreads();
    if (e < a.experts) {
      a.counts[e] = static_cast<int32_t>(count);
      a.offsets[e] = static_cast<int32_t>(place);
      next[e] = place;
      for (uint32_t b = a.block_size > 0 ? place / a.block_size : 1; a.block_size > 0 && b < (place + size) / a.block_size; b++) {
        if (b < a.blocks) a.block_experts[b] = e;
      }
    }
    if (threadIdx.x == 1023) carry = place + size;
    __syncthreads();
  }
  if (threadIdx.x == 0) a.offsets[a.experts] = static_cast<int32_t>(carry);
  if (a.block_size > 0) {
    for (int64_t b = carry / a.block_size + threadIdx.x; b < a.blocks; b += 1024) a.block_experts[b] = -1;
  }
  for (int64_t base = 0; base < a.choices; base += 1024) {
    const int64_t choice = base + threadIdx.x;
    const int expert = local_expert(a, choice);
    experts[threadIdx.x] = expert;
    __syncthreads();
    int rank = 0, equal = 0;
    for (int i = 0; i < 1024 && expert >= 0; i++) {
      const bool same = experts[i] == expert;
      equal += same;
      rank += same && i < static_cast<int>(threadIdx.x);
    }
    int64_t at = -1;
    if (expert >= 0) at = static_cast<int64_t>(next[expert]) + rank;
    __syncthreads();
    if (expert >= 0 && rank == 0) next[expert] += equal;
    if (at >= 0 && at < a.places) a.order[at] = static_cast<int32_t>(choice);
    if (choice < a.choices) a.inverse[choice] = static_cast<int32_t>(at);
    __syncthreads();
  }
}

// A warp copies up to 4 vectors a lane of one token to all its places; after the tokens, 32 places a warp are looked
// through for empty ones.
template <class V>
__global__ void __launch_bounds__(256) gather(const V* hidden, V* rows, const int32_t* inverse, const int32_t* order,
                                              int64_t tokens, int columns, int64_t vectors, int64_t places) {
  constexpr int kEach = 4;
  const int lane = threadIdx.x % 32;
  const int64_t pieces = (vectors + 32 * kEach - 1) / (32 * kEach), copies = tokens * pieces;
  const int64_t choices = tokens * columns, looks = (places + 31) / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; item < copies + looks; item += warps) {
    if (item < copies) {
      const int64_t t = item / pieces, first = item % pieces * (32 * kEach) + lane;
      V values[kEach];
#pragma unroll
      for (int k = 0; k < kEach; k++) {
        if (first + 32 * k < vectors) values[k] = __ldcs(hidden + t * vectors + first + 32 * k);
      }
      for (int base = 0; base < columns; base += 32) {
        const int mine = base + lane < columns ? inverse[t * columns + base + lane] : -1;
        for (int c = 0; c < min(32, columns - base); c++) {
          const int64_t place = __shfl_sync(kAll, mine, c);
          if (place < 0 || place >= places) continue;
#pragma unroll
          for (int k = 0; k < kEach; k++) {
            if (first + 32 * k < vectors) __stcs(rows + place * vectors + first + 32 * k, values[k]);
          }
        }
      }
    } else {
      const int64_t mine = (item - copies) * 32 + lane;
      unsigned empty = __ballot_sync(kAll, mine < places && order[mine < places ? mine : 0] == choices);
      for (; empty != 0; empty &= empty - 1) {
        const int64_t place = (item - copies) * 32 + __ffs(static_cast<int>(empty)) - 1;
        for (int64_t i = lane; i < vectors; i += 32) __stcs(rows + place * vectors + i, V{});
      }
    }
  }
}

// Warps per block by what fits into shared memory, rounds by how many choices there are.
struct Shape {
  int warps, rounds;
  int64_t blocks;
};

constexpr int kRounds[] = {1, 2, 3, 4, 6, 8, 12, 16};

Shape shape_of(const MoeDispatch& p, int sms) {
  const int64_t choices = p.T * p.C;
  int warps = choices > int64_t{32} * kManyWarps * 2 * sms ? 2 * kManyWarps : kManyWarps;
  while (warps > 1 && shared_bytes(warps, p.experts) > kSharedBytes) warps /= 2;
  const int64_t round = 32 * warps;
  int rounds = kRounds[0];
  for (const int more : kRounds) {
    if (choices > round * rounds * sms) rounds = more;
  }
  return {warps, rounds, std::max<int64_t>(1, (choices + round * rounds - 1) / (round * rounds))};
}

bool few(const MoeDispatch& p) { return p.T * p.C <= kFewChoices && shared_bytes(32, p.experts) <= kSharedBytes; }

template <class Kernel>
cudaError_t run(Kernel kernel, const Args& args, const Shape& shape, int bytes, cudaStream_t stream, cudaLaunchAttributeID attribute,
                bool with_attribute) {
  cudaLaunchAttribute attributes[1] = {};
  attributes[0].id = attribute;
  if (attribute == cudaLaunchAttributeCooperative) {
    attributes[0].val.cooperative = 1;
  } else {
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = static_cast<unsigned>(32 * shape.warps);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = with_attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <int Rounds, int Warps>
cudaError_t run_many(Args a, const Shape& shape, Chain chain, cudaStream_t stream) {
  const int plain = shared_bytes(shape.warps, a.experts);
  const int with_staging = plain + 4 * (a.experts + 32 * shape.warps * Rounds);
  a.staged = Rounds > 1 && Rounds <= kStagedRounds && with_staging <= 48 * 1024;
  const int bytes = a.staged ? with_staging : plain;
  if (chain == Chain::kCooperative) {
    return run(sort_many<Rounds, Warps, Phase::kBoth>, a, shape, bytes, stream, cudaLaunchAttributeCooperative, true);
  }
  const cudaError_t counted = run(sort_many<Rounds, Warps, Phase::kCount>, a, shape, bytes, stream, cudaLaunchAttributeCooperative, false);
  if (counted != cudaSuccess) return counted;
  if (chain == Chain::kOverlapped) {
    return run(sort_many<Rounds, Warps, Phase::kPlaceOverlapped>, a, shape, bytes, stream,
               cudaLaunchAttributeProgrammaticStreamSerialization, true);
  }
  return run(sort_many<Rounds, Warps, Phase::kPlace>, a, shape, bytes, stream, cudaLaunchAttributeCooperative, false);
}

template <int Warps>
cudaError_t run_rounds(const Args& a, const Shape& shape, Chain chain, cudaStream_t stream) {
  switch (shape.rounds) {
    case 1: return run_many<1, Warps>(a, shape, chain, stream);
    case 2: return run_many<2, Warps>(a, shape, chain, stream);
    case 3: return run_many<3, Warps>(a, shape, chain, stream);
    case 4: return run_many<4, Warps>(a, shape, chain, stream);
    case 6: return run_many<6, Warps>(a, shape, chain, stream);
    case 8: return run_many<8, Warps>(a, shape, chain, stream);
    case 12: return run_many<12, Warps>(a, shape, chain, stream);
    default: return run_many<16, Warps>(a, shape, chain, stream);
  }
}

template <class V>
cudaError_t run_gather(const MoeDispatch& p, int sms, cudaStream_t stream) {
  const int64_t vectors = p.H * static_cast<int64_t>(size_of(p.rows.dtype)) / static_cast<int64_t>(sizeof(V));
  const int64_t items = p.T * ((vectors + 127) / 128) + (p.P + 31) / 32;
  const int64_t blocks = std::clamp<int64_t>((items + 7) / 8, 1, int64_t{sms} * 64);
  gather<V><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(
      static_cast<const V*>(p.hidden.data), static_cast<V*>(p.rows.data), p.inverse.as<const int32_t>(),
      p.order.as<const int32_t>(), p.T, static_cast<int>(p.C), vectors, p.P);
  return cudaGetLastError();
}

}  // namespace

size_t scratch_bytes(const MoeDispatch& p, int sms) {
  if (p.experts > kManyExperts) return size_t{4} * p.experts;
  if (few(p)) return 0;
  return static_cast<size_t>(shape_of(p, sms).blocks) * row_words(p.experts) * 4;
}

cudaError_t launch(const MoeDispatch& p, int sms, void* scratch, cudaStream_t stream, const char** path, Chain chain) {
  Args a{};
  a.ids = p.ids.as<const int32_t>();
  a.order = p.order.as<int32_t>();
  a.inverse = p.inverse.as<int32_t>();
  a.counts = p.counts.as<int32_t>();
  a.offsets = p.offsets.as<int32_t>();
  a.block_experts = p.block_experts.as<int32_t>();
  a.rows = static_cast<uint32_t*>(scratch);
  a.choices = p.T * p.C;
  a.places = p.P;
  a.blocks = p.blocks;
  a.experts = p.experts;
  a.first_expert = p.first_expert;
  a.block_size = p.block_experts ? p.block_size : 0;
  while (a.experts >> a.bits != 0) a.bits++;
  a.shift = -1;
  for (int bit = 0; bit < 31; bit++) {
    if (a.block_size == 1 << bit) a.shift = bit;
  }
  const Shape shape = shape_of(p, sms);
  cudaError_t error = cudaSuccess;
  if (p.experts > kManyExperts) {
    *path = "one block";
    sort_many_experts<<<1, 1024, 0, stream>>>(a, static_cast<uint32_t*>(scratch));
    error = cudaGetLastError();
  } else if (few(p)) {
    *path = "few choices: every block sorts all";
    // Fewer warps where choices are few: less to clear and to add up. At least eight share the slice.
    const int warps = std::max(8, static_cast<int>((a.choices + 31) / 32));
    const unsigned blocks = static_cast<unsigned>(std::max<int64_t>(1, (a.places + kSlice - 1) / kSlice));
    const int bytes = shared_bytes(warps, a.experts);
    if (warps <= 8) {
      sort_few<8><<<blocks, 32 * warps, bytes, stream>>>(a);
    } else {
      sort_few<32><<<blocks, 32 * warps, bytes, stream>>>(a);
    }
    error = cudaGetLastError();
  } else {
    // All blocks of a cooperative kernel run at once; two overlapping kernels are quicker while there are few blocks.
    const bool together = shape.blocks <= (shape.warps > kManyWarps ? 1 : 2) * int64_t{sms};
    if (chain == Chain::kDefault) chain = together && shape.rounds > 1 ? Chain::kCooperative : Chain::kOverlapped;
    if (chain == Chain::kCooperative && !together) chain = Chain::kPlain;
    *path = chain == Chain::kCooperative ? "one cooperative kernel" : chain == Chain::kOverlapped ? "count and place, overlapped" : "count and place";
    error = shape.warps > kManyWarps ? run_rounds<2 * kManyWarps>(a, shape, chain, stream) : run_rounds<kManyWarps>(a, shape, chain, stream);
  }
  if (error != cudaSuccess || !p.rows || p.P == 0 || p.H == 0) return error;
  const int64_t bytes = p.H * static_cast<int64_t>(size_of(p.rows.dtype));
  const auto whole = [&](int64_t size) {
    return bytes % size == 0 && reinterpret_cast<uintptr_t>(p.rows.data) % size == 0 && reinterpret_cast<uintptr_t>(p.hidden.data) % size == 0;
  };
  if (whole(16)) return run_gather<int4>(p, sms, stream);
  if (whole(4)) return run_gather<int32_t>(p, sms, stream);
  return run_gather<int16_t>(p, sms, stream);
}

}  // namespace moe::dispatch
