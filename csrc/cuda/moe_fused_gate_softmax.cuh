// The kernel of moe_fused_gate for a softmax over few experts: a lane per token, 32 tokens per warp, for at most 8
// choices. Lanes do not speak with each other, so that work per token is least.
//
// Layout: the rows of a warp lie in shared memory, 16 bytes apart from each other's banks.
// 1. The eighth largest of the maxima of four experts each bounds the eighth best choice from below: 8 to 11 of 128
//    are left.
// 2. The keys of these are sorted in registers. A key holds the expert too, so that ties go to the lower id.
// 3. Columns are put in order in shared memory and written in whole lines.
// A token that this does not cover (NaN, infinite logits, powers that underflow, too many candidates) is routed by
// gate_row of the general kernel.
//
// Limits: 16-bit logits; E experts, or from E / 2 on fewer (Ragged: a multiple of 4); K <= 8; at most kTokenColumns
// columns; logits aligned to 16 bytes. Order of accumulation: a tree over the slots.
#pragma once
#include "moe_fused_gate_near.cuh"

namespace moe::gate {

inline constexpr int kTokenColumns = 16;

// Bytes between rows.
template <int E>
inline constexpr int kRowStride = E * 2 + 16;

#ifdef __CUDACC__

// 16 or 8 bytes, not kept in the first cache.
template <int Bytes>
__device__ inline void copy_async(void* to, const void* from) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(Bytes) : "memory");
  }
}
__device__ inline void wait_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A key of a logit that is the choice, ties to the lower id: its 16 bits above those of the expert.
__device__ inline uint32_t ordered_half(uint32_t bits) { return (bits & 0x8000u) != 0 ? ~bits : bits | 0x8000u; }

// Shared memory: histogram counters, then 32 rows for every warp.
template <class T, int E, bool Ragged>
__global__ void __launch_bounds__(256, 1) gate_softmax(const __grid_constant__ Args a) {
  static_assert(sizeof(T) == 2);
  constexpr int kTokens = 32, kStride = kRowStride<E>;
  constexpr int kPieces = E / 32;  // of 32 experts
  constexpr int kMost = 64;        // candidates
  constexpr int kFirst = 12;       // and how many at once
  using Pair = PairOf<T>;

  let_next_kernel_start();
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* histogram = shared_memory;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  char* rows = reinterpret_cast<char*>(shared_memory + a.histogram) + warp * kTokens * kStride;
  char* row = rows + lane * kStride;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * warps + warp) * kTokens, t = first + lane;
  const int here = static_cast<int>(max(int64_t{0}, min(int64_t{kTokens}, a.T - first)));  // rows of this warp
  const int64_t valid = valid_tokens(a);

  // Loads, whole lines by the warp. Rows that do not exist repeat the last.
  constexpr int kBytes = Ragged ? 8 : 16, kUnits = E * 2 / kBytes;  // of a row
  const int row_bytes = Ragged ? a.E * 2 : E * 2;
#pragma unroll
  for (int u = 0; u < kUnits; u++) {
    const int r = (lane + 32 * u) / kUnits, at = lane % kUnits * kBytes;
    char* to = rows + r * kStride + at;
    if (!Ragged || at < row_bytes) {
      copy_async<kBytes>(to, static_cast<const char*>(a.logits) + min(first + r, a.T - 1) * row_bytes + at);
    } else {  // no expert: -inf
      const uint32_t nobody = std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
      *reinterpret_cast<uint2*>(to) = make_uint2(nobody, nobody);
    }
  }
  if (a.histogram > 0) clear_histogram(a, histogram);
  __syncthreads();

  if (here > 0) {
    bool plain;
    wait_async();
    __syncwarp();

    // Candidates: a bit each, of low halves and then of high halves
    uint32_t mask[kPieces];
    const bool whole = a.selection == Selection::kScore && !a.renormalize;  // weights are parts of the sum of all
    float peak, sum = 0;                                                    // peak: the largest logit, times kLog2E
    {
      Pair pairs[kPieces * 16], most_of_octet[kPieces * 4];
#pragma unroll
      for (int i = 0; i < kPieces * 4; i++) {
        const uint4 words = *reinterpret_cast<const uint4*>(row + i * 16);
        pairs[4 * i] = pair_of<Pair>(words.x), pairs[4 * i + 1] = pair_of<Pair>(words.y);
        pairs[4 * i + 2] = pair_of<Pair>(words.z), pairs[4 * i + 3] = pair_of<Pair>(words.w);
        most_of_octet[i] = larger(larger(pairs[4 * i], pairs[4 * i + 1]), larger(pairs[4 * i + 2], pairs[4 * i + 3]));
      }
      float most;
      const float threshold = eighth_of_pairs<1, kPieces * 4>(most_of_octet, most);
      plain = fabsf(most) < kMostLogit && threshold > -infinity();
      // Where powers underflow, they tie, and the logits do not tell.
      if (a.selection == Selection::kScore) plain = plain && threshold > most - 79.0f;
      peak = most * kLog2E;
      Pair under;
      if constexpr (std::is_same_v<Pair, __half2>) {
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
    if (whole) {
#pragma unroll 2
      for (int i = 0; i < kPieces * 4; i++) {
        float x[8];
        unpack(Octet<T>{*reinterpret_cast<const uint4*>(row + i * 16)}, x);
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = power_under(x[k], peak);
        sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      }
    }
    int count = 0;
#pragma unroll
    for (int q = 0; q < kPieces; q++) count += __popc(mask[q]);
    const bool live = t < valid;
    plain = plain && count <= kMost;
    if (!plain || !live) {
#pragma unroll
      for (int q = 0; q < kPieces; q++) mask[q] = 0;
    }

    // Keys, sorted. Loads of all of them come before what uses them, and nothing branches.
    constexpr uint32_t kNobody = 0x8000;
    uint32_t piece = 0;
    const auto take = [&]() -> uint32_t {
      if constexpr (kPieces > 1) {
        const bool next = mask[0] == 0;
#pragma unroll
        for (int q = 0; q < kPieces; q++) mask[q] = !next ? mask[q] : q + 1 < kPieces ? mask[q + 1] : 0;
        piece += next;
      }
      const bool found = mask[0] != 0;
      const uint32_t bit = (31 - __clz(static_cast<int>(mask[0]))) & 31;
      mask[0] &= ~(1u << bit);
      return piece * 32 + (bit & 15) * 2 + (bit >> 4) + (found ? 0 : kNobody);
    };
    const auto take_all = [&](uint32_t* keys, auto n) {
      constexpr int kCount = decltype(n)::value;
      uint32_t e[kCount], bits[kCount];
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        e[i] = take();
        bits[i] = reinterpret_cast<const uint16_t*>(row)[e[i] % E];
      }
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        const uint32_t key = ordered_half(bits[i] == 0x8000u ? 0u : bits[i]) << 16 | (0xffffu - e[i]);
        keys[i] = e[i] < kNobody ? key : 0;
      }
    };
    uint32_t top[8];
    {
      uint32_t keys[kFirst];
      take_all(keys, std::integral_constant<int, kFirst>{});
#pragma unroll
      for (int i = 0; i < 8; i++) top[i] = keys[i];
      sort_eight(top);
      sort_four(keys + 8);
      merge_eight<4>(top, keys + 8);
    }
    const auto more = [&] {
      uint32_t rest = 0;
#pragma unroll
      for (int q = 0; q < kPieces; q++) rest |= mask[q];
      return __any_sync(kAll, rest != 0);
    };
    while (more()) {
      uint32_t keys[4];
      take_all(keys, std::integral_constant<int, 4>{});
      sort_four(keys);
      merge_eight<4>(top, keys);
    }
    __syncwarp();

    // What they weigh
    const bool routed = plain && live;
    int32_t expert[8];
    float weight[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const uint32_t bits = top[k] >> 16;
      const uint16_t half = static_cast<uint16_t>((bits & 0x8000u) != 0 ? bits & 0x7fffu : ~bits);
      expert[k] = routed ? static_cast<int32_t>(0xffffu - (top[k] & 0xffffu)) : 0;
      weight[k] = routed && k < a.K ? widen(*reinterpret_cast<const T*>(&half)) : -infinity();
    }
#pragma unroll
    for (int k = 0; k < 8; k++) weight[k] = power_under(weight[k], peak);
    if (!whole) {
      const float low = (weight[0] + weight[1]) + (weight[2] + weight[3]);
      sum = low + ((weight[4] + weight[5]) + (weight[6] + weight[7]));
    }
    const float inverse = fast_inverse(sum);
#pragma unroll
    for (int k = 0; k < 8; k++) weight[k] = sum == 0 ? 0.0f : weight[k] * inverse;

    // Columns
    const int stride = a.columns | 1;
    int32_t* ids_out = reinterpret_cast<int32_t*>(rows) + lane * stride;
    float* weights_out = reinterpret_cast<float*>(ids_out + kTokens * stride);
    int32_t logical[8], id[8];
#pragma unroll
    for (int k = 0; k < 8; k++) id[k] = logical[k] = expert[k] >= a.routed ? expert[k] + a.shared : expert[k];
    const int32_t* map = a.id_map;
    if (map != nullptr) {
      map += map_round(a, t) * static_cast<int64_t>(a.E + a.shared);
#pragma unroll
      for (int k = 0; k < 8; k++) id[k] = __ldg(map + logical[k]);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
      if (k < a.K) {
        ids_out[k] = routed ? id[k] : -1;
        weights_out[k] = routed ? weight[k] * a.scale : 0.0f;
      }
    }
    for (int s = 0; s < a.shared; s++) {
      const int32_t shared_id = map != nullptr ? __ldg(map + a.routed + s) : a.routed + s;
      ids_out[a.K + s] = routed ? shared_id : -1;
      weights_out[a.K + s] = routed ? a.shared_weight : 0.0f;
      if (a.counters != nullptr && routed) count_load(a, histogram, shared_id);
    }
    if (a.counters != nullptr && routed) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (k < a.K) count_load(a, histogram, id[k]);
      }
    }
    if (a.logical_ids != nullptr && t < a.T) {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (k < a.K) a.logical_ids[t * a.K + k] = routed ? logical[k] : -1;
      }
    }
    unsigned slow = __ballot_sync(kAll, !plain && live);
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
      const int64_t who = first + __ffs(static_cast<int>(slow)) - 1;
      gate_row_apart<E / 32>(a, who, reinterpret_cast<uint32_t*>(rows), histogram);
    }
  }
  if (a.histogram > 0) {
    __syncthreads();
    add_histogram(a, histogram);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
