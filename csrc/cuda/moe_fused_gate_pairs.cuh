// The kernel of moe_fused_gate for middle batches of 256/8/4: two tokens per warp, of which every register holds a pair
// of halves, so that one instruction serves both.
//
// Layout: lane l holds experts 8 l .. 8 l + 7 of both tokens, so that a group of 32 lies in 4 neighbouring lanes.
// 1. Rough choices: within kChoiceError, rounded to halves.
// 2. The two best of each group, by shuffles, give the four groups. Where the fourth and the fifth are closer than
//    the error, the warp scores the token exactly. The smallest second best of the four, less the error, bounds the
//    eighth best choice from below.
// 3. Experts that reach it (about 11 a token) go to a list in shared memory, in the order of ids. Half of the lanes
//    take the candidates of a token, one each, score them exactly, and each finds its rank by counting who beats it.
//    Where a list has more than 16, the tokens take turns with all lanes.
// A rank that nobody has means equal choices: they are ranked again, ties to the lower id. A list longer than the warp
// goes by rounds. A token that this does not cover (NaN, infinite scores, equal groups at the cut) is routed by
// gate_row.
//
// Limits: those of gate_few. Order of accumulation: a tree over the slots.
#pragma once
#include "moe_fused_gate_few.cuh"
#include "moe_fused_gate_near.cuh"

namespace moe::gate {

#ifdef __CUDACC__

inline constexpr int kPairWarps = 36;  // of a multiprocessor

// What a warp has in shared memory, in bytes from its start; token h's part is h strides further.
struct PairLists {
  static constexpr int kExperts = 0, kExpertStride = 128;    // of candidates, a byte each: never more than four groups
  static constexpr int kChoices = 256, kChoiceStride = 128;  // of candidates, padded with -inf
  static constexpr int kChosen = 512, kChosenStride = 64;    // expert and score by rank
  static constexpr int kUsed = 640;
  static constexpr int kBytes = kUsed > 4 * row_scratch(256, 8) ? kUsed : (4 * row_scratch(256, 8) + 15) / 16 * 16;
};

// The sum of x in the lanes up to this one.
__device__ __forceinline__ uint32_t sum_up_to_lane(uint32_t x) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    asm volatile("{\n.reg .pred p;\n.reg .b32 x;\nshfl.sync.up.b32 x|p, %0, %1, 0, -1;\n@p add.u32 %0, %0, x;\n}"
                 : "+r"(x)
                 : "r"(lanes));
  }
  return x;
}

// Stores a byte where `bit` of the mask is set. Returns the place after it, in a new register: a store must have read
// its address before it may change.
__device__ __forceinline__ uint32_t put_byte_if(uint32_t mask, int bit, uint32_t at, uint32_t x) {
  uint32_t after;
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 x;\nand.b32 x, %1, %4;\nsetp.ne.u32 p, x, 0;\n@p st.shared.u8 [%2], %3;\n"
      "shr.u32 x, x, %5;\nadd.u32 %0, %2, x;\n}"
      : "=r"(after)
      : "r"(mask), "r"(at), "r"(x), "r"(1u << bit), "r"(bit)
      : "memory");
  return after;
}
__device__ __forceinline__ uint32_t get_byte(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void put2(uint32_t at, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ uint2 get2(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}

__device__ __forceinline__ __half2 half_pair(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ __forceinline__ uint32_t bits_of(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

__device__ inline void halved(const Octet<float>& o, float* x) {
  unpack(o, x);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] *= 0.5f;
}
template <class T>
__device__ inline void halved(const Octet<T>& o, float* x) {
  unpack_halved(o, x);
}

// The two best of eight. A loser of a pair is second at best, and then only if the best won over it.
__device__ inline void best_of_eight(const __half2* v, __half2& best, __half2& next) {
  __half2 high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    high[i] = larger(v[2 * i], v[2 * i + 1]);
    low[i] = smaller(v[2 * i], v[2 * i + 1]);
  }
  const __half2 left = larger(high[0], high[1]), right = larger(high[2], high[3]);
  __half2 rest = larger(larger(low[0], low[1]), smaller(high[0], high[1]));
  rest = larger(larger(low[2], low[3]), rest);
  rest = larger(larger(smaller(high[2], high[3]), smaller(left, right)), rest);
  best = larger(left, right);
  next = rest;
}

// How many of the `count` choices of a token beat the one at place `i`; with Ties also those that equal it and come
// before: places are in the order of ids.
template <bool Ties>
__device__ __forceinline__ int pair_rank(uint32_t choices, int count, int i, float own) {
  float rank = 0x1p23f;  // whole numbers that can be read as integers
  int j = 0;
#pragma unroll 1
  do {
    float4 v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = get4(choices + 4 * j + 16 * k);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float other[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
      float beats[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        beats[m] = other[m] > own || (Ties && other[m] == own && j + 4 * k + m < i) ? 1.0f : 0.0f;
      }
      rank += (beats[0] + beats[1]) + (beats[2] + beats[3]);
    }
    j += 16;
  } while (j < count);
  return __float_as_int(rank) - __float_as_int(0x1p23f);
}

// Scores candidate `i` of the `count` of token h exactly, by its lane, and stores the choices of the token. Lanes of
// other tokens take part, `bit` is the first that belongs to this one's in a word of ranks.
template <class T>
__device__ __forceinline__ void pair_choose(uint32_t lists, const T* row, const float* biases, int h, int i, int count,
                                            int bit, int K) {
  using Lists = PairLists;
  const uint32_t expert = get_byte(lists + Lists::kExperts + h * Lists::kExpertStride + i);
  const uint32_t choices = lists + Lists::kChoices + h * Lists::kChoiceStride;
  const float bias = biases != nullptr ? __ldg(biases + expert) : 0.0f;
  const float score = fast_sigmoid(widen(__ldg(row + expert)));
  const bool found = i < count;
  const float own = found ? score + bias : -infinity();
  put(choices + 4 * i, __float_as_uint(own));
  __syncwarp();
  int rank = pair_rank<false>(choices, count, i, own);
  // A rank that nobody has: equal choices.
  const uint32_t ranks = __reduce_or_sync(kAll, found ? 1u << bit << rank : 0);
  if (__any_sync(kAll, i < count && i <= K && (ranks >> bit >> i & 1) == 0)) {
    rank = pair_rank<true>(choices, count, i, own);
  }
  const uint32_t chosen = lists + Lists::kChosen + h * Lists::kChosenStride;
  if (found && rank < K) put2(chosen + 8 * rank, expert, __float_as_uint(score));
  __syncwarp();
}

// The same for a list longer than the warp, by rounds of the best choice that is left. (gate_row is no way out, not
// even for one token in a hundred thousand: a launch that finds its code cold waits for it.)
template <class T>
__device__ __noinline__ void pair_choose_long(uint32_t lists, const T* row, const float* biases, int h, int count,
                                              int K) {
  using Lists = PairLists;
  constexpr int kEach = Lists::kExpertStride / 32;
  const int lane = threadIdx.x % 32;
  uint32_t key[kEach], expert[kEach];
  float score[kEach];
#pragma unroll
  for (int m = 0; m < kEach; m++) {
    const int i = lane + 32 * m;
    expert[m] = get_byte(lists + Lists::kExperts + h * Lists::kExpertStride + i);
    score[m] = fast_sigmoid(widen(__ldg(row + expert[m])));
    key[m] = i < count ? rank_key(score[m] + (biases != nullptr ? __ldg(biases + expert[m]) : 0.0f)) : 0;
  }
#pragma unroll 1
  for (int r = 0; r < K; r++) {
    uint32_t best = 0;
#pragma unroll
    for (int m = 0; m < kEach; m++) best = max(best, key[m]);
    best = __reduce_max_sync(kAll, best);
    uint32_t place = kAll;  // the first that has it: places are in the order of ids
#pragma unroll
    for (int m = kEach - 1; m >= 0; m--) place = key[m] == best ? lane + 32 * m : place;
    const uint32_t first = __reduce_min_sync(kAll, place);
#pragma unroll
    for (int m = 0; m < kEach; m++) {
      if (first != static_cast<uint32_t>(lane + 32 * m)) continue;
      key[m] = 0;
      put2(lists + Lists::kChosen + h * Lists::kChosenStride + 8 * r, expert[m], __float_as_uint(score[m]));
    }
  }
  __syncwarp();
}

// The id of a column with everything that a call may ask for. Not a function of its own: that would read the arguments
// from memory, cold, one after the other.
__device__ __forceinline__ int32_t pair_extras(const Args& a, const int32_t* map, int cell, bool routed, int32_t id) {
  if (routed) id = few_logical(a, id);
  if (routed && (a.asks & kCaptured) != 0) a.logical_ids[cell] = id;
  if (map != nullptr) id = __ldg(map + id);
  if ((a.asks & kCounted) != 0) few_count(a, id);
  return id;
}

template <class T, int Warps>
__global__ void __launch_bounds__(32 * Warps, kPairWarps / Warps) gate_pairs(const __grid_constant__ Args a) {
  using Lists = PairLists;
  __shared__ __align__(16) char memory[Warps][Lists::kBytes];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tokens = a.tokens, first = 2 * (blockIdx.x * Warps + warp);
  if (first >= tokens) return;

  // The rows before all else, as in gate_few. A token that does not exist is the first again.
  const T* rows = static_cast<const T*>(a.logits) + static_cast<int64_t>(first) * 256;
  const int second = first + 1 < tokens ? 256 : 0;
  Octet<T> octets[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) {
      octets[h].words[i] = ask(rows + h * second + 8 * lane + 16 / sizeof(T) * i);
    }
  }
  __syncthreads();
  if (gridDim.x <= kEarlyBlocks) let_next_kernel_start();
  const uint32_t lists = shared_address(memory[warp]);
  const int half = lane / 16, t = first + half;  // the lane's token where each has half of the lanes
  uint32_t slow = 0;                             // tokens for another way, a bit each
  Octet<float> biases = {};
  const int32_t* map = nullptr;
  const bool extras = (a.asks & (kMapped | kCounted | kCaptured | kMoved)) != 0;
  if (!extras && (a.asks & (kPadded | kUnbiased)) == 0) {
    biases = {ask(a.bias + 8 * lane), ask(a.bias + 8 * lane + 4)};
  } else {
    if (a.bias != nullptr) biases = {ask(a.bias + 8 * lane), ask(a.bias + 8 * lane + 4)};
    if ((a.asks & kMapped) != 0) map = a.id_map + map_round(a, t) * a.map_row;
    const int valid = few_valid(a);
    if (first >= valid) {
      if (t < tokens) few_pad<16>(a, t);
      return;
    }
    if (first + 1 >= valid) slow = 2;
  }
  __syncwarp();

  // Rough choices, less what brings the best of them close to 0, where halves are fine
  __half2 c[8];
  {
    float near[8], x[8], y[8];
    unpack(biases, near);
    const float first_bias = __shfl_sync(kAll, near[0], 0);
    if (!(fabsf(first_bias) < kFarBias)) slow = 3;
    halved(octets[0], x);
    halved(octets[1], y);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      near[i] -= first_bias + 0.5f;
      c[i] = __floats2half2_rn(near_choice(x[i], near[i]), near_choice(y[i], near[i]));
    }
  }

  // Groups: kept are those that fewer than four others may beat. Where that is not clear, and where there is a NaN, it
  // is not four of them.
  __half2 best, next;
  best_of_eight(c, best, next);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    const __half2 other_best = __shfl_xor_sync(kAll, best, lanes), other_next = __shfl_xor_sync(kAll, next, lanes);
    next = larger(larger(next, other_next), smaller(best, other_best));
    best = larger(best, other_best);
  }
  const __half2 sum = (a.asks & kOneBest) == 0 ? __hadd2(best, next) : best;
  // A sum is as far off as two choices, each by its error and its rounding, and is rounded twice more here.
  const __half2 off = __hfma2(__hadd2(__habs2(best), __habs2(next)), __float2half2_rn(3.1f * 0x1p-11f),
                              __float2half2_rn(2.02f * kChoiceError));
  const __half2 high = __hadd2(sum, off), low = __hsub2(sum, off);
  // Each of the four lanes of a group looks at two groups, the first at its own too, which seems to be above.
  const int others = (lane & 28) ^ (lane & 3) << 3;
  const __half2 other = __shfl_sync(kAll, high, others), next_other = __shfl_sync(kAll, high, others ^ 4);
  __half2 above = __hadd2(__hgtu2(other, low), __hgtu2(next_other, low));
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) above = __hadd2(above, __shfl_xor_sync(kAll, above, lanes));
  uint32_t kept = __hlt2_mask(above, __float2half2_rn(5.0f));
  uint32_t unclear = __popc(__ballot_sync(kAll, (kept & 0xffff) != 0)) == 16 ? 0 : 1;
  if (__popc(__ballot_sync(kAll, kept >= 0x10000)) != 16) unclear |= 2;
  if (unclear != 0) {
#pragma unroll 1
    for (int h = 0; h < 2; h++) {
      if ((unclear >> h & 1) == 0) continue;
      const uint32_t exact = exact_groups<T>(a, min(first + h, tokens - 1));
      if (exact == 0) slow |= 1u << h;
      const uint32_t part = 0xffffu << 16 * h;
      kept = (kept & ~part) | ((exact >> lane / 4 & 1) != 0 ? part : 0);
    }
  }

  // Candidates: a bit each, the first token's from bit 0 and the second's from bit 16
  uint32_t mask = 0;
  {
    __half2 least = half_pair((bits_of(next) & kept) | (0x7c007c00u & ~kept));
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) least = smaller(least, __shfl_xor_sync(kAll, least, lanes));
    least = __hfma2(__habs2(least), __float2half2_rn(-5 * 0x1p-11f), least);
    least = __hsub2(least, __float2half2_rn(2.02f * kChoiceError));
    least = half_pair(bits_of(least) | ~kept);  // NaN, which nothing reaches
#pragma unroll
    for (int i = 0; i < 8; i++) mask |= __hge2_mask(c[i], least) & (0x00010001u << i);
  }
  const uint32_t found = __popc(mask & 0xffff) + (__popc(mask >> 16) << 16);
  const uint32_t upto = sum_up_to_lane(found);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint32_t before = upto - found;
    uint32_t at = lists + Lists::kExperts + h * Lists::kExpertStride + (h == 0 ? before & 0xffff : before >> 16);
#pragma unroll
    for (int i = 0; i < 8; i++) at = put_byte_if(mask, 16 * h + i, at, 8 * lane + i);
  }
  __syncwarp();
  const uint32_t counts = __shfl_sync(kAll, upto, 31);
  // Both from K to 16?
  if (((counts - 0x10001u * static_cast<uint32_t>(a.K) | 0x00100010u - counts) & 0x80008000u) == 0) {
    const int count = static_cast<int>(half == 0 ? counts & 0xffff : counts >> 16);
    pair_choose(lists, rows + half * second, a.bias, half, lane % 16, count, 16 * half, a.K);
  } else {
#pragma unroll 1
    for (int h = 0; h < 2; h++) {
      const int count = static_cast<int>(counts >> 16 * h & 0xffff);
      if (count < a.K) {
        slow |= 1u << h;
      } else if (count > 32) {
        pair_choose_long(lists, rows + h * second, a.bias, h, count, a.K);
      } else {
        pair_choose(lists, rows + h * second, a.bias, h, lane, count, 0, a.K);
      }
    }
  }

  // Columns
  const bool done = (slow >> half & 1) == 0 && t < tokens;
  const uint2 chosen = get2(lists + Lists::kChosen + half * Lists::kChosenStride + 8 * (lane % 8));
  float weight = lane % 16 < a.K ? __uint_as_float(chosen.y) : 0.0f, total = weight;
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) total += __shfl_xor_sync(kAll, total, lanes);
  total = (a.asks & kUndivided) != 0 ? 1.0f : fmaxf(total, kLeastTotal);
  weight *= fast_inverse(total) * a.scale;
  int32_t id = static_cast<int32_t>(chosen.x);
#pragma unroll 1
  for (int k = lane % 16; done && k < a.columns; k += 16) {
    const bool routed = k < a.K;
    if (!routed) {
      id = a.routed + k - a.K;
      weight = a.shared_weight;
    }
    if (extras) id = pair_extras(a, map, t * a.K + k, routed, id);
    const uint32_t cell = t * a.columns + k;
    a.ids[cell] = id;
    a.weights[cell] = weight;
  }
#pragma unroll 1
  for (; slow != 0; slow &= slow - 1) {
    const int h = __ffs(static_cast<int>(slow)) - 1;
    __syncwarp();
    if (first + h >= tokens) break;
    if (first + h < few_valid(a)) {
      gate_row_apart<8>(a, first + h, static_cast<uint32_t*>(__cvta_shared_to_generic(lists)), nullptr);
    } else {
      few_pad<32>(a, first + h);
    }
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
