// The warps of the streaming expert MLP for few tokens that multiply.
#pragma once
#include "expert_mlp_stream_few_finish.cuh"
#include "tensor_tile.cuh"

namespace moe::mlp::few {

template <class T>
struct Worker {
  const Args& a;
  const Shape& shape;
  Shared& s;
  char* memory;
  int warp, lane;
  int stage = 0;
  uint32_t parity = 0;
  uint32_t ring;  // of this warp, from where this lane begins (ldmatrix)
  Sums sums;
  uint32_t left[kPieces][4][4];  // of a slice

  __device__ __forceinline__ Worker(const Args& a, const Shape& shape, Shared& s, char* memory)
      : a(a),
        shape(shape),
        s(s),
        memory(memory),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(hopper::lane_id()),
        ring(hopper::shared_address(memory) + warp * a.layout.stages * kSliceBytes + lane % 16 * 128 +
             ((lane / 16 ^ lane % 8) << 4)),
        sums(a, s, memory) {}

  // The next slice of weights, as the tensor cores take it
  __device__ __forceinline__ void load() {
    const uint32_t weights = ring + stage * kSliceBytes;
    hopper::barrier_wait(hopper::shared_address(s.full[warp] + stage), parity);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++) {
        load_matrices(left[piece][k], (weights ^ (k << 5)) + piece * kPieceBytes);
      }
    }
    hopper::barrier_arrive(hopper::shared_address(s.free[warp] + stage));
    if (++stage == a.layout.stages) stage = 0, parity ^= 1;
  }
  // sum += these weights x the tokens' rows, from `rows` on for this lane (ldmatrix)
  __device__ __forceinline__ void multiply(float (&sum)[4][4], uint32_t rows, int pieces) const {
    if (pieces == kPieces) {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += 2) multiply_pieces<2>(sum, rows, piece);
    } else {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++) {
        if (piece < pieces) multiply_pieces<1>(sum, rows, piece);
      }
    }
  }
  template <int PIECES>
  __device__ __forceinline__ void multiply_pieces(float (&sum)[4][4], uint32_t rows, int first) const {
    uint32_t right[PIECES * 2][4];
#pragma unroll
    for (int k = 0; k < PIECES * 2; k++) load_matrices(right[k], rows + first * 128 + k * 64 + lane / 8 * 16);
#pragma unroll
    for (int k = 0; k < PIECES * 4; k++) {
      mma_16x8x16(sum[k % 4], left[first + k / 4][k % 4], right[k / 2] + k % 2 * 2, static_cast<T*>(nullptr));
    }
  }
  __device__ __forceinline__ static float total_of(const float (&sum)[4][4], int l) {
    return (sum[0][l] + sum[1][l]) + (sum[2][l] + sum[3][l]);
  }

  // gate_up -----------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void gate_up() {
    const bool there = lane % 8 < a.T;
    const uint32_t nothing = hopper::shared_address(s.nothing);
    const uint32_t rows = hopper::shared_address(memory + a.layout.hidden + lane % 8 * a.layout.hidden_pitch);
    hopper::barrier_wait(hopper::shared_address(&s.hidden), 0);
    if (shape.lo == shape.hi) return;
    int mine = shape.lo + warp;
    for (int begin = shape.unit * shape.slices1; begin < shape.hi; begin += shape.slices1) {
      const int end = min(begin + shape.slices1, shape.hi);
      float sum[4][4] = {};
      for (; mine < end; mine += kWarps) {
        const int tile = (mine - begin) * kPieces;
        load();
        multiply(sum, there ? rows + tile * 128 : nothing, min(kPieces, shape.along_h - tile));
      }
      const float total[4] = {total_of(sum, 0), total_of(sum, 1), total_of(sum, 2), total_of(sum, 3)};
      sums.put(total, warp);
    }
  }

  // All activations, once they are there
  __device__ __forceinline__ void fetch_active(int rows) {
    constexpr int kAtOnce = 4, kAll = 32 * kWarps;
    const int each = a.I / 8, total = rows * each;
    const float per = 1.0f / static_cast<float>(each);
    // Counted without a fence, so it only says when it is worth while to look: with the last few on their way.
    const int units = shape.entries * shape.units1, nearly = units - units / 16;
    if (threadIdx.x == 0) {
      while (hopper::load_relaxed(a.counters) < nearly) {
      }
    }
    hopper::named_barrier(1, kAll);
    for (int base = static_cast<int>(threadIdx.x); base < total; base += kAll * kAtOnce) {
      uint4 v[kAtOnce] = {};
      for (bool all = false; !all;) {
        all = true;
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
          if (base + k * kAll < total && !whole(v[k])) v[k] = hopper::load_relaxed4(a.active + (base + k * kAll) * 4);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) all = all && (base + k * kAll >= total || whole(v[k]));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        const int at = base + k * kAll, row = static_cast<int>((static_cast<float>(at) + 0.5f) * per);
        char* to = memory + a.layout.active + row * a.layout.active_pitch + (at - row * each) * 16;
        if (at < total) *reinterpret_cast<uint4*>(to) = make_uint4(~v[k].x, ~v[k].y, ~v[k].z, ~v[k].w);
      }
    }
    hopper::named_barrier(1, kAll);
    hopper::named_barrier_arrive(3, kLeaving);
  }
  __device__ __forceinline__ static bool whole(uint4 v) { return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0; }

  // down --------------------------------------------------------------------------------------------------------------

  // An entry, for this lane: the row that it multiplies by, and what its two tokens' products are weighted with
  struct Entry {
    uint32_t rows;
    bool there, counts[2];
    float weight[2], bias[2];
  };
  __device__ __forceinline__ Entry entry_at(const DownWalk& at) const {
    const uint32_t nothing = hopper::shared_address(s.nothing);
    const int row = s.row[at.entry][lane % 8];
    const char2 rows = *reinterpret_cast<const char2*>(s.row[at.entry] + lane % 4 * 2);
    const float2 weights = *reinterpret_cast<const float2*>(s.weight[at.entry] + lane % 2 * 2);
    Entry e;
    e.there = row >= 0;
    e.rows = e.there ? hopper::shared_address(memory + a.layout.active + row * a.layout.active_pitch) : nothing;
    e.counts[0] = rows.x >= 0, e.counts[1] = rows.y >= 0;
    e.weight[0] = a.weights_on_input ? 1.0f : weights.x, e.weight[1] = a.weights_on_input ? 1.0f : weights.y;
    e.bias[0] = e.bias[1] = 0;
    if (a.experts.b2 != nullptr && at.slice == 0) {
      const float* bias = a.experts.b2 + int64_t{s.slot[at.entry]} * a.H + at.group * 8 + lane / 4;
      e.bias[0] = bias[0];
      if (shape.groups_of(at.group) > 1) e.bias[1] = bias[8];
    }
    return e;
  }

  __device__ __forceinline__ void down(int rows) {
    DownWalk at(a, shape, warp);
    Entry e;
    // As far as it goes without the activations
    if (at.group < shape.last2) e = entry_at(at), load();
    fetch_active(rows);
    for (int group = shape.first2; group < shape.last2; group += 2) {
      float total[4] = {}, sum[4][4] = {};
      while (at.group == group) {
        const int entry = at.entry;
        multiply(sum, e.there ? e.rows + at.slice * kPieces * 128 : e.rows, at.pieces());
        at.advance();
        if (at.group < shape.last2) load();
        if (at.entry != entry || at.group != group) {
#pragma unroll
          for (int l = 0; l < 4; l++) {
            if (e.counts[l % 2]) total[l] = fmaf(e.weight[l % 2], total_of(sum, l) + e.bias[l / 2], total[l]);
            sum[0][l] = sum[1][l] = sum[2][l] = sum[3][l] = 0;
          }
          if (at.group < shape.last2) e = entry_at(at);
        }
      }
      sums.put(total, warp);
    }
  }
};

}  // namespace moe::mlp::few
