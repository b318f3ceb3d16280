// `gate_bench check` and `sanitize`: the CUDA moe_fused_gate against the CPU kernel, every case run twice.
#pragma once
#include "../../csrc/backend.h"
#include "../../csrc/common/float_formats.h"
#include "../../csrc/cuda/moe_fused_gate.cuh"
#include "gate_cases.cuh"

namespace bench {

struct Result {
  std::vector<int32_t> ids, logical;
  std::vector<float> weights;
  std::vector<int64_t> load;
};

inline constexpr size_t kGuard = 64;  // bytes behind an output that nobody may write

inline bool guard_is_whole(const Buffer& output) {
  std::vector<uint8_t> all(output.bytes);
  output.get(all.data(), all.size());
  return std::all_of(all.end() - kGuard, all.end(), [](uint8_t x) { return x == 0xa5; });
}

inline uint16_t bits_of(DType dtype, float x) {
  return dtype == DType::kBF16 ? from_float<bf16>(x).bits : from_float<f16>(x).bits;
}

// Whether the row has a gap in what decides that is not 0 and under 2e-6.
inline bool near_tie(const Case& c, const float* x, const float* bias) {
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

struct Tally {
  int failures = 0, cases = 0, near_ties = 0;
  double worst_weight = 0;
};

inline void check(Backend& cpu, const Case& c, int64_t T, Tally& tally) {
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
  const Status status = moe_fused_gate(cpu, r);
  if (!status.ok()) {
    std::printf("CPU: %s\n", status.text.c_str());
    std::exit(1);
  }

  // Device
  Buffer logits(logit_bytes), bias_d(c.E * 4), map_d(map.size() * 4), load_d(slots * 8), valid_d(4);
  const uint32_t copies = copies_for(slots);
  std::vector<uint64_t> apart(copies * slots * SpreadCounters::kStride);
  Buffer spread_d(apart.size() * 8);
  Buffer ids(T * columns * 4 + kGuard), weights(T * columns * 4 + kGuard), logical(T * c.K * 4 + kGuard);
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
  // Counters apart, and in the tensor itself.
  const SpreadCounters none, some{static_cast<unsigned long long*>(spread_d.data), copies};
  std::vector<std::pair<int, SpreadCounters>> runs;
  for (const int force : c.forces) {
    runs.push_back({force, none});
    if (c.load) runs.push_back({force, some});
  }
  for (const auto& [force, spread] : runs) {
    const char* path = "";
    bool contained = true;
    Result got[2];
    for (auto& g : got) {
      ids.poison(), weights.poison(), logical.poison();
      load_d.put(load_before.data(), slots * 8);
      std::fill(apart.begin(), apart.end(), 0);
      spread_d.put(apart.data(), spread_d.bytes);
      if (dry) {
        MoeFusedGate fake = d;
        const Status s = moe_fused_gate(cpu, fake);
        if (!s.ok()) std::exit(1);
      } else {
        CHECK(gate::launch(d, spread, 132, nullptr, &path, force));
        CHECK(cudaDeviceSynchronize());
      }
      g = {std::vector<int32_t>(T * columns), std::vector<int32_t>(T * c.K), std::vector<float>(T * columns),
           std::vector<int64_t>(slots)};
      ids.get(g.ids.data(), T * columns * 4);
      weights.get(g.weights.data(), T * columns * 4);
      if (c.capture) logical.get(g.logical.data(), T * c.K * 4);
      load_d.get(g.load.data(), slots * 8);
      contained = contained && (spread.data == nullptr || dry || g.load == load_before);
      spread_d.get(apart.data(), spread_d.bytes);
      for (size_t i = 0; i < apart.size(); i++) {
        if (apart[i] != 0) g.load[i / SpreadCounters::kStride % slots] += static_cast<int64_t>(apart[i]);
        contained = contained && (apart[i] == 0 || i % SpreadCounters::kStride == 0);
      }
      contained = contained && guard_is_whole(ids) && guard_is_whole(weights) && guard_is_whole(logical);
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
    tally.cases++;
    tally.near_ties += near;
    tally.worst_weight = std::max(tally.worst_weight, near == 0 ? worst : 0.0);
    if (bad > 0 || !load_ok || !steady || !contained || near > 3 + T / 2000) {
      tally.failures++;
      std::printf("FAIL %s %s %s T=%lld force=%d (%s): bad rows %d, near ties %d, load %s, steady %s, contained %s\n",
                  c.name.c_str(), name_of(c.dtype), fill_names[static_cast<int>(c.fill)], static_cast<long long>(T),
                  force, path, bad, near, load_ok ? "ok" : "BAD", steady ? "yes" : "NO", contained ? "yes" : "NO");
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

// The number of cases that failed, of those whose names begin with `filter`.
inline int run_checks(Backend& cpu, const std::string& filter, bool small) {
  Tally tally;
  const std::vector<int64_t> batches = small
                                           ? std::vector<int64_t>{1, 33, 127}
                                           : std::vector<int64_t>{0, 1, 2, 31, 32, 33, 127, 511, 512, 513, 4097, 40000};
  for (const Case& family : families()) {
    if (family.name.compare(0, filter.size(), filter) != 0) continue;
    for (const int64_t T : batches) {
      if (dry && T > 600) continue;
      check(cpu, family, T, tally);
    }
    for (const Fill fill : {Fill::kTies, Fill::kEqual, Fill::kNaN, Fill::kInfinite, Fill::kSaturated, Fill::kSkewed,
                            Fill::kFewFinite, Fill::kAllNaN, Fill::kAroundZero}) {
      Case c = family;
      c.fill = fill;
      for (const int64_t T : small ? std::vector<int64_t>{33} : std::vector<int64_t>{1, 33, 2000}) {
        check(cpu, c, T, tally);
      }
    }
  }
  std::printf("checks: %d cases, %d failed, %d near ties, worst weight error %.2g\n", tally.cases, tally.failures,
              tally.near_ties, tally.worst_weight);
  return tally.failures;
}

}  // namespace bench
