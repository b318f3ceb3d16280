// Checks the CUDA moe_dispatch against the CPU kernel, and times it. NOTES.md has the command lines.
//   dispatch_bench check [dry] | dispatch_bench time [dry] | dispatch_bench sanitize
#include <memory>

#include "../../csrc/backend.h"
#include "../../csrc/cuda/moe_dispatch.cuh"
#include "../../csrc/cuda/programmatic.cuh"
#include "harness.cuh"

using namespace moe;

namespace {

std::unique_ptr<Backend> cpu_backend;
int failures = 0, cases = 0;
const char* const chain_names[] = {"default", "plain", "overlapped", "cooperative", "cluster"};

enum class Routing { kUniform, kOne, kRemote, kSkewed, kNone };

int64_t capacity(int64_t choices, int experts, int block) {
  if (block == 0) return choices;
  const int64_t worst = std::min<int64_t>(choices + int64_t{experts} * (block - 1), choices * block);
  return (worst + block - 1) / block * block;
}

std::vector<int32_t> route(int64_t T, int C, int experts, int first, Routing routing, Random& random) {
  std::vector<int32_t> ids(T * C);
  for (int64_t i = 0; i < T * C; i++) {
    const int column = static_cast<int>(i % C);
    int64_t e = static_cast<int64_t>(random.next() % experts);
    if (routing == Routing::kUniform && column == C - 1 && C == 9) e = experts - 1;
    if (routing == Routing::kOne) e = experts / 2;
    if (routing == Routing::kRemote) e = static_cast<int64_t>(random.next() % (4 * experts)) - experts - 3;
    if (routing == Routing::kSkewed && random.uniform() < 0.7) e = e % 3;
    if (routing == Routing::kNone) e = -1 - first;
    ids[i] = static_cast<int32_t>(std::max<int64_t>(e + first, -5));
  }
  return ids;
}

// The worst that may stand before a dispatch: lets it start at once, is slow, still reads what the dispatch will write
// over (poison), and writes what it will read at the very end.
struct Late {
  const uint8_t* from[2];
  uint8_t* to[2];
  int64_t bytes[2];
  const uint8_t* outputs[6];
  int64_t output_bytes[6];
  int32_t* early_writes;
};
__global__ void late_kernel(const __grid_constant__ Late a) {
  let_next_kernel_start();
  const long long begin = clock64();
  while (clock64() - begin < 8000) {
  }
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x,
                threads = gridDim.x * static_cast<int64_t>(blockDim.x);
  for (int k = 0; k < 6; k++) {
    for (int64_t i = thread; i < a.output_bytes[k]; i += threads) {
      if (a.outputs[k][i] != 0xa5) atomicAdd(a.early_writes, 1);
    }
  }
  for (int k = 0; k < 2; k++) {
    for (int64_t i = thread; i < a.bytes[k]; i += threads) a.to[k][i] = a.from[k][i];
  }
}

void check(int64_t T, int C, int experts, int first, int block, int64_t H, DType dtype, Routing routing) {
  Random random(T * 7 + C * 3 + experts + block);
  const std::vector<int32_t> ids = route(T, C, experts, first, routing, random);
  const int64_t P = capacity(T * C, experts, block), blocks = block > 0 ? P / block : 0;
  const size_t row_bytes = H * size_of(dtype);
  std::vector<uint8_t> hidden(T * row_bytes);
  for (auto& byte : hidden) byte = static_cast<uint8_t>(random.next());
  struct Outputs {
    std::vector<int32_t> order, inverse, counts, offsets, block_experts;
    std::vector<uint8_t> rows;
  };
  const auto make = [&] {
    return Outputs{std::vector<int32_t>(P),       std::vector<int32_t>(T * C),
                   std::vector<int32_t>(experts), std::vector<int32_t>(experts + 1),
                   std::vector<int32_t>(blocks),  std::vector<uint8_t>(P * row_bytes)};
  };
  MoeDispatch p{};
  p.T = T, p.C = C, p.H = H, p.P = P, p.blocks = blocks, p.experts = experts, p.first_expert = first,
  p.block_size = block;
  static int32_t nothing[16];
  const auto at = [](auto& v) { return v.empty() ? static_cast<void*>(nothing) : static_cast<void*>(v.data()); };
  Outputs want = make();
  MoeDispatch r = p;
  r.ids = {at(const_cast<std::vector<int32_t>&>(ids)), DType::kI32, T * C};
  r.order = {at(want.order), DType::kI32, P}, r.inverse = {at(want.inverse), DType::kI32, T * C};
  r.counts = {at(want.counts), DType::kI32, experts}, r.offsets = {at(want.offsets), DType::kI32, experts + 1};
  if (block > 0) r.block_experts = {at(want.block_experts), DType::kI32, blocks};
  if (H > 0) r.hidden = {at(hidden), dtype, T * H}, r.rows = {at(want.rows), dtype, P * H};
  const Status status = moe_dispatch(*cpu_backend, r);
  if (!status.ok()) {
    std::printf("CPU: %s\n", status.text.c_str());
    std::exit(1);
  }
  Buffer ids_from(T * C * 4), hidden_from(hidden.size()), early_writes(4);
  ids_from.put(ids.data(), T * C * 4);
  hidden_from.put(hidden.data(), hidden.size());
  Buffer ids_d(T * C * 4), hidden_d(hidden.size()), order(P * 4), inverse(T * C * 4), counts(experts * 4),
      offsets(experts * 4 + 4), block_experts(blocks * 4), rows(P * row_bytes);
  ids_d.put(ids.data(), T * C * 4);
  hidden_d.put(hidden.data(), hidden.size());
  MoeDispatch d = p;
  d.ids = {ids_d.data, DType::kI32, T * C};
  d.order = {order.data, DType::kI32, P}, d.inverse = {inverse.data, DType::kI32, T * C};
  d.counts = {counts.data, DType::kI32, experts}, d.offsets = {offsets.data, DType::kI32, experts + 1};
  if (block > 0) d.block_experts = {block_experts.data, DType::kI32, blocks};
  if (H > 0) d.hidden = {hidden_d.data, dtype, T * H}, d.rows = {rows.data, dtype, P * H};
  Buffer scratch(dispatch::scratch_bytes(d, 132, dispatch::Chain::kPlain));  // the most that any chain needs
  static cudaStream_t stream = nullptr;  // not the default stream, where nothing overlaps
  if (!dry && stream == nullptr) CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (int chain = 0; chain < 5; chain++) {
    order.poison(), inverse.poison(), counts.poison(), offsets.poison(), block_experts.poison(), rows.poison(),
        scratch.poison();
    const char* path = "";
    int32_t early = 0;
    early_writes.put(&early, 4);
    if (dry) {
      const Status s = moe_dispatch(*cpu_backend, d);
      if (!s.ok()) std::exit(1);
    } else {
      ids_d.poison(), hidden_d.poison();
      Late late{};
      const auto bytes = [](const Buffer& b) { return static_cast<uint8_t*>(b.data); };
      const Buffer* const outputs[] = {&order, &inverse, &counts, &offsets, &block_experts, &rows};
      for (int k = 0; k < 6; k++)
        late.outputs[k] = bytes(*outputs[k]), late.output_bytes[k] = static_cast<int64_t>(outputs[k]->bytes);
      late.from[0] = bytes(ids_from), late.to[0] = bytes(ids_d), late.bytes[0] = T * C * 4;
      late.from[1] = bytes(hidden_from), late.to[1] = bytes(hidden_d),
      late.bytes[1] = static_cast<int64_t>(hidden.size());
      late.early_writes = static_cast<int32_t*>(early_writes.data);
      CHECK(cudaDeviceSynchronize());
      late_kernel<<<32, 256, 0, stream>>>(late);
      CHECK(dispatch::launch(d, 132, scratch.data, stream, &path, static_cast<dispatch::Chain>(chain)));
      CHECK(cudaDeviceSynchronize());
    }
    Outputs got = make();
    order.get(got.order.data(), P * 4), inverse.get(got.inverse.data(), T * C * 4),
        counts.get(got.counts.data(), experts * 4);
    offsets.get(got.offsets.data(), experts * 4 + 4), block_experts.get(got.block_experts.data(), blocks * 4),
        rows.get(got.rows.data(), P * row_bytes);
    early_writes.get(&early, 4);
    cases++;
    if (early == 0 && got.order == want.order && got.inverse == want.inverse && got.counts == want.counts &&
        got.offsets == want.offsets && got.block_experts == want.block_experts && got.rows == want.rows) {
      continue;
    }
    failures++;
    std::printf(
        "FAIL T=%lld C=%d experts=%d first=%d block=%d H=%lld routing=%d chain=%s (%s): order %d inverse %d counts %d "
        "offsets %d blocks %d rows %d, %d bytes too early\n",
        static_cast<long long>(T), C, experts, first, block, static_cast<long long>(H), static_cast<int>(routing),
        chain_names[chain], path, got.order == want.order, got.inverse == want.inverse, got.counts == want.counts,
        got.offsets == want.offsets, got.block_experts == want.block_experts, got.rows == want.rows, early);
  }
}

void run_checks(bool small) {
  const std::vector<int64_t> batches =
      small ? std::vector<int64_t>{3, 33, 600}
            : std::vector<int64_t>{0, 1, 2, 31, 32, 33, 127, 455, 456, 511, 512, 513, 4097, 40000};
  for (const int64_t T : batches) {
    if (dry && T > 600) continue;
    for (const Routing routing : small ? std::vector<Routing>{Routing::kUniform, Routing::kRemote}
                                       : std::vector<Routing>{Routing::kUniform, Routing::kOne, Routing::kRemote,
                                                              Routing::kSkewed, Routing::kNone}) {
      const int64_t H = T <= 600 ? 40 : 0;
      check(T, 9, 257, 0, 128, H, DType::kBF16, routing);
      check(T, 9, 257, 0, 0, H, DType::kF32, routing);
      check(T, 8, 32, 64, 16, H, DType::kBF16, routing);
      check(T, 1, 1, 0, 1, 7, DType::kBF16, routing);
      check(T, 2, 1024, 5, 64, 0, DType::kF32, routing);
      if (!small || T < 600) check(T, 6, 4096, 0, 8, 0, DType::kF32, routing);  // too slow under the sanitizer
      if (T <= (small ? 100 : 5000)) check(T, 3, 5000, 7, 4, 6, DType::kF16, routing);
    }
  }
  if (!small && !dry) {
    check(131072, 9, 257, 0, 128, 0, DType::kF32, Routing::kUniform);
    check(4096, 9, 257, 0, 128, 512, DType::kBF16, Routing::kUniform);
    check(300, 40, 257, 0, 0, 2050, DType::kBF16, Routing::kSkewed);
  }
  std::printf("checks: %d cases, %d failed\n", cases, failures);
}

struct Set {
  Buffer ids, hidden, order, inverse, counts, offsets, block_experts, rows, scratch;
};

void time_case(Timer& timer, int64_t T, int C, int experts, int block, int64_t H, double copy, double empty) {
  const int rotations = H > 0 ? 4 : 40;
  const int64_t P = capacity(T * C, experts, block), blocks = block > 0 ? P / block : 0;
  std::vector<Set> sets;
  MoeDispatch p{};
  p.T = T, p.C = C, p.H = H, p.P = P, p.blocks = blocks, p.experts = experts, p.block_size = block;
  for (int i = 0; i < rotations; i++) {
    Random random(i + 1);
    const std::vector<int32_t> ids = route(T, C, experts, 0, Routing::kUniform, random);
    sets.push_back({Buffer(T * C * 4), Buffer(T * H * 2), Buffer(P * 4), Buffer(T * C * 4), Buffer(experts * 4),
                    Buffer(experts * 4 + 4), Buffer(blocks * 4), Buffer(P * H * 2), Buffer(1 << 20)});
    sets[i].ids.put(ids.data(), T * C * 4);
    if (!dry && H > 0) CHECK(cudaMemset(sets[i].hidden.data, 17 + i, T * H * 2));
  }
  const double bytes = 4.0 * (2 * T * C + P + blocks + 2 * experts) + (H > 0 ? 2.0 * H * (T + P) : 0);
  const double floor = std::max(empty, bytes / copy * 1e-6);
  std::printf("dispatch %d experts %d columns block %-4d H %-5lld %7lld | floor %7.2f |", experts, C, block,
              static_cast<long long>(H), static_cast<long long>(T), floor);
  for (int chain = 0; chain < 5; chain++) {
    const char* path = "";
    const double us = timer.graph(rotations, [&](int i) {
      MoeDispatch d = p;
      Set& s = sets[i];
      d.ids = {s.ids.data, DType::kI32, T * C};
      d.order = {s.order.data, DType::kI32, P}, d.inverse = {s.inverse.data, DType::kI32, T * C};
      d.counts = {s.counts.data, DType::kI32, experts}, d.offsets = {s.offsets.data, DType::kI32, experts + 1};
      if (block > 0) d.block_experts = {s.block_experts.data, DType::kI32, blocks};
      if (H > 0) d.hidden = {s.hidden.data, DType::kBF16, T * H}, d.rows = {s.rows.data, DType::kBF16, P * H};
      if (dispatch::scratch_bytes(d, 132, dispatch::Chain::kPlain) > s.scratch.bytes) std::exit(1);
      if (!dry)
        CHECK(dispatch::launch(d, 132, s.scratch.data, timer.stream, &path, static_cast<dispatch::Chain>(chain)));
    });
    std::printf(" %s: %7.2f (%.2f)", chain_names[chain], us, us / floor);
  }
  std::printf("\n");
  std::fflush(stdout);
}

void run_times() {
  Timer timer;
  double copy = 0, empty = 0;
  ceilings(timer, &copy, &empty);
  std::printf("copy %.2f TB/s, empty node %.2f us\n", copy, empty);
  for (const int64_t T : {1, 8, 64, 455, 512, 1024, 4096, 5000, 10000, 20000, 40000, 131072})
    time_case(timer, T, 9, 257, 128, 0, copy, empty);
  for (const int64_t T : {64, 4096, 40000}) time_case(timer, T, 9, 257, 0, 0, copy, empty);
  for (const int64_t T : {4096}) time_case(timer, T, 8, 256, 0, 0, copy, empty);
  for (const int64_t T : {64, 1024, 4096}) time_case(timer, T, 9, 257, 0, 7168, copy, empty);
  time_case(timer, 4096, 9, 257, 128, 7168, copy, empty);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  dry = argc > 2 && std::string(argv[2]) == "dry";
  const Status status = create_backend(ContextOptions{}, &cpu_backend);
  if (!status.ok()) {
    std::printf("%s\n", status.text.c_str());
    return 1;
  }
  if (mode == "check" || mode == "sanitize") run_checks(mode == "sanitize");
  if (mode == "time") run_times();
  if (mode == "profile") {
    for (const int64_t T : {64, 4096, 40000}) {
      Random random(1);
      const std::vector<int32_t> ids = route(T, 9, 257, 0, Routing::kUniform, random);
      const int64_t P = capacity(T * 9, 257, 128);
      Set s{Buffer(T * 36), Buffer(0),      Buffer(P * 4), Buffer(T * 36), Buffer(4096),
            Buffer(4096),   Buffer(P / 32), Buffer(0),     Buffer(1 << 20)};
      s.ids.put(ids.data(), T * 36);
      MoeDispatch d{};
      d.T = T, d.C = 9, d.P = P, d.blocks = P / 128, d.experts = 257, d.block_size = 128;
      d.ids = {s.ids.data, DType::kI32, T * 9}, d.order = {s.order.data, DType::kI32, P},
      d.inverse = {s.inverse.data, DType::kI32, T * 9};
      d.counts = {s.counts.data, DType::kI32, 257}, d.offsets = {s.offsets.data, DType::kI32, 258},
      d.block_experts = {s.block_experts.data, DType::kI32, P / 128};
      const char* path = "";
      CHECK(dispatch::launch(d, 132, s.scratch.data, nullptr, &path, dispatch::Chain::kPlain));
      CHECK(cudaDeviceSynchronize());
    }
  }
  return failures > 0;
}
