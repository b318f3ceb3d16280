// What the parts of the streaming expert MLP for few tokens share (expert_mlp_stream_few_sm90a.cu): its arguments and
// memory, its plan, and how work is cut.
#pragma once
#include "expert_mlp.h"
#include "floats.cuh"
#include "hopper.cuh"

namespace moe::mlp::few {

constexpr int kWarps = 8;  // that multiply; as many have weights copied, one finishes
constexpr int kWorkerRegisters = 136, kCopierRegisters = 56;  // a thread, of 96 each
constexpr int kThreads = 32 * (2 * kWarps + 1);
constexpr int kLeaving = 32 * (kWarps + 2);        // threads at the barrier before words are cleared
constexpr int kColumns = 8;                        // of a product
constexpr int kMostTokens = 4, kMostChoices = 32;  // lanes of a warp: 8 for each token, and one for each choice
constexpr int kTileBytes = kWeightTileElements * 2;
constexpr int kPieces = 4, kPieceBytes = 16 * 128;  // of a slice, one a tile
constexpr int kSliceBytes = kPieces * kPieceBytes;
constexpr int kMostStages = 3, kFewestStages = 2;  // slices of a warp in shared memory
constexpr int kBuffers = 4;                        // for the warps' sums of a unit
constexpr int kMostShared = 225 * 1024;            // besides Shared
constexpr unsigned kAll = 0xffffffffu;

struct Layout {
  int stages, hidden, active, sums, end;  // offsets in shared memory; the rings are first
  int hidden_pitch, active_pitch;         // bytes; 16 beyond a multiple of 128, so that rows differ in their banks
};

struct Args {
  const int32_t* ids;
  const float* weights;
  const void* hidden;
  int T, C, H, I, S, first_expert;
  int next_slice, next_entry;  // kWarps slices of down on
  ExpertsView experts;
  Layout layout;
  int ahead;  // slices of a warp on their way at once
  SwiGLU swiglu;
  int zero, first_zero;
  bool weights_on_input;
  float output_scale;
  const float* gates;
  const void* routed;
  void* output;
  int32_t* counters;  // units written, blocks that have read them
  uint32_t* active;   // words of T [rows, I]
  uint32_t* parts;    // words of floats [block][token][8][gate, up]
};

// What goes from block to block goes in words that are zero before and after a call, with all bits inverted: who reads
// a word that is not zero has it, without a fence, a flag or a second round trip. (All ones, a NaN, loses a bit.)
__device__ __forceinline__ uint32_t word_of(uint32_t bits) { return max(~bits, 1u); }

struct Shared {
  // Barriers: slices that have come, places that are free; the tokens; sums that are there, buffers that are free
  uint64_t full[kWarps][kMostStages], free[kWarps][kMostStages], hidden, summed[kBuffers], finished[kBuffers];
  int32_t slot[kMostChoices];                               // of an entry
  alignas(8) int8_t row[kMostChoices][kColumns];            // of activations, of an entry and a token, or -1
  alignas(8) float weight[kMostChoices][kMostTokens];       // where there is a row
  float zeros[kMostTokens];                                 // weight of a token's zero experts
  alignas(16) uint32_t nothing[kPieces * kWeightTile / 2];  // in place of rows that there are not
};
static_assert(sizeof(Shared) <= 2048, "4 tokens of 7,168 and 8 activations of 2,048 just fit");

// The lanes with the same value as this one, of the first `lanes`: several times as quick as match.any.
__device__ __forceinline__ unsigned equal_lanes(int value, int lanes) {
  unsigned equal = 0;
#pragma unroll 4
  for (int i = 0; i < lanes; i++) equal |= static_cast<unsigned>(__shfl_sync(kAll, value, i) == value) << i;
  return equal;
}

// Has values computed here, while the ids are on their way; the compiler would leave some of it until after them.
template <class... Values>
__device__ __forceinline__ void now(Values&... values) {
  (..., [&] { asm volatile("" : "+r"(values)); }());
}

// Made by every warp for itself; lane c has choice c, and lane e entry e.
struct Plan {
  int entries, rows, slot;  // rows: of activations, one per choice of an expert that is here
  bool here;
  int entry, row;  // of this choice
};

// `token`: of this choice.
__device__ __forceinline__ Plan make_plan(const Args& a, int id, int token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned below = (1u << lane) - 1;
  const int64_t e = int64_t{id} - a.first_expert;
  const bool here = lane < a.T * a.C && e >= 0 && e < a.S;
  const int expert = here ? static_cast<int>(e) : -1;
  const unsigned token_lanes = (kAll >> (32 - a.C)) << (here ? token * a.C : 0);
  // How often this token has named it before
  unsigned same = equal_lanes(expert, a.T * a.C);
  const int again = here ? __popc(same & token_lanes & below) : 0;
  if (__any_sync(kAll, again > 0)) same = equal_lanes(here ? expert * kMostChoices + again : -1, a.T * a.C);
  const unsigned firsts = __ballot_sync(kAll, here && (same & below) == 0);
  const unsigned local = __ballot_sync(kAll, here);
  const int entry = __popc(firsts & ((same & -same) - 1));
  int slot = expert;
  if ((firsts & (firsts + 1)) != 0) {  // not just the first so many lanes
    unsigned rest = firsts;
    for (int i = 0; i < lane && rest != 0; i++) rest &= rest - 1;
    slot = __shfl_sync(kAll, expert, __ffs(rest) - 1);
  }
  return {__popc(firsts), __popc(local), slot, here, entry, __popc(local & below)};
}

// By one warp
__device__ __forceinline__ void write_tables(const Args& a, const Plan& plan, float weight, Shared& s) {
  const int lane = static_cast<int>(threadIdx.x);
  *reinterpret_cast<uint64_t*>(s.row[lane]) = ~uint64_t{0};
  s.slot[lane] = plan.slot;
  __syncwarp();
  if (plan.here) {
    s.row[plan.entry][lane / a.C] = static_cast<int8_t>(plan.row);
    s.weight[plan.entry][lane / a.C] = weight;
  }
  if (a.zero > 0 && lane < a.T) {
    float sum = 0;
    for (int c = lane * a.C; c < (lane + 1) * a.C; c++) {
      const int64_t zero = int64_t{a.ids[c]} - a.first_zero;
      if (zero >= 0 && zero < a.zero) sum += a.weights[c];
    }
    s.zeros[lane] = sum;
  }
}

// Sizes, and this block's share: slices lo .. hi - 1 of gate_up, groups of 8 rows first2 .. last2 - 1 of down. The
// lanes of a warp make it for 1 to 32 entries, before the ids are there, because divisions take a while.
struct Shape {
  int entries, along_h, along_i, units1;  // tiles along H and I; units of an entry
  int slices1, slices2;                   // of a unit of gate_up; of an entry in a unit of down
  int each, more, lo, hi, first2, last2;
  int unit, entry;  // of slice lo
  __device__ __forceinline__ Shape(const Args& a, int n)
      : entries(n),
        along_h((a.H + 63) / 64),
        along_i((a.I + 63) / 64),
        units1(a.I / 8),
        slices1((along_h + kPieces - 1) / kPieces),
        slices2((along_i + kPieces - 1) / kPieces) {
    const unsigned blocks = gridDim.x, me = blockIdx.x, total = static_cast<unsigned>(entries * units1 * slices1);
    each = static_cast<int>(total / blocks), more = static_cast<int>(total - each * blocks);
    lo = static_cast<int>(me) * each + min(static_cast<int>(me), more);
    hi = lo + each + (static_cast<int>(me) < more);
    const unsigned groups = static_cast<unsigned>(a.H / 8);
    first2 = static_cast<int>(me * groups / blocks), last2 = static_cast<int>((me + 1) * groups / blocks);
    unit = static_cast<int>(static_cast<unsigned>(lo) / static_cast<unsigned>(slices1));
    entry = static_cast<int>(static_cast<unsigned>(unit) / static_cast<unsigned>(units1));
  }
  // Takes the one that has been made for n entries.
  __device__ __forceinline__ void choose(int n) {
    const int from = max(n - 1, 0);
    each = __shfl_sync(kAll, each, from), more = __shfl_sync(kAll, more, from);
    lo = __shfl_sync(kAll, lo, from), hi = __shfl_sync(kAll, hi, from);
    unit = __shfl_sync(kAll, unit, from), entry = __shfl_sync(kAll, entry, from);
    entries = n;
    if (n == 0) hi = lo;
  }
  // The block in whose span a slice of gate_up is
  __device__ __forceinline__ int owner(int slice) const {
    const int large = more * (each + 1);
    return slice < large ? slice / (each + 1) : more + (slice - large) / each;
  }
  // Groups of the unit of down that begins with `group`
  __device__ __forceinline__ int groups_of(int group) const { return min(2, last2 - group); }
};

// Where a warp is in down: every kWarps-th slice of all units of the block, one after the other.
struct DownWalk {
  const Args& a;
  const Shape& shape;
  int group, entry = 0, slice;
  __device__ __forceinline__ DownWalk(const Args& a, const Shape& shape, int warp)
      : a(a), shape(shape), group(shape.entries > 0 ? shape.first2 : shape.last2), slice(warp) {
    for (; slice >= shape.slices2; slice -= shape.slices2) entry++;
    settle();
  }
  __device__ __forceinline__ void settle() {
    for (; entry >= shape.entries && group < shape.last2; entry -= shape.entries) group += 2;
  }
  __device__ __forceinline__ void advance() {
    slice += a.next_slice, entry += a.next_entry;
    if (slice >= shape.slices2) slice -= shape.slices2, entry++;
    settle();
  }
  __device__ __forceinline__ int pieces() const { return min(kPieces, shape.along_i - slice * kPieces); }
};

}  // namespace moe::mlp::few
