// shared_experts, and what is done in pieces because rows are many.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "layer.h"

namespace moe::testing {

void test_shared() {
  for (int round = 0; round < 18; round++) {
    current = "shared round " + std::to_string(round);
    const DType x = kFloatTypes[round % 3], w = kFloatTypes[round / 3 % 3];
    const int64_t H = round < 9 ? 37 : 528, I = round < 9 ? 19 : 272, T = round < 9 ? 140 : 3;
    const bool gated = round % 2 == 0;
    Layer layer(1, H, I, w, round % 4 == 0, {}, static_cast<uint64_t>(round + 100));
    Data hidden = Data::random(x, T * H, 5), gate = Data::random(w, H, 6);
    Data routed = Data::random(x, T * H, 7);
    Data output(x, T * H), projected(x, T * 2 * I), second(x, T * H);
    std::vector<double> expected, expected_projection;
    for (int64_t t = 0; t < T; t++) {
      const std::vector<double> row = row_of(hidden, t, H), a = layer.gate_up(0, row, 1), y = layer.down(0, a);
      double logit = 0;
      for (int64_t h = 0; h < H; h++) logit += row[h] * gate.at(h);
      expected_projection.insert(expected_projection.end(), a.begin(), a.end());
      for (int64_t h = 0; h < H; h++) {
        expected.push_back(routed.at(t * H + h) + (gated ? 1 / (1 + std::exp(-logit)) : 1) * y[h]);
      }
    }
    SharedExperts p{};
    p.T = T, p.H = H, p.S = 1, p.I = I;
    p.hidden = hidden, p.experts = layer.experts, p.routed = routed, p.output = output;
    if (gated) p.expert_gate = gate;
    ok(shared_experts(backend(2), p));
    check_close(output, expected, "whole");
    SharedExperts up{};
    up.T = T, up.H = H, up.S = 1, up.I = I, up.hidden = hidden, up.experts = layer.experts, up.projected = projected;
    up.part = SharedPart::kGateUp;
    ok(shared_experts(backend(3), up));
    check_close(projected, expected_projection, "projection");
    p.part = SharedPart::kDown;
    p.projected_in = projected;
    p.output = second;
    ok(shared_experts(backend(1), p));
    for (int64_t t = 0; t < T; t++) {  // from what was rounded in between
      const std::vector<double> whole = layer.down(0, layer.gate_up(0, row_of(hidden, t, H), 1));
      const std::vector<double> parts = layer.down(0, row_of(projected, t, 2 * I));
      for (int64_t h = 0; h < H; h++) {
        const auto at = static_cast<size_t>(t * H + h);
        const double factor = gated ? (expected[at] - routed.at(at)) / whole[h] : 1;
        expected[at] = routed.at(at) + factor * parts[h];
      }
    }
    check_close(second, expected, "down");
    if (x == DType::kF32) check(second.bytes == output.bytes, "the parts give the bits of the whole");
  }
}

// A budget of few rows: what takes several pieces has the bits of row by row.
void test_pieces() {
  current = "pieces";
  const int64_t T = 300, I = 600;
  CpuBackend small(2, 128 * 608 * 4, *kernels);
  Layer layer(1, 1, I, DType::kBF16, false, {}, 12);
  Data hidden = Data::random(DType::kBF16, T, 1);
  Data weights = Data::random(DType::kF32, T, 2);
  Data ids(DType::kI32, T), fused(DType::kBF16, T), shared = fused, grouped = fused;
  FusedMoe f{};
  f.T = T, f.H = 1, f.C = 1, f.S = 1, f.I = I, f.output_scale = 1;
  f.hidden = hidden, f.ids = ids, f.weights = weights, f.experts = layer.experts, f.output = fused;
  ok(fused_moe(small, f));
  SharedExperts s{};
  s.T = T, s.H = 1, s.S = 1, s.I = I, s.hidden = hidden, s.experts = layer.experts, s.output = shared;
  ok(shared_experts(small, s));
  Data counts = Data::ints({static_cast<int32_t>(T)}), offsets = Data::ints({0, static_cast<int32_t>(T)});
  MoeExperts e{};
  e.P = T, e.H = 1, e.S = 1, e.I = I, e.rows = hidden, e.counts = counts, e.offsets = offsets;
  e.experts = layer.experts, e.output = grouped;
  ok(moe_experts(small, e));
  check(shared.bytes == grouped.bytes, "experts and shared_experts agree");
  for (int64_t t : {0, 127, 128, 254, 255, 256, 299}) {
    const auto at = static_cast<size_t>(t);
    Data one(DType::kBF16, 1);
    f.T = s.T = 1;
    f.output = s.output = one;
    f.hidden = s.hidden = {hidden.bytes.data() + at * 2, DType::kBF16, 1};
    f.weights = {weights.bytes.data() + at * 4, DType::kF32, 1};
    ok(fused_moe(backend(1), f));
    check(one.at(0) == fused.at(at), "fused row " + std::to_string(t));
    ok(shared_experts(backend(1), s));
    check(one.at(0) == shared.at(at), "shared row " + std::to_string(t));
  }
  const int64_t H = 2048, rows = 140;
  Data wide = Data::random(DType::kBF16, rows * H, 3), router = Data::random(DType::kF32, H, 4);
  Data logits(DType::kF32, rows), one(DType::kF32, 1);
  ok(moe_router(small, {rows, H, 1, wide, router, {}, logits}));
  for (int64_t t : {0, 37, 38, 127, 139}) {
    const Tensor row{wide.bytes.data() + t * H * 2, DType::kBF16, H};
    ok(moe_router(backend(1), {1, H, 1, row, router, {}, one}));
    check(one.at(0) == logits.at(t), "router row " + std::to_string(t));
  }
}

}  // namespace moe::testing
