// A layer of experts in double, and a dispatch, for the tests to compare with and to build on.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "testing.h"

namespace moe::testing {

// One layer in double, from values that are already rounded to their dtypes.
struct Layer {
  int64_t S, H, I;
  DType dtype;
  SwiGLU act;
  Data w13, w2, b13, b2;
  std::vector<char> packed;
  Experts experts;

  Layer(int64_t s, int64_t h, int64_t i, DType type, bool biases, SwiGLU swiglu, uint64_t seed)
      : S(s),
        H(h),
        I(i),
        dtype(type),
        act(swiglu),
        w13(Data::random(type, s * 2 * i * h, seed, 0.3f)),
        w2(Data::random(type, s * h * i, seed + 1, 0.3f)),
        b13(Data::random(DType::kF32, biases ? s * 2 * i : 0, seed + 2)),
        b2(Data::random(DType::kF32, biases ? s * h : 0, seed + 3)) {
    experts.layout = {S, H, I, dtype, biases, act};
    packed.resize(backend(2).expert_bytes(experts.layout) + 64);
    const auto address = reinterpret_cast<uintptr_t>(packed.data());
    experts.data = packed.data() + (64 - address % 64) % 64;
    pack(w13, w2, b13, b2, GateUp::kHalves, false, 0, S);
  }
  void pack(Data& a, Data& b, Data& c, Data& d, GateUp gate_up, bool transposed, int first, int64_t count) {
    PackExperts p{};
    p.S = S, p.H = H, p.I = I, p.count = count;
    p.experts = experts;
    p.w13 = a, p.w2 = b;
    if (c.count() > 0) p.b13 = c;
    if (d.count() > 0) p.b2 = d;
    p.gate_up = gate_up;
    p.transposed = transposed;
    p.first_slot = first;
    ok(pack_experts(backend(2), p));
  }
  std::vector<double> gate_up(int64_t e, const std::vector<double>& x, double weight) const {
    std::vector<double> a(2 * I);
    for (int64_t r = 0; r < 2 * I; r++) {
      double sum = 0;
      for (int64_t h = 0; h < H; h++) sum += x[h] * w13.at((e * 2 * I + r) * H + h);
      a[r] = weight * sum + (b13.count() > 0 ? b13.at(e * 2 * I + r) : 0);
    }
    return a;
  }
  std::vector<double> down(int64_t e, const std::vector<double>& a) const {
    std::vector<double> y(H);
    for (int64_t h = 0; h < H; h++) {
      double sum = b2.count() > 0 ? b2.at(e * H + h) : 0;
      for (int64_t i = 0; i < I; i++) {
        double g = a[i], u = a[I + i];
        if (act.limit > 0) {
          g = std::min(g, static_cast<double>(act.limit));
          u = std::clamp(u, -static_cast<double>(act.limit), static_cast<double>(act.limit));
        }
        const double v = (u + act.beta) * g / (1 + std::exp(-act.alpha * g));
        sum += v * w2.at((e * H + h) * I + i);
      }
      y[h] = sum;
    }
    return y;
  }
};

inline std::vector<double> row_of(const Data& data, int64_t row, int64_t width) {
  std::vector<double> x;
  for (int64_t h = 0; h < width; h++) x.push_back(data.at(row * width + h));
  return x;
}

struct Routing {
  int64_t T, C, P, blocks;
  Data ids, order{DType::kI32, 0}, inverse{DType::kI32, 0}, counts{DType::kI32, 0}, offsets{DType::kI32, 0};
  Data block_experts{DType::kI32, 0}, rows{DType::kF32, 0};
};

inline Routing dispatch(int64_t T, int64_t C, std::vector<int32_t> ids, int experts, int first, int block, Data* hidden,
                 int64_t H, int threads = 3) {
  Routing r{T, C, T * C, 0, Data::ints(ids)};
  if (block > 0) {
    r.P = std::min(T * C + experts * int64_t{block - 1}, T * C * block);
    r.P = (r.P + block - 1) / block * block;
    r.blocks = r.P / block;
  }
  MoeDispatch p{};
  p.T = T, p.C = C, p.H = H, p.P = r.P, p.blocks = r.blocks;
  p.experts = experts, p.first_expert = first, p.block_size = block;
  r.order = Data(DType::kI32, r.P);
  r.inverse = Data(DType::kI32, T * C);
  r.counts = Data(DType::kI32, experts);
  r.offsets = Data(DType::kI32, static_cast<size_t>(experts) + 1);
  r.block_experts = Data(DType::kI32, r.blocks);
  p.ids = r.ids, p.order = r.order, p.inverse = r.inverse, p.counts = r.counts, p.offsets = r.offsets;
  if (block > 0) p.block_experts = r.block_experts;
  if (hidden != nullptr) {
    r.rows = Data(hidden->dtype, r.P * H);
    p.hidden = *hidden, p.rows = r.rows;
  }
  ok(moe_dispatch(backend(threads), p));
  return r;
}

}  // namespace moe::testing
