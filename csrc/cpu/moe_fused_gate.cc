// moe_fused_gate: scores, groups, the K best, weights, shared experts, mapping and load of every token.
//
// Algorithm: one thread per token, 16 tokens a task, all in arrays on its stack. Scores, the two best of groups and the
// K best come from Kernels; where these decline (an infinity or NaN among groups, fewer numbers than are wanted, too
// many equal ones) groups are cut by selection and the K best kept in an insertion-sorted list, with the same result.
// 256 experts in 8 groups have a way of their own where Kernels does. The load is counted afterwards on one thread.
// Limits: 1024 experts, 32 choices; any group count that divides the experts.
//
// Ranks are unsigned keys with the order of the floats, -0 equal to 0 and NaN below -inf; equal keys go to the lower
// id, for experts and for groups. A NaN logit or bias, or a choice that became NaN (+inf score, -inf bias), has weight
// 0. Order of accumulation: softmax sums run lane by lane, sums over chosen experts in slot order, everything in f32;
// sigmoids and exp to a unit in the last place (sigmoids that choose among 256 in 8 groups to 2e-7), log1p and its exp
// rounded from f64.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>

#include "float_rows.h"

namespace moe {

namespace {

constexpr int64_t kMostExperts = 1024;
constexpr int kMostChoices = 32;
constexpr int64_t padded(int64_t n) { return (n + kGatePad - 1) / kGatePad * kGatePad; }
static_assert(padded(kMostExperts) == kMostExperts);
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

uint32_t rank_key(float value) {
  if (std::isnan(value)) return 0;
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// Divides by the sum of what is not NaN, in order. A sum of 0 gives 0; infinite values share the whole equally.
void divide_by_sum(float* values, int64_t n) {
  int64_t infinite = 0;
  float sum = 0;
  for (int64_t i = 0; i < n; i++) {
    infinite += values[i] == kInfinity;
    if (!std::isnan(values[i])) sum += values[i];
  }
  for (int64_t i = 0; i < n; i++) {
    if (std::isnan(values[i])) continue;
    if (infinite > 0) {
      values[i] = values[i] == kInfinity ? 1.0f / static_cast<float>(infinite) : 0.0f;
    } else {
      values[i] = sum == 0 ? 0.0f : values[i] / sum;
    }
  }
}

// Of values with room up to padded(n).
void softmax(const Kernels& kernels, float* x, int64_t n, float* out) {
  std::fill(x + n, x + padded(n), kNaN);
  if (kernels.softmax(x, padded(n), out)) return;
  const bool infinite = std::any_of(x, x + n, [](float value) { return value == kInfinity; });
  for (int64_t i = 0; i < n; i++) out[i] = std::isnan(x[i]) ? kNaN : infinite && x[i] == kInfinity ? 1.0f : 0.0f;
  if (infinite) divide_by_sum(out, n);
}

// NaN stays NaN. `x` has room up to padded(n).
void score(const Kernels& kernels, Scoring scoring, float* x, int64_t n, float* out) {
  if (scoring == Scoring::kSoftmax) return softmax(kernels, x, n, out);
  if (scoring == Scoring::kSigmoid) return kernels.sigmoids(x, n, out);
  for (int64_t i = 0; i < n; i++) {
    const auto power = static_cast<float>(std::exp(static_cast<double>(std::min(x[i], 21.0f))));
    const float softplus = x[i] > 20.0f ? x[i] : static_cast<float>(std::log1p(static_cast<double>(power)));
    out[i] = std::isnan(x[i]) ? x[i] : std::sqrt(softplus);
  }
}

struct Row {
  float x[kMostExperts];        // logits; NaN where the bias is
  float scores[kMostExperts];   // NaN where x is
  float choices[kMostExperts];  // NaN also from E to padded(E)
  uint32_t keys[kMostExperts];
  bool kept[kMostExperts];  // per group
};

// Marks the groups whose experts are candidates. False where Kernels decline.
bool keep_groups_fast(const Kernels& kernels, const MoeFusedGate& p, Row& row) {
  float scores[kMostExperts], seconds[kMostExperts];
  int32_t best[kMostChoices];
  const int64_t groups = p.groups;
  if (p.top_groups > kMostChoices) return false;
  if (!kernels.best_two(row.choices, groups, p.E / groups, scores, seconds)) return false;
  for (int64_t g = 0; g < groups && p.group_score == GroupScore::kTop2Sum; g++) scores[g] += seconds[g];
  std::fill(scores + groups, scores + padded(groups), kNaN);
  if (!kernels.top(scores, padded(groups), p.top_groups, best)) return false;
  std::fill(row.kept, row.kept + groups, false);
  for (int i = 0; i < p.top_groups; i++) row.kept[best[i]] = true;
  return true;
}

// The same for any choices, one by one.
void keep_groups(const MoeFusedGate& p, Row& row) {
  const int64_t groups = p.groups, size = p.E / groups;
  uint64_t ranks[kMostExperts], sorted[kMostExperts];
  for (int64_t g = 0; g < groups; g++) {
    float first = kNaN, second = kNaN;
    for (int64_t e = g * size; e < (g + 1) * size; e++) {
      const float choice = row.choices[e];
      if (choice > first || std::isnan(first)) {
        second = first;
        first = choice;
      } else if (choice > second || std::isnan(second)) {
        second = choice;
      }
    }
    const bool sum = p.group_score == GroupScore::kTop2Sum && !std::isnan(second);
    const uint64_t key = rank_key(sum ? first + second : first);
    ranks[g] = sorted[g] = key << 32 | static_cast<uint64_t>(groups - g);
  }
  std::nth_element(sorted, sorted + p.top_groups - 1, sorted + groups, std::greater<>());
  for (int64_t g = 0; g < groups; g++) row.kept[g] = ranks[g] >= sorted[p.top_groups - 1];
}

// The K best candidates by row.keys, best first.
void choose(const MoeFusedGate& p, const Row& row, int32_t* chosen) {
  const int64_t size = p.E / p.groups;
  uint32_t keys[kMostChoices];
  int count = 0;
  for (int64_t g = 0; g < p.groups; g++) {
    if (!row.kept[g]) continue;
    for (int64_t e = g * size; e < (g + 1) * size; e++) {
      const uint32_t key = row.keys[e];
      if (count == p.K && key <= keys[count - 1]) continue;
      int at = count < p.K ? count++ : count - 1;
      for (; at > 0 && keys[at - 1] < key; at--) {
        keys[at] = keys[at - 1];
        chosen[at] = chosen[at - 1];
      }
      keys[at] = key;
      chosen[at] = static_cast<int32_t>(e);
    }
  }
}

// The K best choices, best first, of groups that are kept.
void choose_by_score(const Kernels& kernels, const MoeFusedGate& p, Row& row, int32_t* chosen) {
  const int64_t E = p.E, size = E / p.groups;
  std::fill(row.choices + E, row.choices + padded(E), kNaN);
  if (p.top_groups >= p.groups) {
    std::fill(row.kept, row.kept + p.groups, true);
  } else {
    if (!keep_groups_fast(kernels, p, row)) keep_groups(p, row);
    for (int64_t g = 0; g < p.groups; g++) {
      if (!row.kept[g]) std::fill_n(row.choices + g * size, size, kNaN);
    }
  }
  if (kernels.top(row.choices, padded(E), p.K, chosen)) return;
  for (int64_t e = 0; e < E; e++) row.keys[e] = rank_key(row.choices[e]);
  choose(p, row, chosen);
}

// Whether the columns of a row are its chosen experts and nothing else.
bool is_plain(const MoeFusedGate& p) { return p.shared == 0 && p.zero == 0 && !p.id_map && !p.logical_ids; }

// The columns of a row: chosen experts with their weights, then the shared ones.
void write_row(const MoeFusedGate& p, int64_t t, const int32_t* chosen, const float* weights) {
  const int64_t columns = int64_t{p.K} + p.shared, routed = p.E - p.zero;
  const bool in_weights = p.scale_placement == ScalePlacement::kInWeights;
  const int32_t* map = p.id_map ? p.id_map.as<const int32_t>() + t % p.rounds * (p.E + p.shared) : nullptr;
  for (int64_t c = 0; c < columns; c++) {
    const bool shared = c >= p.K;
    int64_t id = routed + c - p.K;
    if (!shared) id = chosen[c] < routed ? chosen[c] : int64_t{chosen[c]} + p.shared;
    if (!shared && p.logical_ids) p.logical_ids.as<int32_t>()[t * p.K + c] = static_cast<int32_t>(id);
    p.ids.as<int32_t>()[t * columns + c] = map != nullptr ? map[id] : static_cast<int32_t>(id);
    p.weights.as<float>()[t * columns + c] =
        shared ? (in_weights ? 1.0f : 1.0f / p.scale) : (in_weights ? weights[c] * p.scale : weights[c]);
  }
}

// Whether the rows may be tried with Kernels::choose_of_256.
bool is_grouped_256(const Kernels& kernels, const MoeFusedGate& p) {
  const float* bias = p.bias.as<const float>();
  return kernels.choose_of_256 != nullptr && p.E == 256 && p.groups == 8 && p.top_groups >= 3 && p.K <= 8 &&
         p.scoring == Scoring::kSigmoid && p.selection == Selection::kScore &&
         (bias == nullptr || std::all_of(bias, bias + p.E, [](float b) { return std::isfinite(b); }));
}

void route(const Kernels& kernels, const MoeFusedGate& p, int64_t t, Row& row) {
  const int64_t E = p.E;
  const float* bias = p.bias.as<const float>();
  kernels.widen(element(p.logits.data, p.logits.dtype, t * E), p.logits.dtype, E, row.x);
  for (int64_t e = 0; e < E && bias != nullptr; e++) row.x[e] = std::isnan(bias[e]) ? kNaN : row.x[e];

  // Who is chosen
  const bool by_logits = p.selection == Selection::kLogits;
  if (!by_logits) score(kernels, p.scoring, row.x, E, row.scores);
  int32_t chosen[kMostChoices];
  if (p.selection == Selection::kUniform) {
    const uint32_t h = mix(p.seed ^ (static_cast<uint32_t>(t) + 1) * 0x9e3779b1u);
    for (int64_t e = 0; e < E; e++) row.keys[e] = mix(h ^ (static_cast<uint32_t>(e) + 1) * 0x85ebca77u);
    std::fill(row.kept, row.kept + p.groups, true);
    choose(p, row, chosen);
  } else {
    for (int64_t e = 0; e < E; e++) {
      row.choices[e] = by_logits ? row.x[e] : bias != nullptr ? row.scores[e] + bias[e] : row.scores[e];
    }
    choose_by_score(kernels, p, row, chosen);
  }

  // What it weighs
  float weights[padded(kMostChoices)];
  if (by_logits) {
    float logits[padded(kMostChoices)];
    for (int c = 0; c < p.K; c++) logits[c] = row.x[chosen[c]];
    score(kernels, p.scoring, logits, p.K, weights);
  } else {
    for (int c = 0; c < p.K; c++) weights[c] = row.scores[chosen[c]];
  }
  for (int c = 0; c < p.K; c++) {
    const bool nan_choice = p.selection == Selection::kScore && std::isnan(row.choices[chosen[c]]);
    if (nan_choice || std::isnan(weights[c])) weights[c] = 0;
  }
  if (p.renormalize) divide_by_sum(weights, p.K);
  write_row(p, t, chosen, weights);
}

// Rows begin .. begin+count-1 with count <= kGateRows; single rows go the general way.
void route_grouped_256(const Kernels& kernels, const MoeFusedGate& p, int64_t begin, int64_t count, Row& row) {
  constexpr int64_t kChosen = 8;
  float wide[kGateRows * 256];
  const void* from = element(p.logits.data, p.logits.dtype, begin * p.E);
  if (p.logits.dtype != DType::kF32) kernels.widen(from, p.logits.dtype, count * p.E, wide);
  const float* logits = p.logits.dtype == DType::kF32 ? static_cast<const float*>(from) : wide;

  // Straight to where they belong if rows are nothing but these
  const bool whole = p.K == kChosen && is_plain(p);
  int32_t own_ids[kGateRows * kChosen];
  float own_weights[kGateRows * kChosen];
  int32_t* chosen = whole ? p.ids.as<int32_t>() + begin * kChosen : own_ids;
  float* weights = whole ? p.weights.as<float>() + begin * kChosen : own_weights;
  const uint32_t done = kernels.choose_of_256(logits, static_cast<int>(count), p.bias.as<const float>(), p.top_groups,
                                              p.group_score == GroupScore::kTop2Sum, chosen);
  for (int64_t r = 0; r < count; r++) {
    for (int64_t c = 0; c < kChosen; c++) weights[r * kChosen + c] = logits[r * 256 + chosen[r * kChosen + c]];
  }
  kernels.sigmoids(weights, count * kChosen, weights);
  const float scale = whole && p.scale_placement == ScalePlacement::kInWeights ? p.scale : 1.0f;
  for (int64_t r = 0; r < count; r++) {
    float* of_row = weights + r * kChosen;
    float sum = 0;
    for (int c = 0; c < p.K; c++) sum += of_row[c];
    const float divisor = !p.renormalize ? 1.0f : sum == 0 ? kInfinity : sum;
    for (int64_t c = 0; c < kChosen; c++) of_row[c] = of_row[c] / divisor * scale;
    if (!whole) write_row(p, begin + r, chosen + r * kChosen, of_row);
  }
  for (int64_t r = 0; r < count; r++) {
    if ((done >> r & 1) == 0) route(kernels, p, begin + r, row);
  }
}

}  // namespace

Status moe_fused_gate(Backend& backend, const MoeFusedGate& p) {
  if (p.E > kMostExperts || p.K > kMostChoices) {
    return Status::Error(Code::kUnsupported, "expected at most 1024 experts and topK 32 but received " +
                                                 std::to_string(p.E) + " and " + std::to_string(p.K));
  }
  const Kernels& kernels = cpu(backend).kernels();
  const bool grouped_256 = is_grouped_256(kernels, p);
  backend.note_path("moe_fused_gate", grouped_256 ? "avx512 for 256 experts in 8 groups" : kernels.name);
  const int64_t columns = int64_t{p.K} + p.shared;
  const int64_t given = p.valid_tokens.device != nullptr ? *p.valid_tokens.device : p.valid_tokens.host;
  const int64_t valid = std::clamp(given, int64_t{0}, p.T);
  cpu(backend).pool().parallel_for(p.T, 16, [&](int64_t begin, int64_t end) {
    Row row;
    const int64_t routed = std::min(end, valid);
    for (int64_t t = begin; t < routed && grouped_256; t += kGateRows) {
      route_grouped_256(kernels, p, t, std::min<int64_t>(kGateRows, routed - t), row);
    }
    for (int64_t t = begin; t < routed && !grouped_256; t++) route(kernels, p, t, row);
    for (int64_t t = std::max(begin, valid); t < end; t++) {
      std::fill_n(p.ids.as<int32_t>() + t * columns, columns, -1);
      std::fill_n(p.weights.as<float>() + t * columns, columns, 0.0f);
      if (p.logical_ids) std::fill_n(p.logical_ids.as<int32_t>() + t * p.K, p.K, -1);
    }
  });
  MOE_RETURN_IF_ERROR(cpu(backend).finished());
  for (int64_t i = 0; i < valid * columns && p.load; i++) {
    const int32_t id = p.ids.as<int32_t>()[i];
    if (id >= 0 && id < p.slots) p.load.as<int64_t>()[id]++;
  }
  return Status::Ok();
}

MOE_REGISTER(moe_fused_gate, MoeFusedGate);

}  // namespace moe
