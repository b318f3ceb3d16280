// The warps of the streaming expert MLP for few tokens that have weights copied: each fills the ring of one that
// multiplies. A warp apart, because starting a copy waits while the copy engine is busy.
#pragma once
#include "expert_mlp_stream_few.cuh"

namespace moe::mlp::few {

// What a warp has the copy engine bring: its slices in the order in which it multiplies them.
struct Supply {
  const Args& a;
  const Shape& shape;
  int slot;                       // of the entry of this lane
  int at, unit_end, entry, rows;  // gate_up: the next slice; the end of its unit, that one's entry and number
  DownWalk down;
  uint64_t policy;

  __device__ __forceinline__ Supply(const Args& a, const Shape& shape, int slot, int warp)
      : a(a),
        shape(shape),
        slot(slot),
        at(shape.lo + warp),
        down(a, shape, warp),
        policy(hopper::evict_first_policy()) {
    entry = shape.entry;
    rows = shape.unit - entry * shape.units1, unit_end = (shape.unit + 1) * shape.slices1;
  }
  // Has the first page of down looked up, so that nothing waits for that in the middle.
  __device__ __forceinline__ void touch_down() const {
    if (down.group >= shape.last2) return;
    const char* matrix = matrix_of_down();
    if (threadIdx.x % 32 == 0) hopper::prefetch_l2(row_of(matrix, down.group));
  }
  // The next slice to `to`; false when there are no more.
  __device__ __forceinline__ bool copy(uint32_t to, uint32_t full) {
    const char* source;
    const char* rest = nullptr;  // of 16 rows that are not in one tile
    int bytes = kPieceBytes, pieces;
    if (at < shape.hi) {
      for (; at >= unit_end; unit_end += shape.slices1) {
        if (++rows == shape.units1) rows = 0, entry++;
      }
      const int tile = (at - unit_end + shape.slices1) * kPieces;
      source = static_cast<const char*>(a.experts.w13) + __shfl_sync(kAll, slot, entry) * a.experts.size13 * 2 +
               int64_t{rows / 4 * shape.along_h + tile} * kTileBytes + rows % 4 * kPieceBytes;
      pieces = min(kPieces, shape.along_h - tile);
      at += kWarps;
    } else if (down.group < shape.last2) {
      const int group = down.group;
      const char* matrix = matrix_of_down();
      source = row_of(matrix, group);
      bytes = shape.groups_of(group) * 1024;
      if (bytes == kPieceBytes && group % 8 == 7) rest = row_of(matrix, group + 1);
      pieces = down.pieces();
      down.advance();
    } else {
      return false;
    }
    if (threadIdx.x % 32 != 0) return true;
    hopper::barrier_arrive_expect(full, pieces * bytes);
    if (rest == nullptr) {
#pragma unroll 1
      for (int k = 0; k < pieces; k++) {
        hopper::copy_bulk(to + k * kPieceBytes, source + k * kTileBytes, bytes, full, policy);
      }
    } else {
#pragma unroll 1
      for (int k = 0; k < pieces; k++) {
        hopper::copy_bulk(to + k * kPieceBytes, source + k * kTileBytes, 1024, full, policy);
        hopper::copy_bulk(to + k * kPieceBytes + 1024, rest + k * kTileBytes, 1024, full, policy);
      }
    }
    return true;
  }

 private:
  __device__ __forceinline__ const char* matrix_of_down() const {
    return static_cast<const char*>(a.experts.w2) + __shfl_sync(kAll, slot, down.entry) * a.experts.size2 * 2 +
           int64_t{down.slice} * kPieces * kTileBytes;
  }
  __device__ __forceinline__ const char* row_of(const char* matrix, int group) const {
    return matrix + int64_t{group / 8 * shape.along_i} * kTileBytes + group % 8 * 1024;
  }
};

// Words that blocks have left for each other are cleared by the last block to have read them and counted its units: by
// one warp, once it has nothing else to do.
__device__ __forceinline__ void clear_words(const Args& a, const Plan& plan) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  hopper::named_barrier(3, kLeaving);
  int before = 0;
  if (lane == 0) before = hopper::add_acquire_release(a.counters + 1, 1);
  if (__shfl_sync(kAll, before, 0) != static_cast<int>(gridDim.x) - 1) return;
  if (lane < 2) a.counters[lane] = 0;
  for (int i = lane; i < plan.rows * a.I / 8; i += 32) reinterpret_cast<uint4*>(a.active)[i] = uint4{};
}

// Fills the ring of the warp that multiplies `warp`'s slices.
__device__ __forceinline__ void copy_weights(const Args& a, Shared& s, char* memory, const Plan& plan,
                                             const Shape& shape, int warp) {
  Supply supply(a, shape, plan.slot, warp);
  int stage = 0;
  uint32_t parity = 1;
  for (int i = 0;; i++) {
    hopper::barrier_wait(hopper::shared_address(s.free[warp] + stage), parity);
    if (i >= a.ahead) {
      const int before = stage - a.ahead;
      if (before < 0)
        hopper::barrier_wait(hopper::shared_address(s.full[warp] + before + a.layout.stages), parity);
      else
        hopper::barrier_wait(hopper::shared_address(s.full[warp] + before), parity ^ 1);
    }
    const uint32_t to = hopper::shared_address(memory) + (warp * a.layout.stages + stage) * kSliceBytes;
    if (!supply.copy(to, hopper::shared_address(s.full[warp] + stage))) break;
    if (i == 0) supply.touch_down();
    if (++stage == a.layout.stages) stage = 0, parity ^= 1;
  }
  if (warp == 0) clear_words(a, plan);
}

}  // namespace moe::mlp::few
