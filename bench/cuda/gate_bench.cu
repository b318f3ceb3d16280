// Checks the CUDA moe_fused_gate against the CPU kernel, and times it. NOTES.md has the command lines.
//   gate_bench check|time|sanitize [dry | beginning of a name] | gate_bench profile [tokens]
#include <cmath>
#include <memory>

#include "../../csrc/backend.h"
#include "../../csrc/common/float_formats.h"
#include "../../csrc/cuda/moe_fused_gate.cuh"
#include "harness.cuh"

using namespace moe;

namespace {

enum class Fill { kNormal, kTies, kEqual, kNaN, kInfinite, kSaturated, kSkewed, kFewFinite, kAllNaN, kAroundZero };
const char* const fill_names[] = {"normal",    "ties",   "equal",      "nan",     "inf",
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
  int valid = -1;  // -1: all; else tokens * valid / 10
  bool valid_on_device = false;
  DType dtype = DType::kF32;
  Fill fill = Fill::kNormal;
  std::vector<int> forces = {0};
};

std::unique_ptr<Backend> cpu_backend;
std::string filter;  // only cases whose names begin like this

float logit(Fill fill, Random& random, int64_t t, int e, int E, int group_size) {
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

struct Result {
  std::vector<int32_t> ids, logical;
  std::vector<float> weights;
  std::vector<int64_t> load;
};

uint16_t bits_of(DType dtype, float x) {
  return dtype == DType::kBF16 ? from_float<bf16>(x).bits : from_float<f16>(x).bits;
}

// Whether the row has a gap in what decides that is not 0 and under 2e-6.
bool near_tie(const Case& c, const float* x, const float* bias) {
  std::vector<double> choice(c.E);
  double most = -INFINITY, sum = 0;
  for (int e = 0; e < c.E; e++) most = std::max<double>(most, x[e]);
  for (int e = 0; e < c.E; e++) sum += std::exp(x[e] - most);
  for (int e = 0; e < c.E; e++) {
    double s = x[e];
    if (c.selection != Selection::kLogits) {
      if (c.scoring == Scoring::kSigmoid) s = 1 / (1 + std::exp(-double{x[e]}));
      if (c.scoring == Scoring::kSqrtSoftplus) s = std::sqrt(std::log1p(std::exp(double{x[e]})));
      if (c.scoring == Scoring::kSoftmax) s = std::exp(x[e] - most) / sum;
    }
    choice[e] = s + (bias != nullptr ? bias[e] : 0);
    if (std::isnan(choice[e])) choice[e] = -INFINITY;
  }
  const auto close = [](std::vector<double>& v, int upto) {
    std::sort(v.begin(), v.end(), std::greater<>());
    for (int i = 0; i < upto && i + 1 < static_cast<int>(v.size()); i++) {
      const double gap = v[i] - v[i + 1];
      if (gap > 0 && gap < 2e-6) return true;
    }
    return false;
  };
  std::vector<double> candidates;
  if (c.top_groups < c.groups) {
    const int size = c.E / c.groups;
    std::vector<std::pair<double, int>> scores;
    for (int g = 0; g < c.groups; g++) {
      std::vector<double> group(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(group.begin(), group.end(), std::greater<>());
      scores.push_back({c.group_score == GroupScore::kTop2Sum && size > 1 ? group[0] + group[1] : group[0], -g});
    }
    std::sort(scores.begin(), scores.end(), std::greater<>());
    const double gap = scores[c.top_groups - 1].first - scores[c.top_groups].first;
    if (gap > 0 && gap < 4e-6) return true;
    for (int i = 0; i < c.top_groups; i++) {
      const int g = -scores[i].second;
      candidates.insert(candidates.end(), choice.begin() + g * size, choice.begin() + (g + 1) * size);
    }
  } else {
    candidates = choice;
  }
  return close(candidates, c.K);
}

int failures = 0, cases = 0, near_ties = 0;
double worst_weight = 0;

void check(const Case& c, int64_t T) {
  Random random(static_cast<uint64_t>(T) * 131 + c.E * 7 + c.K + static_cast<int>(c.fill) * 977 +
                static_cast<int>(c.dtype));
  const int columns = c.K + c.shared;
  std::vector<float> x(T * c.E), bias(c.E);
  std::vector<uint16_t> narrow(c.dtype == DType::kF32 ? 0 : T * c.E);
  for (int64_t t = 0; t < T; t++) {
    for (int e = 0; e < c.E; e++) {
      float& v = x[t * c.E + e];
      v = logit(c.fill, random, t, e, c.E, std::max(c.E / c.groups, 1));
      if (c.dtype == DType::kF32) continue;
      const uint16_t bits = narrow[t * c.E + e] = bits_of(c.dtype, v);
      v = c.dtype == DType::kBF16 ? to_float(bf16{bits}) : to_float(f16{bits});
    }
  }
  for (int e = 0; e < c.E; e++) {
    bias[e] = static_cast<float>(random.normal()) * 0.1f;
    if (c.fill == Fill::kTies)
      bias[e] = 0.0625f;  // mixed biases would make sums of groups that differ in rounding only
    if (c.fill == Fill::kEqual) bias[e] = 0.25f;
    if (c.fill == Fill::kFewFinite) bias[e] = 0;
    if (c.fill == Fill::kAroundZero) bias[e] -= 0.85f;  // choices of both signs
    if (c.fill == Fill::kNaN && e % 50 == 3) bias[e] = std::nanf("");
    if (c.fill == Fill::kInfinite && e % 50 == 3) bias[e] = e % 100 == 3 ? INFINITY : -INFINITY;
  }
  const int slots = c.rounds > 0 ? 400 : std::max(c.E + c.shared - 3, 1);  // some ids are beyond the counters
  std::vector<int32_t> map(std::max(c.rounds, 1) * (c.E + c.shared));
  for (auto& id : map) id = static_cast<int32_t>(random.next() % 420) - 5;
  const int32_t valid = static_cast<int32_t>(c.valid < 0 ? T : T * c.valid / 10);

  const size_t logit_bytes = T * c.E * size_of(c.dtype);
  const void* logits_host = c.dtype == DType::kF32 ? static_cast<const void*>(x.data()) : narrow.data();
  std::vector<int64_t> load_before(slots);
  for (auto& n : load_before) n = static_cast<int64_t>(random.next() % 1000);

  MoeFusedGate p{};
  p.T = T, p.E = c.E, p.rounds = c.rounds, p.slots = c.load ? slots : 0;
  p.K = c.K, p.scoring = c.scoring, p.selection = c.selection, p.groups = c.groups, p.top_groups = c.top_groups;
  p.group_score = c.group_score, p.renormalize = c.renormalize, p.scale = c.scale, p.scale_placement = c.placement;
  p.shared = c.shared, p.zero = c.zero, p.capture_logical_ids = c.capture, p.seed = 77;

  // Reference
  Result want{std::vector<int32_t>(T * columns), std::vector<int32_t>(T * c.K), std::vector<float>(T * columns),
              load_before};
  MoeFusedGate r = p;
  r.logits = {const_cast<void*>(logits_host), c.dtype, T * c.E};
  if (c.bias) r.bias = {bias.data(), DType::kF32, c.E};
  r.valid_tokens = c.valid_on_device ? Count{&valid, 0} : Count{nullptr, valid};
  if (c.rounds > 0) r.id_map = {map.data(), DType::kI32, static_cast<int64_t>(map.size())};
  if (c.load) r.load = {want.load.data(), DType::kI64, slots};
  r.ids = {want.ids.data(), DType::kI32, T * columns};
  r.weights = {want.weights.data(), DType::kF32, T * columns};
  if (c.capture) r.logical_ids = {want.logical.data(), DType::kI32, T * c.K};
  const Status status = moe_fused_gate(*cpu_backend, r);
  if (!status.ok()) {
    std::printf("CPU: %s\n", status.text.c_str());
    std::exit(1);
  }

  // Device
  Buffer logits(logit_bytes), bias_d(c.E * 4), map_d(map.size() * 4), load_d(slots * 8), valid_d(4);
  Buffer ids(T * columns * 4), weights(T * columns * 4), logical(T * c.K * 4);
  logits.put(logits_host, logit_bytes);
  bias_d.put(bias.data(), c.E * 4);
  map_d.put(map.data(), map.size() * 4);
  valid_d.put(&valid, 4);
  MoeFusedGate d = p;
  d.logits = {logits.data, c.dtype, T * c.E};
  if (c.bias) d.bias = {bias_d.data, DType::kF32, c.E};
  d.valid_tokens = c.valid_on_device ? Count{static_cast<int32_t*>(valid_d.data), 0} : Count{nullptr, valid};
  if (c.rounds > 0) d.id_map = {map_d.data, DType::kI32, static_cast<int64_t>(map.size())};
  if (c.load) d.load = {load_d.data, DType::kI64, slots};
  d.ids = {ids.data, DType::kI32, T * columns};
  d.weights = {weights.data, DType::kF32, T * columns};
  if (c.capture) d.logical_ids = {logical.data, DType::kI32, T * c.K};
  for (const int force : c.forces) {
    const char* path = "";
    Result got[2];
    for (auto& g : got) {
      ids.poison(), weights.poison(), logical.poison();
      load_d.put(load_before.data(), slots * 8);
      if (dry) {
        MoeFusedGate fake = d;
        const Status s = moe_fused_gate(*cpu_backend, fake);
        if (!s.ok()) std::exit(1);
      } else {
        CHECK(gate::launch(d, 132, nullptr, &path, force));
        CHECK(cudaDeviceSynchronize());
      }
      g = {std::vector<int32_t>(T * columns), std::vector<int32_t>(T * c.K), std::vector<float>(T * columns),
           std::vector<int64_t>(slots)};
      ids.get(g.ids.data(), T * columns * 4);
      weights.get(g.weights.data(), T * columns * 4);
      if (c.capture) logical.get(g.logical.data(), T * c.K * 4);
      load_d.get(g.load.data(), slots * 8);
    }
    int bad = 0, near = 0;
    int64_t where = -1;
    double worst = 0;
    for (int64_t t = 0; t < T; t++) {
      bool same = true, weights_ok = true;
      for (int k = 0; k < columns; k++) {
        const int64_t i = t * columns + k;
        same = same && got[0].ids[i] == want.ids[i];
        if (c.capture && k < c.K) same = same && got[0].logical[t * c.K + k] == want.logical[t * c.K + k];
        const double off = std::fabs(double{got[0].weights[i]} - want.weights[i]);
        // The CPU adds up a softmax in the order of ids: up to 4e-6 off where one expert has nearly all of it.
        const bool whole_row = c.scoring == Scoring::kSoftmax && c.selection == Selection::kScore && !c.renormalize;
        if (!(off <= (whole_row ? 4e-6 : 2e-6) * std::max(1.0f, c.scale))) weights_ok = false;
        if (off > worst) worst = off;
      }
      if (same && weights_ok) continue;
      if (!same && near_tie(c, x.data() + t * c.E, c.bias ? bias.data() : nullptr)) {
        near++;
        continue;
      }
      bad++;
      if (where < 0) where = t;
    }
    bool load_ok = true;
    if (c.load && near == 0) load_ok = got[0].load == want.load;
    const bool steady = got[0].ids == got[1].ids &&
                        std::memcmp(got[0].weights.data(), got[1].weights.data(), T * columns * 4) == 0 &&
                        got[0].load == got[1].load;
    cases++;
    near_ties += near;
    worst_weight = std::max(worst_weight, near == 0 ? worst : 0.0);
    if (bad > 0 || !load_ok || !steady || near > 3 + T / 2000) {
      failures++;
      std::printf("FAIL %s %s %s T=%lld force=%d (%s): bad rows %d, near ties %d, load %s, steady %s\n", c.name.c_str(),
                  name_of(c.dtype), fill_names[static_cast<int>(c.fill)], static_cast<long long>(T), force, path, bad,
                  near, load_ok ? "ok" : "BAD", steady ? "yes" : "NO");
      if (where >= 0) {
        for (int k = 0; k < columns; k++) {
          const int64_t i = where * columns + k;
          std::printf("   row %lld: %d (want %d) weight %.8g (want %.8g)\n", static_cast<long long>(where),
                      got[0].ids[i], want.ids[i], got[0].weights[i], want.weights[i]);
        }
      }
    }
  }
}

std::vector<Case> families() {
  std::vector<Case> all;
  const auto add = [&](Case c) { all.push_back(c); };
  const std::vector<int> v3 = {0, 1, 8, 32, 102};
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    Case c;
    c.name = "v3", c.dtype = dtype, c.forces = v3;
    add(c);
    c.name = "v3 best of group", c.group_score = GroupScore::kMax;
    add(c);
    c.group_score = GroupScore::kTop2Sum;
    if (dtype == DType::kF16) continue;
    c.name = "v3 +1 shared, load", c.shared = 1, c.load = true;
    add(c);
    c.name = "v3 +2 shared, map of 16, load, capture, valid on device", c.shared = 2, c.rounds = 16, c.capture = true,
    c.valid = 7, c.valid_on_device = true;
    add(c);
    c.name = "v3 onOutput, zero experts, valid on host", c.placement = ScalePlacement::kOnOutput, c.zero = 4,
    c.rounds = 0, c.valid = 9, c.valid_on_device = false, c.renormalize = false;
    add(c);
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
      c.rounds = 0, c.forces = {0};
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
  general(512, 1, 1, 10, Scoring::kSoftmax, DType::kBF16, false);
  general(96, 12, 5, 7, Scoring::kSigmoid, DType::kF16, true)->load = true;
  general(128, 32, 8, 8, Scoring::kSigmoid, DType::kF32, true)->shared = 1;
  general(384, 6, 2, 16, Scoring::kSoftmax, DType::kF32, false)->rounds = 3;
  general(36, 1, 1, 4, Scoring::kSoftmax, DType::kBF16, false)->valid = 7;
  general(128, 1, 1, 1, Scoring::kSigmoid, DType::kBF16, false)->selection = Selection::kLogits;
  general(1024, 1, 1, 32, Scoring::kSigmoid, DType::kF32, true);
  general(1024, 128, 40, 32, Scoring::kSigmoid, DType::kF16, true);
  general(60, 1, 1, 4, Scoring::kSoftmax, DType::kF16, false);
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

void run_checks(bool small) {
  const std::vector<int64_t> batches = small
                                           ? std::vector<int64_t>{1, 33, 127}
                                           : std::vector<int64_t>{0, 1, 2, 31, 32, 33, 127, 511, 512, 513, 4097, 40000};
  for (const Case& family : families()) {
    if (family.name.compare(0, filter.size(), filter) != 0) continue;
    for (const int64_t T : batches) {
      if (dry && T > 600) continue;
      check(family, T);
    }
    for (const Fill fill : {Fill::kTies, Fill::kEqual, Fill::kNaN, Fill::kInfinite, Fill::kSaturated, Fill::kSkewed,
                            Fill::kFewFinite, Fill::kAllNaN, Fill::kAroundZero}) {
      Case c = family;
      c.fill = fill;
      for (const int64_t T : small ? std::vector<int64_t>{33} : std::vector<int64_t>{1, 33, 2000}) check(c, T);
    }
  }
  std::printf("checks: %d cases, %d failed, %d near ties, worst weight error %.2g\n", cases, failures, near_ties,
              worst_weight);
}

// Timing -------------------------------------------------------------------------------------------------------------

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
  Buffer logits, ids, weights;
};

void time_case(Timer& timer, const Case& c, const std::vector<int64_t>& batches, double copy, double empty) {
  if (c.name.compare(0, filter.size(), filter) != 0) return;
  constexpr int kRotations = 40;
  const int columns = c.K + c.shared;
  const int64_t most = *std::max_element(batches.begin(), batches.end());
  const int bytes = static_cast<int>(size_of(c.dtype));
  std::vector<Set> sets;
  for (int i = 0; i < kRotations; i++) {
    sets.push_back({Buffer(most * c.E * bytes), Buffer(most * columns * 4), Buffer(most * columns * 4)});
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
    CHECK(cudaMemset(load.data, 0, load.bytes));
    CHECK(cudaDeviceSynchronize());
  }
  for (const int64_t T : batches) {
    const double floor =
        std::max(empty, (static_cast<double>(T) * (c.E * bytes + columns * 8) + c.E * 4) / copy * 1e-6);
    std::printf("%-44s %-4s %7lld | floor %6.2f |", c.name.c_str(), name_of(c.dtype), static_cast<long long>(T), floor);
    for (const int force : c.forces) {
      const char* path = "";
      const double us = timer.graph(kRotations, [&](int i) {
        MoeFusedGate p{};
        p.T = T, p.E = c.E, p.rounds = c.rounds, p.slots = c.load ? 288 : 0;
        p.logits = {sets[i].logits.data, c.dtype, T * c.E};
        if (c.bias) p.bias = {bias.data, DType::kF32, c.E};
        p.valid_tokens.host = T;
        if (c.rounds > 0) p.id_map = {map.data, DType::kI32, c.rounds * int64_t{c.E + c.shared}};
        if (c.load) p.load = {load.data, DType::kI64, 288};
        p.ids = {sets[i].ids.data, DType::kI32, T * columns};
        p.weights = {sets[i].weights.data, DType::kF32, T * columns};
        p.K = c.K, p.scoring = c.scoring, p.selection = c.selection, p.groups = c.groups, p.top_groups = c.top_groups;
        p.group_score = c.group_score, p.renormalize = c.renormalize, p.scale = c.scale, p.shared = c.shared;
        if (!dry) CHECK(gate::launch(p, 132, timer.stream, &path, force));
      });
      std::printf(" %s%d: %6.2f (%.2f)", force == 0 ? "auto " : "L", force, us, us / floor);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

// One launch of each variant, for ncu.
void run_profile(int64_t T) {
  const auto once = [&](int E, Scoring scoring, DType dtype, std::vector<int> forces) {
    Buffer logits(T * E * size_of(dtype)), bias(E * 4), ids(T * 32), weights(T * 32);
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
      CHECK(gate::launch(p, 132, nullptr, &path, force));
      CHECK(cudaDeviceSynchronize());
    }
  };
  once(256, Scoring::kSigmoid, DType::kBF16, {8, 32, 102});
  once(128, Scoring::kSoftmax, DType::kBF16, {8, 101});
  once(384, Scoring::kSigmoid, DType::kF32, {8});
  once(60, Scoring::kSoftmax, DType::kBF16, {0});
  once(512, Scoring::kSigmoid, DType::kBF16, {0});
}

void run_times() {
  Timer timer;
  double copy = 0, empty = 0;
  ceilings(timer, &copy, &empty);
  std::printf(
      "copy %.2f TB/s, empty node %.2f us; L1 is the general kernel, L8..L32 the lanes per token, L101 and L102 those "
      "of the kernel for large batches\n",
      copy, empty);
  const std::vector<int64_t> full = {1, 8, 64, 512, 4096, 10000, 20000, 40000, 131072},
                             some = {1, 64, 512, 4096, 10000, 40000};
  Case v3;
  v3.name = "256/8/4/8 sigmoid", v3.forces = {0, 8, 32, 102};
  v3.dtype = DType::kBF16;
  time_case(timer, v3, full, copy, empty);
  v3.dtype = DType::kF32;
  time_case(timer, v3, full, copy, empty);
  v3.dtype = DType::kBF16, v3.forces = {0};
  Case with = v3;
  with.name = "256/8/4/8 +1 shared", with.shared = 1;
  time_case(timer, with, some, copy, empty);
  with.name = "256/8/4/8 +1 shared, map of 16", with.rounds = 16;
  time_case(timer, with, some, copy, empty);
  with.name = "256/8/4/8 +1 shared, map of 16, load", with.load = true;
  time_case(timer, with, some, copy, empty);
  with = v3, with.name = "256/8/4/8 map of 16", with.rounds = 16;
  time_case(timer, with, {40000}, copy, empty);
  with = v3, with.name = "256/8/4/8 load", with.load = true;
  time_case(timer, with, {40000}, copy, empty);
  v3.dtype = DType::kF16, v3.name = "256/8/4/8 f16", v3.forces = {0, 8};
  time_case(timer, v3, {40000}, copy, empty);
  Case kimi;
  kimi.name = "384/1/1/8 sigmoid", kimi.E = 384, kimi.groups = kimi.top_groups = 1, kimi.forces = {0, 8, 16};
  time_case(timer, kimi, some, copy, empty);
  for (const int E : {128, 64}) {
    Case c;
    c.name = "softmax " + std::to_string(E), c.E = E, c.K = E == 64 ? 6 : 8, c.groups = c.top_groups = 1,
    c.scoring = Scoring::kSoftmax, c.bias = false, c.scale = 1, c.dtype = DType::kBF16;
    c.forces = E == 64 ? std::vector<int>{0, 8, 101} : std::vector<int>{0, 8, 16, 101};
    time_case(timer, c, some, copy, empty);
  }
  const auto general = [&](int E, int groups, int top_groups, int K, Scoring scoring, DType dtype, bool bias) {
    Case c;
    c.name = std::to_string(E) + "/" + std::to_string(groups) + "/" + std::to_string(top_groups) + "/" +
             std::to_string(K) + " general";
    c.E = E, c.groups = groups, c.top_groups = top_groups, c.K = K, c.scoring = scoring, c.dtype = dtype, c.bias = bias;
    if (!bias) c.group_score = GroupScore::kMax;
    time_case(timer, c, {64, 4096, 40000}, copy, empty);
  };
  general(160, 8, 3, 6, Scoring::kSoftmax, DType::kBF16, false);
  general(512, 16, 8, 10, Scoring::kSigmoid, DType::kBF16, true);
  general(1024, 1, 1, 32, Scoring::kSigmoid, DType::kBF16, true);
  general(60, 1, 1, 4, Scoring::kSoftmax, DType::kBF16, false);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  dry = argc > 2 && std::string(argv[2]) == "dry";
  ContextOptions options;
  const Status status = create_backend(options, &cpu_backend);
  if (!status.ok()) {
    std::printf("%s\n", status.text.c_str());
    return 1;
  }
  if (mode != "profile" && !dry && argc > 2) filter = argv[2];
  if (mode == "check" || mode == "sanitize") run_checks(mode == "sanitize");
  if (mode == "time") run_times();
  if (mode == "profile") run_profile(argc > 2 ? std::atoll(argv[2]) : 40000);
  return failures > 0;
}
