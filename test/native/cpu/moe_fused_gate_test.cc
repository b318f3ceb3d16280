// moe_fused_gate: known answers, NaN and infinities, maps and loads, and random rows against scores in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "testing.h"

namespace moe::testing {

namespace {

struct GateCase {
  MoeFusedGate p{};
  Data logits{DType::kF32, 0}, bias{DType::kF32, 0}, map{DType::kI32, 0}, load{DType::kI64, 0};
  Data ids{DType::kI32, 0}, weights{DType::kF32, 0}, logical{DType::kI32, 0};

  explicit GateCase(const std::vector<float>& x, int64_t E, int K, DType dtype = DType::kF32) {
    logits = Data::floats(dtype, x);
    p.E = E;
    p.T = static_cast<int64_t>(x.size()) / E;
    p.K = K;
    p.groups = p.top_groups = 1;
    p.scale = 1;
    p.valid_tokens.host = p.T;
  }
  void with_bias(const std::vector<float>& values) { bias = Data::floats(DType::kF32, values); }
  void run(int threads = 2) {
    const auto rows = static_cast<size_t>(p.T), columns = static_cast<size_t>(p.K + p.shared);
    ids = Data(DType::kI32, rows * columns);
    weights = Data(DType::kF32, rows * columns);
    logical = Data(DType::kI32, rows * static_cast<size_t>(p.K));
    p.logits = logits;
    if (bias.count() > 0) p.bias = bias;
    if (map.count() > 0) p.id_map = map;
    if (load.count() > 0) p.load = load;
    p.slots = static_cast<int64_t>(load.count());
    p.ids = ids;
    p.weights = weights;
    p.logical_ids = logical;
    ok(moe_fused_gate(backend(threads), p));
  }
};

double score_of(Scoring scoring, double x) {
  if (scoring == Scoring::kSigmoid) return 1 / (1 + std::exp(-x));
  return std::sqrt(x > 20 ? x : std::log1p(std::exp(x)));
}

}  // namespace

void test_gate_golden() {
  current = "gate golden";
  const std::vector<float> x = {0.5f, -1, 2, 0, 1.5f, 1.5f, -0.5f, 3};
  GateCase v3(x, 8, 3);
  v3.with_bias({0, 0.5f, -0.25f, 0, 0, 0, 0.6f, -0.5f});
  v3.p.scoring = Scoring::kSigmoid;
  v3.p.groups = 4;
  v3.p.top_groups = 2;
  v3.p.group_score = GroupScore::kTop2Sum;
  v3.run();
  check(v3.ids.ids() == std::vector<int32_t>{6, 4, 5}, "V3 ids");
  check_close(v3.weights, {.37754068, .8175745, .8175745}, "V3 weights");
  v3.p.renormalize = true;
  v3.p.scale = 2.5f;
  v3.p.shared = 1;
  v3.run();
  check(v3.ids.ids() == std::vector<int32_t>{6, 4, 5, 8}, "V3 ids with a shared expert");
  check_close(v3.weights, {.46895045, 1.0155249, 1.0155249, 1}, "V3 in weights");
  v3.p.scale_placement = ScalePlacement::kOnOutput;
  v3.run();
  check_close(v3.weights, {.18758018, .40620995, .40620995, .4}, "V3 on output");

  GateCase v2(x, 8, 3);
  v2.p.groups = 4;
  v2.p.top_groups = 2;
  v2.run();
  check(v2.ids.ids() == std::vector<int32_t>{7, 2, 3}, "V2 ids");
  check_close(v2.weights, {.5013726, .18444464, .024961868}, "V2 weights");
}

void test_gate_special() {
  current = "gate special values";
  GateCase rows({kNaN,  kNaN,  kNaN,  kNaN,   //
                 -kInf, -kInf, -kInf, -kInf,  //
                 1,     kInf,  kNaN,  kInf,   //
                 kNaN,  -kInf, 0.0f,  -0.0f,  //
                 kNaN,  kNaN,  kNaN,  2},
                4, 3);
  rows.run();
  check(rows.ids.ids() == std::vector<int32_t>({0, 1, 2, 0, 1, 2, 1, 3, 0, 2, 3, 1, 3, 0, 1}), "softmax ids");
  check_close(rows.weights, {0, 0, 0, 0, 0, 0, .5, .5, 0, .5, .5, 0, 1, 0, 0}, "softmax weights");
  rows.p.selection = Selection::kLogits;
  rows.run();
  check(rows.ids.ids() == std::vector<int32_t>({0, 1, 2, 0, 1, 2, 1, 3, 0, 2, 3, 1, 3, 0, 1}), "logits ids");
  check_close(rows.weights, {0, 0, 0, 0, 0, 0, .5, .5, 0, .5, .5, 0, 1, 0, 0}, "logits weights");
  rows.p.selection = Selection::kScore;
  rows.p.scoring = Scoring::kSqrtSoftplus;
  rows.p.renormalize = true;
  rows.run();
  check_close(rows.weights, {0, 0, 0, 0, 0, 0, .5, .5, 0, .5, .5, 0, 1, 0, 0}, "shares of infinite scores");

  // inf score with -inf bias has no choice score; a NaN bias takes its expert out of the softmax
  GateCase clash({kInf, 1, 2, 3}, 4, 4);
  clash.with_bias({-kInf, 0, kNaN, 0});
  clash.p.scoring = Scoring::kSqrtSoftplus;
  clash.run();
  check(clash.ids.ids() == std::vector<int32_t>({3, 1, 0, 2}), "NaN choices last, in order");
  check(clash.weights.at(2) == 0 && clash.weights.at(3) == 0 && clash.weights.at(0) > 0, "NaN choices weigh 0");
  GateCase biased({0, 0, 0, 0}, 4, 2);
  biased.with_bias({kNaN, 0, kNaN, 1});
  biased.run();
  check_close(biased.weights, {.5, .5}, "softmax without NaN biases");

  // Groups: without a choice or with inf - inf they rank last; one non-NaN choice counts alone
  GateCase groups({kNaN, kNaN, 1, kNaN, -3, -3, 0, 0}, 8, 2);
  groups.with_bias({0, 0, 0, 0, 0, 0, kInf, -kInf});
  groups.p.groups = 4;
  groups.p.top_groups = 2;
  groups.p.group_score = GroupScore::kTop2Sum;
  groups.p.scoring = Scoring::kSigmoid;
  groups.run();
  check(groups.ids.ids() == std::vector<int32_t>({2, 4}), "groups with NaN");
  groups.p.top_groups = 4;
  groups.run();
  check(groups.ids.ids() == std::vector<int32_t>({6, 2}), "all groups kept");
}

void test_gate_mapping() {
  current = "gate mapping";
  // 2 routed + 2 zero experts, 2 shared: routed 0,1; shared 2,3; zero 4,5
  GateCase g({1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 0, 9}, 4, 2);
  g.p.zero = 2;
  g.p.shared = 2;
  g.p.scoring = Scoring::kSigmoid;
  g.run();
  check(g.ids.ids() == std::vector<int32_t>({5, 4, 2, 3, 0, 1, 2, 3, 5, 0, 2, 3}), "zero experts");
  const int32_t two = 2;
  g.p.valid_tokens = {&two, 0};
  g.p.rounds = 2;
  g.map = Data::ints({10, 11, 12, 13, 14, 15, 20, 21, 0, -1, 24, 25});
  g.load = Data(DType::kI64, 16);
  g.run();
  check(g.ids.ids() == std::vector<int32_t>({15, 14, 12, 13, 20, 21, 0, -1, -1, -1, -1, -1}), "map by round");
  check(g.logical.ids() == std::vector<int32_t>({5, 4, 0, 1, -1, -1}), "logical ids");
  check(g.weights.at(8) == 0 && g.weights.at(11) == 0, "padding weighs 0");
  std::vector<int64_t> load(16);
  std::memcpy(load.data(), g.load.bytes.data(), 16 * 8);
  check(load[15] == 1 && load[14] == 1 && load[12] == 1 && load[13] == 1 && load[0] == 1 &&
            std::accumulate(load.begin(), load.end(), int64_t{0}) == 5,
        "load counts mapped ids in range");
  const int32_t many = 99, negative = -5;
  g.p.valid_tokens = {&many, 0};
  g.run();
  check(g.ids.id(8) == 15, "valid tokens clamped to the rows");
  g.p.valid_tokens = {&negative, 0};
  g.run();
  check(g.ids.id(0) == -1, "valid tokens clamped to 0");
  GateCase empty({}, 4, 2);
  empty.run();
}

// Any row by full sorting, in double.
void test_gate_random() {
  current = "gate random";
  Random r(11);
  for (int round = 0; round < 400; round++) {
    const int groups = 1 << r.below(4), size = 1 + r.below(9), E = groups * size, T = 1 + r.below(20);
    const int top = 1 + r.below(groups), K = 1 + r.below(std::min(32, top * size));
    std::vector<float> x(T * E), bias(E);
    for (float& v : x) v = r.below(12) == 0 ? kNaN : static_cast<float>(r.below(64)) / 8 - 4;
    for (float& v : bias) v = r.below(20) == 0 ? kNaN : static_cast<float>(r.below(9)) / 8;
    GateCase g(x, E, K, kFloatTypes[r.below(3)]);
    const bool biased = r.below(2) == 0;
    if (biased) g.with_bias(bias);
    g.p.groups = groups;
    g.p.top_groups = top;
    g.p.group_score = r.below(2) == 0 ? GroupScore::kMax : GroupScore::kTop2Sum;
    g.p.scoring = r.below(2) == 0 ? Scoring::kSigmoid : Scoring::kSqrtSoftplus;
    g.p.renormalize = r.below(2) == 0;
    g.p.scale = 1.5f;
    g.run(1 + r.below(3));
    bool ids_right = true;
    std::vector<double> weights;
    for (int t = 0; t < T; t++) {
      std::vector<float> choice(E), score(E);
      for (int e = 0; e < E; e++) {
        const auto at = static_cast<size_t>(e);
        // f32 as the kernel has it, because ties are wanted here
        const double v = x[t * E + e];
        if (g.p.scoring == Scoring::kSigmoid)
          score[at] = 1 / (1 + static_cast<float>(std::exp(-v)));
        else
          score[at] = std::sqrt(static_cast<float>(std::log1p(double{static_cast<float>(std::exp(v))})));
        choice[at] = biased ? score[at] + bias[at] : score[at];
      }
      const auto better = [](float a, float b) { return std::isnan(a) ? false : std::isnan(b) ? true : a > b; };
      std::vector<float> group_score;
      for (int group = 0; group < groups; group++) {
        std::vector<float> c(choice.begin() + group * size, choice.begin() + (group + 1) * size);
        std::stable_sort(c.begin(), c.end(), better);
        const bool two = g.p.group_score == GroupScore::kTop2Sum && size > 1 && !std::isnan(c[1]);
        group_score.push_back(two ? c[0] + c[1] : c[0]);
      }
      std::vector<int> order(groups), candidates;
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return better(group_score[a], group_score[b]); });
      std::sort(order.begin(), order.begin() + top);
      for (int i = 0; i < top; i++) {
        for (int e = 0; e < size; e++) candidates.push_back(order[i] * size + e);
      }
      std::stable_sort(candidates.begin(), candidates.end(),
                       [&](int a, int b) { return better(choice[a], choice[b]); });
      double sum = 0;
      for (int c = 0; c < K; c++) {
        const auto e = static_cast<size_t>(candidates[static_cast<size_t>(c)]);
        ids_right &= g.ids.id(t * K + c) == candidates[c];
        weights.push_back(std::isnan(choice[e]) ? 0 : score_of(g.p.scoring, x[static_cast<size_t>(t * E) + e]));
        sum += weights.back();
      }
      for (int c = 0; c < K; c++) {
        double& w = weights[weights.size() - static_cast<size_t>(c) - 1];
        w = 1.5 * (g.p.renormalize ? (sum == 0 ? 0 : w / sum) : w);
      }
    }
    check(ids_right, "ids");
    check_close(g.weights, weights, "weights");
  }

  GateCase uniform(std::vector<float>(64 * 1000), 64, 8);
  uniform.p.selection = Selection::kUniform;
  uniform.p.seed = 7;
  uniform.load = Data(DType::kI64, 64);
  uniform.run();
  bool distinct = true;
  for (size_t t = 0; t < 1000; t++) {
    std::vector<int32_t> row;
    for (size_t c = 0; c < 8; c++) row.push_back(uniform.ids.id(t * 8 + c));
    std::sort(row.begin(), row.end());
    distinct &= std::adjacent_find(row.begin(), row.end()) == row.end() && row[0] >= 0 && row[7] < 64;
  }
  check(distinct, "uniform ids are distinct");
  int64_t least = 1 << 30, most = 0;
  for (size_t e = 0; e < 64; e++) {
    int64_t count;
    std::memcpy(&count, uniform.load.bytes.data() + e * 8, 8);
    least = std::min(least, count);
    most = std::max(most, count);
  }
  check(least > 80 && most < 170, "uniform load is even: " + std::to_string(least) + ".." + std::to_string(most));
  Data first = uniform.ids;
  uniform.run(3);
  check(first.bytes == uniform.ids.bytes, "uniform is deterministic");
}

// 256 experts in 8 groups, which have a way of their own where a set has one: rows of every kind that it takes or
// leaves, against full sorting in double. Where a decision hangs on less than 2e-6, any side of it will do.
void test_gate_grouped() {
  current = "gate grouped";
  constexpr int kExperts = 256, kGroupCount = 8, kSize = 32, kKinds = 9;
  Random r(12);
  for (int round = 0; round < 120; round++) {
    const int T = 1 + r.below(50), K = 1 + r.below(8), top = 1 + r.below(kGroupCount);
    std::vector<float> x(static_cast<size_t>(T * kExperts)), bias(kExperts);
    for (int t = 0; t < T; t++) {
      const int kind = r.below(2) == 0 ? 0 : r.below(kKinds);
      for (int e = 0; e < kExperts; e++) {
        float& v = x[static_cast<size_t>(t * kExperts + e)];
        v = 4 * r.uniform();
        if (kind == 1 && r.below(40) == 0) v = kNaN;
        if (kind == 2 && r.below(60) == 0) v = r.below(2) == 0 ? kInf : -kInf;
        if (kind == 3) v = std::round(v);                          // many ties
        if (kind == 4) v = 1;                                      // nothing but ties
        if (kind == 5) v *= 1e6f;                                  // scores of 0 and 1
        if (kind == 6) v = r.below(3) == 0 ? v : -kInf;            // experts that are masked
        if (kind == 7) v = static_cast<float>(e % kSize) - 60.0f;  // small ones, every group the same
        if (kind == 8) v = e < 20 ? 3 + v / 8 : v - 8;             // the best in one place
      }
      if (kind == 1 && r.below(8) == 0) std::fill_n(&x[static_cast<size_t>(t * kExperts)], kExperts, kNaN);
    }
    const int biased = r.below(4);
    for (float& b : bias) {
      b = biased == 1 ? r.uniform() / 4 : static_cast<float>(r.below(9)) / 8 - 0.75f;
      if (biased == 3 && r.below(50) == 0) b = r.below(3) == 0 ? kNaN : r.below(2) == 0 ? kInf : -kInf;
    }
    GateCase g(x, kExperts, K, kFloatTypes[r.below(3)]);
    if (biased != 0) g.with_bias(bias);
    g.p.groups = kGroupCount;
    g.p.top_groups = top;
    g.p.group_score = r.below(4) == 0 ? GroupScore::kMax : GroupScore::kTop2Sum;
    g.p.scoring = Scoring::kSigmoid;
    g.p.renormalize = r.below(2) == 0;
    g.p.scale = 2.5f;
    g.p.scale_placement = r.below(2) == 0 ? ScalePlacement::kInWeights : ScalePlacement::kOnOutput;
    g.p.shared = r.below(4) == 0 ? 1 : 0;
    g.run(1 + r.below(2));

    const int columns = K + g.p.shared;
    const auto better = [](double a, double b) { return std::isnan(a) ? false : std::isnan(b) ? true : a > b; };
    const auto near = [](double a, double b) { return a != b && std::abs(a - b) < 2e-6; };
    int wrong = 0, undecided = 0;
    for (int t = 0; t < T; t++) {
      double choice[kExperts], score[kExperts], group[kGroupCount];
      for (int e = 0; e < kExperts; e++) {
        score[e] = 1 / (1 + std::exp(-double{g.logits.at(t * kExperts + e)}));
        choice[e] = score[e] + (biased != 0 ? double{bias[static_cast<size_t>(e)]} : 0);
      }
      std::vector<int> order(kGroupCount), candidates;
      std::iota(order.begin(), order.end(), 0);
      for (int i = 0; i < kGroupCount; i++) {
        double c[kSize];
        std::copy_n(choice + i * kSize, kSize, c);
        std::stable_sort(c, c + kSize, better);
        group[i] = g.p.group_score == GroupScore::kTop2Sum && !std::isnan(c[1]) ? c[0] + c[1] : c[0];
      }
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return better(group[a], group[b]); });
      bool decided = top == kGroupCount || !near(group[order[top - 1]], group[order[top]]);
      std::sort(order.begin(), order.begin() + top);
      for (int i = 0; i < top; i++) {
        for (int e = 0; e < kSize; e++) candidates.push_back(order[static_cast<size_t>(i)] * kSize + e);
      }
      const auto first = [&](int a, int b) { return better(choice[a], choice[b]); };
      std::stable_sort(candidates.begin(), candidates.end(), first);
      double sum = 0;
      for (int c = 0; c < K; c++) {
        const int e = candidates[static_cast<size_t>(c)], next = candidates[static_cast<size_t>(c) + 1];
        decided &= !near(choice[e], choice[next]);
        sum += std::isnan(choice[e]) ? 0 : score[e];
      }
      undecided += !decided;
      for (int c = 0; c < K && decided; c++) {
        const int e = candidates[static_cast<size_t>(c)];
        const double scale = g.p.scale_placement == ScalePlacement::kInWeights ? 2.5 : 1;
        double weight = std::isnan(choice[e]) ? 0 : score[e];
        if (g.p.renormalize) weight = sum == 0 ? 0 : weight / sum;
        wrong += g.ids.id(t * columns + c) != e || !close(g.weights.at(t * columns + c), scale * weight, 2e-5);
      }
    }
    check(wrong == 0, std::to_string(wrong) + " columns, round " + std::to_string(round));
    check(undecided <= 2 + T / 4, std::to_string(undecided) + " of " + std::to_string(T) + " rows undecided");
  }
}

}  // namespace moe::testing
