// Checks the CUDA moe_dispatch against the CPU kernel, and times it. NOTES.md has the command lines.
//   dispatch_bench check [dry] | time [dry | tokens [hidden]] | sanitize | profile [tokens [hidden]]
#include <memory>

#include "../../csrc/backend.h"
#include "../../csrc/cuda/moe_dispatch.cuh"
#include "../../csrc/cuda/programmatic.cuh"
#include "harness.cuh"

using namespace moe;

namespace {

std::unique_ptr<Backend> cpu_backend;
int failures = 0, cases = 0;
bool small = false;  // for the sanitizer: fewer shapes, and each path once
const char* const chain_names[] = {"default", "plain", "overlapped", "cooperative", "clusters"};

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
    if (small && chain > (T * C <= 1024 ? 1 : 3)) break;  // these take what the default takes
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

void run_checks() {
  const std::vector<int64_t> batches =
      small ? std::vector<int64_t>{3, 33, 600}
            : std::vector<int64_t>{0, 1, 2, 31, 32, 33, 127, 455, 456, 511, 512, 513, 4097, 40000};
  for (const int64_t T : batches) {
    if (dry && T > 600) continue;
    for (const Routing routing : small ? std::vector<Routing>{T < 600 ? Routing::kUniform : Routing::kRemote}
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
    check(3300, 3, 257, 0, 0, 2048, DType::kBF16, Routing::kRemote);
    check(3300, 2, 32, 0, 0, 7168, DType::kBF16, Routing::kUniform);
  }
  if (!dry) check(3168, 2, 32, 0, 0, 2048, DType::kBF16, Routing::kRemote);
  std::printf("checks: %d cases, %d failed\n", cases, failures);
}

struct Set {
  Buffer ids, hidden, order, inverse, counts, offsets, block_experts, rows, scratch;
};

Set make_set(const MoeDispatch& p, uint64_t seed) {
  Random random(seed);
  const std::vector<int32_t> ids = route(p.T, static_cast<int>(p.C), p.experts, 0, Routing::kUniform, random);
  Set s{Buffer(p.T * p.C * 4), Buffer(p.T * p.H * 2), Buffer(p.P * 4),
        Buffer(p.T * p.C * 4), Buffer(p.experts * 4), Buffer(p.experts * 4 + 4),
        Buffer(p.blocks * 4),  Buffer(p.P * p.H * 2), Buffer(1 << 20)};
  s.ids.put(ids.data(), ids.size() * 4);
  if (!dry && p.H > 0) CHECK(cudaMemset(s.hidden.data, 17 + static_cast<int>(seed), p.T * p.H * 2));
  if (dispatch::scratch_bytes(p, 132, dispatch::Chain::kPlain) > s.scratch.bytes) std::exit(1);
  return s;
}

MoeDispatch shape(int64_t T, int C, int experts, int block, int64_t H) {
  MoeDispatch p{};
  p.T = T, p.C = C, p.H = H, p.P = capacity(T * C, experts, block), p.experts = experts, p.block_size = block;
  p.blocks = block > 0 ? p.P / block : 0;
  return p;
}

const char* launch(MoeDispatch p, const Set& s, cudaStream_t stream, dispatch::Chain chain) {
  p.ids = {s.ids.data, DType::kI32, p.T * p.C};
  p.order = {s.order.data, DType::kI32, p.P}, p.inverse = {s.inverse.data, DType::kI32, p.T * p.C};
  p.counts = {s.counts.data, DType::kI32, p.experts}, p.offsets = {s.offsets.data, DType::kI32, p.experts + 1};
  if (p.blocks > 0) p.block_experts = {s.block_experts.data, DType::kI32, p.blocks};
  if (p.H > 0) p.hidden = {s.hidden.data, DType::kBF16, p.T * p.H}, p.rows = {s.rows.data, DType::kBF16, p.P * p.H};
  const char* path = "";
  if (!dry) CHECK(dispatch::launch(p, 132, s.scratch.data, stream, &path, chain));
  return path;
}

void time_case(Timer& timer, int64_t T, int C, int experts, int block, int64_t H, double copy, double empty) {
  const int rotations = H > 0 ? 4 : 40;
  const MoeDispatch p = shape(T, C, experts, block, H);
  std::vector<Set> sets;
  for (int i = 0; i < rotations; i++) sets.push_back(make_set(p, i + 1));
  const double bytes = 4.0 * (2 * T * C + p.P + p.blocks + 2 * experts) + (H > 0 ? 2.0 * H * (T + p.P) : 0);
  const double floor = std::max(empty, bytes / copy * 1e-6);
  std::printf("dispatch %d experts %d columns block %-4d H %-5lld %7lld | floor %7.2f |", experts, C, block,
              static_cast<long long>(H), static_cast<long long>(T), floor);
  for (int chain = 0; chain < 5; chain++) {
    const double us =
        timer.graph(rotations, [&](int i) { launch(p, sets[i], timer.stream, static_cast<dispatch::Chain>(chain)); });
    std::printf(" %s: %7.2f (%.2f)", chain_names[chain], us, us / floor);
  }
  std::printf("\n");
  std::fflush(stdout);
}

// For ncu.
void profile(int64_t T, int64_t H) {
  const MoeDispatch p = shape(T, 9, 257, H > 0 ? 0 : 128, H);
  launch(p, make_set(p, 1), nullptr, dispatch::Chain::kDefault);
  if (!dry) CHECK(cudaDeviceSynchronize());
}

// Of everything, or of one batch, or of one batch with rows.
void run_times(int64_t tokens, int64_t hidden) {
  Timer timer;
  double copy = 0, empty = 0;
  ceilings(timer, &copy, &empty);
  std::printf("copy %.2f TB/s, empty node %.2f us\n", copy, empty);
  if (hidden > 0) return time_case(timer, tokens, 9, 257, 0, hidden, copy, empty);
  const auto time = [&](int64_t T, int C, int experts, int block, int64_t H) {
    if (tokens == 0 || T == tokens) time_case(timer, T, C, experts, block, H, copy, empty);
  };
  for (const int64_t T : {1, 8, 64, 455, 512, 1024, 2048, 4096, 5000, 10000, 20000, 40000, 131072})
    time(T, 9, 257, 128, 0);
  for (const int64_t T : {64, 4096, 40000}) time(T, 9, 257, 0, 0);
  time(4096, 8, 256, 0, 0);
  time(4096, 6, 4096, 8, 0);
  for (const int64_t T : {64, 1024, 4096}) time(T, 9, 257, 0, 7168);
  time(4096, 9, 257, 128, 7168);
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
  small = mode == "sanitize";
  if (mode == "check" || small) run_checks();
  if (mode == "time") run_times(argc > 2 ? std::atoll(argv[2]) : 0, argc > 3 ? std::atoll(argv[3]) : 0);
  if (mode == "profile") profile(argc > 2 ? std::atoll(argv[2]) : 4096, argc > 3 ? std::atoll(argv[3]) : 0);
  return failures > 0;
}
