// The kernel of moe_fused_gate for small and middle batches of 256/8/4: a warp per token. A launch that finds all of it
// cold lasts nearly 2 us before it computes anything, so what counts is the chain of instructions from the arrival of a
// row to its stores, and from a few thousand tokens on their number.
//
// Layout: lane l holds experts 8 l .. 8 l + 7, so that a group of 32 lies in 4 neighbouring lanes.
// 1. Every lane asks for its part of the row, then for the bias. Exact choices and scores stay in registers.
// 2. The two best of each group, by shuffles, and by comparing their sums the four groups. Their smallest second best
//    is the threshold: at least eight choices reach it.
// 3. The groups that are kept put choices and scores into shared memory, one after the other, so that every lane takes
//    four of the 128 choices that are left. Those that reach the threshold (about 11) go to a list as keys: how many
//    floats the choice is above the threshold, then the slot among the 128, so that no two are equal.
// 4. Two lanes for each candidate, or one where there are more than 16, count who beats it: its rank is its column.
// A list longer than the warp goes by rounds, and so does a token whose choices are negative or too far apart for keys.
// A token with a NaN or equal groups at the cut is routed by gate_row of the general kernel.
//
// Limits: 256 experts, 8 groups, 4 kept, sigmoid; K <= 8; at most 16 shared experts; logits and bias aligned to 16
// bytes; fewer than 2^27 tokens and 2^31 cells of an output. Order of accumulation: a tree over the slots.
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

// In grids of more blocks, each letting the next kernel start costs more than that kernel gains.
inline constexpr unsigned kEarlyBlocks = 2048;

// valid_tokens where the launch has brought what the host gave into range.
__device__ __forceinline__ int few_valid(const Args& a) {
  return a.valid_device != nullptr ? min(*a.valid_device, a.tokens) : a.valid;
}
// The padding row of a token, by some lanes of a warp.
template <int Lanes>
__device__ __forceinline__ void few_pad(const Args& a, int t) {
#pragma unroll 1
  for (int i = threadIdx.x % Lanes; i < a.columns; i += Lanes) write_padding(a, Rows(a, t), 0, i);
}
// count_load where there is no histogram.
__device__ __forceinline__ void few_count(const Args& a, int32_t id) {
  if (static_cast<uint32_t>(id) < static_cast<uint32_t>(a.slots)) add_load(a, id, 1);
}
// The id of an expert among shared ones.
__device__ __forceinline__ int32_t few_logical(const Args& a, int32_t expert) {
  return expert < a.routed ? expert : expert + a.shared;
}

// What a warp has in shared memory, in bytes from its start. Slots are the experts of the groups kept, from the last to
// the first; a lane that has a kept group has 8 of them.
struct FewList {
  static constexpr int kSlots = 128;
  static constexpr int kKeys = 0;                                       // of candidates; 32 begin as 0
  static constexpr int kWeights = 4 * kSlots, kChosen = kWeights + 32;  // by rank: scores; slots, where by rounds
  static constexpr int kFirst = kChosen + 32;                           // first expert of each eight slots
  static constexpr int kChoices = kFirst + 64;                          // of slots
  static constexpr int kScores = kChoices + 4 * kSlots;                 // of slots
  static constexpr int kUnread = kScores + 4 * kSlots;                  // where prefetches end
  static constexpr int kBytes = kUnread + 128;
};
static_assert(FewList::kBytes % 128 == 0 && FewList::kBytes >= 4 * row_scratch(256, 8));
inline constexpr float kOrigin = 0x1p23f;         // whole numbers above it can be read as integers
inline constexpr uint32_t kMostAbove = 0xfe0000;  // floats that a choice can be above the threshold for a key

// Keeps the compiler from working x out anew.
__device__ __forceinline__ uint32_t held(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The lanes of kept groups put choices and scores into eight slots each. Predicates differ so that the assembler makes
// no branch of them, which would have to come together again.
__device__ __forceinline__ void few_put(uint32_t list, uint32_t place, float above, uint32_t first, const float* c,
                                        const float* score) {
  using List = FewList;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.lt.f32 p, %0, 0f40800000;\nsetp.lt.f32 q, %0, 0f40780000;\n"
      "@p st.shared.v4.f32 [%1+%20], {%9, %8, %7, %6};\n@q st.shared.v4.f32 [%1+%20+16], {%5, %4, %3, %2};\n"
      "@p st.shared.v4.f32 [%1+%21], {%17, %16, %15, %14};\n@q st.shared.v4.f32 [%1+%21+16], {%13, %12, %11, %10};\n"
      "@p st.shared.b32 [%18+%22], %19;\n}" ::"f"(above),
      "r"(list + 32 * place), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "f"(c[4]), "f"(c[5]), "f"(c[6]), "f"(c[7]),
      "f"(score[0]), "f"(score[1]), "f"(score[2]), "f"(score[3]), "f"(score[4]), "f"(score[5]), "f"(score[6]),
      "f"(score[7]), "r"(list + 4 * place), "r"(first), "n"(List::kChoices), "n"(List::kScores), "n"(List::kFirst)
      : "memory");
}

// `rank` and how many of N keys beat `own`.
template <int N>
__device__ __forceinline__ float few_rank(uint32_t others, float own, float rank) {
#pragma unroll 1
  for (int j = 0; j < N; j += 8, others += 32) {
    const float4 v[2] = {get4(others), get4(others + 16)};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float other[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
      float beats[4];
#pragma unroll
      for (int m = 0; m < 4; m++) beats[m] = other[m] > own ? 1.0f : 0.0f;
      rank += (beats[0] + beats[1]) + (beats[2] + beats[3]);
    }
  }
  return rank;
}

// The eight best slots by rounds of the best choice that is left.
__device__ __noinline__ void few_rounds(uint32_t list) {
  using List = FewList;
  const int lane = threadIdx.x % 32;
  const float4 four = get4(list + List::kChoices + 16 * lane);
  uint32_t key[4] = {rank_key(four.x), rank_key(four.y), rank_key(four.z), rank_key(four.w)};
#pragma unroll 1
  for (int r = 0; r < 8; r++) {
    const uint32_t best = __reduce_max_sync(kAll, max(max(key[0], key[1]), max(key[2], key[3])));
    int slot = -1;
#pragma unroll
    for (int m = 0; m < 4; m++) slot = key[m] == best ? 4 * lane + m : slot;
    slot = __reduce_max_sync(kAll, slot);
#pragma unroll
    for (int m = 0; m < 4; m++) key[m] = slot == 4 * lane + m ? 0 : key[m];
    if (lane == 0) put(list + List::kChosen + 4 * r, slot);
  }
  __syncwarp();
}

// Small: a small batch. Allowed: what the call may ask for, of Asks; a thing alone it asks for.
template <class T, int Warps, int PerSm, bool Small, uint32_t Allowed>
__global__ void __launch_bounds__(32 * Warps, PerSm / Warps) gate_few(const __grid_constant__ Args a) {
  using List = FewList;
  __shared__ __align__(128) char memory[Warps][List::kBytes];
  const uint32_t thread = blockIdx.x * (32 * Warps) + threadIdx.x, lane = held(threadIdx.x % 32);
  const int t = static_cast<int>(thread / 32);
  if (t >= a.tokens) return;

  // The row before all else: the barrier keeps the compiler from asking for anything earlier.
  const T* row = static_cast<const T*>(a.logits) + static_cast<uint64_t>(thread) * 8;
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) octet.words[i] = ask(row + 16 / sizeof(T) * i);
  __syncthreads();
  if (Small && gridDim.x <= kEarlyBlocks) let_next_kernel_start();
  const uint32_t asks = (Allowed & (Allowed - 1)) != 0 ? Allowed & a.asks : Allowed;
  const uint32_t list = shared_address(memory[threadIdx.x / 32]), mine = held(list + 4 * lane);
  Octet<float> biases = {};
  if ((asks & kUnbiased) == 0) {
    const float* bias_at = a.bias + 8 * lane;
    asm("" : "+l"(bias_at));  // one address for both
    biases = {ask(bias_at), ask(bias_at + 4)};
  }
  uint32_t map = 0;  // the first cell of its row
  if ((asks & kMapped) != 0) {
    map = map_round(a, t) * a.map_row;
    // Its row is on its way to the first cache before it is needed. With many tokens it is there already.
    if (Small) prefetch(mine + List::kUnread, a.id_map + map + 8 * lane);
  }
  if ((asks & kPadded) != 0 && t >= few_valid(a)) {
    few_pad<32>(a, t);
    return;
  }
  put(mine + List::kKeys, 0);
  if ((asks & kFewer) != 0 && lane < 8) put(mine + List::kWeights, 0);

  float c[8], score[8], best, next;
  {
    float bias[8];
    unpack(octet, c);
    unpack(biases, bias);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      score[i] = fast_sigmoid(c[i]);
      c[i] = score[i] + bias[i];
    }
    best_of_octet(c, best, next);
  }

  // Groups: kept are those that fewer than four others beat. Each of a group's four lanes looks at two, the first at
  // its own too. Equal groups at the cut make them more than four, and so does a NaN, which no other beats.
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const float other_best = __shfl_xor_sync(kAll, best, lanes), other_next = __shfl_xor_sync(kAll, next, lanes);
    merge_best(best, next, other_best, other_next);
  }
  const float sum = (asks & kOneBest) == 0 ? best + next : best;
  const int others = (lane & 28) ^ (lane & 3) << 3;
  const float other = __shfl_sync(kAll, sum, others), next_other = __shfl_sync(kAll, sum, others ^ 4);
  float above = (other > sum ? 1.0f : 0.0f) + (next_other > sum ? 1.0f : 0.0f);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) above += __shfl_xor_sync(kAll, above, lanes);
  unsigned lanes_above;
  asm("mov.u32 %0, %%lanemask_gt;" : "=r"(lanes_above));
  const unsigned kept = __ballot_sync(kAll, above < 4);  // four lanes a group
  const uint32_t place = held(__popc(kept & lanes_above));

  // The threshold; and are there four groups, and choices that reach it all positive and near enough to each other?
  const int least = __reduce_min_sync(kAll, above < 4 ? __float_as_int(next) : 0x7fffffff);
  const uint32_t apart = (__float_as_uint(best) & 0x7fffffff) - least;  // much where `least` is negative
  const bool odd = (place > 16) | ((apart >= kMostAbove) & (above < 4));
  const int K = (Allowed & kFewer) != 0 ? a.K : 8, columns = (Allowed & (kShared | kFewer)) != 0 ? a.columns : 8;
  const int last = static_cast<int>(lane) + columns - 32;  // the last lanes have columns of shared experts
  const bool beyond = (Allowed & kShared) != 0 && last >= K;
  float score_of, rank;  // of the lane's candidate
  int32_t logical, id;
  bool ranked;
  // What belongs to a candidate, whose slot is in the lower bits of its key, is asked for before its rank is known.
  const auto take = [&](uint32_t key) {
    score_of = __uint_as_float(get(list + held(key & 127) * 4 + List::kScores));
    logical = static_cast<int32_t>(get(list + held(key & 120) / 2 + List::kFirst) | (~key & 7));
    if ((asks & kMoved) != 0) logical = few_logical(a, logical);
    if (beyond) logical = a.routed - K + last;
    id = logical;
    if ((asks & kMapped) != 0) id = __ldg(a.id_map + (map + static_cast<uint32_t>(logical)));
  };
  if (__any_sync(kAll, odd)) {
    if (__popc(kept) != 16) {
      gate_row_apart<8>(a, t, reinterpret_cast<uint32_t*>(memory[threadIdx.x / 32]), nullptr);
      return;
    }
    few_put(list, place, above, 8 * lane, c, score);
    __syncwarp();
  rounds:
    few_rounds(list);
    take(get(list + List::kChosen + 4 * (lane & 7)));
    rank = kOrigin + static_cast<float>(lane);
    ranked = lane < 8;
  } else {
    few_put(list, place, above, 8 * lane, c, score);
    __syncwarp();
    const float4 four = get4(list + List::kChoices + 16 * lane);
    const float choice[4] = {four.x, four.y, four.z, four.w};
    const uint32_t key_base = 128 + 4 * lane - 128 * static_cast<uint32_t>(least);

    // Candidates: a place each, and the key
    bool reaches[4];
    uint32_t places = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      reaches[i] = choice[i] >= __int_as_float(least);
      places += __popc(__ballot_sync(kAll, reaches[i]) & lanes_above);
    }
    uint32_t at = list + 4 * places;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (reaches[i]) put(at + List::kKeys, 128 * static_cast<uint32_t>(__float_as_int(choice[i])) + (key_base + i));
      at += reaches[i] ? 4 : 0;
    }
    // Ranks. A lane without a candidate has 0, which at least eight beat.
    if (!__any_sync(kAll, at > list + 64)) {
      __syncwarp();
      const uint32_t own = get((mine & ~64) + List::kKeys);
      take(own);
      rank = few_rank<8>(list + List::kKeys + held(lane & 16) * 2, __uint_as_float(own), kOrigin / 2);
      rank += __shfl_xor_sync(kAll, rank, 16);
      ranked = lane < 16;
    } else {
      __syncwarp();
      if (__any_sync(kAll, at > list + 4 * (32 + K - columns))) goto rounds;
      const uint32_t own = get(mine + List::kKeys);
      take(own);
      rank = few_rank<32>(list + List::kKeys, __uint_as_float(own), kOrigin);
      ranked = true;
    }
  }
  int column = __float_as_int(rank) - __float_as_int(kOrigin);
  const bool chosen = ranked && column < K;
  if (chosen) put(list + List::kWeights + 4 * column, __float_as_uint(score_of));
  if (beyond) column = last;
  __syncwarp();

  // Columns
  if (chosen || beyond) {
    const float4 low = get4(list + List::kWeights), high = get4(list + List::kWeights + 16);
    const float total = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
    const float inverse = (asks & kUndivided) != 0 ? 1.0f : fast_inverse(fmaxf(total, kLeastTotal));
    const uint32_t cell = t * columns + column;
    a.ids[cell] = id;
    a.weights[cell] = beyond ? a.shared_weight : score_of * (inverse * a.scale);
    if ((asks & kCaptured) != 0 && chosen) a.logical_ids[t * K + column] = logical;
    if ((asks & kCounted) != 0) few_count(a, id);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
