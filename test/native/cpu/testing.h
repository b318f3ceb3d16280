// What the tests of the CPU backend share: counted checks, tensors whose every byte is owned, and one backend for each
// instruction set and number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../../../csrc/common/float_formats.h"
#include "../../../csrc/cpu/backend.h"

namespace moe::testing {

inline int passed = 0, failed = 0;
inline std::string current;  // what is being tested

inline void check(bool condition, const std::string& what) {
  condition ? passed++ : failed++;
  if (!condition) std::printf("FAILED %s: %s\n", current.c_str(), what.c_str());
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr DType kFloatTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 2862933555777941757ull + 3037000493ull) {}
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(bits() >> 8) / 8388608.0f - 1.0f; }
};

// A tensor's bytes in a buffer of exactly its size, so that AddressSanitizer sees every step outside, and its values.
struct Data {
  DType dtype;
  std::vector<char> bytes;
  Data(DType type, int64_t count) : dtype(type), bytes(static_cast<size_t>(count) * size_of(type)) {}

  static Data floats(DType type, const std::vector<float>& values) {
    Data data(type, static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); i++) {
      char* at = data.bytes.data() + i * size_of(type);
      if (type == DType::kF32) std::memcpy(at, &values[i], 4);
      const uint16_t bits = type == DType::kBF16 ? from_float<bf16>(values[i]).bits : from_float<f16>(values[i]).bits;
      if (type != DType::kF32) std::memcpy(at, &bits, 2);
    }
    return data;
  }
  static Data random(DType type, int64_t count, uint64_t seed, float scale = 1) {
    Random r(seed);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = r.uniform() * scale;
    return floats(type, values);
  }
  static Data ints(const std::vector<int32_t>& values) {
    Data data(DType::kI32, static_cast<int64_t>(values.size()));
    if (!values.empty()) std::memcpy(data.bytes.data(), values.data(), values.size() * 4);
    return data;
  }
  size_t count() const { return bytes.size() / size_of(dtype); }
  float at(int64_t i) const {
    const char* from = bytes.data() + static_cast<size_t>(i) * size_of(dtype);
    if (dtype == DType::kF32) {
      float v;
      std::memcpy(&v, from, 4);
      return v;
    }
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return dtype == DType::kBF16 ? to_float(bf16{bits}) : to_float(f16{bits});
  }
  int32_t id(int64_t i) const {
    int32_t v;
    std::memcpy(&v, bytes.data() + i * 4, 4);
    return v;
  }
  std::vector<int32_t> ids() const {
    std::vector<int32_t> all(count());
    for (size_t i = 0; i < all.size(); i++) all[i] = id(i);
    return all;
  }
  operator Tensor() {
    static char nothing[64];
    return {bytes.empty() ? static_cast<void*>(nothing) : bytes.data(), dtype, static_cast<int64_t>(count())};
  }
};

inline double tolerance(DType dtype) { return dtype == DType::kF32 ? 2e-5 : dtype == DType::kF16 ? 2e-3 : 1.6e-2; }

inline bool close(double a, double b, double limit) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::abs(a - b) <= limit * std::max(1.0, std::abs(b));
}

// `slack`: how many roundings to the narrow dtype lie behind a value.
inline void check_close(const Data& got, const std::vector<double>& expected, const std::string& what,
                        double slack = 1) {
  size_t bad = got.count() == expected.size() ? expected.size() : 0;
  for (size_t i = 0; i < expected.size() && bad == expected.size(); i++) {
    if (!close(got.at(i), expected[i], slack * tolerance(got.dtype))) bad = i;
  }
  const bool good = got.count() == expected.size() && bad == expected.size();
  check(good, what + (good ? ""
                           : " at " + std::to_string(bad) + ": " + std::to_string(got.at(bad)) + " for " +
                                 std::to_string(expected[bad])));
}

inline const Kernels* kernels = usable_kernels().front();  // of the instruction set that is tested

inline CpuBackend& backend(int threads) {
  static std::map<std::pair<const Kernels*, int>, std::unique_ptr<CpuBackend>> all;
  auto& found = all[{kernels, threads}];
  if (found == nullptr) found = std::make_unique<CpuBackend>(threads, CpuBackend::kScratchBudget, *kernels);
  return *found;
}

inline void ok(const Status& status) { check(status.ok(), "status: " + status.text); }

// The tests, one file per subject; those from test_conversions on are run for every instruction set.
void test_handles();
void test_faults();
void test_pool();
void test_queue();
void test_allocator();
void test_conversions();
void test_gate_steps();
void test_gate_golden();
void test_gate_special();
void test_gate_mapping();
void test_gate_random();
void test_gate_grouped();
void test_router();
void test_dispatch();
void test_layers();
void test_shared();
void test_pieces();
void test_pack();

}  // namespace moe::testing
