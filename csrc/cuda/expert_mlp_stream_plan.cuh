// The plan of the streaming expert MLP, made by every block of threads for itself from the ids: which experts are hit,
// ascending, and the rows of each in the order of their choices.
//
// A stable counting sort: a warp owns consecutive choices, 32 a round; a ballot per bit of the expert ranks equal
// experts of a round; a counter per warp and expert holds what came before.
#pragma once
#include "expert_mlp_stream.cuh"

namespace moe::mlp::stream {

// Workspace, over the sums and the ring of rows, which are not in use yet
struct PlanSpace {
  int warps;
  float* weight;
  uint16_t *counters, *base, *expert, *rank;
};

MOE_BOTH int plan_warps(int choices) { return choices >= 32 * kWarps ? kWarps : (choices + 31) / 32; }
MOE_BOTH int plan_bytes(int choices, int S) { return 2 * ((plan_warps(choices) + 1) * ((S + 8) & ~7) + 4 * choices); }

__device__ __forceinline__ int expert_of(const Args& a, int choice) {
  if (a.ids == nullptr) return 0;
  const int64_t e = int64_t{a.ids[choice]} - a.first_expert;
  return e >= 0 && e < a.S ? static_cast<int>(e) : a.S;
}

// Ranks the choices within their warp and expert.
__device__ __forceinline__ void rank_choices(const Args& a, const PlanSpace& s, int choices) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (warp >= s.warps) return;
  const int each = (choices + 32 * s.warps - 1) / (32 * s.warps) * 32;
  const int width = 32 - __clz(a.S);
  uint16_t* counters = s.counters + warp * ((a.S + 8) & ~7);
  for (int at = warp * each; at < min((warp + 1) * each, choices); at += 32) {
    const int choice = at + lane;
    const int e = choice < choices ? expert_of(a, choice) : a.S;
    if (choice < choices) s.weight[choice] = a.ids == nullptr ? 1.0f : a.weights[choice];
    unsigned same = 0xffffffffu;
    for (int bit = 0; bit < width; bit++) {
      const unsigned set = __ballot_sync(0xffffffffu, e >> bit & 1);
      same &= e >> bit & 1 ? set : ~set;
    }
    const int before = counters[e], rank = __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (rank == 0) counters[e] = static_cast<uint16_t>(before + __popc(same));
    if (choice < choices) {
      s.expert[choice] = static_cast<uint16_t>(e);
      s.rank[choice] = static_cast<uint16_t>(before + rank);
    }
    __syncwarp();
  }
}

// Counts become first places; entries are written.
__device__ __forceinline__ void list_entries(const Args& a, const PlanSpace& s, Plan& plan, Entry* list) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, pitch = (a.S + 8) & ~7;
  const int each = (a.S + kThreads - 1) / kThreads, first = thread * each, last = min(a.S, first + each);
  // entries, rows, rows padded to 8: 16 bits each
  const auto sizes = [](int rows) {
    const int pieces = (rows + kMostRows - 1) / kMostRows;
    return static_cast<uint64_t>(pieces) | static_cast<uint64_t>(rows) << 16 |
           static_cast<uint64_t>((rows + 7) & ~7) << 32;
  };
  uint64_t mine = 0;
  for (int e = first; e < last; e++) {
    int total = 0;
    for (int w = 0; w < s.warps; w++) {
      const int count = s.counters[w * pitch + e];
      s.counters[w * pitch + e] = static_cast<uint16_t>(total);
      total += count;
    }
    s.base[e] = static_cast<uint16_t>(total);
    mine += sizes(total);
  }
  uint64_t inclusive = mine;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, inclusive, lanes);
    if (lane >= lanes) inclusive += other;
  }
  if (lane == 31) plan.partial[warp] = inclusive;
  __syncthreads();
  uint64_t before = inclusive - mine, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    if (w < warp) before += plan.partial[w];
    total += plan.partial[w];
  }
  if (thread == 0) plan.entries = static_cast<int>(total & 0xffff);
  for (int e = first; e < last; e++) {
    const int rows = s.base[e], entry = static_cast<int>(before & 0xffff), at = static_cast<int>(before >> 16 & 0xffff),
              at8 = static_cast<int>(before >> 32 & 0xffff);
    s.base[e] = static_cast<uint16_t>(at);
    for (int piece = 0; piece * kMostRows < rows; piece++) {
      const int from = piece * kMostRows;
      list[entry + piece] = {static_cast<uint16_t>(e), static_cast<uint16_t>(min(kMostRows, rows - from)),
                             static_cast<uint16_t>(at + from), static_cast<uint16_t>(at8 + from)};
    }
    before += sizes(rows);
  }
}

// Rows to their places: by all threads but those of one warp, which has left to stream weights.
__device__ __forceinline__ void place_rows(const Args& a, const PlanSpace& s, Plan& plan, PlanRow* rows, int choices) {
  const int each = (choices + 32 * s.warps - 1) / (32 * s.warps) * 32, pitch = (a.S + 8) & ~7;
  const int thread = static_cast<int>(threadIdx.x) - (threadIdx.x >= 32 * kConsumerWarps ? 32 : 0);
  for (int choice = thread; choice < choices; choice += kThreads - 32) {
    const int e = s.expert[choice];
    if (e >= a.S) continue;
    const int place = s.base[e] + s.counters[choice / each * pitch + e] + s.rank[choice], token = choice / a.C;
    int round = 0;
    for (int other = token * a.C; other < choice; other++) round += s.expert[other] == e;
    if (round > 0) atomicMax(&plan.repeats, round);
    rows[place] = {s.weight[choice], static_cast<uint16_t>(token), static_cast<uint16_t>(round)};
  }
}

// What zero experts add to every token, as a factor of its hidden row
__device__ __forceinline__ void add_zeros(const Args& a, float* zeros) {
  for (int t = static_cast<int>(threadIdx.x); t < a.T; t += kThreads) {
    float sum = 0;
    for (int c = 0; c < a.C; c++) {
      const int64_t zero = int64_t{a.ids[t * a.C + c]} - a.first_zero;
      if (zero >= 0 && zero < a.zero) sum += a.weights[t * a.C + c];
    }
    zeros[t] = sum;
  }
}

}  // namespace moe::mlp::stream
