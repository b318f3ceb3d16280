// What the parts of the streaming expert MLP share: its arguments, its memory, and how work is cut into spans.
//
// Both products are lists of steps, a step being 128 rows x 64 columns of weights (two tiles):
//   gate_up  (block of 128 packed rows = 64 activations, entry, step along H)
//   down     (block of 128 rows of H, entry, step along I)
// where an entry is an expert with the rows it was given, at most kMostRows of them. Each list is cut into one
// contiguous span of equal length per block of threads, entries innermost, so that an entry with many rows, whose steps
// take longer, is shared out. Blocks of rows that are cut are finished by whose span they begin in, who adds the parts
// in order.
#pragma once
#include "expert_mlp.h"
#include "floats.cuh"
#include "hopper.cuh"

namespace moe::mlp::stream {

constexpr int kConsumerWarps = 8;  // two warpgroups, one tile of 64 rows each
constexpr int kGatherWarps = 3;    // after one that streams weights
constexpr int kWarps = kConsumerWarps + 1 + kGatherWarps;
constexpr int kThreads = 32 * kWarps;
constexpr int kMostShared = 226 * 1024;  // besides Barriers and Plan
constexpr int kMostRows = 128;           // of an entry: an expert with more is streamed again
constexpr int kTileBytes = kWeightTileElements * 2;
constexpr int kStepBytes = 2 * kTileBytes;
constexpr int kMostStages = 13;  // of weights
constexpr int kAhead = 4;        // stages of weights on their way at once: more only lengthens the queues at the memory
constexpr int kFewRows = 32;     // columns of a product up to which mma.sync is used: 1% less time than wgmma
constexpr int kRowStages = 12;   // of rows

struct Entry {
  uint16_t slot, rows, first, first8;  // first: of its rows in the plan; first8: the same with entries padded to 8 rows
};

struct PlanRow {
  float weight;
  uint16_t token, round;  // round: how often the same token occurs before it in the same expert
};

// What is planned once, in shared memory
struct Plan {
  int32_t entries, repeats;  // repeats: the largest round
  uint64_t partial[kWarps];
};

// Offsets in shared memory, from the start (aligned to 1024 bytes): stages of weights are first.
struct Layout {
  int stages, ring, sums, list, rows, zeros, end;
  int ring_bytes;
};

struct Args {
  const void *hidden, *routed;
  const int32_t* ids;
  const float *weights, *gates;
  void* output;
  ExpertsView experts;
  SwiGLU swiglu;
  int T, C, H, I, S;
  int first_expert, zero, first_zero;
  bool weights_on_input;
  float output_scale;
  void* active;  // per entry [tiles of I][rows padded to 8][64], swizzled like weights
  float* parts;  // [block of threads][warp][part_rows * 16]
  int part_rows;
  int32_t* counters;
  Layout layout;
};

struct Barriers {
  uint64_t weights_full[kMostStages], weights_free[kMostStages];
  uint64_t rows_full[2][kRowStages], rows_free[2][kRowStages];  // by product
};
static_assert(sizeof(Barriers) + sizeof(Plan) <= 1024);

// counters: [product][block of threads][warp], then activations written, then blocks that know it
__device__ __forceinline__ int32_t* part_counter(const Args& a, int product, int block, int warp) {
  return a.counters + (product * static_cast<int>(gridDim.x) + block) * kConsumerWarps + warp;
}
__device__ __forceinline__ int32_t* ready_counter(const Args& a) {
  return a.counters + 2 * static_cast<int>(gridDim.x) * kConsumerWarps;
}

// Steps lo .. hi - 1 of `total` are this block's; `blocks` of them share the list.
struct Span {
  int total, blocks, lo, hi;
  __device__ __forceinline__ explicit Span(int steps) : total(steps), blocks(min(static_cast<int>(gridDim.x), steps)) {
    const int64_t me = blockIdx.x;
    lo = me < blocks ? static_cast<int>(me * total / blocks) : 0;
    hi = me < blocks ? static_cast<int>((me + 1) * total / blocks) : 0;
  }
  __device__ __forceinline__ int owner(int step) const {
    return static_cast<int>((int64_t{step + 1} * blocks - 1) / total);
  }
};

// Sizes in tiles and the two lists.
struct Shape {
  int entries, along_h, along_i, blocks1, blocks2, tiles1, tiles2;
  __device__ __forceinline__ Shape(const Args& a, int n)
      : entries(n),
        along_h((a.H + 63) / 64),
        along_i((a.I + 63) / 64),
        blocks1(along_i),
        blocks2((a.H + 127) / 128),
        tiles1((2 * a.I + 63) / 64),
        tiles2(along_h) {}
  __device__ __forceinline__ int steps1() const { return entries * blocks1 * along_h; }
  __device__ __forceinline__ int steps2() const { return blocks2 * entries * along_i; }
};

// segment(block, from, to) for the parts of blocks of `length` steps that lie in the span
template <class F>
__device__ __forceinline__ void for_segments(const Span& span, int length, F segment) {
  for (int at = span.lo; at < span.hi;) {
    const int block = at / length, from = at - block * length;
    const int to = min(length, from + span.hi - at);
    segment(block, from, to);
    at += to - from;
  }
}

// Columns of the product for an entry of so many rows
MOE_BOTH int columns_for(int rows) {
  return rows <= 32 ? (rows + 7) & ~7 : rows <= 64 ? (rows + 15) & ~15 : (rows + 31) & ~31;
}

// Waits on a barrier. With MOE_STREAM_WATCHDOG a wait of two seconds says for what and traps.
__device__ __forceinline__ void wait(const uint64_t* barrier, uint32_t parity, int what) {
#ifdef MOE_STREAM_WATCHDOG
  const uint32_t address = hopper::shared_address(barrier);
  const long long begin = clock64();
  for (uint32_t done = 0; done == 0;) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
    if (clock64() - begin > 3000000000ll) {
      printf("block %d thread %d waits for %d parity %u\n", blockIdx.x, threadIdx.x, what, parity);
      __trap();
    }
  }
#else
  hopper::barrier_wait(hopper::shared_address(barrier), parity);
#endif
}
__device__ __forceinline__ void arrive(const uint64_t* barrier) {
  hopper::barrier_arrive(hopper::shared_address(barrier));
}

// Where the next rows lie in their ring, and their barriers: consumers and producers walk alike.
struct RowRing {
  int bytes, at = 0, stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ int take(int size) {
    if (at + size > bytes) at = 0;
    const int begin = at;
    at += size;
    return begin;
  }
  __device__ __forceinline__ void next() {
    if (++stage == kRowStages) stage = 0, parity ^= 1;
  }
};

}  // namespace moe::mlp::stream
