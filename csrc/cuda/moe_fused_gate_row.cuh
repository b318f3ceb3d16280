// The general kernel of moe_fused_gate, and what the fast one falls back to: one warp per token, any options.
//
// Layout: expert e lies in register e / 32 of lane e % 32, N registers a lane. Choices become keys; a bound
// from below leaves few of them, which rank each other in shared memory. Where too many remain (ties), every round
// takes the largest key of the warp with one redux and its lowest expert with another. Lane r keeps the r-th choice.
// Group scores go through shared memory: some lanes per group. Limits: 1024 experts, 32 choices, any group count.
//
// Ties go to the lower id for experts and groups. A NaN logit or bias ranks below -inf and weighs 0. Order of
// accumulation: register by register, then a butterfly over the lanes.
#pragma once
#include "moe_fused_gate.cuh"

namespace moe::gate {

#ifdef __CUDACC__

__device__ inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lanes));
  return x;
}

__device__ inline float softmax_power(float x, float most) {
  if (isnan(x)) return x;
  return most == -infinity() ? 0.0f : x == most ? 1.0f : expf(x - most);
}

// Words of shared memory that gate_row needs per warp.
inline constexpr int kRowList = 64;
__host__ __device__ inline constexpr int row_scratch(int experts, int groups) {
  return (experts > 2 * kRowList + 32 ? experts : 2 * kRowList + 32) + groups;
}

template <int N, class T>
__device__ __forceinline__ void load_row(const T* row, int experts, float* x) {
  const int lane = threadIdx.x % 32;
  T raw[N];
#pragma unroll
  for (int i = 0; i < N; i++) raw[i] = __ldg(row + min(lane + 32 * i, experts - 1));
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = lane + 32 * i < experts ? widen(raw[i]) : nan_value();
}

// Sets the keys of experts to 0 that are not in the best groups. `scratch`: experts + groups words.
template <int N>
__device__ __forceinline__ void keep_groups(const Args& a, uint32_t* key, uint32_t* scratch) {
  const int lane = threadIdx.x % 32;
  uint32_t* group_keys = scratch + a.E;
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (lane + 32 * i < a.E) scratch[lane + 32 * i] = key[i];
  }
  __syncwarp();
  // As many lanes per group as there are, each with every so many-th of its experts.
  const int team = a.groups > 16 ? 1 : a.groups > 8 ? 2 : a.groups > 4 ? 4 : a.groups > 2 ? 8 : 16;
  for (int base = 0; base < a.groups; base += 32 / team) {
    const int g = base + lane / team;
    uint32_t best = 0, next = 0;
    if (g < a.groups) {
      const uint32_t* keys = scratch + g * a.group_size;
#pragma unroll 4
      for (int i = lane % team; i < a.group_size; i += team) {
        const uint32_t other = keys[i];
        next = max(next, min(best, other));
        best = max(best, other);
      }
    }
    for (int lanes = 1; lanes < team; lanes *= 2) {
      const uint32_t other_best = __shfl_xor_sync(kAll, best, lanes), other_next = __shfl_xor_sync(kAll, next, lanes);
      next = max(min(best, other_best), max(next, other_next));
      best = max(best, other_best);
    }
    const bool both = a.two_best && next > 1;  // 1 is NaN, 0 nobody
    if (g < a.groups && lane % team == 0) group_keys[g] = both ? rank_key(key_value(best) + key_value(next)) : best;
  }
  __syncwarp();
  uint32_t* kept = scratch;  // the keys are not needed there any more
  for (int g = lane; g < a.groups; g += 32) {
    const uint32_t mine = group_keys[g];
    int rank = 0;
#pragma unroll 4
    for (int h = 0; h < a.groups; h++) {
      const uint32_t other = group_keys[h];
      rank += other > mine || (other == mine && h < g);
    }
    kept[g] = rank < a.top_groups;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < N; i++) {
    const uint32_t e = min(lane + 32 * i, a.E - 1);
    if (kept[e * a.group_magic >> 20] == 0) key[i] = 0;
  }
  __syncwarp();
}

// Lane r < K gets the r-th best expert, one after the other. Few registers, many instructions.
template <int N>
__device__ __forceinline__ int32_t best_by_rounds(uint32_t (&key)[N], int K) {
  const int lane = threadIdx.x % 32;
  uint32_t mine = 0;
#pragma unroll
  for (int i = 0; i < N; i++) mine = max(mine, key[i]);
  int32_t chosen = 0;
  for (int r = 0; r < K; r++) {
    const uint32_t best = __reduce_max_sync(kAll, mine);
    uint32_t expert = 0xffffffffu;
    if (mine == best) {
#pragma unroll
      for (int i = N - 1; i >= 0; i--) {
        if (key[i] == best) expert = lane + 32 * i;
      }
    }
    const uint32_t winner = __reduce_min_sync(kAll, expert);
    if (lane == r) chosen = static_cast<int32_t>(winner);
    if (winner == expert) {
      mine = 0;
#pragma unroll
      for (int i = 0; i < N; i++) {
        if (lane + 32 * i == expert) key[i] = 0;
        mine = max(mine, key[i]);
      }
    }
  }
  return chosen;
}

// The same as a function of its own. By value: an array that a call can reach would lie in memory everywhere.
template <int N>
struct RowKeys {
  uint32_t key[N];
};
template <int N>
__device__ __noinline__ int32_t best_by_rounds_apart(RowKeys<N> row, int K) {
  return best_by_rounds<N>(row.key, K);
}

// Lane r < K gets the r-th best expert. The K-th of the maxima of some keys each (four per lane) bounds the K-th key
// from below; a bisection finds it nearly, and what is not below goes to a list where each counts who beats it.
template <int N>
__device__ __forceinline__ int32_t best_of_row(const uint32_t* key, int K, uint32_t* scratch) {
  constexpr int kMaxima = N < 4 ? N : 4, kSlack = 6;
  const int lane = threadIdx.x % 32;
  uint32_t most[kMaxima] = {}, mine = 0;
#pragma unroll
  for (int i = 0; i < N; i++) most[i % kMaxima] = max(most[i % kMaxima], key[i]);
#pragma unroll
  for (int i = 0; i < kMaxima; i++) mine = max(mine, most[i]);
  uint32_t low = max(__reduce_min_sync(kAll, mine), 1u), high = __reduce_max_sync(kAll, mine) + 1;
  while (high - low > 1 && high > low) {
    const uint32_t middle = low + (high - low) / 2;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMaxima; i++) count += __popc(__ballot_sync(kAll, most[i] >= middle));
    if (count >= K) {
      low = middle;
      if (count <= K + kSlack) break;
    } else {
      high = middle;
    }
  }
  uint64_t* list = reinterpret_cast<uint64_t*>(scratch);
  int32_t* sorted = reinterpret_cast<int32_t*>(scratch + 2 * kRowList);
  const unsigned before = (1u << lane) - 1;
  int count = 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const bool listed = key[i] >= low;
    const unsigned lanes = __ballot_sync(kAll, listed);
    const int place = count + __popc(lanes & before);
    if (listed && place < kRowList) list[place] = static_cast<uint64_t>(key[i]) << 32 | (0xffffu - (lane + 32 * i));
    count += __popc(lanes);
  }
  if (count > kRowList || count < K) {
    RowKeys<N> row;
#pragma unroll
    for (int i = 0; i < N; i++) row.key[i] = key[i];
    return best_by_rounds_apart<N>(row, K);
  }
  __syncwarp();
  const uint64_t own[2] = {lane < count ? list[lane] : 0, lane + 32 < count ? list[lane + 32] : 0};
  int rank[2] = {};
#pragma unroll 4
  for (int i = 0; i < count; i++) {
    const uint64_t other = list[i];
    rank[0] += other > own[0];
    rank[1] += other > own[1];
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (lane + 32 * i < count && rank[i] < K)
      sorted[rank[i]] = static_cast<int32_t>(0xffffu - static_cast<uint32_t>(own[i]));
  }
  __syncwarp();
  const int32_t chosen = sorted[min(lane, K - 1)];
  __syncwarp();
  return chosen;
}

// The keys of a row, one expert at a time and through `scratch`, so that this is code for one expert: logits are read
// again where all of them are needed first. The same arithmetic in the same order as in gate_row.
template <int N, class Score>
__device__ __forceinline__ void lean_keys(const Args& a, int64_t first, uint32_t* scratch, uint32_t (&key)[N],
                                          float& most, float& sum, const Score& score) {
  const int lane = threadIdx.x % 32;
  const auto logit_at = [&](int e) {
    return e >= a.E || (a.bias != nullptr && isnan(a.bias[e])) ? nan_value() : load_logit(a, first + e);
  };
  const bool by_logits = a.selection == Selection::kLogits;
  if (!by_logits && a.scoring == Scoring::kSoftmax) {
#pragma unroll 1
    for (int i = 0; i < N; i++) most = fmaxf(most, logit_at(lane + 32 * i));
    most = warp_max(most);
    float mine = 0;
#pragma unroll 1
    for (int i = 0; i < N; i++) {
      const float power = softmax_power(logit_at(lane + 32 * i), most);
      if (!isnan(power)) mine += power;
    }
    sum = warp_sum(mine);
  }
#pragma unroll 1
  for (int e = lane; e < a.E; e += 32) {
    const float logit = logit_at(e), bias = a.bias != nullptr ? a.bias[e] : 0.0f;
    scratch[e] = rank_key(by_logits ? logit : score(logit) + bias);
  }
#pragma unroll
  for (int i = 0; i < N; i++) key[i] = lane + 32 * i < a.E ? scratch[lane + 32 * i] : 0;
  __syncwarp();
}

// Routes token t < valid. `scratch`: row_scratch() words of this warp alone, aligned to 8 bytes. LEAN: with little
// code and few registers, for kernels that rarely need it; not for Selection::kUniform.
template <int N, bool LEAN = false>
__device__ __forceinline__ void gate_row(const Args& a, int64_t t, uint32_t* scratch, uint32_t* histogram) {
  const int lane = threadIdx.x % 32;
  const int64_t first = t * a.E;
  // Softmax needs the whole row
  float most = -infinity(), sum = 0;
  const bool by_logits = a.selection == Selection::kLogits;
  const auto score = [&](float logit) {
    if (a.scoring == Scoring::kSigmoid) return fast_sigmoid(logit);
    if (a.scoring == Scoring::kSqrtSoftplus) return sqrt_softplus(logit);
    const float power = softmax_power(logit, most);
    return sum == 0 || isnan(power) ? power : __fdiv_rn(power, sum);
  };
  uint32_t key[N];
  if (!LEAN && a.selection == Selection::kUniform) {
    const uint32_t h = mix(a.seed ^ (static_cast<uint32_t>(t) + 1) * 0x9e3779b1u);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t hashed = mix(h ^ (static_cast<uint32_t>(lane + 32 * i) + 1) * 0x85ebca77u);
      key[i] = lane + 32 * i < a.E ? max(hashed, 1u) : 0;
    }
  }
  if constexpr (LEAN) {
    lean_keys<N>(a, first, scratch, key, most, sum, score);
  } else {
    // Options are asked outside of loops: a load that waits for a branch waits for every load before it.
    float x[N], b[N] = {};
    if (a.dtype == DType::kF32) {
      load_row<N>(static_cast<const float*>(a.logits) + first, a.E, x);
    } else if (a.dtype == DType::kBF16) {
      load_row<N>(static_cast<const __nv_bfloat16*>(a.logits) + first, a.E, x);
    } else {
      load_row<N>(static_cast<const __half*>(a.logits) + first, a.E, x);
    }
    if (a.bias != nullptr) {
      load_row<N>(a.bias, a.E, b);
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = isnan(b[i]) ? nan_value() : x[i];
    }
    float choice[N];
    if (by_logits) {
#pragma unroll
      for (int i = 0; i < N; i++) choice[i] = x[i];
    } else if (a.scoring == Scoring::kSoftmax) {
#pragma unroll
      for (int i = 0; i < N; i++) most = fmaxf(most, x[i]);
      most = warp_max(most);
#pragma unroll
      for (int i = 0; i < N; i++) {
        choice[i] = softmax_power(x[i], most);
        if (!isnan(choice[i])) sum += choice[i];
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int i = 0; i < N; i++)
        choice[i] = (sum == 0 || isnan(choice[i]) ? choice[i] : __fdiv_rn(choice[i], sum)) + b[i];
    } else if (a.scoring == Scoring::kSigmoid) {
#pragma unroll
      for (int i = 0; i < N; i++) choice[i] = fast_sigmoid(x[i]) + b[i];
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) choice[i] = sqrt_softplus(x[i]) + b[i];
    }
    if (a.selection != Selection::kUniform) {
#pragma unroll
      for (int i = 0; i < N; i++) key[i] = lane + 32 * i < a.E ? rank_key(choice[i]) : 0;
    }
  }
  if (a.selection != Selection::kUniform && a.top_groups < a.groups) keep_groups<N>(a, key, scratch);
  int32_t chosen = 0;
  if constexpr (LEAN) {
    chosen = best_by_rounds<N>(key, a.K);
  } else {
    chosen = best_of_row<N>(key, a.K, scratch);
  }

  // What it weighs
  const bool active = lane < a.K;
  float weight = 0;
  float logit = nan_value(), bias = 0;
  if (active) {
    chosen = min(chosen, a.E - 1);
    logit = load_logit(a, first + chosen);
    if (a.bias != nullptr) bias = a.bias[chosen];
    if (isnan(bias)) logit = nan_value();
  }
  if (by_logits && a.scoring == Scoring::kSoftmax) {
    most = warp_max(fmaxf(-infinity(), logit));
    const float power = softmax_power(logit, most);
    sum = warp_sum(isnan(power) ? 0.0f : power);
  }
  if (active) {
    weight = a.scoring == Scoring::kSigmoid ? __fdiv_rn(1.0f, 1.0f + expf(-logit)) : score(logit);
    if (isnan(weight)) weight = 0;
    if (a.selection == Selection::kScore && isnan(weight + bias)) weight = 0;
  }
  if (a.renormalize) {
    const unsigned infinite = __ballot_sync(kAll, weight == infinity());
    const float total = warp_sum(weight);
    if (infinite != 0) {
      weight = weight == infinity() ? 1.0f / static_cast<float>(__popc(infinite)) : 0.0f;
    } else {
      weight = total == 0 ? 0.0f : __fdiv_rn(weight, total);
    }
  }
  const Rows rows(a, t);
  const uint32_t round = a.id_map != nullptr ? map_round(a, t) : 0;
  if (active) write_choice(a, rows, 0, round, lane, chosen, weight, histogram);
  for (int s = lane; s < a.shared; s += 32) write_shared(a, rows, 0, round, s, histogram);
}

// The same as a function of its own, for kernels that rarely need it.
template <int N>
__device__ __noinline__ void gate_row_apart(const Args& a, int64_t t, uint32_t* scratch, uint32_t* histogram) {
  gate_row<N, true>(a, t, scratch, histogram);
}

// Shared memory: histogram counters, then row_scratch() floats for every warp.
template <int N>
__global__ void __launch_bounds__(128, N <= 8    ? 6
                                       : N <= 16 ? 4
                                                 : 3) gate_rows(const __grid_constant__ Args a) {
  let_next_kernel_start();
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* histogram = shared_memory;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int words = row_scratch(a.E, a.top_groups < a.groups ? a.groups : 0) + 1 & ~1;
  uint32_t* scratch = shared_memory + a.histogram + warp * words;
  if (a.histogram > 0) {
    clear_histogram(a, histogram);
    __syncthreads();
  }
  const int64_t valid = valid_tokens(a);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * warps + warp; t < a.T;
       t += static_cast<int64_t>(gridDim.x) * warps) {
    if (t < valid) {
      gate_row<N>(a, t, scratch, histogram);
    } else {
      for (int c = threadIdx.x % 32; c < a.columns; c += 32) write_padding(a, Rows(a, t), 0, c);
    }
  }
  if (a.histogram > 0) {
    __syncthreads();
    add_histogram(a, histogram);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
