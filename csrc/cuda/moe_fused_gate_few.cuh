// The kernel of moe_fused_gate for small and middle batches of 256/8/4: a warp per token. A launch that finds all of it
// cold lasts nearly 2 us before it computes anything, so what counts is the chain of instructions from the arrival of a
// row to its stores, and then their number.
//
// Layout: lane l holds experts 8 l .. 8 l + 7, so that a group of 32 lies in 4 neighbouring lanes.
// 1. Every lane asks for its part of the row, then for the bias, and prepares its lists while they come.
// 2. Exact choices (two special-function instructions each) stay in registers. The two best of each group, by
//    shuffles, give the four groups; their smallest second best is the threshold: at least eight choices reach it.
// 3. Choices that do (about 11) go to a list in shared memory, in the order of ids. Each finds its rank by counting who
//    beats it; ranks below K are the choices.
// A rank that nobody has means equal choices: all are ranked again, ties to the lower id, before any is stored. A token
// with a NaN, an infinite threshold, equal groups at the cut or more than kCandidates candidates is routed by gate_row
// of the general kernel.
//
// Limits: 256 experts, 8 groups, 4 kept, sigmoid; K <= 8; at most 32 columns; logits and bias aligned to 16 bytes;
// fewer than 2^31 cells of the outputs. Order of accumulation: a tree over the slots.
#pragma once
#include "moe_fused_gate_lanes.cuh"

namespace moe::gate {

#ifdef __CUDACC__

// Shared memory by address: with pointers the compiler works the address of the block's memory out anew in every
// branch, 30 cycles each.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(at));
  return at;
}
__device__ __forceinline__ void put(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void put4(uint32_t at, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ uint32_t get(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ float4 get4(uint32_t at) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
// A load that stays where it is written.
__device__ __forceinline__ uint4 ask(const void* at) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at)
               : "memory");
  return x;
}

// Brings 32 bytes into the first cache, by copying four of them to where nobody reads: nobody waits for them. (A load
// whose result nobody reads is dropped by the assembler.)
__device__ __forceinline__ void prefetch(uint32_t unread, const void* at) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(unread), "l"(at) : "memory");
}

// What a warp has in shared memory, in bytes from its start. Choices begin as -inf, scores by rank as 0.
struct FewList {
  static constexpr int kChoices = 0;                          // of candidates, in the order of ids, in chunks of 16
  static constexpr int kWeights = 4 * (kCandidates + 16);     // scores by rank
  static constexpr int kChosen = kWeights + 32;               // experts by rank
  static constexpr int kExperts = kChosen + 32;               // of candidates
  static constexpr int kScores = kExperts + 4 * kCandidates;  // of all experts
  static constexpr int kUnread = kScores + 4 * 256;           // where prefetches end
  static constexpr int kBytes = kUnread + 4 * 32;
};
inline constexpr int kFewWarps = 36;      // of a multiprocessor
inline constexpr int kFewBlockWarps = 2;  // of a block
inline constexpr int kMostFewWarps = 32;  // of a block that counts the load
// In grids of more blocks, each letting the next kernel start costs more than that kernel gains.
inline constexpr unsigned kEarlyBlocks = 2048;
static_assert(FewList::kBytes % 16 == 0 && FewList::kBytes >= 4 * row_scratch(256, 8));

__device__ __forceinline__ void few_clear(uint32_t list) {
  const int lane = threadIdx.x % 32;
  const float x = lane < FewList::kWeights / 16 ? -infinity() : 0.0f;
  if (lane < FewList::kChosen / 16) put4(list + 16 * lane, x, x, x, x);
}

// The choices of sixteen candidates.
struct Sixteen {
  float4 four[4];
};
__device__ __forceinline__ Sixteen get16(uint32_t at) {
  Sixteen v;
#pragma unroll
  for (int k = 0; k < 4; k++) v.four[k] = get4(at + 16 * k);
  return v;
}
// How many of the `count` candidates, of which the first are in `v`, beat `own`; with Ties also those that equal it and
// come before place i.
template <bool Ties>
__device__ __forceinline__ int few_rank(uint32_t list, Sixteen v, int count, float own, int i) {
  float rank = 0x1p23f;  // whole numbers that can be read as integers
#pragma unroll 1
  for (int j = 0;;) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float other[4] = {v.four[k].x, v.four[k].y, v.four[k].z, v.four[k].w};
      float beats[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        beats[m] = other[m] > own || (Ties && other[m] == own && j + 4 * k + m < i) ? 1.0f : 0.0f;
      }
      rank += (beats[0] + beats[1]) + (beats[2] + beats[3]);
    }
    j += 16;
    if (j >= count) return __float_as_int(rank) - __float_as_int(0x1p23f);
    v = get16(list + 4 * j);
  }
}
// Stores a choice in its place, which is K or more for those that are none.
__device__ __forceinline__ void few_choose(uint32_t list, int rank, int K, uint32_t expert, uint32_t score) {
  if (rank >= K) return;
  put(list + FewList::kChosen + 4 * rank, expert);
  put(list + FewList::kWeights + 4 * rank, score);
}

// Ranks and stores where choices are equal, or more than there are lanes. Rare things are functions of their own, so
// that the other instructions are fetched without gaps.
__device__ __noinline__ void few_rank_ties(uint32_t list, int count, int K) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const uint32_t expert = get(list + FewList::kExperts + 4 * i);
    const int rank = few_rank<true>(list, get16(list), count, __uint_as_float(get(list + 4 * i)), i);
    few_choose(list, rank, K, expert, get(list + FewList::kScores + 4 * expert));
  }
}
// valid_tokens where the launch has brought what the host gave into range.
__device__ __forceinline__ int few_valid(const Args& a) {
  return a.valid_device != nullptr ? min(*a.valid_device, static_cast<int>(a.T)) : static_cast<int>(a.valid_host);
}
// The padding row of a token, by some lanes of a warp.
template <int Lanes>
__device__ __forceinline__ void few_pad(const Args& a, int t) {
#pragma unroll 1
  for (int i = threadIdx.x % Lanes; i < a.columns; i += Lanes) write_padding(a, Rows(a, t), 0, i);
}
// The id of a column with everything that a call may ask for. Not a function of its own: that would read the arguments
// from memory, cold, one after the other.
__device__ __forceinline__ int32_t few_extras(const Args& a, const int32_t* map, int cell, bool routed, int32_t id,
                                              uint32_t* histogram) {
  if (routed && id >= a.routed) id += a.shared;
  if (routed && a.logical_ids != nullptr) a.logical_ids[cell] = id;
  if (map != nullptr) id = __ldg(map + id);
  if (a.counters != nullptr) count_load(a, histogram, id);
  return id;
}

// Routes token t by a warp, with kBytes of shared memory at `memory`. Together: all warps of the block are here.
template <class T, bool Together>
__device__ __forceinline__ void few_token(const Args& a, int t, char* memory, uint32_t* histogram) {
  using List = FewList;
  const int lane = threadIdx.x % 32;
  // The row before all else: the barrier keeps the compiler from asking for anything earlier.
  const T* row = static_cast<const T*>(a.logits) + (static_cast<int64_t>(t) * 256 + 8 * lane);
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) octet.words[i] = ask(row + 16 / sizeof(T) * i);
  if (Together) __syncthreads();
  if (gridDim.x <= kEarlyBlocks) let_next_kernel_start();
  const uint32_t list = shared_address(memory);
  Octet<float> biases = {};
  const int32_t* map = nullptr;
  if (a.plain) {
    biases = {ask(a.bias + 8 * lane), ask(a.bias + 8 * lane + 4)};
  } else {
    if (a.bias != nullptr) biases = {ask(a.bias + 8 * lane), ask(a.bias + 8 * lane + 4)};
    if (a.id_map != nullptr) {
      map = a.id_map + static_cast<int64_t>(map_round(a, t)) * (a.E + a.shared);
      // Its row is on its way to the first cache before it is needed. With many tokens it is there already.
      if (gridDim.x <= kEarlyBlocks) prefetch(list + List::kUnread + 4 * lane, map + 8 * lane);
    }
    if (t >= few_valid(a)) {
      few_pad<32>(a, t);
      return;
    }
  }
  few_clear(list);
  __syncwarp();

  float c[8], score[8], bias[8];
  unpack(octet, c);
  unpack(biases, bias);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    score[i] = fast_sigmoid(c[i]);
    c[i] = score[i] + bias[i];
  }
  put4(list + List::kScores + 32 * lane, score[0], score[1], score[2], score[3]);
  put4(list + List::kScores + 32 * lane + 16, score[4], score[5], score[6], score[7]);

  // Groups: kept are those that fewer than four others beat. Equal groups at the cut make them more than four, and so
  // does a NaN, which no other beats.
  float best, next;
  best_of_octet(c, best, next);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float other_best = __shfl_xor_sync(kAll, best, lanes), other_next = __shfl_xor_sync(kAll, next, lanes);
    merge_best(best, next, other_best, other_next);
  }
  const float sum = a.group_score == GroupScore::kTop2Sum ? best + next : best;
  // Each of the four lanes of a group looks at two groups, the first at its own too.
  const int others = (lane & 28) ^ (lane & 3) << 3;
  const float other = __shfl_sync(kAll, sum, others), next_other = __shfl_sync(kAll, sum, others ^ 4);
  float above = (other > sum ? 1.0f : 0.0f) + (next_other > sum ? 1.0f : 0.0f);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) above += __shfl_xor_sync(kAll, above, lanes);
  const bool kept = above < 4;
  const uint32_t kept_lanes = __ballot_sync(kAll, kept);
  const auto ordered_bits = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  const int32_t key = kept ? ordered_bits(__float_as_int(next)) : 0x7fffffff;
  const float threshold = __int_as_float(ordered_bits(__reduce_min_sync(kAll, key)));

  // Candidates: the sign of a difference, copied into a byte, gives a bit: of experts 0, 2, 4 and 6 from bit 2 and of
  // the others from bit 10.
  const float least = kept ? threshold : infinity();
  uint32_t signs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    asm("prmt.b32 %0, %1, %2, 0xfbfb;" : "=r"(signs[i]) : "f"(c[2 * i] - least), "f"(c[2 * i + 1] - least));
  }
  const auto choose = [](uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); };
  uint32_t mask = ~choose(0x0c0c, choose(0x0404, signs[0], signs[1]), choose(0x1010, signs[2], signs[3])) & 0x3c3c;
  // Places: lanes of a group add up what they found, and one sum over the warp has a byte for each of the four groups.
  const uint32_t found = __popc(mask);
  uint32_t upto = found;
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    asm volatile("{\n.reg .pred p;\n.reg .b32 x;\nshfl.sync.up.b32 x|p, %0, %1, 0x1c00, -1;\n@p add.u32 %0, %0, x;\n}"
                 : "+r"(upto)
                 : "r"(lanes));
  }
  const int before = 2 * __popc(kept_lanes & ((1u << (lane & 28)) - 1));  // bits of the groups before this one
  const uint32_t of_groups = __reduce_add_sync(kAll, found << (before & 31));
  const int count = of_groups * 0x01010101u >> 24;
  if (__popc(kept_lanes) != 16 || !(fabsf(threshold) < infinity()) || count > kCandidates) {
    __syncwarp();
    gate_row_apart<8>(a, t, reinterpret_cast<uint32_t*>(memory), histogram);
    return;
  }
  const uint32_t of_before = of_groups & ((1u << before) - 1);
  uint32_t at = list + 4 * ((of_before * 0x01010101u >> 24) + upto - found);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint32_t after;  // a new register each: a store must have read its address before it may change
    const int bit = i % 2 * 8 + i / 2 + 2;
    asm volatile(
        "{\n.reg .pred p;\n.reg .b32 x;\nand.b32 x, %2, %3;\nsetp.ne.b32 p, x, 0;\n@p st.shared.f32 [%1], %4;\n"
        "@p st.shared.b32 [%1+%7], %5;\nshr.u32 x, x, %6;\nadd.u32 %0, %1, x;\n}"
        : "=r"(after)
        : "r"(at), "r"(mask), "r"(1 << bit), "f"(c[i]), "r"(8 * lane + i), "r"(bit - 2), "n"(List::kExperts)
        : "memory");
    at = after;
  }
  __syncwarp();
  // A lane without a candidate has -inf, which all of them beat. Where no choices are equal, the ranks are all numbers
  // up to theirs. (The first 32 may be that of more; then the choices are among them.)
  const float own = __uint_as_float(get(list + 4 * lane));
  const uint32_t expert = get(list + List::kExperts + 4 * lane) & 255;
  const Sixteen first = get16(list);
  const uint32_t own_score = get(list + List::kScores + 4 * expert);
  const int rank = few_rank<false>(list, first, count, own, lane);
  const uint32_t ranks = __reduce_or_sync(kAll, __funnelshift_lc(0, 1, rank));
  if (ranks + 1 != __funnelshift_lc(0, 2, count)) {
    few_rank_ties(list, count, a.K);
  } else {
    few_choose(list, rank, a.K, expert, own_score);
  }
  __syncwarp();
  int32_t id = static_cast<int32_t>(get(list + List::kChosen + 4 * lane));
  float weight = __uint_as_float(get(list + List::kWeights + 4 * lane));
  const float4 low = get4(list + List::kWeights), high = get4(list + List::kWeights + 16);

  // Columns
  if (lane < a.columns) {
    const bool routed = lane < a.K;
    float total = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
    total = fminf(fmaxf(total, a.least_total), a.most_total);
    weight *= fast_inverse(total) * a.scale;
    if (!routed) {
      id = lane + a.shared_column;
      weight = a.shared_weight;
    }
    if (a.extras) id = few_extras(a, map, t * a.K + lane, routed, id, histogram);
    const uint32_t cell = t * a.columns + lane;
    a.ids[cell] = id;
    a.weights[cell] = weight;
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kFewBlockWarps, kFewWarps / kFewBlockWarps)
    gate_few(const __grid_constant__ Args a) {
  __shared__ __align__(16) char lists[kFewBlockWarps][FewList::kBytes];
  const int warp = threadIdx.x / 32, t = blockIdx.x * kFewBlockWarps + warp;
  if (t < static_cast<int>(a.T)) few_token<T, true>(a, t, lists[warp], nullptr);
}

// The same with the load counted in shared memory: histogram counters, then a list for every warp. A block for every
// multiprocessor, so that few add their counters to the load: a line of it takes 2.3 ns for every 32 bytes that one of
// them adds.
template <class T>
__global__ void __launch_bounds__(32 * kMostFewWarps, 1) gate_few_counted(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) uint32_t shared_memory[];
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  clear_histogram(a, shared_memory);
  __syncthreads();
#pragma unroll 1
  for (int t = blockIdx.x + gridDim.x * warp; t < static_cast<int>(a.T); t += gridDim.x * warps) {
    char* memory = reinterpret_cast<char*>(shared_memory + a.histogram) + warp * FewList::kBytes;
    few_token<T, false>(a, t, memory, shared_memory);
    __syncwarp();
  }
  __syncthreads();
  add_histogram(a, shared_memory);
}

#endif  // __CUDACC__

}  // namespace moe::gate
