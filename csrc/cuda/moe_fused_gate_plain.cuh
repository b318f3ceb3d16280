// The kernel of moe_fused_gate for small and middle batches of 256/8/4 that ask for nothing else: eight choices, sums
// of two, a bias, no options, no padding. A warp per token, as gate_few, with fewer instructions.
//
// Layout: lane l holds experts 8 l .. 8 l + 7, so that a group of 32 lies in 4 neighbouring lanes.
// 1. Every lane asks for its part of the row, then for the bias. Exact choices and scores stay in registers.
// 2. The two best of each group, by shuffles, and by comparing their sums the four groups.
// 3. These put choices, scores and second bests into shared memory, one after the other, so that every lane takes four
//    of the 128 choices that are left. The smallest second best is the threshold: at least eight choices
//    reach it. Ballots tell each of them (about 11) its place in a list.
// 4. Two lanes for each candidate, or one where there are more than 16, count who beats it: its rank is its column.
// Where the ranks have a gap, choices are equal: they are ranked again, ties to the lower id. A list longer than the
// warp goes by rounds. A token with a NaN or equal groups at the cut is routed by gate_row of the general kernel.
//
// Limits: 256 experts, 8 groups, 4 kept, sigmoid; those above; logits and bias aligned to 16 bytes; fewer than 2^31
// cells of the outputs. Order of accumulation: a tree over the slots.
#pragma once
#include "moe_fused_gate_few.cuh"

namespace moe::gate {

#ifdef __CUDACC__

// What a warp has in shared memory, in bytes from its start. An entry is the id of an expert in the upper half and the
// place of its score, from kScores, in the lower: the order of ids.
struct PlainList {
  static constexpr int kMost = 128;                                     // candidates: four groups
  static constexpr int kChoices = 0, kEntries = 4 * kMost;              // of candidates; 32 choices begin as -inf
  static constexpr int kBounds = 2 * kEntries, kGroups = kBounds + 16;  // second bests and first entries of groups kept
  static constexpr int kWeights = kGroups + 16, kChosen = kWeights + 32;  // scores and entries by rank
  static constexpr int kKept = kChosen + 32, kScores = kKept + 512;       // choices and scores in groups that are kept
  static constexpr int kBytes = kScores + 512;
};
static_assert(PlainList::kBytes % 16 == 0 && PlainList::kBytes >= 4 * row_scratch(256, 8));
inline constexpr uint32_t kWhole = 0x4b000000;  // 0x1p23f: whole numbers above it can be read as integers

// `rank` and how many of N choices beat `own`; with Ties also those that equal it and have a lower id.
template <int N, bool Ties>
__device__ __forceinline__ float plain_rank(uint32_t others, float own, uint32_t entry, float rank) {
#pragma unroll 1
  for (int j = 0; j < N; j += 8, others += 32) {
    const float4 v[2] = {get4(others), get4(others + 16)};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float other[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
      float beats[4];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        bool beaten = other[m] > own;
        if (Ties) beaten = beaten || (other[m] == own && get(others + PlainList::kEntries + 16 * k + 4 * m) < entry);
        beats[m] = beaten ? 1.0f : 0.0f;
      }
      rank += (beats[0] + beats[1]) + (beats[2] + beats[3]);
    }
  }
  return rank;
}
__device__ __noinline__ float plain_rank_ties(uint32_t list, float own, uint32_t entry) {
  return plain_rank<32, true>(list, own, entry, 0x1p23f);
}

// The eight best entries of a list longer than the warp, by rounds of the best choice that is left.
__device__ __noinline__ void plain_rounds(uint32_t list, int count) {
  using List = PlainList;
  const int lane = threadIdx.x % 32;
  uint32_t key[List::kMost / 32], entry[List::kMost / 32];
#pragma unroll
  for (int m = 0; m < List::kMost / 32; m++) {
    const int i = lane + 32 * m;
    entry[m] = get(list + List::kEntries + 4 * i);
    key[m] = i < count ? rank_key(__uint_as_float(get(list + List::kChoices + 4 * i))) : 0;
  }
#pragma unroll 1
  for (int r = 0; r < 8; r++) {
    uint32_t best = 0, first = kAll;
#pragma unroll
    for (int m = 0; m < List::kMost / 32; m++) best = max(best, key[m]);
    best = __reduce_max_sync(kAll, best);
#pragma unroll
    for (int m = 0; m < List::kMost / 32; m++) first = key[m] == best ? min(first, entry[m]) : first;
    first = __reduce_min_sync(kAll, first);
#pragma unroll
    for (int m = 0; m < List::kMost / 32; m++) key[m] = entry[m] == first ? 0 : key[m];
    if (lane == 0) put(list + List::kChosen + 4 * r, first);
  }
  __syncwarp();
}

template <class T, int Warps, int PerSm>
__global__ void __launch_bounds__(32 * Warps, PerSm / Warps) gate_plain(const __grid_constant__ Args a) {
  using List = PlainList;
  __shared__ __align__(16) char memory[Warps][List::kBytes];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = blockIdx.x * Warps + warp;
  if (t >= static_cast<int>(a.T)) return;

  // The row before all else: the barrier keeps the compiler from asking for anything earlier.
  const T* row = static_cast<const T*>(a.logits) + (static_cast<int64_t>(t) * 256 + 8 * lane);
  Octet<T> octet;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) octet.words[i] = ask(row + 16 / sizeof(T) * i);
  __syncthreads();
  if (gridDim.x <= kEarlyBlocks) let_next_kernel_start();
  const uint32_t list = shared_address(memory[warp]);
  const float* bias_at = a.bias + 8 * lane;
  asm("" : "+l"(bias_at));  // one address for both
  const Octet<float> biases = {ask(bias_at), ask(bias_at + 4)};
  put(list + List::kChoices + 4 * lane, __float_as_uint(-infinity()));
  __syncwarp();

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
  const float sum = best + next;
  const int others = (lane & 28) ^ (lane & 3) << 3;
  const float other = __shfl_sync(kAll, sum, others), next_other = __shfl_sync(kAll, sum, others ^ 4);
  float above = (other > sum ? 1.0f : 0.0f) + (next_other > sum ? 1.0f : 0.0f);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) above += __shfl_xor_sync(kAll, above, lanes);
  const unsigned kept = __ballot_sync(kAll, above < 4);  // four lanes a group
  if (__popc(kept) != 16) {
    gate_row_apart<8>(a, t, reinterpret_cast<uint32_t*>(memory[warp]), nullptr);
    return;
  }

  // Groups that are kept, in shared memory: predicated, since a branch would have to come together again.
  {
    const uint32_t below = __popc(kept & ((1u << (lane & 28)) - 1));
    const uint32_t at = list + lane % 4 * 32 + below * 32, group = list + below;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.lt.f32 p, %0, 0f40800000;\nsetp.eq.and.u32 q, %25, 0, p;\n"
        "@p st.shared.v4.f32 [%1+%20], {%2, %3, %4, %5};\n@p st.shared.v4.f32 [%1+%20+16], {%6, %7, %8, %9};\n"
        "@p st.shared.v4.f32 [%1+%21], {%10, %11, %12, %13};\n@p st.shared.v4.f32 [%1+%21+16], {%14, %15, %16, %17};\n"
        "@q st.shared.f32 [%18+%22], %19;\n@q st.shared.b32 [%18+%23], %24;\n}" ::"f"(above),
        "r"(at), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), "f"(c[4]), "f"(c[5]), "f"(c[6]), "f"(c[7]), "f"(score[0]),
        "f"(score[1]), "f"(score[2]), "f"(score[3]), "f"(score[4]), "f"(score[5]), "f"(score[6]), "f"(score[7]),
        "r"(group), "f"(next), "n"(List::kKept), "n"(List::kScores), "n"(List::kBounds), "n"(List::kGroups),
        "r"((lane & 28) << 19), "r"(lane % 4)
        : "memory");
  }
  __syncwarp();
  const float4 bounds = get4(list + List::kBounds), four = get4(list + List::kKept + 16 * lane);
  const uint32_t first_entry = get(list + List::kGroups + (lane & 24) / 2) + ((lane & 7) << 18) + 16 * lane;
  const float least = fminf(fminf(bounds.x, bounds.y), fminf(bounds.z, bounds.w));
  const float choice[4] = {four.x, four.y, four.z, four.w};

  // Candidates, in the order of lanes
  unsigned lanes_below;
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lanes_below));
  bool reaches[4];
  uint32_t at = list;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    reaches[i] = choice[i] >= least;
    at += 4 * __popc(__ballot_sync(kAll, reaches[i]) & lanes_below);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (reaches[i]) {
      put(at + List::kChoices, __float_as_uint(choice[i]));
      put(at + List::kEntries, first_entry + 0x10004 * i);
    }
    at += reaches[i] ? 4 : 0;
  }
  const int count = static_cast<int>(__shfl_sync(kAll, at - list, 31)) / 4;
  __syncwarp();

  // Ranks
  uint32_t entry;
  float own = 0, rank;
  int candidates = count;
  if (count <= 16) {
    const uint32_t mine = list + 4 * (lane & 15);
    own = __uint_as_float(get(mine + List::kChoices));
    entry = get(mine + List::kEntries);
    rank = plain_rank<8, false>(list + List::kChoices + 2 * (lane & 16), own, entry, 0x1p22f);
    rank += __shfl_xor_sync(kAll, rank, 16);
  } else if (count <= 32) {
    const uint32_t mine = list + 4 * lane;
    own = __uint_as_float(get(mine + List::kChoices));
    entry = get(mine + List::kEntries);
    rank = plain_rank<32, false>(list + List::kChoices, own, entry, 0x1p23f);
  } else {
    plain_rounds(list, count);
    entry = get(list + List::kChosen + 4 * (lane & 7));
    rank = 0x1p23f + static_cast<float>(lane);
    candidates = 8;
  }
  const float score_of = __uint_as_float(get(list + (entry & 0x1fc) + List::kScores));
  int place = __float_as_int(rank) - static_cast<int>(kWhole);
  const bool found = lane < candidates;
  const uint32_t places = __reduce_or_sync(kAll, found ? 1u << (place & 31) : 0);
  if (places != __ballot_sync(kAll, found)) {
    place = __float_as_int(plain_rank_ties(list, own, entry)) - static_cast<int>(kWhole);
  }
  const bool chosen = found && place < 8;
  if (chosen) put(list + List::kWeights + 4 * place, __float_as_uint(score_of));
  __syncwarp();

  // Columns
  const float4 low = get4(list + List::kWeights), high = get4(list + List::kWeights + 16);
  if (chosen) {
    float total = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
    total = fminf(fmaxf(total, a.least_total), a.most_total);
    const uint32_t cell = 8 * t + place;
    a.ids[cell] = static_cast<int32_t>(entry >> 16);
    a.weights[cell] = score_of * (fast_inverse(total) * a.scale);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
