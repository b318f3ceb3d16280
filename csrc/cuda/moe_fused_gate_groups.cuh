// The kernel of moe_fused_gate for any number of experts, and any size of groups, that is a multiple of four: L lanes
// per token, 32 / L tokens per warp, for at most L choices.
//
// Layout: a quad is 4 consecutive experts; lane l of a token holds quads l, l + L, ... in registers.
// 1. Every lane scores its experts and takes the two best of each quad. Through shared memory a lane gets those of a
//    group and its score; groups count who beats them.
// 2. The two largest maxima of kept quads of each lane: the K-th of them, by counting again, bounds the K-th best
//    choice from below.
// 3. What is not under that bound goes to a list with an exact score, and finds its rank by counting who beats it.
// A token that this does not cover (NaN, infinite scores, powers that underflow, more than kList candidates) is routed
// by gate_row of the general kernel.
//
// Limits: E <= 32 L; 32 groups; logits and bias aligned to 16 bytes. What chooses is sigmoid + bias, or the logit
// itself (Sigmoid false, no bias; softmax or sigmoid for weights). Ties go to the lower id, for experts and groups.
// Order of accumulation: a butterfly over the slots; a whole softmax quad by quad, then a butterfly over the lanes.
#pragma once
#include "moe_fused_gate_lanes.cuh"

namespace moe::gate {

inline constexpr int kMostGroups = 32;

// What a token has in shared memory.
template <int L>
struct alignas(16) GroupScratch {
  static constexpr int kList = 64;
  union {
    float2 bests[8 * L + kMostGroups];  // of quads, those of groups an odd number apart
    struct {
      uint64_t key[kList];
      float score[kList];
    } list;
  };
  union {
    float sums[kMostGroups];
    float maxima[2 * L];
    struct {
      int32_t expert[16];
      float score[16];
    } chosen;
  };
  float gap[L];  // the tokens of a warp in other banks
};

#ifdef __CUDACC__

// Four logits as they lie in memory: of 4 bytes, or of 2 in either format.
__device__ inline void unpack_quad(const Args&, uint4 raw, float* x) {
  x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack_quad(const Args& a, uint2 raw, float* x) {
  if (a.dtype == DType::kBF16) {
    x[0] = __uint_as_float(raw.x << 16), x[1] = __uint_as_float(raw.x & 0xffff0000u);
    x[2] = __uint_as_float(raw.y << 16), x[3] = __uint_as_float(raw.y & 0xffff0000u);
  } else {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
}

// Over the lanes of a token.
template <int L, class V, class Op>
__device__ inline V over_lanes(V x, const Op& op) {
#pragma unroll
  for (int lanes = 1; lanes < L; lanes *= 2) x = op(x, __shfl_xor_sync(kAll, x, lanes));
  return x;
}

// Quad: uint4 for logits of 4 bytes, uint2 for those of 2. Shared memory: histogram counters, the bias where the
// sigmoid chooses, then a GroupScratch for every token.
template <class Quad, int L, bool Sigmoid>
__global__ void __launch_bounds__(128, 4) gate_groups(const __grid_constant__ Args a) {
  constexpr int J = 8, kTokens = 32 / L, kOwn = 16 / L;
  let_next_kernel_start();
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* histogram = shared_memory;
  float* shared_bias = reinterpret_cast<float*>(shared_memory + a.histogram);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int token = lane / L, l = lane % L;
  GroupScratch<L>* scratch =
      reinterpret_cast<GroupScratch<L>*>(shared_bias + (Sigmoid ? 4 * J * L : 0)) + warp * kTokens;
  GroupScratch<L>& own = scratch[token];
  const unsigned token_lanes = ((1u << L) - 1) << (token * L);

  const int quads = a.E / 4, group_quads = a.group_size / 4;
  const bool grouped = a.top_groups < a.groups;
  const bool whole = a.scoring == Scoring::kSoftmax && a.selection == Selection::kScore && !a.renormalize;
  const int64_t step = static_cast<int64_t>(gridDim.x) * warps * kTokens;
  int64_t first = (static_cast<int64_t>(blockIdx.x) * warps + warp) * kTokens;
  Quad raw[J] = {};
  const auto load = [&](int64_t t) {
    const Quad* row = static_cast<const Quad*>(a.logits) + min(t, a.T - 1) * quads;
#pragma unroll
    for (int j = 0; j < J; j++) {
      if (j * L + l < quads) raw[j] = __ldg(row + j * L + l);
    }
  };
  load(first + token);
  const int64_t valid = valid_tokens(a);
  uint32_t group_of[2] = {};  // a byte for each quad of this lane
#pragma unroll
  for (int j = 0; j < J; j++) group_of[j / 4] |= ((j * L + l) * 4 * a.group_magic >> 20 & 31) << j % 4 * 8;
  const auto group_at = [&](int j) { return group_of[j / 4] >> j % 4 * 8 & 31; };
  if constexpr (Sigmoid) {
    for (int e = threadIdx.x; e < 4 * J * L; e += blockDim.x) {
      shared_bias[e] = e >= a.E ? -infinity() : a.bias != nullptr ? __ldg(a.bias + e) : 0.0f;
    }
  }
  if (a.histogram > 0) clear_histogram(a, histogram);
  if (Sigmoid || a.histogram > 0) __syncthreads();

  for (; first < a.T; first += step) {
    const int64_t t = first + token;

    // Choices, and the two best of each quad
    float c[4 * J], best[J];
#pragma unroll
    for (int j = 0; j < J; j++) {
      float* x = c + 4 * j;
      x[0] = x[1] = x[2] = x[3] = best[j] = -infinity();
      if (j * L < quads) {
        const int q = j * L + l;
        if (Sigmoid || q < quads) unpack_quad(a, raw[j], x);
        if constexpr (Sigmoid) {
          const float4 b = reinterpret_cast<const float4*>(shared_bias)[q];
          x[0] = fast_sigmoid(x[0]) + b.x, x[1] = fast_sigmoid(x[1]) + b.y;
          x[2] = fast_sigmoid(x[2]) + b.z, x[3] = fast_sigmoid(x[3]) + b.w;
        }
        const float high = larger(x[0], x[1]), high2 = larger(x[2], x[3]);
        best[j] = larger(high, high2);
        const float next = larger(smaller(high, high2), larger(smaller(x[0], x[1]), smaller(x[2], x[3])));
        if (q < quads) own.bests[q + (group_quads % 2 == 0 ? group_at(j) : 0)] = make_float2(best[j], next);
      }
    }
    float most = best[0];
#pragma unroll
    for (int j = 1; j < J; j++) most = larger(most, best[j]);
    most = over_lanes<L>(most, [](float x, float y) { return larger(x, y); });
    bool plain = most < infinity();
    float sum = 0;  // of a whole softmax
    const float top_of_row = most * kLog2E;
    if (!Sigmoid && whole) {
      plain = fabsf(most) < kMostLogit;
#pragma unroll
      for (int j = 0; j < J; j++) {
        if (j * L < quads) {
          const float* x = c + 4 * j;
          sum += (power_under(x[0], top_of_row) + power_under(x[1], top_of_row)) +
                 (power_under(x[2], top_of_row) + power_under(x[3], top_of_row));
        }
      }
      sum = over_lanes<L>(sum, [](float x, float y) { return x + y; });
    }

    // The groups that are kept, a bit each
    uint32_t kept = kAll;
    if (grouped) {
      __syncwarp();
      for (int g = l; g < a.groups; g += L) {
        const float2* bests = own.bests + g * (group_quads | 1);
        float high = -infinity(), next = -infinity();
#pragma unroll 4
        for (int i = 0; i < group_quads; i++) {
          const float2 other = bests[i];
          merge_best(high, next, other.x, other.y);
        }
        own.sums[g] = a.two_best ? high + next : high;
      }
      __syncwarp();
      kept = 0;
      for (int base = 0; base < a.groups; base += L) {
        const int g = base + l;
        const float mine = own.sums[min(g, a.groups - 1)];
        int rank = 0;
#pragma unroll 4
        for (int h = 0; h < a.groups; h++) {
          const float other = own.sums[h];
          rank += other > mine || (other == mine && h < g);
        }
        plain = plain && mine < infinity();
        const unsigned chosen = __ballot_sync(kAll, g < a.groups && rank < a.top_groups);
        kept |= ((chosen & token_lanes) >> (token * L)) << base;
      }
    }
    uint32_t kept_quads = 0;
#pragma unroll
    for (int j = 0; j < J; j++) kept_quads |= (kept >> group_at(j) & 1) << j;

    // The threshold
    float high = -infinity(), next = -infinity();
#pragma unroll
    for (int j = 0; j < J; j++) {
      const float x = (kept_quads >> j & 1) != 0 ? best[j] : -infinity();
      next = larger(next, smaller(high, x));
      high = larger(high, x);
    }
    __syncwarp();
    *reinterpret_cast<float2*>(own.maxima + 2 * l) = make_float2(high, next);
    __syncwarp();
    float high_rank = 0, next_rank = 0;  // counted by one instruction more where they are integers
    const float most_rank = static_cast<float>(a.K);
#pragma unroll
    for (int i = 0; i < 2 * L; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(own.maxima + i);
      const float other[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        high_rank += other[k] > high ? 1.0f : 0.0f;
        next_rank += other[k] > next ? 1.0f : 0.0f;
      }
    }
    const float mine = next_rank < most_rank ? next : high_rank < most_rank ? high : infinity();
    const float threshold = fmaxf(over_lanes<L>(mine, [](float x, float y) { return fminf(x, y); }), -0x1p126f);

    // Candidates: a bit each
    const float under = threshold - fmaf(fabsf(threshold), 0x1p-20f, Sigmoid ? 0x1p-20f : 0.0f);
    uint32_t mask = 0;
#pragma unroll
    for (int j = J - 1; j >= 0; j--) {
      const float bound = (kept_quads >> j & 1) != 0 ? under : infinity();
#pragma unroll
      for (int i = 3; i >= 0; i--) mask = __funnelshift_l(__float_as_uint(bound - c[4 * j + i]), mask, 1);
    }
    const int mine_listed = __popc(mask);
    int place = mine_listed;
#pragma unroll
    for (int lanes = 1; lanes < L; lanes *= 2) {
      const int before = __shfl_up_sync(kAll, place, lanes, L);
      if (l >= lanes) place += before;
    }
    int count = __shfl_sync(kAll, place, L - 1, L);
    place -= mine_listed;
    const bool live = t < valid;
    plain = plain && count >= a.K && count <= GroupScratch<L>::kList;
    plain = (~__ballot_sync(kAll, plain) & token_lanes) == 0;
    if (!plain || !live) count = 0, mask = 0;
    for (; mask != 0; place++) {
      const int bit = 31 - __clz(static_cast<int>(mask));
      mask ^= 1u << bit;
      own.list.score[place] = __int_as_float(((bit / 4) * L + l) * 4 + bit % 4);
    }
    __syncwarp();

    // Exact scores
#pragma unroll 1
    for (int i = l; i < count; i += L) {
      const int e = __float_as_int(own.list.score[i]);
      const float x = load_logit(a, t * a.E + e), score = Sigmoid ? fast_sigmoid(x) : x;
      const float choice = Sigmoid ? score + shared_bias[e] : x;
      own.list.score[i] = score;
      own.list.key[i] = static_cast<uint64_t>(rank_key(choice)) << 32 | (0xffffu - e);
    }
    __syncwarp();
    if (first + step < a.T) load(t + step);

    // Ranks
    for (int base = 0; base < count; base += kOwn * L) {
      uint64_t key[kOwn];
      int rank[kOwn] = {};
#pragma unroll
      for (int m = 0; m < kOwn; m++) key[m] = base + m * L + l < count ? own.list.key[base + m * L + l] : 0;
#pragma unroll 4
      for (int i = 0; i < count; i++) {
        const uint64_t other = own.list.key[i];
#pragma unroll
        for (int m = 0; m < kOwn; m++) rank[m] += other > key[m];
      }
#pragma unroll
      for (int m = 0; m < kOwn; m++) {
        const int i = base + m * L + l;
        if (i < count && rank[m] < a.K) {
          own.chosen.expert[rank[m]] = static_cast<int32_t>(0xffffu - static_cast<uint32_t>(key[m]));
          own.chosen.score[rank[m]] = own.list.score[i];
        }
      }
    }
    __syncwarp();

    // Columns: lane l has that of choice l
    bool routed = count > 0;
    const bool active = l < a.K;
    float weight = routed && active ? own.chosen.score[l] : Sigmoid ? 0.0f : -infinity();
    const int32_t expert = routed && active ? own.chosen.expert[l] : 0;
    if constexpr (!Sigmoid) {
      if (a.scoring == Scoring::kSigmoid) {
        weight = active ? fast_sigmoid(weight) : 0.0f;
      } else {
        // Where powers underflow, they tie, and the logits do not tell.
        const float least = __shfl_sync(kAll, weight, token * L + a.K - 1), top = __shfl_sync(kAll, weight, token * L);
        if (a.selection == Selection::kScore) plain = plain && (!routed || least > most - 79.0f);
        routed = routed && plain;
        weight = routed ? (whole ? power_under(weight, top_of_row) : expf(weight - top)) : 0.0f;
      }
    }
    const bool softmax = !Sigmoid && a.scoring == Scoring::kSoftmax;
    if (a.renormalize || softmax) {
      if (!whole) sum = over_lanes<L>(weight, [](float x, float y) { return x + y; });
      weight = sum == 0 ? 0.0f : __fdividef(weight, sum);
    }
    const Rows rows(a, first);
    const uint32_t round = a.id_map != nullptr ? map_round(a, t) : 0;
    const bool padding = t >= valid && t < a.T;
    if (active && routed) {
      write_choice(a, rows, token, round, l, expert, weight, histogram);
    } else if (active && padding) {
      write_padding(a, rows, token, l);
    }
#pragma unroll 1
    for (int s = l; s < a.shared; s += L) {
      if (routed) write_shared(a, rows, token, round, s, histogram);
      if (padding) write_padding(a, rows, token, a.K + s);
    }
    for (unsigned slow = __ballot_sync(kAll, !plain && live && l == 0); slow != 0; slow &= slow - 1) {
      __syncwarp();
      const int64_t who = first + (__ffs(static_cast<int>(slow)) - 1) / L;
      gate_row_apart<L>(a, who, reinterpret_cast<uint32_t*>(scratch), histogram);
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
