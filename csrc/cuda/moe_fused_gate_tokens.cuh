// The kernel of moe_fused_gate for large batches of 256 experts in 8 groups of which 4 are kept: two lanes per token,
// 16 tokens per warp, for at most 8 choices. Lanes hardly speak with each other, so that work per token is least, and
// its latency greatest.
//
// 1. Rough choices, a row at a time by the whole warp: within 2^-12, rounded to halves, into shared memory. Rows there
//    lie 16 bytes apart from each other's banks.
// 2. Groups: a lane takes the two best of four groups. Where that does not tell the fourth group from the fifth, the
//    warp scores the token exactly.
// 3. A lane takes two of the four groups kept. The eighth largest of the maxima of four experts each, less the error,
//    bounds the eighth best choice from below: 8 to 11 of 128 experts are left. They go to a list, which the lanes of
//    the token share evenly.
// 4. Every lane computes exact keys of its candidates and sorts them in registers; then sorted lists are merged. The
//    key holds the expert too, so that ties go to the lower id. Keys have 32 bits where all choices that are left lie
//    within 2^25 floats of each other, and 64 where they do not.
// 5. Columns are put in order in shared memory and written in whole lines.
// A token that this does not cover (NaN, infinite scores, equal groups at the cut) is routed by gate_row of the general
// kernel.
//
// Limits: K <= 8; at most kTokenColumns columns; logits, bias, ids and weights aligned to 16 bytes. Order of
// accumulation: a tree over the slots.
#pragma once
#include "moe_fused_gate_softmax.cuh"

namespace moe::gate {

inline constexpr int kMostTokenWarps = 20;        // of a block
inline constexpr int kTurnWarps = 8;              // of a block whose warps all read at once
inline constexpr int kRowsOfTurn = 6;             // that a warp has read when others begin
inline constexpr int kTokensOfWarp = 16;          // two lanes each
inline constexpr int kHalfStride = 256 * 2 + 16;  // bytes between rows
inline constexpr int kTokenWarpBytes = kTokensOfWarp * kHalfStride;

#ifdef __CUDACC__

__device__ inline uint32_t ordered(float choice) {
  const uint32_t bits = __float_as_uint(choice + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// What a lane has of a row while the whole warp reads it: 16 bytes of each whole line, 8 logits, two times 4 in a row.
template <class T>
struct LaneColumns {
  static constexpr int kParts = sizeof(T) / 2;
  uint4 raw[kParts];

  // The first of the four logits.
  __device__ static int column(int lane, int quad) { return kParts == 1 ? lane * 8 + quad * 4 : quad * 128 + lane * 4; }
  __device__ void load(const T* row, int lane) {
#pragma unroll
    for (int i = 0; i < kParts; i++) raw[i] = __ldg(reinterpret_cast<const uint4*>(row + column(lane, i)));
  }
  // x / 2 of the 8 logits.
  __device__ void halved(float* x) const {
    if constexpr (kParts == 1) {
      unpack_halved(Octet<T>{{raw[0]}}, x);
    } else {
      unpack(Octet<float>{{raw[0], raw[1]}}, x);
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] *= 0.5f;
    }
  }
  // Pairs of halves, one for every two logits.
  __device__ static void store(char* row, int lane, const __half2* pairs) {
    const uint2* quads = reinterpret_cast<const uint2*>(pairs);
    if constexpr (kParts == 1) {
      *reinterpret_cast<uint4*>(row + lane * 16) = *reinterpret_cast<const uint4*>(pairs);
    } else {
      *reinterpret_cast<uint2*>(row + lane * 8) = quads[0];
      *reinterpret_cast<uint2*>(row + 256 + lane * 8) = quads[1];
    }
  }
};

// The groups of 32 that are kept, a bit each, by the two lanes of a token. `plain` becomes false where a group's score
// is NaN or infinite or far off, `sure` where the error of rough choices may matter.
__device__ __forceinline__ uint32_t rough_groups(const char* row, int l, bool two_best, bool& plain, bool& sure) {
  float sums[4], farthest = 0, all[8], fourth, fifth;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    __align__(16) __half2 pairs[16];
    __half2 best, next;
#pragma unroll
    for (int o = 0; o < 4; o++) {
      reinterpret_cast<uint4*>(pairs)[o] = *reinterpret_cast<const uint4*>(row + (i * 2 + l) * 64 + o * 16);
    }
    best_of_pairs(pairs, best, next);
    const float first_best = __low2float(best), second_best = __low2float(next);
    sums[i] = first_best + (two_best ? second_best : 0.0f);
    farthest = fmaxf(farthest, fmaxf(fabsf(first_best), fabsf(second_best)));
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    all[i] = sums[i];
    all[4 + i] = __shfl_xor_sync(kAll, sums[i], 1);
  }
  middle_of_eight(all, fourth, fifth);
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    plain = plain && sums[i] < infinity();  // a NaN among the group's experts is still here
    kept |= (sums[i] >= fourth ? 1u : 0u) << (i * 2 + l);
  }
  kept |= __shfl_xor_sync(kAll, kept, 1);
  farthest = fmaxf(farthest, __shfl_xor_sync(kAll, farthest, 1));
  plain = plain && farthest < kFarBias;
  // Two sums are as far off as four choices, each by its error and its rounding to a half.
  sure = fourth - fifth > 4 * kChoiceError + 0x1.02p-9f * farthest;
  return kept;
}

// Shared memory: histogram counters, then kTokensOfWarp rows for every warp.
template <class T>
__global__ void __launch_bounds__(32 * kMostTokenWarps, 1) gate_tokens(const __grid_constant__ Args a) {
  constexpr int E = 256, kTokens = kTokensOfWarp, kAhead = 4;  // kAhead: rows under way

  let_next_kernel_start();
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* histogram = shared_memory;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  char* rows = reinterpret_cast<char*>(shared_memory + a.histogram) + warp * kTokens * kHalfStride;
  const int token = lane / 2, l = lane % 2;
  char* row = rows + token * kHalfStride;
  const int tokens = a.tokens, first = (blockIdx.x * warps + warp) * kTokens, t = first + token;
  const int here = max(0, min(kTokens, tokens - first));  // rows of this warp
  const int last = max(here, 1) - 1;                      // rows that do not exist repeat it
  const T* logits = static_cast<const T*>(a.logits) + static_cast<int64_t>(min(first, tokens - 1)) * E;

  float near[8];  // the bias less what brings the best choices close to 0, where halves are fine
#pragma unroll
  for (int quad = 0; quad < 2; quad++) {
    const int e = LaneColumns<T>::column(lane, quad);
    const float4 b = a.bias == nullptr ? float4{} : __ldg(reinterpret_cast<const float4*>(a.bias + e));
    near[4 * quad] = b.x, near[4 * quad + 1] = b.y, near[4 * quad + 2] = b.z, near[4 * quad + 3] = b.w;
  }
  if (a.histogram > 0) {
    clear_histogram(a, histogram);
    __syncthreads();
  }
  // Of a large block, some warps read their rows when the others have read some of theirs: then some sort while others
  // read.
  const int first_turn = warps > kTurnWarps ? (3 * warps + 4) / 5 : warps;
  if (warp >= first_turn) asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory");
  LaneColumns<T> ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; i++) ahead[i].load(logits + min(i, last) * E, lane);
  const int valid = static_cast<int>(valid_tokens(a));
  const auto pass_turn = [&] {
    if (warp < first_turn && first_turn < warps) asm volatile("bar.arrive 1, %0;" ::"r"(blockDim.x) : "memory");
  };
  if (here == 0) pass_turn();

  if (here > 0) {
    // Rough choices
    const float first_bias = __shfl_sync(kAll, near[0], 0);
    const bool usual = fabsf(first_bias) < kFarBias;
    const float middle = usual ? first_bias + 1.0f : 1.0f;  // choices are rough choices and this
#pragma unroll
    for (int i = 0; i < 8; i++) near[i] -= middle - 0.5f;
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      float c[8];
      __align__(16) __half2 pairs[4];
      ahead[i % kAhead].halved(c);
      if (i + kAhead < kTokens) ahead[i % kAhead].load(logits + min(i + kAhead, last) * E, lane);
#pragma unroll
      for (int k = 0; k < 8; k++) c[k] = near_choice(c[k], near[k]);
#pragma unroll
      for (int k = 0; k < 4; k++) pairs[k] = __floats2half2_rn(c[2 * k], c[2 * k + 1]);
      LaneColumns<T>::store(rows + i * kHalfStride, lane, pairs);
      if (i + 1 == kRowsOfTurn) pass_turn();
    }
    __syncwarp();

    // The groups that are kept
    bool plain = usual, sure;
    uint32_t kept = rough_groups(row, l, a.two_best, plain, sure);
    unsigned unsure = __ballot_sync(kAll, !sure && plain && t < valid && l == 0);
    for (; unsure != 0; unsure &= unsure - 1) {
      const int who = (__ffs(static_cast<int>(unsure)) - 1) / 2;
      const uint32_t exact = exact_groups<T>(a, first + who);
      if (token == who) {
        kept = exact;
        plain = plain && exact != 0;
      }
    }
    uint32_t groups = 0;  // the four, a byte each
#pragma unroll
    for (int q = 0; q < 4; q++) {
      groups |= ((__ffs(static_cast<int>(kept)) - 1) & 7) << 8 * q;
      kept &= kept - 1;
    }

    // Candidates: a bit each, of low halves and then of high halves
    uint32_t mask[2], base_key;
    bool narrow;
    {
      __half2 pairs[32], most_of_octet[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const char* at = row + (groups >> (l * 16 + i / 4 * 8) & 7) * 64 + i % 4 * 16;
        const uint4 words = *reinterpret_cast<const uint4*>(at);
        pairs[4 * i] = pair_of<__half2>(words.x), pairs[4 * i + 1] = pair_of<__half2>(words.y);
        pairs[4 * i + 2] = pair_of<__half2>(words.z), pairs[4 * i + 3] = pair_of<__half2>(words.w);
        most_of_octet[i] = larger(larger(pairs[4 * i], pairs[4 * i + 1]), larger(pairs[4 * i + 2], pairs[4 * i + 3]));
      }
      float most;
      const float threshold = eighth_of_pairs<2, 8>(most_of_octet, most);
      plain = plain && most < infinity() && threshold > -infinity();
      const float bound = threshold - 2.01f * kChoiceError - 0x1.02p-10f * fabsf(threshold);
      const __half2 under = __half2half2(__float2half_rd(bound));
      // Exact choices of candidates are above `low` and below `high`.
      const float least = __low2float(under);
      const float low = least - 0x1p-10f * fabsf(least) - 2 * kChoiceError + middle;
      const float high = most + 0x1p-10f * fabsf(most) + 2 * kChoiceError + middle;
      base_key = ordered(low);
      narrow = ordered(high) - base_key < 1u << 25;
#pragma unroll
      for (int q = 0; q < 2; q++) {
        mask[q] = 0;
#pragma unroll
        for (int w = 0; w < 16; w++) mask[q] |= __hge2_mask(pairs[16 * q + w], under) & (0x00010001u << w);
      }
    }
    __syncwarp();
    plain = __shfl_xor_sync(kAll, plain, 1) && plain;
    const bool live = t < valid, routed = plain && live;
    if (!routed) mask[0] = mask[1] = 0;

    // Keys, sorted. A slot is the place of an expert among the 128 of the kept groups, in the order of ids.
    const T* own = logits + min(token, last) * E;
    float* scores = reinterpret_cast<float*>(row);          // of slots
    uint8_t* list = reinterpret_cast<uint8_t*>(row) + 512;  // slots of 16 candidates
    const auto expert_of = [&](uint32_t slot) { return (groups >> (slot >> 5) * 8 & 7) * 32 + slot % 32; };
    const auto sorted = [&](auto kind, uint32_t* slots) {
      using Key = decltype(kind);
      Key top[8];
      bool more = false;
      do {
        const bool again = more;
        const int mine = __popc(mask[0]) + __popc(mask[1]), others = __shfl_xor_sync(kAll, mine, 1);
        const int count = mine + others;
        for (int place = l == 0 ? 0 : others; place < 16 && (mask[0] | mask[1]) != 0; place++) {
          const bool first_group = mask[0] != 0;
          const uint32_t rest = first_group ? mask[0] : mask[1], bit = 31 - __clz(static_cast<int>(rest));
          mask[0] = first_group ? rest & ~(1u << bit) : 0;
          mask[1] = first_group ? mask[1] : rest & ~(1u << bit);
          list[place] = static_cast<uint8_t>((2 * l + !first_group) * 32 + (bit & 15) * 2 + (bit >> 4));
        }
        more = __any_sync(kAll, (mask[0] | mask[1]) != 0);
        __syncwarp();
        const uint2 listed = *reinterpret_cast<const uint2*>(list + 8 * l);
        uint32_t slot[8];
        T logit[8];
        float bias[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          slot[i] = __byte_perm(i < 4 ? listed.x : listed.y, 0, 0x4440 + i % 4) & 127;
          const uint32_t e = expert_of(slot[i]);
          logit[i] = __ldg(own + e);
          bias[i] = a.bias == nullptr ? 0.0f : __ldg(a.bias + e);
        }
        Key keys[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float score = fast_sigmoid(widen(logit[i]));
          const bool found = 8 * l + i < count;
          if (found) scores[slot[i]] = score;
          if constexpr (sizeof(Key) == 4) {
            keys[i] = found ? (ordered(score + bias[i]) - base_key) << 7 | (127 - slot[i]) : 0;
          } else {
            keys[i] = found ? static_cast<Key>(ordered(score + bias[i])) << 32 | (127 - slot[i]) : 0;
          }
        }
        sort_eight(keys);
        if (again) {
          merge_eight<8>(top, keys);
        } else {
#pragma unroll
          for (int i = 0; i < 8; i++) top[i] = keys[i];
        }
        __syncwarp();
      } while (more);
      Key other[8];
#pragma unroll
      for (int i = 0; i < 8; i++) other[i] = __shfl_xor_sync(kAll, top[i], 1);
      merge_eight<8>(top, other);
#pragma unroll
      for (int k = 0; k < 4; k++) slots[k] = 127 - (static_cast<uint32_t>(l == 0 ? top[k] : top[4 + k]) & 127);
    };
    uint32_t slots[4];  // of the choices 4 l ...
    if (__all_sync(kAll, narrow || !routed)) {
      sorted(uint32_t{}, slots);
    } else {
      sorted(uint64_t{}, slots);
    }

    // What they weigh. Mapped ids are on their way meanwhile.
    const int32_t* map = a.id_map;
    if (map != nullptr) map += static_cast<int64_t>(map_round(a, t)) * a.map_row;
    int32_t logical[4], id[4];
    float weight[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int32_t e = static_cast<int32_t>(expert_of(slots[k]));
      logical[k] = e < a.routed ? e : e + a.shared;
      id[k] = map != nullptr ? __ldg(map + logical[k]) : logical[k];
      weight[k] = routed && 4 * l + k < a.K ? scores[slots[k]] : 0.0f;
    }
    if (a.renormalize) {
      float sum = (weight[0] + weight[1]) + (weight[2] + weight[3]);
      sum += __shfl_xor_sync(kAll, sum, 1);
      const float inverse = fast_inverse(sum);
#pragma unroll
      for (int k = 0; k < 4; k++) weight[k] = sum == 0 ? 0.0f : weight[k] * inverse;
    }
    __syncwarp();

    // Columns
    int32_t* ids_out = reinterpret_cast<int32_t*>(rows);
    float* weights_out = reinterpret_cast<float*>(ids_out + kTokens * a.columns);
    const int cell = token * a.columns;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (4 * l + k < a.K) {
        ids_out[cell + 4 * l + k] = routed ? id[k] : -1;
        weights_out[cell + 4 * l + k] = routed ? weight[k] * a.scale : 0.0f;
        if (a.counters != nullptr && routed) count_load(a, histogram, id[k]);
        if (a.logical_ids != nullptr && t < tokens) {
          a.logical_ids[static_cast<int64_t>(t) * a.K + 4 * l + k] = routed ? logical[k] : -1;
        }
      }
    }
#pragma unroll 1
    for (int s = l; s < a.shared; s += 2) {
      const int32_t shared_id = map != nullptr ? __ldg(map + a.routed + s) : a.routed + s;
      ids_out[cell + a.K + s] = routed ? shared_id : -1;
      weights_out[cell + a.K + s] = routed ? a.shared_weight : 0.0f;
      if (a.counters != nullptr && routed) count_load(a, histogram, shared_id);
    }
    unsigned slow = __ballot_sync(kAll, !plain && live && l == 0);
    __syncwarp();
    int32_t* ids = a.ids + static_cast<int64_t>(first) * a.columns;
    float* weights = a.weights + static_cast<int64_t>(first) * a.columns;
    const int cells = here * a.columns;
#pragma unroll 1
    for (int i = 4 * lane; i < cells; i += 128) {
      if (i + 4 <= cells) {
        *reinterpret_cast<int4*>(ids + i) = *reinterpret_cast<const int4*>(ids_out + i);
        *reinterpret_cast<float4*>(weights + i) = *reinterpret_cast<const float4*>(weights_out + i);
      } else {
#pragma unroll 1
        for (int j = i; j < cells; j++) ids[j] = ids_out[j], weights[j] = weights_out[j];
      }
    }
    for (; slow != 0; slow &= slow - 1) {
      __syncwarp();
      const int64_t who = first + (__ffs(static_cast<int>(slow)) - 1) / 2;
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
