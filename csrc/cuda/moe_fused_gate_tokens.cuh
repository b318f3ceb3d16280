// The kernel of moe_fused_gate for large batches: L lanes per token, 32 / L tokens per warp, for at most 8
// choices. Lanes hardly speak with each other, so that work per token is least, and its latency greatest.
//
// Layout: the rows of a warp lie in shared memory, 16 bytes apart from each other's banks; a piece is 32 consecutive
// experts, and a group of 256/8.
// 1. Groups: every lane scores its pieces roughly, within 2^-12 and rounded to halves, leaves them where the logits were
//    and keeps the two best of each. Where that does not tell the fourth group from the fifth, the warp scores the token
//    exactly.
// 2. The pieces that count (of the 4 groups kept; all, where the logits choose) are shared out among the lanes. The
//    eighth largest of the maxima of four experts each, less the error, bounds the eighth best choice from below: 8 to 11
//    of 128 are left.
// 3. Every lane computes exact keys of its candidates and sorts them in registers; sorted lists of lanes are merged. The
//    key holds the expert too, so that ties go to the lower id.
// 4. Columns are put in order in shared memory and written in whole lines.
// A token that this does not cover (NaN, infinite scores, equal groups at the cut, too many candidates) is routed by
// gate_row of the general kernel.
//
// Limits: 16-bit logits; E as instantiated, 256/8/4 or a softmax; K <= 8; at most kTokenColumns columns; logits and bias
// aligned to 16 bytes. Order of accumulation: a tree over the slots.
#pragma once
#include "moe_fused_gate_near.cuh"

namespace moe::gate {

inline constexpr int kTokenColumns = 16;
inline constexpr int kMostTokenWarps = 8;  // of a block

// Bytes between rows.
template <int E>
inline constexpr int kRowStride = E * 2 + 16;
// Floats between pieces of the shifted bias: lanes of a token read different ones at once.
inline constexpr int kNearStride = 36;
// Floats of shared memory for the bias, and for the bias shifted.
inline constexpr int kTokenBias = 256 + 8 * kNearStride;

#ifdef __CUDACC__

__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
}
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ inline void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Keys that order choices, ties to the lower id. Where a logit is the choice, its 16 bits are above those of the expert;
// else the bits of a float are above a word of the expert and its place in the token's list.
__device__ inline uint32_t ordered(uint32_t bits, uint32_t sign) { return (bits & sign) != 0 ? ~bits : bits | sign; }
__device__ inline uint64_t choice_key(float choice, uint32_t low) {
  return static_cast<uint64_t>(ordered(__float_as_uint(choice + 0.0f), 0x80000000u)) << 32 | low;
}

// Shared memory: histogram counters, the bias where there is one, then kTokens rows for every warp.
template <class T, int E, int L, Family F>
__global__ void __launch_bounds__(32 * kMostTokenWarps, 1) gate_tokens(const __grid_constant__ Args a) {
  constexpr bool kGrouped = F == Family::kGrouped;
  static_assert(sizeof(T) == 2 && (kGrouped ? E == 256 : F == Family::kSoftmax) && (L == 1 || L == 2));
  constexpr int kSize = 2, kStride = kRowStride<E>, kTokens = 32 / L;
  constexpr int kSteps = E / (32 * L);                           // pieces of a lane while all are scored
  constexpr int kPieces = kGrouped ? 4 / L : kSteps;             // and while the best are looked for
  constexpr int kMost = L == 1 ? 64 : 16, kList = 128 / L;       // candidates of a lane and the room for them
  constexpr int kFirst = L == 1 ? 12 : 8;                        // and how many at once
  using Pair = std::conditional_t<kGrouped, __half2, PairOf<T>>;
  using Key = std::conditional_t<kGrouped, uint64_t, uint32_t>;

  let_next_kernel_start();
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* histogram = shared_memory;
  float* shared_bias = reinterpret_cast<float*>(shared_memory + a.histogram);
  float* near = shared_bias + 256;  // the bias less what brings the best choices close to 0, where halves are fine
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  char* rows = reinterpret_cast<char*>(shared_bias + (kGrouped ? kTokenBias : 0)) + warp * kTokens * kStride;
  const int token = lane / L, l = lane % L;
  char* row = rows + token * kStride;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * warps + warp) * kTokens, t = first + token;
  const int here = static_cast<int>(max(int64_t{0}, min(int64_t{kTokens}, a.T - first)));  // rows of this warp

  // Loads: the bias first, then a piece per lane and row at a time, kAhead of them before the first is needed, so that
  // no warp waits until all rows of all warps have come. Rows that do not exist repeat the last.
  constexpr int kAhead = kGrouped && kSteps > 3 ? 3 : kSteps;
  constexpr int kUnits = 2 * L * kSize, kEach = 2 * kSize;  // of 16 bytes: in a row and of a lane at a time
  float4 bias_part[2];
  if constexpr (kGrouped) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = threadIdx.x + i * blockDim.x;
      bias_part[i] = a.bias != nullptr && at < E / 4 ? __ldg(reinterpret_cast<const float4*>(a.bias) + at) : float4{};
    }
  }
  const float first_bias = kGrouped && a.bias != nullptr ? __ldg(a.bias) : 0.0f;
  const int64_t valid = valid_tokens(a);
  const char* from[kEach];
  char* to[kEach];
#pragma unroll
  for (int u = 0; u < kEach; u++) {
    const int r = (lane + 32 * u) / kUnits, at = lane % kUnits * 16;
    from[u] = static_cast<const char*>(a.logits) + (min(first + r, a.T - 1)) * (E * kSize) + at;
    to[u] = rows + r * kStride + at;
  }
  const auto fetch = [&](int step) {
#pragma unroll
    for (int u = 0; u < kEach; u++) copy_async(to[u] + step * 16 * kUnits, from[u] + step * 16 * kUnits);
  };
#pragma unroll
  for (int i = 0; i < kAhead; i++) {
    fetch(i);
    commit_async();
  }
  if (a.histogram > 0) clear_histogram(a, histogram);
  if constexpr (kGrouped) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at < E / 4) {
        const float4 b = bias_part[i];
        reinterpret_cast<float4*>(shared_bias)[at] = b;
        const float less = fabsf(first_bias) < kFarBias ? first_bias + 0.5f : 0.5f;
        *reinterpret_cast<float4*>(near + at / 8 * kNearStride + at % 8 * 4) = make_float4(b.x - less, b.y - less, b.z - less, b.w - less);
      }
    }
  }
  __syncthreads();

  if (here > 0) {
    // Scores and the groups that are kept
    bool plain = true;
    uint32_t pieces = 0;  // a byte each: those of this lane
    if constexpr (kGrouped) {
      float sums[8] = {}, farthest = 0;
#pragma unroll 1
      for (int i = 0; i < kSteps; i++) {
        wait_async<kAhead - 1>();
        __syncwarp();
        if (i + kAhead < kSteps) fetch(i + kAhead);
        commit_async();  // also an empty one: the number of groups under way stays the same
        const int piece = i * L + l;
        const auto octet_at = [&](int o) { return piece * 32 + o * 8; };
        // All loads before all stores, which the compiler must take for stores to any of them.
        Octet<T> octets[4];
        float4 shifts[8];
#pragma unroll
        for (int o = 0; o < 4; o++) {
          octets[o] = *reinterpret_cast<const Octet<T>*>(row + octet_at(o) * kSize);
          const float4* at = reinterpret_cast<const float4*>(near + piece * (kNearStride - 32) + octet_at(o));
          shifts[2 * o] = at[0], shifts[2 * o + 1] = at[1];
        }
        __half2 pairs[16], best, next;
#pragma unroll
        for (int o = 0; o < 4; o++) {
          const float4 low = shifts[2 * o], high = shifts[2 * o + 1];
          const float shift[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          float c[8];
          unpack_halved(octets[o], c);
#pragma unroll
          for (int k = 0; k < 8; k++) c[k] = near_choice(c[k], shift[k]);
#pragma unroll
          for (int k = 0; k < 4; k++) pairs[4 * o + k] = __floats2half2_rn(c[2 * k], c[2 * k + 1]);
        }
        best_of_pairs(pairs, best, next);
#pragma unroll
        for (int o = 0; o < 4; o++) *reinterpret_cast<uint4*>(row + octet_at(o) * kSize) = *reinterpret_cast<const uint4*>(pairs + 4 * o);
#pragma unroll
        for (int k = 0; k + 1 < kSteps; k++) sums[k] = sums[k + 1];
        const float first_best = __low2float(best), second_best = __low2float(next);
        sums[kSteps - 1] = a.group_score == GroupScore::kTop2Sum ? first_best + second_best : first_best;
        farthest = fmaxf(farthest, fmaxf(fabsf(first_best), fabsf(second_best)));
      }
      float all[8];
#pragma unroll
      for (int i = 0; i < 8; i++) all[i] = i < kSteps ? sums[i] : __shfl_xor_sync(kAll, sums[i % kSteps], i / kSteps);
      float fourth, fifth;
      middle_of_eight(all, fourth, fifth);
      plain = fabsf(first_bias) < kFarBias;
      uint32_t kept = 0;
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        plain = plain && sums[i] < infinity();  // a NaN among the group's experts is still here
        kept |= (sums[i] >= fourth ? 1u : 0u) << (i * L + l);
      }
#pragma unroll
      for (int lanes = 1; lanes < L; lanes *= 2) {
        kept |= __shfl_xor_sync(kAll, kept, lanes);
        farthest = fmaxf(farthest, __shfl_xor_sync(kAll, farthest, lanes));
      }
      plain = plain && farthest < kFarBias;
      // Two sums are as far off as four choices, each by its error and its rounding to a half.
      const bool sure = fourth - fifth > 4 * kChoiceError + 0x1.02p-9f * farthest;
      for (unsigned unsure = __ballot_sync(kAll, !sure && plain && t < valid && l == 0); unsure != 0; unsure &= unsure - 1) {
        const int who = (__ffs(static_cast<int>(unsure)) - 1) / L;
        const uint32_t exact = exact_groups<T>(a, first + who, shared_bias);
        if (token == who) {
          kept = exact;
          plain = plain && exact != 0;
        }
      }
      for (int i = 0; i < l * kPieces; i++) kept &= kept - 1;
#pragma unroll
      for (int q = 0; q < kPieces; q++) {
        pieces |= ((__ffs(static_cast<int>(kept)) - 1) & 7) << 8 * q;
        kept &= kept - 1;
      }
    } else {
      wait_async<0>();
#pragma unroll
      for (int q = 0; q < kPieces; q++) pieces |= (q * L + l) << 8 * q;
    }
    __syncwarp();

    // Candidates: a bit each, of low halves and then of high halves
    uint32_t mask[kPieces];
    {
      Pair pairs[kPieces * 16], most_of_octet[kPieces * 4];
#pragma unroll
      for (int i = 0; i < kPieces * 4; i++) {
        const char* at = row + ((pieces >> i / 4 * 8 & 7) * 32 + i % 4 * 8) * kSize;
        const uint4 words = *reinterpret_cast<const uint4*>(at);
        pairs[4 * i] = pair_of<Pair>(words.x), pairs[4 * i + 1] = pair_of<Pair>(words.y);
        pairs[4 * i + 2] = pair_of<Pair>(words.z), pairs[4 * i + 3] = pair_of<Pair>(words.w);
        most_of_octet[i] = larger(larger(pairs[4 * i], pairs[4 * i + 1]), larger(pairs[4 * i + 2], pairs[4 * i + 3]));
      }
      float most;
      const float threshold = eighth_of_pairs<L, kPieces * 4>(most_of_octet, most);
      plain = plain && most < infinity() && threshold > -infinity();
      // Where powers underflow, they tie, and the logits do not tell.
      if (!kGrouped && a.selection == Selection::kScore) plain = plain && threshold > most - 79.0f;
      Pair under;
      if constexpr (kGrouped) {
        under = __half2half2(__float2half_rd(threshold - 2.01f * kChoiceError - 0x1.02p-10f * fabsf(threshold)));
      } else if constexpr (std::is_same_v<Pair, __half2>) {
        under = __float2half2_rn(threshold);
      } else {
        under = __float2bfloat162_rn(threshold);
      }
#pragma unroll
      for (int q = 0; q < kPieces; q++) {
        mask[q] = 0;
#pragma unroll
        for (int w = 0; w < 16; w++) mask[q] |= __hge2_mask(pairs[16 * q + w], under) & (0x00010001u << w);
      }
    }
    __syncwarp();
    int count = 0;
#pragma unroll
    for (int q = 0; q < kPieces; q++) count += __popc(mask[q]);
    const bool live = t < valid;
    plain = plain && count <= kMost;
    const unsigned token_lanes = L == 32 ? kAll : ((1u << (L % 32)) - 1) << (token * L);  // they agree
    plain = (~__ballot_sync(kAll, plain) & token_lanes) == 0;
    if (!plain || !live) {
#pragma unroll
      for (int q = 0; q < kPieces; q++) mask[q] = 0;
    }

    // Keys, sorted. Loads of all of them come before what uses them, and nothing branches.
    const T* logits = kGrouped ? static_cast<const T*>(a.logits) + min(t, a.T - 1) * E : reinterpret_cast<const T*>(row);
    float* list = reinterpret_cast<float*>(row);  // scores of the token's candidates
    uint32_t place = l * kList;
    constexpr uint32_t kNobody = 0x8000;
    const auto take = [&]() -> uint32_t {
      if constexpr (kPieces > 1) {
        const bool next = mask[0] == 0;
#pragma unroll
        for (int q = 0; q < kPieces; q++) mask[q] = !next ? mask[q] : q + 1 < kPieces ? mask[q + 1] : 0;
        pieces = next ? pieces >> 8 : pieces;
      }
      const bool found = mask[0] != 0;
      const uint32_t bit = (31 - __clz(static_cast<int>(mask[0]))) & 31;
      mask[0] &= ~(1u << bit);
      return (pieces & 0xff) * 32 + (bit & 15) * 2 + (bit >> 4) + (found ? 0 : kNobody);
    };
    const auto take_all = [&](Key* keys, auto n) {
      constexpr int kCount = decltype(n)::value;
      uint32_t e[kCount];
      T logit[kCount];
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        e[i] = take();
        const T* at = logits + e[i] % E;
        logit[i] = kGrouped ? __ldg(at) : *at;
      }
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        Key key;
        if constexpr (!kGrouped) {
          const uint32_t bits = *reinterpret_cast<const uint16_t*>(&logit[i]);
          key = ordered(bits == 0x8000u ? 0u : bits, 0x8000u) << 16 | (0xffffu - e[i]);
        } else {
          const uint32_t at = e[i] % E;
          const float score = fast_sigmoid(widen(logit[i]));
          list[place] = score;
          key = choice_key(score + shared_bias[at], (0xffffu - e[i]) << 8 | place++);
        }
        keys[i] = e[i] < kNobody ? key : 0;
      }
    };
    Key top[8] = {};
    {
      Key keys[kFirst];
      take_all(keys, std::integral_constant<int, kFirst>{});
#pragma unroll
      for (int i = 0; i < 8; i++) top[i] = keys[i];
      sort_eight(top);
      if constexpr (kFirst == 12) {
        sort_four(keys + 8);
        merge_eight<4>(top, keys + 8);
      }
    }
    const auto more = [&] {
      uint32_t rest = 0;
#pragma unroll
      for (int q = 0; q < kPieces; q++) rest |= mask[q];
      return __any_sync(kAll, rest != 0);
    };
    while (more()) {
      Key keys[4];
      take_all(keys, std::integral_constant<int, 4>{});
      sort_four(keys);
      merge_eight<4>(top, keys);
    }
#pragma unroll
    for (int lanes = 1; lanes < L; lanes *= 2) {
      Key other[8];
#pragma unroll
      for (int i = 0; i < 8; i++) other[i] = __shfl_xor_sync(kAll, top[i], lanes);
      merge_eight<8>(top, other);
    }
    __syncwarp();

    // What they weigh
    const bool routed = plain && live;
    int32_t expert[8];
    float weight[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      float value;
      if constexpr (!kGrouped) {
        const uint32_t bits = top[k] >> 16;
        const uint16_t half = static_cast<uint16_t>((bits & 0x8000u) != 0 ? bits & 0x7fffu : ~bits);
        expert[k] = static_cast<int32_t>(0xffffu - (top[k] & 0xffffu));
        value = widen(*reinterpret_cast<const T*>(&half));
      } else {
        const uint32_t low = static_cast<uint32_t>(top[k]);
        expert[k] = static_cast<int32_t>(0xffffu - (low >> 8));
        value = list[low & 0x7f];
      }
      if (!routed) expert[k] = 0;
      weight[k] = routed && k < a.K ? value : kGrouped ? 0.0f : -infinity();
    }
    if constexpr (!kGrouped) {
      const float most = routed ? weight[0] : 0.0f;
#pragma unroll
      for (int k = 0; k < 8; k++) weight[k] = expf(weight[k] - most);
    }
    if (a.renormalize || !kGrouped) {
      const float sum = ((weight[0] + weight[1]) + (weight[2] + weight[3])) + ((weight[4] + weight[5]) + (weight[6] + weight[7]));
      const float inverse = fast_inverse(sum);
#pragma unroll
      for (int k = 0; k < 8; k++) weight[k] = sum == 0 ? 0.0f : weight[k] * inverse;
    }
    __syncwarp();

    // Columns: of the routed ones, lane l has l, l + L, ...
    constexpr int kColumns = 8 / L;
    const int stride = a.columns | 1;
    int32_t* ids_out = reinterpret_cast<int32_t*>(rows) + token * stride;
    float* weights_out = reinterpret_cast<float*>(ids_out + kTokens * stride);
    int32_t logical[kColumns], id[kColumns];
    float value[kColumns];
#pragma unroll
    for (int k = 0; k < kColumns; k++) {
      logical[k] = expert[k * L], value[k] = weight[k * L];
#pragma unroll
      for (int other = 1; other < L; other++) {
        if (l == other) logical[k] = expert[k * L + other], value[k] = weight[k * L + other];
      }
      if (logical[k] >= a.routed) logical[k] += a.shared;
      id[k] = logical[k];
    }
    const int32_t* map = a.id_map;
    if (map != nullptr) {
      map += map_round(a, t) * static_cast<int64_t>(a.E + a.shared);
#pragma unroll
      for (int k = 0; k < kColumns; k++) id[k] = __ldg(map + logical[k]);
    }
#pragma unroll
    for (int k = 0; k < kColumns; k++) {
      if (k * L + l < a.K) {
        ids_out[k * L + l] = routed ? id[k] : -1;
        weights_out[k * L + l] = routed ? value[k] * a.scale : 0.0f;
      }
    }
    for (int s = l; s < a.shared; s += L) {
      const int32_t shared_id = map != nullptr ? __ldg(map + a.routed + s) : a.routed + s;
      ids_out[a.K + s] = routed ? shared_id : -1;
      weights_out[a.K + s] = routed ? a.shared_weight : 0.0f;
      if (a.load != nullptr && routed) count_load(a, histogram, shared_id);
    }
    if (a.load != nullptr && routed) {
#pragma unroll
      for (int k = 0; k < kColumns; k++) {
        if (k * L + l < a.K) count_load(a, histogram, id[k]);
      }
    }
    if (a.logical_ids != nullptr && t < a.T) {
#pragma unroll
      for (int k = 0; k < kColumns; k++) {
        if (k * L + l < a.K) a.logical_ids[t * a.K + k * L + l] = routed ? logical[k] : -1;
      }
    }
    unsigned slow = __ballot_sync(kAll, !plain && live && l == 0);
    __syncwarp();
    const int cells = here * a.columns;
#pragma unroll 4
    for (int i = lane; i < cells; i += 32) {
      const int at = i + static_cast<int>(__umulhi(i, a.column_magic));  // a cell between rows of an even length
      a.ids[first * a.columns + i] = reinterpret_cast<const int32_t*>(rows)[at];
      a.weights[first * a.columns + i] = reinterpret_cast<const float*>(rows)[kTokens * stride + at];
    }
    for (; slow != 0; slow &= slow - 1) {
      __syncwarp();
      gate_row_apart<E / 32>(a, first + (__ffs(static_cast<int>(slow)) - 1) / L, reinterpret_cast<uint32_t*>(rows), histogram);
    }
  }
  if (a.histogram > 0) {
    __syncthreads();
    add_histogram(a, histogram);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
