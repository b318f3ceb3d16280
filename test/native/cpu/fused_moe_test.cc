// fused_moe, and moe_experts with moe_combine around a dispatch, against a layer in double; faults in their data.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "layer.h"

namespace moe::testing {

void test_layers() {
  Random r(21);
  const SwiGLU plain, clamped{1.702f, 1.0f, 0.7f};
  for (int round = 0; round < 36; round++) {
    const DType x = kFloatTypes[round % 3], w = kFloatTypes[round / 3 % 3];
    const int64_t sizes[][4] = {{4, 40, 24, 33}, {3, 17, 5, 1}, {5, 16, 300, 4}, {2, 530, 16, 150}};  // S, H, I, T
    const auto [S, H, I, T] = sizes[round / 9];
    const int64_t C = 1 + r.below(4);
    const bool biases = r.below(2) == 0, on_input = r.below(2) == 0, padded_blocks = r.below(2) == 0;
    const int zero = r.below(3), first = r.below(3), first_zero = first + static_cast<int>(S) + 1;
    const float scale = 1.25f;
    current = "layer round " + std::to_string(round);
    Layer layer(S, H, I, w, biases, r.below(2) == 0 ? plain : clamped, static_cast<uint64_t>(round));
    Data hidden = Data::random(x, T * H, 77);
    Data weights = Data::random(DType::kF32, T * C, 78);
    std::vector<int32_t> id_list(T * C);
    for (int32_t& id : id_list) id = r.below(static_cast<int>(S) + 5) - 1;
    Data ids = Data::ints(id_list);

    std::vector<double> expected;
    for (int64_t t = 0; t < T; t++) {
      std::vector<double> sum(H);
      for (int64_t c = 0; c < C; c++) {
        const double weight = weights.at(t * C + c);
        const int64_t id = id_list[t * C + c], e = id - first;
        std::vector<double> y(H);
        if (id >= first_zero && id < first_zero + zero) {
          y = row_of(hidden, t, H);
          for (double& v : y) v *= weight;
        } else if (id >= 0 && e >= 0 && e < S) {
          y = layer.down(e, layer.gate_up(e, row_of(hidden, t, H), on_input ? weight : 1));
          for (double& v : y) v *= on_input ? 1 : weight;
        }
        for (size_t h = 0; h < sum.size(); h++) sum[h] += y[h];
      }
      for (double v : sum) expected.push_back(scale * v);
    }

    std::vector<Data> outputs;
    for (int threads : {1, 2, 3}) {
      Data output(x, T * H);
      FusedMoe p{};
      p.T = T, p.H = H, p.C = C, p.S = S, p.I = I;
      p.hidden = hidden, p.ids = ids, p.weights = weights, p.experts = layer.experts, p.output = output;
      p.output_scale = scale, p.first_expert = first, p.zero = zero, p.first_zero = first_zero;
      p.weights_on_input = on_input;
      ok(fused_moe(backend(threads), p));
      outputs.push_back(output);
    }
    check_close(outputs[0], expected, "fused_moe");
    const bool same = outputs[0].bytes == outputs[1].bytes && outputs[0].bytes == outputs[2].bytes;
    check(same, "the same bits on 1, 2, 3 threads");

    Routing routing = dispatch(T, C, id_list, static_cast<int>(S), first, padded_blocks ? 4 : 0, &hidden, H);
    Data rows_out(x, routing.P * H);
    std::fill(rows_out.bytes.begin(), rows_out.bytes.end(), char{0x55});
    MoeExperts e{};
    e.P = routing.P, e.H = H, e.S = S, e.I = I, e.T = T, e.C = C;
    e.rows = routing.rows, e.counts = routing.counts, e.offsets = routing.offsets, e.experts = layer.experts;
    e.output = rows_out;
    if (on_input) e.order = routing.order, e.weights = weights;
    ok(moe_experts(backend(2), e));
    bool empty_places_zero = true;
    for (int64_t place = 0; place < routing.P; place++) {
      if (routing.order.id(place) != T * C) continue;
      for (int64_t h = 0; h < H; h++) empty_places_zero &= rows_out.at(place * H + h) == 0;
    }
    check(empty_places_zero, "empty places are zero");

    Data combined(x, T * H);
    MoeCombine c{};
    c.P = routing.P, c.H = H, c.T = T, c.C = C;
    c.rows = rows_out, c.inverse = routing.inverse, c.weights = weights, c.ids = ids, c.hidden = hidden;
    c.output = combined, c.output_scale = scale, c.weights_on_input = on_input;
    c.zero = zero, c.first_zero = first_zero;
    ok(moe_combine(backend(3), c));
    check_close(combined, expected, "dispatch, experts, combine", static_cast<double>(C + 1));
    if (x == DType::kF32) check(combined.bytes == outputs[0].bytes, "fused_moe has the bits of the three ops");

    // Faults in the data
    if (on_input && T > 1) {
      Data bad = Data::ints(routing.order.ids());
      const auto at = static_cast<size_t>(routing.offsets.id(0));
      if (routing.counts.id(0) > 0) {
        std::vector<int32_t> list = bad.ids();
        list[at] = static_cast<int32_t>(T * C);
        bad = Data::ints(list);
        e.order = bad;
        const Status status = moe_experts(backend(2), e);
        check(status.code == Code::kRange && status.arg == "order", "order outside: " + status.text);
        e.order = routing.order;
      }
    }
    std::vector<int32_t> counts = routing.counts.ids(), offsets = routing.offsets.ids();
    counts[0] = -1;
    Data bad_counts = Data::ints(counts);
    e.counts = bad_counts;
    check(moe_experts(backend(2), e).arg == "counts", "negative count");
    counts[0] = static_cast<int32_t>(routing.P) + 1;
    bad_counts = Data::ints(counts);
    e.counts = bad_counts;
    check(moe_experts(backend(2), e).arg == "offsets", "rows outside");
    if (routing.P > 1 && S > 1) {
      counts[0] = counts[1] = 2;
      offsets[0] = 0, offsets[1] = 1;
      if (on_input) e.order = {}, e.weights = {};
      bad_counts = Data::ints(counts);
      Data bad_offsets = Data::ints(offsets);
      e.counts = bad_counts, e.offsets = bad_offsets;
      if (routing.P > 2) check(moe_experts(backend(2), e).arg == "offsets", "a row of two experts");
    }
    std::vector<int32_t> places = routing.inverse.ids();
    for (size_t i = 0; i < places.size(); i++) {
      if (places[i] >= 0) places[i] = static_cast<int32_t>(routing.P);
    }
    Data bad_inverse = Data::ints(places);
    c.inverse = bad_inverse;
    const bool any = std::any_of(places.begin(), places.end(), [](int32_t i) { return i >= 0; });
    if (any && zero == 0) check(moe_combine(backend(2), c).arg == "inverse", "inverse outside");
  }

  current = "empty batch";
  Layer layer(2, 8, 4, DType::kF32, false, plain, 1);
  Data none(DType::kF32, 0), no_ids(DType::kI32, 0), counts = Data::ints({0, 0}), offsets = Data::ints({0, 0, 0});
  FusedMoe f{};
  f.H = 8, f.C = 2, f.S = 2, f.I = 4, f.output_scale = 1;
  f.hidden = none, f.ids = no_ids, f.weights = none, f.experts = layer.experts, f.output = none;
  ok(fused_moe(backend(2), f));
  MoeExperts e{};
  e.H = 8, e.S = 2, e.I = 4, e.rows = none, e.counts = counts, e.offsets = offsets;
  e.experts = layer.experts, e.output = none;
  ok(moe_experts(backend(2), e));
  MoeCombine c{};
  c.H = 8, c.C = 2, c.rows = none, c.inverse = no_ids, c.weights = none, c.output = none;
  ok(moe_combine(backend(2), c));
  dispatch(0, 2, {}, 2, 0, 4, &none, 8);
  SharedExperts s{};
  Layer dense(1, 8, 4, DType::kF32, true, plain, 1);
  s.H = 8, s.S = 1, s.I = 4, s.hidden = none, s.experts = dense.experts, s.output = none;
  ok(shared_experts(backend(2), s));
}

}  // namespace moe::testing
