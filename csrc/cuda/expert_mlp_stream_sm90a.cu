// The streaming expert MLP of Hopper: from ids to output in one kernel that reads the weights of the experts hit once,
// at the speed of memory. For few tokens.
//
// One block of threads per multiprocessor. Each plans for itself (expert_mlp_stream_plan.cuh), then one warp streams
// the tiles of its span of gate_up and of down through a ring of up to 208 KB, three warps gather rows, and eight
// multiply (mma.sync up to 32 rows an expert, wgmma above; weights are M, rows are N). Activations go through scratch;
// while the last of them are awaited the weights of down are arriving already. down goes through the experts block of
// rows by block of rows, so that a block's output is summed in shared memory, experts ascending, and rounded once.
//
// Order of sums: the steps of a span in order, the spans of a block in order, experts ascending, a token's repeats of
// one expert in column order, zero experts last. It depends on the ids and the number of multiprocessors alone. NaN and
// infinities take their course. Limits: stream_takes.
//
// Up to four tokens and 32 choices another kernel does the same (expert_mlp_stream_few_sm90a.cu).
//
// Blocks of threads wait for each other, so all of them must be resident at once: one fits a multiprocessor, and the
// call must have the device's multiprocessors to itself (CudaBackend::two_lanes).
#include <algorithm>

#include "expert_mlp_stream_consume.cuh"
#include "expert_mlp_stream_few.h"
#include "expert_mlp_stream_launch.cuh"
#include "expert_mlp_stream_plan.cuh"
#include "expert_mlp_stream_produce.cuh"

namespace moe::mlp {

namespace stream {

template <class T>
__global__ void __launch_bounds__(kThreads, 1) stream_experts(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ Barriers barriers;
  __shared__ Plan plan;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, choices = a.T * a.C, pitch = (a.S + 8) & ~7;
  Entry* list = reinterpret_cast<Entry*>(memory + a.layout.list);
  PlanRow* rows = reinterpret_cast<PlanRow*>(memory + a.layout.rows);
  PlanSpace space{plan_warps(choices)};
  space.counters = reinterpret_cast<uint16_t*>(memory + a.layout.ring);
  space.base = space.counters + space.warps * pitch;
  space.weight = reinterpret_cast<float*>(space.base + pitch);
  space.expert = reinterpret_cast<uint16_t*>(space.weight + choices);
  space.rank = space.expert + choices;

  let_next_kernel_start();
  if (thread < a.layout.stages) {
    hopper::barrier_init(hopper::shared_address(barriers.weights_full + thread), 1);
    hopper::barrier_init(hopper::shared_address(barriers.weights_free + thread), 32 * kConsumerWarps);
    hopper::fence_barrier_init();
  } else if (thread >= 32 && thread < 32 + kRowStages) {
    const int i = thread - 32;
    hopper::barrier_init(hopper::shared_address(barriers.rows_full[0] + i), 32 * kGatherWarps);
    hopper::barrier_init(hopper::shared_address(barriers.rows_full[1] + i), 1);
    hopper::barrier_init(hopper::shared_address(barriers.rows_free[0] + i), 32 * kConsumerWarps);
    hopper::barrier_init(hopper::shared_address(barriers.rows_free[1] + i), 32 * kConsumerWarps);
    hopper::fence_barrier_init();
  }
  if (thread == 0) plan.repeats = 0;
  for (int i = thread; i < space.warps * pitch / 8; i += kThreads)
    reinterpret_cast<uint4*>(space.counters)[i] = uint4{};
  wait_for_previous_kernel();
  __syncthreads();
  // Hidden rows into L2 while the plan is made
  for (int64_t at = (int64_t{blockIdx.x} * kThreads + thread) * 128; at < int64_t{a.T} * a.H * 2;
       at += int64_t{gridDim.x} * kThreads * 128) {
    hopper::prefetch_l2(static_cast<const char*>(a.hidden) + at);
  }
  rank_choices(a, space, choices);
  if (a.zero > 0) add_zeros(a, reinterpret_cast<float*>(memory + a.layout.zeros));
  __syncthreads();
  list_entries(a, space, plan, list);
  __syncthreads();

  const Shape shape(a, plan.entries);
  if (warp == kConsumerWarps) {
    if (thread % 32 == 0) stream_weights(a, shape, list, &barriers, memory);
    return;
  }
  place_rows(a, space, plan, rows, choices);
  hopper::named_barrier(1, kThreads - 32);
  const int repeats = plan.repeats;
  hopper::named_barrier(1, kThreads - 32);  // the plan's workspace is the ring of rows from here on
  if (warp > kConsumerWarps) {
    char* ring = memory + a.layout.ring;
    RowRoom room = gather_rows<T>(a, shape, list, rows, &barriers, ring, thread - 32 * (kConsumerWarps + 1));
    if (warp == kConsumerWarps + 1) fetch_active<T>(a, shape, list, &barriers, ring, room);
    hopper::copy_async_wait<0>();
    return;
  }
  Consumer<T> consumer(a, shape, list, rows, &barriers, memory, repeats);
  consumer.gate_up();
  consumer.down();
}

namespace {

constexpr int64_t kMostTokens = 128, kMostChoices = 4096, kMostExperts = 1024;
constexpr int kFewestStages = 4;

int align(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

int64_t most_entries(const StreamCall& call) {
  const int64_t choices = call.T * call.C;
  return std::min(call.S, choices) + choices / kMostRows;
}
// Columns of the product for the most rows that an entry can have
int most_columns(const StreamCall& call) {
  return columns_for(static_cast<int>(std::min<int64_t>(call.T * call.C, kMostRows)));
}
int part_rows(const StreamCall& call) { return std::max(static_cast<int>(call.T), most_columns(call)); }

Layout layout_of(const StreamCall& call) {
  const int choices = static_cast<int>(call.T * call.C);
  Layout l{};
  l.ring_bytes = std::clamp(8 * most_columns(call) * 128, 16 * 1024, 48 * 1024);
  const int sums = align(call.T * 16 * 4 * kConsumerWarps, 128);
  l.ring_bytes = std::max(l.ring_bytes, align(plan_bytes(choices, static_cast<int>(call.S)) - sums, 1024));
  const int list = align(most_entries(call) * sizeof(Entry), 16), rows = align(choices * sizeof(PlanRow), 16);
  const int zeros = call.zero > 0 ? align(call.T * 4, 16) : 0;
  const int fixed = l.ring_bytes + sums + list + rows + zeros;
  l.stages = std::min(kMostStages, (kMostShared - fixed) / kStepBytes);
  l.ring = l.stages * kStepBytes;
  l.sums = l.ring + l.ring_bytes;
  l.list = l.sums + sums;
  l.rows = l.list + list;
  l.zeros = l.rows + rows;
  l.end = l.zeros + zeros;
  return l;
}

// Scratch: activations, then the parts of cut blocks
int64_t active_bytes(const StreamCall& call) {
  const int64_t rows = call.T * call.C + 7 * most_entries(call);
  return (rows * weight_tiles(call.I) * kWeightTile * 2 + 255) / 256 * 256;
}

}  // namespace

}  // namespace stream

bool stream_takes(const StreamCall& call) {
  using namespace stream;
  if (call.dtype == DType::kF32 || call.T < 1 || call.C < 1 || call.H < 8 || call.I < 8 || call.S < 1) return false;
  if (call.H % 8 != 0 || call.I % 8 != 0 || call.T > kMostTokens || call.C > kMostChoices ||
      call.T * call.C > kMostChoices)
    return false;
  if (call.S > kMostExperts || call.H > 1 << 20 || call.I > 1 << 20) return false;
  if (2 * call.sm_count * kConsumerWarps + 2 > kStreamCounters) return false;
  const int64_t steps = most_entries(call) * weight_tiles(call.I) * weight_tiles(call.H);
  return steps < int64_t{1} << 30 && layout_of(call).stages >= kFewestStages;
}

size_t stream_scratch(const StreamCall& call) {
  if (few_takes(call)) return 0;
  const int64_t parts = int64_t{call.sm_count} * stream::kConsumerWarps * stream::part_rows(call) * 16 * 4;
  return static_cast<size_t>(stream::active_bytes(call) + parts);
}

cudaError_t launch_stream(const StreamCall& call) {
  if (few_takes(call)) return launch_few(call);
  stream::Args args{};
  args.hidden = call.hidden, args.routed = call.routed, args.ids = call.ids, args.weights = call.weights,
  args.gates = call.gates;
  args.output = call.output, args.experts = call.experts, args.swiglu = call.swiglu;
  args.T = static_cast<int>(call.T), args.C = static_cast<int>(call.C), args.H = static_cast<int>(call.H);
  args.I = static_cast<int>(call.I), args.S = static_cast<int>(call.S);
  args.first_expert = call.first_expert, args.zero = call.zero, args.first_zero = call.first_zero;
  args.weights_on_input = call.weights_on_input, args.output_scale = call.output_scale;
  args.active = call.scratch;
  args.parts = reinterpret_cast<float*>(static_cast<char*>(call.scratch) + stream::active_bytes(call));
  args.part_rows = stream::part_rows(call);
  args.counters = call.counters;
  args.layout = stream::layout_of(call);
  const auto kernel =
      call.dtype == DType::kBF16 ? stream::stream_experts<__nv_bfloat16> : stream::stream_experts<__half>;
  return launch_streaming(kernel, stream::kThreads, args.layout.end, stream::kMostShared, call, args);
}

}  // namespace moe::mlp
