// What gate_bench checks: calls of moe_fused_gate over all its options, and odd logits.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/ops.h"
#include "harness.cuh"

namespace bench {

using namespace moe;

enum class Fill { kNormal, kTies, kEqual, kNaN, kInfinite, kSaturated, kSkewed, kFewFinite, kAllNaN, kAroundZero };
inline const char* const fill_names[] = {"normal",    "ties",   "equal",      "nan",     "inf",
                                         "saturated", "skewed", "few finite", "all nan", "around 0"};

struct Case {
  std::string name;
  int E = 256, groups = 8, top_groups = 4, K = 8;
  Scoring scoring = Scoring::kSigmoid;
  Selection selection = Selection::kScore;
  GroupScore group_score = GroupScore::kTop2Sum;
  bool bias = true, renormalize = true;
  float scale = 2.5f;
  ScalePlacement placement = ScalePlacement::kInWeights;
  int shared = 0, zero = 0, rounds = 0;
  bool load = false, capture = false;
  int copies = -1;  // of spread counters: -1 as many as the package has, 0 none
  int valid = -1;   // -1: all; else tokens * valid / 10
  bool valid_on_device = false;
  DType dtype = DType::kF32;
  Fill fill = Fill::kNormal;
  std::vector<int> forces = {0};
};

inline float logit(Fill fill, Random& random, int64_t t, int e, int E, int group_size) {
  const float normal = static_cast<float>(random.normal());
  switch (fill) {
    case Fill::kNormal:
    case Fill::kAroundZero: return normal;
    case Fill::kTies: return std::round(normal * 2) / 2;
    case Fill::kEqual: return static_cast<float>(t % 3) - 1;
    case Fill::kNaN: return random.uniform() < (t % 4 == 0 ? 0.5 : 0.02) ? std::nanf("") : normal;
    case Fill::kInfinite: {
      const double u = random.uniform();
      return u < 0.02 ? INFINITY : u < (t % 4 == 0 ? 0.9 : 0.05) ? -INFINITY : normal;
    }
    case Fill::kSaturated: return normal * 40;
    case Fill::kSkewed: return normal * 0.1f + (e / group_size == t % 3 ? 2.0f : 0.0f) + (e == 7 ? 8.0f : 0.0f);
    case Fill::kFewFinite: return e == E / 3 || e == E / 2 || e == E - 1 ? normal : -INFINITY;
    case Fill::kAllNaN: return std::nanf("");
  }
  return 0;
}

inline std::vector<Case> families() {
  std::vector<Case> all;
  const auto add = [&](Case c) { all.push_back(c); };
  const std::vector<int> v3 = {0, 1, 8, 16, 32, 102};
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    Case c;
    c.name = "v3", c.dtype = dtype, c.forces = v3;
    add(c);
    c.name = "v3 best of group", c.group_score = GroupScore::kMax;
    add(c);
    c.group_score = GroupScore::kTop2Sum, c.forces = {0, 32};
    c.name = "v3 load", c.load = true;
    add(c);
    c.name = "v3 map of 16", c.load = false, c.rounds = 16;
    add(c);
    c.name = "v3 +1 shared", c.rounds = 0, c.shared = 1;
    add(c);
    c.shared = 0, c.forces = v3;
    if (dtype == DType::kF16) continue;
    c.name = "v3 +1 shared, load", c.shared = 1, c.load = true;
    add(c);
    c.name = "v3 +2 shared, map of 16, load, capture, valid on device", c.shared = 2, c.rounds = 16, c.capture = true,
    c.valid = 7, c.valid_on_device = true;
    add(c);
    c.name = "v3 onOutput, zero experts, valid on host", c.placement = ScalePlacement::kOnOutput, c.zero = 4,
    c.rounds = 0, c.valid = 9, c.valid_on_device = false, c.renormalize = false;
    add(c);
    Case six;
    six.name = "v3 of six, no bias", six.dtype = dtype, six.K = 6, six.bias = false, six.forces = v3;
    add(six);
    six.name = "v3 +12 shared", six.K = 8, six.bias = true, six.shared = 12, six.rounds = 3;
    add(six);
  }
  Case kimi;
  kimi.name = "kimi", kimi.E = 384, kimi.groups = kimi.top_groups = 1, kimi.forces = {0, 1, 8, 16}, kimi.load = true;
  add(kimi);
  kimi.dtype = DType::kBF16, kimi.shared = 1;
  add(kimi);
  Case glm;
  glm.name = "256 in one group, no bias", glm.groups = glm.top_groups = 1, glm.bias = false, glm.forces = {0, 1, 8, 32};
  add(glm);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int E : {64, 128, 256}) {
      Case c;
      c.name = "softmax " + std::to_string(E), c.E = E, c.K = E == 64 ? 6 : 8, c.groups = c.top_groups = 1,
      c.scoring = Scoring::kSoftmax, c.bias = false, c.scale = 1, c.dtype = dtype;
      c.forces = E == 64    ? std::vector<int>{0, 1, 8, 101}
                 : E == 128 ? std::vector<int>{0, 1, 8, 16, 101}
                            : std::vector<int>{0, 1, 8, 32};
      add(c);
      c.name += ", by logits", c.selection = Selection::kLogits, c.renormalize = false, c.shared = 1, c.rounds = 3;
      add(c);
      c.name = "softmax not renormalised " + std::to_string(E), c.selection = Selection::kScore, c.shared = 0,
      c.rounds = 0, c.forces = E < 256 ? std::vector<int>{0, 101} : std::vector<int>{0};
      add(c);
    }
  }
  const auto general = [&](int E, int groups, int top_groups, int K, Scoring scoring, DType dtype, bool bias) {
    Case c;
    c.name =
        std::to_string(E) + "/" + std::to_string(groups) + "/" + std::to_string(top_groups) + "/" + std::to_string(K);
    c.E = E, c.groups = groups, c.top_groups = top_groups, c.K = K, c.scoring = scoring, c.dtype = dtype, c.bias = bias;
    if (!bias) c.group_score = GroupScore::kMax;
    c.forces = {0, 1};
    add(c);
    return &all.back();
  };
  general(160, 8, 3, 6, Scoring::kSoftmax, DType::kBF16, false);
  general(160, 8, 3, 6, Scoring::kSigmoid, DType::kF32, true);
  general(512, 16, 8, 10, Scoring::kSigmoid, DType::kBF16, true);
  general(160, 8, 3, 6, Scoring::kSoftmax, DType::kF32, false)->renormalize = false;
  general(160, 8, 3, 6, Scoring::kSoftmax, DType::kBF16, false)->renormalize = false;
  general(512, 1, 1, 10, Scoring::kSoftmax, DType::kBF16, false)->renormalize = false;
  general(512, 1, 1, 10, Scoring::kSoftmax, DType::kBF16, false);
  general(96, 12, 5, 7, Scoring::kSigmoid, DType::kF16, true)->load = true;
  general(128, 32, 8, 8, Scoring::kSigmoid, DType::kF32, true)->shared = 1;
  general(384, 6, 2, 16, Scoring::kSoftmax, DType::kF32, false)->rounds = 3;
  general(36, 1, 1, 4, Scoring::kSoftmax, DType::kBF16, false)->valid = 7;
  general(128, 1, 1, 1, Scoring::kSigmoid, DType::kBF16, false)->selection = Selection::kLogits;
  general(1024, 1, 1, 32, Scoring::kSigmoid, DType::kF32, true);
  general(1024, 128, 40, 32, Scoring::kSigmoid, DType::kF16, true);
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    general(60, 1, 1, 4, Scoring::kSoftmax, dtype, false);
    general(60, 1, 1, 4, Scoring::kSoftmax, dtype, false)->renormalize = false;
  }
  general(255, 5, 3, 8, Scoring::kSigmoid, DType::kBF16, true);
  general(256, 1, 1, 6, Scoring::kSqrtSoftplus, DType::kF32, true);
  general(8, 1, 1, 8, Scoring::kSigmoid, DType::kF32, true);
  general(1, 1, 1, 1, Scoring::kSigmoid, DType::kF32, false);
  Case uniform;
  uniform.name = "uniform", uniform.selection = Selection::kUniform, uniform.bias = false,
  uniform.groups = uniform.top_groups = 1;
  add(uniform);
  Case llama;
  llama.name = "sigmoid by logits", llama.selection = Selection::kLogits, llama.E = 128, llama.K = 1,
  llama.bias = false, llama.groups = llama.top_groups = 1;
  add(llama);
  return all;
}

}  // namespace bench
