// moe_router, and the conversions that its rows go through.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "testing.h"

namespace moe::testing {

void test_conversions() {
  current = "conversions";
  std::vector<uint16_t> bits(65536);
  std::iota(bits.begin(), bits.end(), uint16_t{0});
  std::vector<float> wide(bits.size());
  std::vector<uint16_t> back(bits.size());
  int wrong = 0;
  kernels->widen(bits.data(), DType::kF16, 65536, wide.data());
  for (size_t i = 0; i < bits.size(); i++) {
    const float expected = to_float(f16{bits[i]});
    wrong += std::memcmp(&wide[i], &expected, 4) != 0 && !(std::isnan(wide[i]) && std::isnan(expected));
  }
  kernels->narrow(wide.data(), 65536, back.data(), DType::kF16);
  for (size_t i = 0; i < bits.size(); i++) wrong += !std::isnan(wide[i]) && back[i] != bits[i];
  kernels->widen(bits.data(), DType::kBF16, 65536, wide.data());
  kernels->narrow(wide.data(), 65536, back.data(), DType::kBF16);
  for (size_t i = 0; i < bits.size(); i++) {
    wrong += back[i] != from_float<bf16>(wide[i]).bits || (!std::isnan(wide[i]) && back[i] != bits[i]);
  }
  Random r(9);
  for (int i = 0; i < 65536; i++) {
    const uint32_t random = r.bits();
    std::memcpy(&wide[static_cast<size_t>(i)], &random, 4);
  }
  kernels->narrow(wide.data(), 65536, back.data(), DType::kBF16);
  for (size_t i = 0; i < bits.size(); i++) wrong += back[i] != from_float<bf16>(wide[i]).bits;
  check(wrong == 0, std::to_string(wrong) + " of them differ from float_formats.h");
}

void test_router() {
  current = "router";
  for (DType x : kFloatTypes) {
    for (DType w : kFloatTypes) {
      using Shape = std::tuple<int, int, int>;
      for (const auto& [T, H, E] : {Shape{0, 8, 4}, {1, 1, 1}, {5, 33, 7}, {131, 600, 19}, {3, 0, 2}}) {
        Data hidden = Data::random(x, T * H, 1), weight = Data::random(w, E * H, 2);
        Data bias = Data::random(DType::kF32, E, 3), logits(DType::kF32, T * E);
        MoeRouter p{T, H, E, hidden, weight, bias, logits};
        ok(moe_router(backend(3), p));
        std::vector<double> expected;
        for (int t = 0; t < T; t++) {
          for (int e = 0; e < E; e++) {
            double sum = bias.at(e);
            for (int h = 0; h < H; h++) sum += double{hidden.at(t * H + h)} * weight.at(e * H + h);
            expected.push_back(sum);
          }
        }
        check_close(logits, expected, "logits");
      }
    }
  }
}

}  // namespace moe::testing
