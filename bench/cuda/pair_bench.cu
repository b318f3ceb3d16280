// Times moe_fused_gate and the moe_dispatch that follows it, with and without programmatic dependent launch, and
// compares what both leave behind. NOTES.md has the command line.
#include "../../csrc/cuda/moe_dispatch.cuh"
#include "../../csrc/cuda/moe_fused_gate.cuh"
#include "harness.cuh"

using namespace moe;

namespace {

constexpr int kRouted = 256, kExperts = 257, kColumns = 9, kBlock = 128, kRotations = 40;

struct Set {
  Buffer logits, bias, ids, weights, order, inverse, counts, offsets, block_experts, scratch;
};

struct Pair {
  MoeFusedGate gate{};
  MoeDispatch dispatch{};
  void* scratch;
  Pair(int64_t T, const Set& s) : scratch(s.scratch.data) {
    const int64_t P = static_cast<int64_t>(s.order.bytes / 4), blocks = P / kBlock;
    gate.T = T, gate.E = kRouted, gate.K = kColumns - 1, gate.shared = 1, gate.groups = 8, gate.top_groups = 4;
    gate.logits = {s.logits.data, DType::kBF16, T * kRouted}, gate.bias = {s.bias.data, DType::kF32, kRouted};
    gate.ids = {s.ids.data, DType::kI32, T * kColumns}, gate.weights = {s.weights.data, DType::kF32, T * kColumns};
    gate.valid_tokens.host = T, gate.rounds = 1;
    gate.scoring = Scoring::kSigmoid, gate.selection = Selection::kScore, gate.group_score = GroupScore::kTop2Sum;
    gate.renormalize = true, gate.scale = 2.5f, gate.scale_placement = ScalePlacement::kInWeights;
    dispatch.T = T, dispatch.C = kColumns, dispatch.P = P, dispatch.blocks = blocks;
    dispatch.experts = kExperts, dispatch.block_size = kBlock;
    dispatch.ids = gate.ids;
    dispatch.order = {s.order.data, DType::kI32, P}, dispatch.inverse = {s.inverse.data, DType::kI32, T * kColumns};
    dispatch.counts = {s.counts.data, DType::kI32, kExperts};
    dispatch.offsets = {s.offsets.data, DType::kI32, kExperts + 1};
    dispatch.block_experts = {s.block_experts.data, DType::kI32, blocks};
  }
};

uint16_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

std::vector<int32_t> content(const std::vector<Set>& sets) {
  std::vector<int32_t> all;
  for (const Set& s : sets) {
    for (const Buffer* b : {&s.ids, &s.order, &s.inverse, &s.counts, &s.offsets, &s.block_experts}) {
      const size_t size = all.size();
      all.resize(size + b->bytes / 4);
      b->get(all.data() + size, b->bytes);
    }
  }
  return all;
}

bool time_pair(Timer& timer, int64_t T) {
  const int64_t choices = T * kColumns;
  const int64_t worst = std::min(choices + kExperts * (kBlock - 1), choices * kBlock);
  const int64_t P = (worst + kBlock - 1) / kBlock * kBlock;
  std::vector<Set> sets;
  std::vector<float> bias(kRouted);
  for (int i = 0; i < kRotations; i++) {
    Random random(i + 1);
    std::vector<uint16_t> logits(T * kRouted);
    for (auto& x : logits) x = bf16_bits(static_cast<float>(random.normal()));
    for (auto& x : bias) x = static_cast<float>(random.normal() * 0.1);
    sets.push_back({Buffer(T * kRouted * 2), Buffer(kRouted * 4), Buffer(choices * 4), Buffer(choices * 4),
                    Buffer(P * 4), Buffer(choices * 4), Buffer(kExperts * 4), Buffer(kExperts * 4 + 4),
                    Buffer(P / kBlock * 4), Buffer(1 << 20)});
    sets[i].logits.put(logits.data(), logits.size() * 2);
    sets[i].bias.put(bias.data(), bias.size() * 4);
  }
  const char *gate_path = "", *dispatch_path = "";
  const auto measure = [&](bool gate, bool dispatch, dispatch::Chain chain) {
    return timer.graph(kRotations, [&](int i) {
      const Pair pair(T, sets[i]);
      if (dry) return;
      if (gate) CHECK(gate::launch(pair.gate, SpreadCounters{}, 132, timer.stream, &gate_path));
      if (dispatch) CHECK(dispatch::launch(pair.dispatch, 132, pair.scratch, timer.stream, &dispatch_path, chain));
    });
  };
  const auto clear = [&] {
    for (Set& s : sets) {
      for (Buffer* b : {&s.ids, &s.order, &s.inverse, &s.counts, &s.offsets, &s.block_experts}) b->poison();
    }
  };
  clear();
  const double plain = measure(true, true, dispatch::Chain::kPlain);
  const std::vector<int32_t> want = content(sets);
  clear();
  const double early = measure(true, true, dispatch::Chain::kDefault);
  const bool same = dry || content(sets) == want;
  const double gate = measure(true, false, dispatch::Chain::kPlain);
  const double alone = measure(false, true, dispatch::Chain::kPlain);
  std::printf("%5lld tokens: gate %.2f, dispatch %.2f, both %.2f, programmatic %.2f us, %s (%s; %s)\n",
              static_cast<long long>(T), gate, alone, plain, early, same ? "the same" : "DIFFERENT", gate_path,
              dispatch_path);
  std::fflush(stdout);
  return same;
}

}  // namespace

int main(int argc, char** argv) {
  dry = argc > 1 && std::string(argv[1]) == "dry";
  Timer timer;
  bool same = true;
  for (const int64_t T : {1, 3, 16, 64, 113, 256, 1024, 4096, 40000}) same = time_pair(timer, T) && same;
  return same ? 0 : 1;
}
