// `gate_bench time` and `profile`.
#pragma once
#include "../../csrc/cuda/moe_fused_gate.cuh"
#include "gate_cases.cuh"

namespace bench {

__global__ void fill_normal(void* out, int dtype, size_t n, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    uint64_t z = (static_cast<uint64_t>(seed) << 40) + i;
    float sum = 0;
    for (int k = 0; k < 2; k++) {
      z = (z + 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
      z ^= z >> 29;
      sum = k == 0 ? sqrtf(-2 * logf((static_cast<float>(z >> 40) + 0.5f) * 0x1p-24f))
                   : sum * cospif(2 * static_cast<float>(z >> 40) * 0x1p-24f);
    }
    if (dtype == 0) static_cast<float*>(out)[i] = sum * scale;
    if (dtype == 1) static_cast<__nv_bfloat16*>(out)[i] = __float2bfloat16(sum * scale);
    if (dtype == 2) static_cast<__half*>(out)[i] = __float2half(sum * scale);
  }
}

struct Set {
  Buffer logits, ids, weights, counters;
};

// What is timed: cases whose names begin with `filter`, at batches of their own or at those given; with `steady` while
// the device is kept busy, as through the package.
struct Run {
  Timer timer;
  std::string filter;
  std::vector<int64_t> given;
  bool steady = false;
  double copy = 0, empty = 0;  // TB/s, us
};

// Microseconds per launch of the same graph where replays, and the reads between them, follow without a pause: the
// clock is lower then. Median of 11 times 10 replays, less what the reads take alone.
inline double without_pause(Timer& timer, int rotations, const std::function<void(int)>& launch) {
  if (dry) return timer.graph(rotations, launch);
  constexpr int kTurns = 12, kReplays = 10;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(timer.stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < rotations; i++) launch(i);
  CHECK(cudaStreamEndCapture(timer.stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  std::vector<cudaEvent_t> events(kTurns + 1);
  for (auto& event : events) CHECK(cudaEventCreate(&event));
  const auto turns = [&](bool replay) {
    for (auto& event : events) {
      CHECK(cudaEventRecord(event, timer.stream));
      for (int i = 0; i < kReplays; i++) {
        const Buffer& flush = timer.flush;
        read_kernel<<<132 * 8, 512, 0, timer.stream>>>(static_cast<const uint4*>(flush.data), flush.bytes / 16,
                                                       static_cast<uint32_t*>(flush.data));
        if (replay) CHECK(cudaGraphLaunch(exec, timer.stream));
      }
    }
    CHECK(cudaStreamSynchronize(timer.stream));
    std::vector<float> times(kTurns - 1);  // the first turn, of a device that has rested, does not count
    for (int i = 1; i < kTurns; i++) CHECK(cudaEventElapsedTime(&times[i - 1], events[i], events[i + 1]));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  const double us = (turns(true) - turns(false)) * 1000.0 / (kReplays * rotations);
  for (auto& event : events) CHECK(cudaEventDestroy(event));
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  return us;
}

inline void time_case(Run& run, const Case& c, const std::vector<int64_t>& own) {
  if (c.name.compare(0, run.filter.size(), run.filter) != 0) return;
  const std::vector<int64_t>& batches = run.given.empty() ? own : run.given;
  constexpr int kRotations = 40;
  const int columns = c.K + c.shared;
  const int64_t most = *std::max_element(batches.begin(), batches.end());
  const int bytes = static_cast<int>(size_of(c.dtype));
  constexpr int kSlots = 288;
  const uint32_t copies = !c.load ? 0 : c.copies < 0 ? copies_for(kSlots) : c.copies;
  std::vector<Set> sets;
  for (int i = 0; i < kRotations; i++) {
    sets.push_back({Buffer(most * c.E * bytes), Buffer(most * columns * 4), Buffer(most * columns * 4),
                    Buffer(copies * kSlots * SpreadCounters::kStride * 8)});
    if (!dry)
      fill_normal<<<1024, 256>>>(sets[i].logits.data,
                                 c.dtype == DType::kF32    ? 0
                                 : c.dtype == DType::kBF16 ? 1
                                                           : 2,
                                 most * c.E, i + 1, 1.0f);
  }
  Buffer bias(c.E * 4), map(16 * 1100 * 4), load(2048 * 8);
  std::vector<int32_t> ids(16 * 1100);
  for (size_t i = 0; i < ids.size(); i++) ids[i] = static_cast<int32_t>(i * 7919 % 288);
  map.put(ids.data(), ids.size() * 4);
  if (!dry) {
    fill_normal<<<16, 256>>>(bias.data, 0, c.E, 99, 0.1f);
    if (c.fill == Fill::kSkewed) {  // all tokens choose the same eight
      std::vector<float> popular(c.E);
      for (int e = 0; e < c.E; e++) popular[e] = e % 64 < 2 ? 4.0f : 0.0f;
      bias.put(popular.data(), c.E * 4);
    }
    CHECK(cudaMemset(load.data, 0, load.bytes));
    for (const Set& set : sets) CHECK(cudaMemset(set.counters.data, 0, set.counters.bytes));
    CHECK(cudaDeviceSynchronize());
  }
  for (const int64_t T : batches) {
    const double floor =
        std::max(run.empty, (static_cast<double>(T) * (c.E * bytes + columns * 8) + c.E * 4) / run.copy * 1e-6);
    std::printf("%-44s %-4s %7lld | floor %6.2f |", c.name.c_str(), name_of(c.dtype), static_cast<long long>(T), floor);
    for (const int force : c.forces) {
      const char* path = "";
      const auto launch = [&](int i) {
        MoeFusedGate p{};
        p.T = T, p.E = c.E, p.rounds = c.rounds, p.slots = c.load ? kSlots : 0;
        p.logits = {sets[i].logits.data, c.dtype, T * c.E};
        if (c.bias) p.bias = {bias.data, DType::kF32, c.E};
        p.valid_tokens.host = T;
        if (c.rounds > 0) p.id_map = {map.data, DType::kI32, c.rounds * int64_t{c.E + c.shared}};
        if (c.load) p.load = {load.data, DType::kI64, kSlots};
        p.ids = {sets[i].ids.data, DType::kI32, T * columns};
        p.weights = {sets[i].weights.data, DType::kF32, T * columns};
        p.K = c.K, p.scoring = c.scoring, p.selection = c.selection, p.groups = c.groups, p.top_groups = c.top_groups;
        p.group_score = c.group_score, p.renormalize = c.renormalize, p.scale = c.scale, p.shared = c.shared;
        const SpreadCounters spread = {copies > 0 ? static_cast<unsigned long long*>(sets[i].counters.data) : nullptr,
                                       copies};
        if (!dry) CHECK(gate::launch(p, spread, 132, run.timer.stream, &path, force));
      };
      const double us = run.steady ? without_pause(run.timer, kRotations, launch) : run.timer.graph(kRotations, launch);
      std::printf(" %s%d: %6.2f (%.2f)", force == 0 ? "auto " : "L", force, us, us / floor);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

// For ncu: one launch of one kernel of 256/8/4/8 in bf16 or f32 (`only` as launch takes it), with a map of 16 rounds or
// load counting where `options` is one of these words, or of every kind.
inline void run_profile(int64_t T, int only, bool wide, const std::string& options) {
  const auto once = [&](int E, Scoring scoring, DType dtype, std::vector<int> forces) {
    constexpr int kSlots = 288;
    const uint32_t copies = copies_for(kSlots);
    Buffer logits(T * E * size_of(dtype)), bias(E * 4), ids(T * 32), weights(T * 32), map(16 * 256 * 4),
        load(kSlots * 8);
    Buffer counters(copies * kSlots * SpreadCounters::kStride * 8);
    CHECK(cudaMemset(map.data, 0, map.bytes));
    CHECK(cudaMemset(counters.data, 0, counters.bytes));
    fill_normal<<<1024, 256>>>(logits.data, dtype == DType::kF32 ? 0 : 1, T * E, 1, 1.0f);
    fill_normal<<<16, 256>>>(bias.data, 0, E, 99, 0.1f);
    for (const int force : forces) {
      const char* path = "";
      MoeFusedGate p{};
      p.T = T, p.E = E, p.logits = {logits.data, dtype, T * E};
      if (scoring == Scoring::kSigmoid) p.bias = {bias.data, DType::kF32, E};
      p.valid_tokens.host = T, p.ids = {ids.data, DType::kI32, T * 8}, p.weights = {weights.data, DType::kF32, T * 8};
      p.K = 8, p.scoring = scoring, p.groups = E == 256 ? 8 : 1, p.top_groups = E == 256 ? 4 : 1;
      p.group_score = GroupScore::kTop2Sum, p.renormalize = true, p.scale = 2.5f;
      if (options == "map") p.rounds = 16, p.id_map = {map.data, DType::kI32, 16 * 256};
      if (options == "load") p.slots = kSlots, p.load = {load.data, DType::kI64, kSlots};
      CHECK(gate::launch(p, {static_cast<unsigned long long*>(counters.data), copies}, 132, nullptr, &path, force));
      CHECK(cudaDeviceSynchronize());
    }
  };
  if (only != 0) return once(256, Scoring::kSigmoid, wide ? DType::kF32 : DType::kBF16, {only});
  once(256, Scoring::kSigmoid, DType::kBF16, {8, 32, 102});
  once(128, Scoring::kSoftmax, DType::kBF16, {8, 101});
  once(384, Scoring::kSigmoid, DType::kF32, {8});
  once(60, Scoring::kSoftmax, DType::kBF16, {0});
  once(512, Scoring::kSigmoid, DType::kBF16, {0});
}

inline void run_times(const std::string& filter, const std::vector<int64_t>& given, bool steady) {
  Run run{.filter = filter, .given = given, .steady = steady};
  ceilings(run.timer, &run.copy, &run.empty);
  std::printf(
      "copy %.2f TB/s, empty node %.2f us; L1 is the general kernel, L8..L32 the lanes per token, L101 and L102 those "
      "of the kernels for large batches\n",
      run.copy, run.empty);
  const std::vector<int64_t> full = {1, 8, 64, 512, 4096, 10000, 20000, 40000, 131072},
                             some = {1, 64, 512, 4096, 10000, 40000};
  Case v3;
  v3.name = "256/8/4/8 sigmoid", v3.forces = {0, 8, 16, 32, 102};
  v3.dtype = DType::kBF16;
  time_case(run, v3, full);
  v3.dtype = DType::kF32;
  time_case(run, v3, full);
  v3.dtype = DType::kBF16, v3.forces = {0, 16, 32, 102};
  Case with = v3;
  with.name = "256/8/4/8 +1 shared", with.shared = 1;
  time_case(run, with, some);
  with.name = "256/8/4/8 +1 shared, map of 16", with.rounds = 16;
  time_case(run, with, some);
  with.name = "256/8/4/8 +1 shared, map of 16, load", with.load = true;
  time_case(run, with, some);
  with = v3, with.name = "256/8/4/8 map of 16", with.rounds = 16;
  time_case(run, with, some);
  with = v3, with.name = "256/8/4/8 load", with.load = true;
  time_case(run, with, some);
  if (filter == "copies") {
    for (const Fill fill : {Fill::kNormal, Fill::kSkewed}) {
      for (const int copies : {0, 1, 4, 16}) {
        with.name = "copies " + std::to_string(copies) + (fill == Fill::kSkewed ? ", all choose the same" : "");
        with.fill = fill, with.copies = copies, with.forces = {0};
        time_case(run, with, {512, 4096, 10000, 20000});
      }
    }
  }
  v3.dtype = DType::kF16, v3.name = "256/8/4/8 f16", v3.forces = {0, 8};
  time_case(run, v3, {40000});
  Case kimi;
  kimi.name = "384/1/1/8 sigmoid", kimi.E = 384, kimi.groups = kimi.top_groups = 1, kimi.forces = {0, 8, 16};
  time_case(run, kimi, some);
  for (const int E : {128, 64}) {
    Case c;
    c.name = "softmax " + std::to_string(E), c.E = E, c.K = E == 64 ? 6 : 8, c.groups = c.top_groups = 1,
    c.scoring = Scoring::kSoftmax, c.bias = false, c.scale = 1, c.dtype = DType::kBF16;
    c.forces = E == 64 ? std::vector<int>{0, 8, 101} : std::vector<int>{0, 8, 16, 101};
    time_case(run, c, some);
  }
  const auto general = [&](int E, int groups, int top_groups, int K, Scoring scoring, bool bias, bool renormalize) {
    Case c;
    c.name = std::to_string(E) + "/" + std::to_string(groups) + "/" + std::to_string(top_groups) + "/" +
             std::to_string(K) + (renormalize ? " general" : " not renormalised");
    c.E = E, c.groups = groups, c.top_groups = top_groups, c.K = K, c.scoring = scoring, c.dtype = DType::kBF16;
    c.bias = bias, c.renormalize = renormalize;
    if (!bias) c.group_score = GroupScore::kMax;
    time_case(run, c, {64, 4096, 40000});
  };
  for (const bool renormalize : {true, false}) {
    general(160, 8, 3, 6, Scoring::kSoftmax, false, renormalize);
    general(128, 1, 1, 8, Scoring::kSoftmax, false, renormalize);
    general(64, 1, 1, 8, Scoring::kSoftmax, false, renormalize);
    general(60, 1, 1, 4, Scoring::kSoftmax, false, renormalize);
  }
  general(512, 16, 8, 10, Scoring::kSigmoid, true, true);
  general(1024, 1, 1, 32, Scoring::kSigmoid, true, true);
}

}  // namespace bench
