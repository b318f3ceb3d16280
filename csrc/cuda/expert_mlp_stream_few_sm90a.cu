// The streaming expert MLP for one to four tokens, where what counts is that the memory is never idle: weights are
// asked for as soon as the ids are there, and those of down while the activations are still on their way.
//
// One block of threads per multiprocessor. Every warp that multiplies has a ring of its own in shared memory, which a
// warp of its own keeps full: slices of 16 rows x 256 columns of weights (mma.sync; weights are M, tokens N), first its
// slices of gate_up, then those of down.
//
//   gate_up  units of 16 packed rows (8 activations) x H. The slices of all units are cut into one span per block. A
//            unit that is cut is finished by the block in whose span it begins: there it comes last, while the rest
//            of it comes first in the next span, so that nobody waits for long.
//   down     units of 16 rows of H over all entries, whole: a block's outputs are its own.
//   both     the slices of a block go to the warps in turn; one more warp adds up what they have and does what follows.
//
// An entry is an expert hit (once more for every time that a token names it again). All tokens are multiplied by the
// weights of an entry; those that have not named it are left out of what follows.
//
// Order of sums: a warp's slices ascending, every fourth 16 columns by themselves, entry after entry with its routing
// weight in the order in which choices name them first, warps ascending, zero experts last; in gate_up the parts of
// other blocks first. It depends on the ids and the number of multiprocessors alone. NaN and infinities take their
// course. Limits: few_takes.
//
// Blocks of threads wait for each other: see expert_mlp_stream_sm90a.cu.
#include "expert_mlp_stream_few.h"

#include <algorithm>

#include "expert_mlp_stream_few_consume.cuh"
#include "expert_mlp_stream_few_produce.cuh"
#include "expert_mlp_stream_launch.cuh"

namespace moe::mlp {

namespace few {

template <class T>
__global__ void __launch_bounds__(kThreads, 1) stream_few(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ Shared s;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const bool has = lane < a.T * a.C;
  const int id = !has ? -1 : a.ids != nullptr ? a.ids[lane] : a.first_expert;
  const float weight = warp == 0 && has && a.ids != nullptr ? a.weights[lane] : 1.0f;
  // While the ids are on their way
  if (warp >= kWarps && warp < 2 * kWarps) {
    const int w = warp - kWarps;
    if (lane < kMostStages) {
      hopper::barrier_init(hopper::shared_address(s.full[w] + lane), 1);
      hopper::barrier_init(hopper::shared_address(s.free[w] + lane), 32);
    }
    if (w == 0 && lane == 0) {
      hopper::barrier_init(hopper::shared_address(&s.hidden), 1);
      hopper::fence_barrier_init();
      hopper::barrier_arrive_expect(hopper::shared_address(&s.hidden), a.T * a.H * 2);
    }
    hopper::fence_barrier_init();
    __syncwarp();
    if (w == 0 && lane < a.T) {  // the tokens before the weights: the copy engine keeps the order
      hopper::copy_bulk(hopper::shared_address(memory + a.layout.hidden + lane * a.layout.hidden_pitch),
                        static_cast<const T*>(a.hidden) + int64_t{lane} * a.H, a.H * 2,
                        hopper::shared_address(&s.hidden));
    }
  } else if (warp < kWarps) {
    if (warp == 0) {
      if (lane < kBuffers) {
        hopper::barrier_init(hopper::shared_address(s.summed + lane), 32 * kWarps);
        hopper::barrier_init(hopper::shared_address(s.finished + lane), 32);
      }
      hopper::fence_barrier_init();
    }
    // Zeros in place of rows, and beyond H and I
    for (int i = thread; i < kPieces * kWeightTile / 2; i += 32 * kWarps) s.nothing[i] = 0;
    const auto clear_beyond = [&](char* rows, int count, int pitch, int columns) {
      const int beyond = (64 - columns % 64) % 64;
#pragma unroll 1
      for (int i = thread; i < beyond * count; i += 32 * kWarps) {
        reinterpret_cast<T*>(rows + i / beyond * pitch)[columns + i % beyond] = narrow<T>(0.0f);
      }
    };
    clear_beyond(memory + a.layout.hidden, a.T, a.layout.hidden_pitch, a.H);
    clear_beyond(memory + a.layout.active, a.T * a.C, a.layout.active_pitch, a.I);
  }
  Shape shape(a, lane + 1);
  int token = lane / a.C;
  now(token, shape.each, shape.more, shape.lo, shape.hi, shape.first2, shape.last2, shape.unit, shape.entry);
  __syncwarp();
  const Plan plan = make_plan(a, id, token);
  shape.choose(plan.entries);
  if (warp >= kWarps && warp < 2 * kWarps) {  // from the first weight on
    hopper::fewer_registers<kCopierRegisters>();
    hopper::named_barrier_arrive(2, kThreads);
    copy_weights(a, s, memory, plan, shape, warp - kWarps);
    return;
  }
  if (warp == 0) write_tables(a, plan, weight, s);
  hopper::named_barrier(2, kThreads);
  if (warp == 2 * kWarps) {
    Finisher<T> finisher(a, shape, s, memory);
    finisher.gate_up();
    hopper::named_barrier_arrive(3, kLeaving);
    finisher.down();
    return;
  }
  hopper::more_registers<kWorkerRegisters>();
  Worker<T> worker(a, shape, s, memory);
  worker.gate_up();
  worker.down(plan.rows);
}

namespace {

int align(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

// In ints of `counters`: two that count, the activations, the parts
constexpr int64_t kWords = 4;
int64_t parts_at(const StreamCall& call) { return kWords + call.T * call.C * call.I / 2; }
int64_t words_of(const StreamCall& call) { return parts_at(call) + call.sm_count * call.T * 16; }

Layout layout_of(const StreamCall& call) {
  Layout l{};
  l.hidden_pitch = align(call.H * 2, 128) + 16, l.active_pitch = align(call.I * 2, 128) + 16;
  const int hidden = static_cast<int>(call.T) * l.hidden_pitch;
  const int active = static_cast<int>(call.T * call.C) * l.active_pitch;
  const int sums = kBuffers * kWarps * 16 * align(call.T, 2) * 4;
  const int fixed = hidden + active + sums;
  l.stages = std::min(kMostStages, (kMostShared - fixed) / (kWarps * kSliceBytes));
  l.hidden = l.stages * kWarps * kSliceBytes;
  l.active = l.hidden + hidden;
  l.sums = l.active + active;
  l.end = l.sums + sums;
  return l;
}

}  // namespace

}  // namespace few

bool few_takes(const StreamCall& call) {
  using namespace few;
  if (call.dtype == DType::kF32 || call.T < 1 || call.C < 1 || call.H < 8 || call.I < 8 || call.S < 1) return false;
  if (call.H % 8 != 0 || call.I % 8 != 0 || call.T > kMostTokens || call.T * call.C > kMostChoices) return false;
  if (call.S > 1 << 20 || call.H > 1 << 15 || call.I > 1 << 15) return false;
  return words_of(call) <= kStreamCounters && layout_of(call).stages >= kFewestStages;
}

cudaError_t launch_few(const StreamCall& call) {
  using namespace few;
  Args args{};
  args.hidden = call.hidden, args.ids = call.ids, args.weights = call.weights, args.experts = call.experts;
  args.gates = call.gates, args.routed = call.routed, args.output = call.output, args.swiglu = call.swiglu;
  args.T = static_cast<int>(call.T), args.C = static_cast<int>(call.C), args.S = static_cast<int>(call.S);
  args.H = static_cast<int>(call.H), args.I = static_cast<int>(call.I);
  args.first_expert = call.first_expert, args.zero = call.zero, args.first_zero = call.first_zero;
  args.weights_on_input = call.weights_on_input, args.output_scale = call.output_scale;
  uint32_t* words = reinterpret_cast<uint32_t*>(call.counters);
  args.counters = call.counters, args.active = words + kWords, args.parts = words + parts_at(call);
  const int slices2 = static_cast<int>((weight_tiles(call.I) + kPieces - 1) / kPieces);
  args.next_slice = kWarps % slices2, args.next_entry = kWarps / slices2;
  args.layout = layout_of(call);
  // With one token more weights on their way delay the last of gate_up, for which all blocks wait, which only a long
  // run makes good (measured: 9 and 11 slices a warp with 1 on its way, 20 with 2).
  const int64_t slices1 = (weight_tiles(call.H) + kPieces - 1) / kPieces * (call.I / 8);
  const int64_t slices = call.C * (slices1 + slices2 * (call.H / 16)) / (call.sm_count * kWarps);
  args.ahead = call.T > 1 ? args.layout.stages : slices < 16 ? 1 : 2;
  const auto kernel = call.dtype == DType::kBF16 ? stream_few<__nv_bfloat16> : stream_few<__half>;
  return launch_streaming(kernel, kThreads, args.layout.end, kMostShared, call, args);
}

}  // namespace moe::mlp
