// The CPU backend without Node: pool, queue, allocator, and every kernel against plain loops in double. Small shapes,
// odd sizes, NaN rows; meant to run under the sanitizers (run.sh).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <future>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../../csrc/binding/buffers.h"
#include "../../csrc/binding/task.h"
#include "../../csrc/common/float_formats.h"
#include "../../csrc/cpu/backend.h"
#include "../../csrc/cpu/experts_layout.h"

namespace {

using namespace moe;

int passed = 0, failed = 0;
std::string current;

void check(bool condition, const std::string& what) {
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

double tolerance(DType dtype) { return dtype == DType::kF32 ? 2e-5 : dtype == DType::kF16 ? 2e-3 : 1.6e-2; }

bool close(double a, double b, double limit) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::abs(a - b) <= limit * std::max(1.0, std::abs(b));
}

// `slack`: how many roundings to the narrow dtype lie behind a value.
void check_close(const Data& got, const std::vector<double>& expected, const std::string& what, double slack = 1) {
  size_t bad = got.count() == expected.size() ? expected.size() : 0;
  for (size_t i = 0; i < expected.size() && bad == expected.size(); i++) {
    if (!close(got.at(i), expected[i], slack * tolerance(got.dtype))) bad = i;
  }
  const bool good = got.count() == expected.size() && bad == expected.size();
  check(good, what + (good ? ""
                           : " at " + std::to_string(bad) + ": " + std::to_string(got.at(bad)) + " for " +
                                 std::to_string(expected[bad])));
}

const Kernels* kernels = usable_kernels().front();  // of the instruction set that is tested

CpuBackend& backend(int threads) {
  static std::map<std::pair<const Kernels*, int>, std::unique_ptr<CpuBackend>> all;
  auto& found = all[{kernels, threads}];
  if (found == nullptr) found = std::make_unique<CpuBackend>(threads, CpuBackend::kScratchBudget, *kernels);
  return *found;
}

void ok(const Status& status) { check(status.ok(), "status: " + status.text); }

// --- pool, queue, allocator -----------------------------------------------------------------------------------------

void test_pool() {
  current = "pool";
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 7, 1000}) {
      std::vector<int> seen(static_cast<size_t>(n));
      std::atomic<bool> lanes_fit{true};
      for (int repeat = 0; repeat < 20; repeat++) {
        pool.parallel_for(n, 3, [&](int64_t begin, int64_t end) {
          if (ThreadPool::lane() < 0 || ThreadPool::lane() >= threads || end - begin > 3) lanes_fit = false;
          for (int64_t i = begin; i < end; i++) seen[static_cast<size_t>(i)]++;
        });
      }
      check(std::all_of(seen.begin(), seen.end(), [](int s) { return s == 20; }), "every item once per loop");
      check(lanes_fit, "lanes and grain");
    }
    std::atomic<int> inner{0};
    pool.parallel_for(4, 1, [&](int64_t, int64_t) {
      pool.parallel_for(10, 1, [&](int64_t begin, int64_t end) { inner += static_cast<int>(end - begin); });
    });
    check(inner == 40, "nested loops");

    std::atomic<int> two_callers{0};
    const auto loop = [&] {
      for (int i = 0; i < 50; i++) pool.parallel_for(16, 1, [&](int64_t, int64_t) { two_callers++; });
    };
    std::thread other(loop);
    loop();
    other.join();
    check(two_callers == 1600, "two callers at once");

    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the workers sleep by now
    std::atomic<int> after{0};
    pool.parallel_for(8, 1, [&](int64_t, int64_t) { after++; });
    check(after == 8, "wakes sleeping workers");
    std::atomic<int> ran{0};
    pool.parallel_for(100000, 1, [&](int64_t, int64_t) {
      if (ran++ == 10) pool.cancel();
    });
    check(ran < 100000 && pool.cancelled(), "cancelled");
    pool.stop();
    pool.stop();
  }
  ThreadPool stopped(4);
  stopped.stop();
  int ran = 0;
  stopped.parallel_for(8, 1, [&](int64_t, int64_t) { ran++; });
  check(ran == 8, "runs on the caller after stop");
}

void test_queue() {
  current = "queue";
  CpuBackend b(2);
  ok(b.wait());
  std::vector<int> order;
  std::atomic<int> notified{0};
  for (int i = 0; i < 200; i++) {
    b.submit([&order, i] { order.push_back(i); });
    if (i % 50 == 49) b.notify([&, i](Status s) { notified += s.ok() && order.size() == static_cast<size_t>(i) + 1; });
  }
  ok(b.wait());
  check(order.size() == 200 && std::is_sorted(order.begin(), order.end()), "in order");
  check(notified == 4, "notified after what came before");
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  std::promise<bool> done;
  b.notify([&](Status s) { done.set_value(s.ok()); });
  check(done.get_future().get(), "wakes a sleeping queue");

  // stop() with work pending: the running piece ends early, the rest is destroyed unrun
  auto alive = std::make_shared<int>(0);
  std::atomic<int> begun{0};
  std::atomic<bool> stopped_early{false};
  Status inside;
  b.submit([&, alive] {
    begun++;
    const auto piece = [](int64_t, int64_t) { std::this_thread::sleep_for(std::chrono::microseconds(200)); };
    b.pool().parallel_for(1000000, 1, piece);
    stopped_early = b.pool().cancelled();
    inside = b.finished();
  });
  for (int i = 0; i < 10; i++) b.submit([&, alive] { begun++; });
  b.notify([&, alive](Status) { begun++; });
  check(alive.use_count() == 13 || begun == 1, "queued work holds what it needs");
  while (begun == 0) std::this_thread::yield();
  b.stop();
  check(begun == 1 && alive.use_count() == 1, "queued work abandoned and destroyed");
  check(stopped_early && inside.code == Code::kAborted, "running work stopped early");
  b.submit([&, alive] { begun++; });
  b.notify([&, alive](Status) { begun++; });
  check(alive.use_count() == 1 && begun == 1, "nothing runs after stop");
  check(b.wait().code == Code::kOk || b.wait().code == Code::kAborted, "wait after stop returns");
  b.stop();

  CpuBackend never_used(4);
  never_used.stop();
  CpuBackend throwing(1);
  throwing.submit([] { throw std::runtime_error("lost"); });
  check(throwing.wait().code == Code::kInternal, "an exception is noticed");
}

void test_allocator() {
  current = "allocator";
  for (size_t bytes :
       {size_t{0}, size_t{1}, size_t{64}, size_t{65}, size_t{256}, size_t{257}, size_t{320}, size_t{321}, size_t{1000},
        size_t{1} << 20, (size_t{1} << 20) + 1, size_t{64} << 20, (size_t{64} << 20) + 1}) {
    const size_t block = Allocator::block_size(bytes);
    check(block >= bytes && block % 64 == 0 && block >= 64, "block of " + std::to_string(bytes));
    check(bytes < 256 || block <= bytes + bytes / 4 + 64, "waste of " + std::to_string(bytes));
  }
  CpuBackend b(2);
  std::map<void*, size_t> live;
  Random r(5);
  for (int i = 0; i < 4000; i++) {
    if (r.below(2) == 0 || live.empty()) {
      const size_t bytes = static_cast<size_t>(r.below(5)) << r.below(20);
      void* data = nullptr;
      ok(b.allocate(bytes, &data));
      check(data != nullptr && reinterpret_cast<uintptr_t>(data) % 64 == 0 && live.count(data) == 0, "block");
      std::memset(data, 0xab, bytes);
      live[data] = bytes;
    } else {
      auto it = std::next(live.begin(), r.below(static_cast<int>(live.size())));
      std::thread releasing([&] { b.release(it->first, it->second); });
      releasing.join();
      live.erase(it);
    }
  }
  size_t used = 0;
  for (const auto& [data, bytes] : live) used += bytes;
  check(b.memory().used == used && b.memory().reserved >= used, "used is what live tensors hold");
  for (const auto& [data, bytes] : live) b.release(data, bytes);
  check(b.memory().used == 0, "nothing used in the end");
  check(b.memory().reserved <= Allocator::kMostKept, "bounded retention");

  void *first = nullptr, *second = nullptr;
  ok(b.allocate(100000, &first));
  b.release(first, 100000);
  ok(b.allocate(99000, &second));
  check(first == second, "a block is used again");
  b.release(second, 99000);

  CpuBackend fresh(1);
  for (int i = 0; i < 40; i++) {  // far more than may be kept
    const size_t bytes = (size_t{1} << 20) << i % 2;
    std::vector<void*> blocks(i % 2 == 0 ? 16 : 8);
    for (void*& block : blocks) ok(fresh.allocate(bytes, &block));
    for (void* block : blocks) fresh.release(block, bytes);
  }
  check(fresh.memory().reserved <= size_t{17} << 20, "retention follows the peak");
  void *large = nullptr, *again = nullptr;
  ok(fresh.allocate(size_t{48} << 20, &large));
  fresh.release(large, size_t{48} << 20);
  ok(fresh.allocate(size_t{48} << 20, &again));
  check(large == again, "a block that was all of the peak is used again");
  fresh.release(again, size_t{48} << 20);
  check(fresh.memory().reserved <= size_t{49} << 20, "no more is kept than there was at once");

  void* none = nullptr;
  for (size_t bytes : {size_t{1} << 50, std::numeric_limits<size_t>::max()}) {
    const Status status = b.allocate(bytes, &none);
    check(status.code == Code::kOutOfMemory && none == nullptr, "absurd size refused");
    check(status.text.starts_with("requested " + std::to_string(bytes) + " bytes, ") &&
              status.text.ends_with(" bytes available"),
          "text: " + status.text);
  }
  ExpertsLayout huge{65536, int64_t{1} << 31, int64_t{1} << 30, DType::kF32, true, {}};
  check(b.allocate(b.expert_bytes(huge), &none).code == Code::kOutOfMemory, "experts beyond 64 bits of bytes");
  {
    Workspace workspace(b);
    float* scratch = nullptr;
    check(workspace.take(int64_t{1} << 48, &scratch).code == Code::kOutOfMemory, "scratch out of memory");
    for (int i = 0; i < 3; i++) {
      ok(workspace.take(100000, &scratch));
      std::fill_n(scratch, 100000, 1.0f);
    }
  }
  check(b.memory().used == 0, "scratch is not used memory");
  const Probe probe = probe_backend();
  check(probe.state == "ready" && probe.devices.size() == 1 && !probe.devices[0].empty(), "probe");
  std::unique_ptr<Backend> made;
  ok(create_backend({}, &made));
  check(create_backend({1, 0, {}}, &made).code == Code::kInvalidArg, "there is no second CPU");
  check(create_backend({0, 1, "mmx"}, &made).code == Code::kUnsupported, "nobody has kernels for MMX");
  check(create_backend({0, 1, "scalar"}, &made).ok(), "every processor runs the portable kernels");
  const std::vector<char> from(3000000, 'x');
  std::vector<char> to(from.size());
  ok(b.copy_in(to.data(), from.data(), from.size()));
  check(to == from, "copies");
  ok(b.fill_zero(to.data(), to.size()));
  check(to == std::vector<char>(from.size()), "zeroes");
}

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

// --- gate -----------------------------------------------------------------------------------------------------------

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

// --- experts --------------------------------------------------------------------------------------------------------

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

std::vector<double> row_of(const Data& data, int64_t row, int64_t width) {
  std::vector<double> x;
  for (int64_t h = 0; h < width; h++) x.push_back(data.at(row * width + h));
  return x;
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

struct Routing {
  int64_t T, C, P, blocks;
  Data ids, order{DType::kI32, 0}, inverse{DType::kI32, 0}, counts{DType::kI32, 0}, offsets{DType::kI32, 0};
  Data block_experts{DType::kI32, 0}, rows{DType::kF32, 0};
};

Routing dispatch(int64_t T, int64_t C, std::vector<int32_t> ids, int experts, int first, int block, Data* hidden,
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

void test_dispatch() {
  current = "dispatch";
  const Routing doc = dispatch(4, 3, {2, 3, 4, 1, 2, 4, 1, 3, 4, 1, 2, 3}, 5, 0, 4, nullptr, 0);
  const std::vector<int32_t> sorted = {3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12};
  const std::vector<int32_t> order = doc.order.ids();
  check(std::equal(sorted.begin(), sorted.end(), order.begin()) &&
            std::all_of(order.begin() + 16, order.end(), [](int32_t i) { return i == 12; }),
        "vLLM's example");
  check(doc.offsets.ids() == std::vector<int32_t>({0, 0, 4, 8, 12, 16}), "offsets");
  const std::vector<int32_t> blocks = doc.block_experts.ids();
  check(std::vector<int32_t>(blocks.begin(), blocks.begin() + 4) == std::vector<int32_t>({1, 2, 3, 4}) &&
            std::all_of(blocks.begin() + 4, blocks.end(), [](int32_t e) { return e == -1; }),
        "blocks");

  Random r(3);
  for (int round = 0; round < 60; round++) {
    const bool large = round >= 57;
    const int64_t T = large ? 40000 : r.below(30), C = 1 + r.below(5), H = 1 + r.below(9);
    const int experts = 1 + r.below(12), first = r.below(4), block = r.below(2) == 0 ? 0 : 1 + r.below(8);
    std::vector<int32_t> ids(T * C);
    for (int32_t& id : ids) id = r.below(20) == 0 ? std::numeric_limits<int32_t>::min() : r.below(experts + 6) - 1;
    Data hidden = Data::random(kFloatTypes[r.below(3)], T * H, 4);
    const Routing got = dispatch(T, C, ids, experts, first, block, &hidden, H, 1 + r.below(3));
    std::vector<int32_t> expected_order(got.P, static_cast<int32_t>(T * C)), inverse(ids.size(), -1);
    size_t place = 0;
    bool right = true;
    for (int e = 0; e < experts; e++) {
      right &= got.offsets.id(e) == static_cast<int32_t>(place);
      const size_t begin = place;
      for (size_t i = 0; i < ids.size(); i++) {
        if (ids[i] != first + e) continue;
        expected_order[place] = static_cast<int32_t>(i);
        inverse[i] = static_cast<int32_t>(place++);
      }
      right &= got.counts.id(e) == static_cast<int32_t>(place - begin);
      while (block > 0 && place % static_cast<size_t>(block) != 0) place++;
      for (size_t b = begin; block > 0 && b < place; b += static_cast<size_t>(block)) {
        right &= got.block_experts.id(b / static_cast<size_t>(block)) == e;
      }
    }
    for (size_t b = place; block > 0 && b < static_cast<size_t>(got.P); b += static_cast<size_t>(block)) {
      right &= got.block_experts.id(b / static_cast<size_t>(block)) == -1;
    }
    right &= got.offsets.id(experts) == static_cast<int32_t>(place);
    check(right, "counts, offsets, blocks");
    check(got.order.ids() == expected_order && got.inverse.ids() == inverse, "order and inverse");
    bool rows_right = true;
    for (size_t at = 0; at < expected_order.size(); at++) {
      for (int64_t h = 0; h < H; h++) {
        const int64_t token = expected_order[at] / C;
        const float expected = expected_order[at] == T * C ? 0 : hidden.at(token * H + h);
        rows_right &= got.rows.at(at * static_cast<size_t>(H) + static_cast<size_t>(h)) == expected;
      }
    }
    check(rows_right, "rows");
  }
}

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

void test_pack() {
  Random r(8);
  for (int round = 0; round < 72; round++) {
    current = "pack round " + std::to_string(round);
    const DType from = kFloatTypes[round % 3], to = kFloatTypes[round / 3 % 3];
    const bool interleaved = round / 9 % 2 == 1, transposed = round / 18 % 2 == 1, large = round >= 36;
    const int64_t S = 3, count = 2, H = large ? 70 : 1 + r.below(5), I = large ? 45 : 1 + r.below(5);
    Layer layer(S, H, I, to, true, {}, 4);
    const std::vector<char> before = layer.packed;
    Data w13 = Data::random(from, count * 2 * I * H, 1), w2 = Data::random(from, count * H * I, 2);
    Data b13 = Data::random(from, round % 2 == 0 ? count * 2 * I : 0, 3);
    Data b2 = Data::random(from, count * H, 4);
    layer.pack(w13, w2, b13, b2, interleaved ? GateUp::kInterleaved : GateUp::kHalves, transposed, 1, count);
    const auto value = [&](const char* data, int64_t i) {
      Data one(to, 1);
      std::memcpy(one.bytes.data(), data + static_cast<size_t>(i) * size_of(to), size_of(to));
      return one.at(0);
    };
    const char* data = static_cast<const char*>(layer.experts.data);
    const ExpertsView view(layer.experts);
    const auto place = [&](int64_t k, int64_t column) {
      return k * kPanel + (size_of(to) == 4 ? column : 2 * (column % kHalf) + column / kHalf);
    };
    bool right = true;
    for (int64_t e = 0; e < count; e++) {
      for (int64_t row = 0; row < 2 * I; row++) {
        const int64_t source = !interleaved ? row : row < I ? 2 * row : 2 * (row - I) + 1;
        const int64_t i = row % I, column = row / I * kHalf + i % kHalf;
        const char* panel = static_cast<const char*>(view.w13(e + 1, i / kHalf));
        for (int64_t h = 0; h < H; h++) {
          const int64_t index = e * 2 * I * H + (transposed ? h * 2 * I + source : source * H + h);
          right &= value(panel, place(h, column)) == Data::floats(to, {w13.at(index)}).at(0);
        }
        const float bias = b13.count() > 0 ? b13.at(e * 2 * I + source) : 0;
        right &= view.b13(e + 1, i / kHalf)[column] == bias;
      }
      for (int64_t h = 0; h < panels2(layer.experts.layout) * kPanel; h++) {
        const char* panel = static_cast<const char*>(view.w2(e + 1, h / kPanel));
        for (int64_t i = 0; i < I; i++) {
          const int64_t index = e * H * I + (transposed ? i * H + h : h * I + i);
          const float expected = h < H ? Data::floats(to, {w2.at(index)}).at(0) : 0;
          right &= value(panel, place(i, h % kPanel)) == expected;
        }
        right &= view.b2(e + 1, 0)[h] == (h < H ? b2.at(e * H + h) : 0);
      }
    }
    check(right, "packed values");
    const auto start = static_cast<size_t>(data - layer.packed.data());
    const auto slot = static_cast<size_t>(static_cast<const char*>(view.w13(1, 0)) - data);
    check(std::memcmp(before.data() + start, data, slot) == 0, "other slots untouched");
  }
}

void test_handles() {
  HandleTable<int, 4> table;  // slots that wear out after three uses
  std::vector<double> seen;
  for (int i = 0; i < 1000; i++) {
    const double handle = table.add(std::make_shared<int>(i));
    const std::shared_ptr<int>* found = table.find(handle);
    check(found != nullptr && **found == i, "a handle finds its object, however often slots were used");
    check(std::find(seen.begin(), seen.end(), handle) == seen.end(), "a handle is never given out twice");
    seen.push_back(handle);
    check(table.remove(handle) != nullptr && table.find(handle) == nullptr, "a removed handle finds nothing");
  }
  for (const double forged : {0.0, -1.0, 0.5, 1e300, std::numeric_limits<double>::quiet_NaN(), 9007199254740992.0}) {
    check(table.find(forged) == nullptr, "an invented handle finds nothing");
  }
}

void test_faults() {
  const auto fault = [](const char* op) { return std::make_shared<const Fault>(Fault{Status{}, op}); };
  FaultLog log;
  const auto first = fault("first"), second = fault("second");
  log.add(first);
  log.add(second);
  log.reported(first);
  check(log.take() == second, "a failure that was told of does not hide the next");
  check(log.take() == nullptr, "a failure is told once");
}

}  // namespace

int main() {
  test_handles();
  test_faults();
  test_pool();
  test_queue();
  test_allocator();
  for (const Kernels* each : usable_kernels()) {
    std::printf("-- %s\n", each->name);
    kernels = each;
    test_conversions();
    test_gate_golden();
    test_gate_special();
    test_gate_mapping();
    test_gate_random();
    test_gate_grouped();
    test_router();
    test_dispatch();
    test_layers();
    test_shared();
    test_pieces();
    test_pack();
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
