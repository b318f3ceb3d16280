// The fast kernel of moe_fused_gate: L lanes per token, 32 / L tokens per warp, for at most 8 choices.
//
// Layout: experts come in octets of 8 consecutive ids; lane l of a token holds octets l, l + L, ... in registers, so
// that a group of 32 experts lies in one octet of 4 neighbouring lanes.
// 1. Every lane scores its experts (two special-function instructions each) and keeps the two best of each octet.
// 2. Eight of these bests (two of each kept group; or the eight best of all lanes' bests) bound the eighth best choice
//    from below: what lies under that threshold cannot be chosen. The test is a subtraction whose sign is
//    shifted into a bit mask, so that no register is indexed and nothing branches per expert.
// 3. The candidates (about 14 of 128 or 256) go to a list in shared memory with an exact score; each finds its rank by
//    counting who beats it, and those with rank below K are the choices.
// A token that this does not cover (NaN, infinite scores, equal groups at the cut, more than kCandidates candidates)
// is routed by gate_row of the general kernel.
//
// Limits: experts, groups and dtype as instantiated (Ragged: fewer experts too, any alignment, a softmax); K <= 8;
// logits and bias aligned to 16 bytes. Ties go to the lower id. Order
// of accumulation: butterfly over the slots.
#pragma once
#include "moe_fused_gate_row.cuh"
#include "moe_fused_gate_sort.cuh"

namespace moe::gate {

// What chooses: sigmoid + bias in 4 of 8 groups, sigmoid + bias, or the logits themselves with a softmax for weights.
enum class Family { kGrouped, kSigmoid, kSoftmax };

#ifdef __CUDACC__

inline constexpr int kCandidates = 64;

template <class T>
struct Octet {
  uint4 words[sizeof(T) / 2];
};

__device__ inline void unpack(const Octet<float>& o, float* x) {
  const uint4 a = o.words[0], b = o.words[1];
  const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = __uint_as_float(words[i]);
}

__device__ inline void unpack(const Octet<__nv_bfloat16>& o, float* x) {
  const uint32_t words[4] = {o.words[0].x, o.words[0].y, o.words[0].z, o.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ inline void unpack(const Octet<__half>& o, float* x) {
  const uint32_t words[4] = {o.words[0].x, o.words[0].y, o.words[0].z, o.words[0].w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <class T>
__device__ inline Octet<T> load_octet(const T* at) {
  Octet<T> o;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) o.words[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
  return o;
}

// The eighth largest among the two best of each of L lanes, and the largest.
template <int L>
__device__ inline float eighth_of_lanes(float best, float next, float& most) {
  float v[8];
  const float other_best = __shfl_xor_sync(kAll, best, 1), other_next = __shfl_xor_sync(kAll, next, 1);
  v[0] = larger(best, other_best);
  v[3] = smaller(next, other_next);
  v[1] = smaller(best, other_best);
  v[2] = larger(next, other_next);
  order(v[1], v[2]);
#pragma unroll
  for (int i = 0; i < 4; i++) v[7 - i] = __shfl_xor_sync(kAll, v[i], 2);
  sort_bitonic_eight(v);
#pragma unroll
  for (int lanes = 4; lanes < L; lanes *= 2) {
    float other[8];
#pragma unroll
    for (int i = 0; i < 8; i++) other[i] = __shfl_xor_sync(kAll, v[i], lanes);
    most = larger(v[0], other[0]);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = larger(v[i], other[7 - i]);
    if (2 * lanes < L) sort_bitonic_eight(v);
  }
  return smaller(smaller(smaller(v[0], v[1]), smaller(v[2], v[3])), smaller(smaller(v[4], v[5]), smaller(v[6], v[7])));
}

template <int L>
struct WarpLists {
  static constexpr int kTokens = 32 / L;
  // Ranks read this many at a time: many where a token's latency counts, few where the rest of the padding costs.
  static constexpr int kChunk = L >= 16 ? 16 : 4;
  static constexpr int kCandidateStride = kCandidates + kChunk + (L >= 16 ? 4 : 0);  // the tokens' lists in other banks
  __align__(16) float choice[kTokens][kCandidateStride];
  float score[kTokens][kCandidateStride];
  int32_t expert[kTokens][kCandidateStride];
  int32_t chosen[kTokens][8];  // places in the list
};

// Words of shared memory per warp.
template <int E, int L>
inline constexpr int kLanesScratch =
    static_cast<int>(sizeof(WarpLists<L>)) / 4 > (E + 8) ? static_cast<int>(sizeof(WarpLists<L>)) / 4 : E + 8;

// Ranks the candidates of this lane's token and stores those below K. With Ties, equal choices are ordered by expert;
// without, they come to one rank, and the answer is whether this lane met another there. `chosen` must hold -1 then.
template <int L, bool Ties>
__device__ inline bool rank_candidates(WarpLists<L>& lists, int token, int l, int count, int K) {
  constexpr int kOwn = L >= 16 ? 1 : 16 / L;
  const float* choices = lists.choice[token];
  const int32_t* experts = lists.expert[token];
  bool met = false;
  for (int base = 0; base < count; base += kOwn * L) {
    float own[kOwn], rank[kOwn];
    int32_t expert[kOwn];
#pragma unroll
    for (int m = 0; m < kOwn; m++) {
      const int i = base + m * L + l;
      own[m] = i < count ? choices[i] : -infinity();
      expert[m] = i < count ? experts[i] : 0;
      rank[m] = 0;
    }
    constexpr int kChunk = WarpLists<L>::kChunk;
#pragma unroll 1
    for (int j = 0; j < count; j += kChunk) {
      float other[kChunk];
      int32_t id[kChunk] = {};
#pragma unroll
      for (int k = 0; k < kChunk; k += 4) {
        const float4 four = *reinterpret_cast<const float4*>(choices + j + k);
        other[k] = four.x, other[k + 1] = four.y, other[k + 2] = four.z, other[k + 3] = four.w;
        if (Ties) {
          const int4 ids = *reinterpret_cast<const int4*>(experts + j + k);
          id[k] = ids.x, id[k + 1] = ids.y, id[k + 2] = ids.z, id[k + 3] = ids.w;
        }
      }
#pragma unroll
      for (int k = 0; k < kChunk; k++) {
#pragma unroll
        for (int m = 0; m < kOwn; m++) {
          const bool beats = Ties ? other[k] > own[m] || (other[k] == own[m] && id[k] < expert[m]) : other[k] > own[m];
          rank[m] += beats ? 1.0f : 0.0f;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kOwn; m++) {
      const int i = base + m * L + l;
      const int place = static_cast<int>(rank[m]);
      if (i < count && place < K) {
        if (Ties) {
          lists.chosen[token][place] = i;
        } else {
          met = atomicExch(&lists.chosen[token][place], i) >= 0 || met;
        }
      }
    }
  }
  return met;
}

// Shared memory: histogram counters, the bias where registers do not hold it, then kLanesScratch words per warp.
template <class T, int E, int L, Family F, int Warps, int Blocks, bool Ragged>
__global__ void __launch_bounds__(32 * Warps, Blocks) gate_lanes(const __grid_constant__ Args a) {
  constexpr int J = E / (8 * L), N = 8 * J, kTokens = 32 / L;
  constexpr bool kBiased = F != Family::kSoftmax;
  constexpr bool kDirect = N <= 16;  // candidates go to the list from registers, scores included
  constexpr bool kBiasInRegisters = kBiased && N <= 16;
  constexpr bool kBiasInShared = kBiased && !kBiasInRegisters;
  static_assert(E % (8 * L) == 0 && (F != Family::kGrouped || E == 256) && (!Ragged || F == Family::kSoftmax));

  let_next_kernel_start();
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* histogram = shared_memory;
  float* shared_bias = reinterpret_cast<float*>(shared_memory + a.histogram);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t* scratch = shared_memory + a.histogram + (kBiasInShared ? E : 0) + warp * kLanesScratch<E, L>;
  WarpLists<L>& lists = *reinterpret_cast<WarpLists<L>*>(scratch);
  const int token = lane / L, l = lane % L;

  const int64_t step = static_cast<int64_t>(gridDim.x) * Warps * kTokens;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * Warps + warp) * kTokens;
  Octet<T> octets[Ragged ? 1 : J];
  float ragged[Ragged ? N : 1];
  const int row_size = Ragged ? a.E : E;
  const auto load = [&](int64_t t) {
    const T* row = static_cast<const T*>(a.logits) + (t < a.T ? t : a.T - 1) * row_size + 8 * l;
    if constexpr (Ragged) {
#pragma unroll
      for (int i = 0; i < N; i++) {
        const int e = i / 8 * 8 * L + i % 8;
        ragged[i] = 8 * l + e < row_size ? widen(__ldg(row + e)) : -infinity();
      }
    } else {
#pragma unroll
      for (int j = 0; j < J; j++) octets[j] = load_octet(row + 8 * L * j);
    }
  };
  float4 bias_part = {};
  if constexpr (kBiasInShared) {
    static_assert(E / 4 <= 32 * Warps);
    if (a.bias != nullptr && threadIdx.x < E / 4)
      bias_part = __ldg(reinterpret_cast<const float4*>(a.bias) + threadIdx.x);
  }
  load(first + token);
  const int64_t valid = valid_tokens(a);
  float bias[kBiasInRegisters ? N : 1];
  if constexpr (kBiasInRegisters) {
#pragma unroll
    for (int i = 0; i < N; i++) bias[i] = a.bias != nullptr ? __ldg(a.bias + (i / 8 * L + l) * 8 + i % 8) : 0.0f;
  }
  if constexpr (kBiasInShared) {
    if (threadIdx.x < E / 4) reinterpret_cast<float4*>(shared_bias)[threadIdx.x] = bias_part;
  }
  if (a.id_map != nullptr && L == 32) {  // few tokens: the map row is on its way before it is needed
    const int64_t row = static_cast<uint32_t>(first) % a.rounds * static_cast<int64_t>(a.E + a.shared);
    if (lane * 32 < a.E + a.shared) asm volatile("prefetch.global.L1 [%0];" ::"l"(a.id_map + row + lane * 32));
  }
  if (a.histogram > 0) clear_histogram(a, histogram);
  if (kBiasInShared || a.histogram > 0) __syncthreads();

  for (; first < a.T; first += step) {
    const int64_t t = first + token;

    // Scores
    float c[N], score[kDirect ? N : 1];
#pragma unroll
    for (int j = 0; j < J; j++) {
      float* x = c + 8 * j;
      if constexpr (Ragged) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = ragged[8 * j + i];
      } else {
        unpack(octets[j], x);
      }
      if constexpr (kBiased) {
        float b[8];
        if constexpr (kBiasInShared) {
          const float4* at = reinterpret_cast<const float4*>(shared_bias + (j * L + l) * 8);
          const float4 low = at[0], high = at[1];
          b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
          b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
        } else {
#pragma unroll
          for (int i = 0; i < 8; i++) b[i] = bias[8 * j + i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float s = fast_sigmoid(x[i]);
          if constexpr (kDirect) score[8 * j + i] = s;
          x[i] = s + b[i];
        }
      }
    }
    bool plain = true;

    // The threshold
    float threshold, most = 0;
    bool kept[F == Family::kGrouped ? J : 1];
    if constexpr (F == Family::kGrouped) {
      float sum[J], next[J], sums[8];
#pragma unroll
      for (int j = 0; j < J; j++) {
        float best;
        best_of_octet(c + 8 * j, best, next[j]);
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
          const float other_best = __shfl_xor_sync(kAll, best, lanes),
                      other_next = __shfl_xor_sync(kAll, next[j], lanes);
          merge_best(best, next[j], other_best, other_next);
        }
        sum[j] = a.two_best ? best + next[j] : best;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i] = i < J ? sum[i % J] : __shfl_xor_sync(kAll, sum[i % J], i / J * 4);
      float fourth, fifth;
      middle_of_eight(sums, fourth, fifth);
      plain = fourth > fifth;
#pragma unroll
      for (int j = 0; j < J; j++)
        plain = plain && sum[j] < infinity();  // a NaN among the group's experts is still here
      threshold = infinity();
#pragma unroll
      for (int j = 0; j < J; j++) {
        kept[j] = sum[j] >= fourth;
        if (kept[j]) threshold = smaller(threshold, next[j]);
      }
#pragma unroll
      for (int lanes = 4; lanes < L; lanes *= 2)
        threshold = smaller(threshold, __shfl_xor_sync(kAll, threshold, lanes));
    } else {
      float best, next;
      best_of_octet(c, best, next);
#pragma unroll
      for (int j = 1; j < J; j++) {
        float other_best, other_next;
        best_of_octet(c + 8 * j, other_best, other_next);
        merge_best(best, next, other_best, other_next);
      }
      if constexpr (L == 8 || L == 16) {
        threshold = eighth_of_lanes<L>(best, next, most);
      } else {
#pragma unroll
        for (int lanes = 1; lanes < L / 4; lanes *= 2) {
          const float other_best = __shfl_xor_sync(kAll, best, lanes), other_next = __shfl_xor_sync(kAll, next, lanes);
          merge_best(best, next, other_best, other_next);
        }
        threshold = next;
        most = best;
#pragma unroll
        for (int lanes = L / 4; lanes < L; lanes *= 2) {
          threshold = smaller(threshold, __shfl_xor_sync(kAll, threshold, lanes));
          most = larger(most, __shfl_xor_sync(kAll, most, lanes));
        }
      }
      plain = most < infinity();
      // Where powers underflow, they tie, and the logits do not tell.
      if (F == Family::kSoftmax && a.selection == Selection::kScore) plain = plain && threshold > most - 80.0f;
    }
    plain = plain && threshold > -infinity();

    // Candidates
    const float under = threshold - fmaf(fabsf(threshold), 0x1p-20f, F == Family::kSoftmax ? 0.0f : 0x1p-20f);
    uint32_t mask[(N + 31) / 32] = {};
#pragma unroll
    for (int j = J - 1; j >= 0; j--) {
      float bound = under;
      if constexpr (F == Family::kGrouped) bound = kept[j] ? under : infinity();
#pragma unroll
      for (int i = 7; i >= 0; i--) {
        uint32_t& word = mask[8 * j / 32];
        word = __funnelshift_l(__float_as_uint(bound - c[8 * j + i]), word, 1);
      }
    }
    int count = 0;
#pragma unroll
    for (int w = 0; w < (N + 31) / 32; w++) count += __popc(mask[w]);
    int after = count;
#pragma unroll
    for (int lanes = 1; lanes < L; lanes *= 2) {
      const int before = __shfl_up_sync(kAll, after, lanes, L);
      if (l >= lanes) after += before;
    }
    int place = after - count;
    count = __shfl_sync(kAll, after, L - 1, L);
    plain = plain && count >= a.K && count <= kCandidates;
    // All lanes of a token agree.
    const unsigned token_lanes = L == 32 ? kAll : ((1u << (L % 32)) - 1) << (token * L);
    plain = (~__ballot_sync(kAll, plain) & token_lanes) == 0;
    const bool live = t < valid;
    if (!plain || !live) count = 0;
    if constexpr (kBiased) {
      for (int i = lane; i < kTokens * 8; i += 32) lists.chosen[i / 8][i % 8] = -1;
    }
    if (count > 0) {
      if constexpr (kDirect) {
#pragma unroll
        for (int i = 0; i < N; i++) {
          if ((mask[0] >> i & 1) != 0) {
            lists.choice[token][place] = c[i];
            if constexpr (kBiased) lists.score[token][place] = score[i];
            lists.expert[token][place] = (i / 8 * L + l) * 8 + i % 8;
            place++;
          }
        }
      } else {
        int32_t* list = lists.expert[token] + place;
#pragma unroll
        for (int w = 0; w < (N + 31) / 32; w++) {
          // Lane and bit only: what expert that is, is worked out when the candidates are shared out evenly.
          uint32_t rest = mask[w];
          while (rest != 0) {
            const int bit = 31 - __clz(static_cast<int>(rest));
            rest ^= 1u << bit;
            *list++ = (w * 8 * L + l) * 64 + bit;
          }
        }
      }
    }
    __syncwarp();

    // Exact scores
    if constexpr (!kDirect) {
      const T* row = static_cast<const T*>(a.logits) + t * row_size;
#pragma unroll 1
      for (int i = l; i < count; i += L) {
        const unsigned code = static_cast<unsigned>(lists.expert[token][i]);
        const unsigned octet = (code / 8 % 4 + code / (512 * L) * 4) * L + code / 64 % L;  // j * L + lane
        const unsigned e = octet * 8 + code % 8;
        lists.expert[token][i] = static_cast<int32_t>(e);
        const float x = widen(__ldg(row + e));
        if constexpr (kBiased) {
          const float s = fast_sigmoid(x);
          lists.score[token][i] = s;
          lists.choice[token][i] = s + shared_bias[e];
        } else {
          lists.choice[token][i] = x;
        }
      }
    }
    if (l < WarpLists<L>::kChunk - 1) lists.choice[token][count + l] = -infinity();
    __syncwarp();
    if (first + step < a.T) load(t + step);

    // Ranks, then columns
    const unsigned processed = __ballot_sync(kAll, count > 0);
    const bool tie = rank_candidates<L, !kBiased>(lists, token, l, count, a.K);
    __syncwarp();
    if constexpr (kBiased) {
      if (__any_sync(kAll, tie)) {
        __syncwarp();
        rank_candidates<L, true>(lists, token, l, count, a.K);
        __syncwarp();
      }
    }
    const Rows rows(a, first);
#pragma unroll
    for (int base = 0; base < kTokens * 8; base += 32) {
      const int i = base + lane, slot = i % 8, at = i / 8;
      const bool active = at < kTokens && slot < a.K;
      const bool routed = active && (processed >> (at * L % 32) & 1) != 0;
      const int32_t place_in_list = routed ? lists.chosen[at][slot] : 0;
      const int32_t expert = routed ? lists.expert[at][place_in_list] : 0;
      float weight = 0;
      if (routed) weight = kBiased ? lists.score[at][place_in_list] : lists.choice[at][place_in_list];
      if constexpr (!kBiased) {
        const float top = __shfl_sync(kAll, weight, lane & ~7);
        if (routed) weight = expf(weight - top);
      }
      if (a.renormalize || F == Family::kSoftmax) {
        float sum = weight;
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
        weight = sum == 0 ? 0.0f : __fdividef(weight, sum);
      }
      if (routed) {
        write_choice(a, rows, at, a.id_map != nullptr ? map_round(a, first + at) : 0, slot, expert, weight, histogram);
      } else if (active && first + at >= valid && first + at < a.T) {
        write_padding(a, rows, at, slot);
      }
    }
    const unsigned slow = __ballot_sync(kAll, !plain && live && l == 0);
    if (a.shared > 0) {
      for (int i = lane; i < kTokens * a.shared; i += 32) {
        const int at = a.shared == 1 ? i : i / a.shared, which = i - at * a.shared;
        if (first + at >= a.T || (slow >> (at * L) & 1) != 0) continue;
        if (first + at < valid) {
          write_shared(a, rows, at, a.id_map != nullptr ? map_round(a, first + at) : 0, which, histogram);
        } else {
          write_padding(a, rows, at, a.K + which);
        }
      }
    }
    for (unsigned rest = slow; rest != 0; rest &= rest - 1) {
      __syncwarp();
      gate_row_apart<(E + 31) / 32>(a, first + (__ffs(static_cast<int>(rest)) - 1) / L, scratch, histogram);
    }
    __syncwarp();
  }
  if (a.histogram > 0) {
    __syncthreads();
    add_histogram(a, histogram);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
