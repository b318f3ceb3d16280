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
  Sums sums;

  __device__ __forceinline__ Worker(const Args& a, const Shape& shape, Shared& s, char* memory)
      : a(a),
        shape(shape),
        s(s),
        memory(memory),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32),
        sums(a, s, memory) {}

  __device__ __forceinline__ uint32_t place() const {
    return hopper::shared_address(memory) + (warp * a.layout.stages + stage) * kSliceBytes;
  }
  // sum += the next slice of weights x the tokens' rows. `rows`: this lane's row of them (ldmatrix), or zeros where
  // `there` is 0.
  __device__ __forceinline__ void multiply(float (&sum)[2][4], uint32_t rows, uint32_t there, int pieces) {
    const uint32_t weights = place() + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4), offset = lane / 8 * 16;
    hopper::barrier_wait(hopper::shared_address(s.full[warp] + stage), parity);
    if (pieces == kPieces) {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece++) multiply_piece(sum, weights, rows, there, offset, piece);
    } else {
#pragma unroll 1
      for (int piece = 0; piece < pieces; piece++) multiply_piece(sum, weights, rows, there, offset, piece);
    }
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(hopper::shared_address(s.free[warp] + stage));
    if (++stage == a.layout.stages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void multiply_piece(float (&sum)[2][4], uint32_t weights, uint32_t rows, uint32_t there,
                                                 uint32_t offset, int piece) {
    uint32_t left[4][4], right[2][4];
#pragma unroll
    for (int k = 0; k < 2; k++) load_matrices(right[k], rows + ((piece * 128 + k * 64 + offset) & there));
#pragma unroll
    for (int k = 0; k < 4; k++) load_matrices(left[k], (weights + piece * kPieceBytes) ^ (k << 5));
#pragma unroll
    for (int k = 0; k < 4; k++) mma_16x8x16(sum[k % 2], left[k], right[k / 2] + k % 2 * 2, static_cast<T*>(nullptr));
  }

  // gate_up -----------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void gate_up() {
    const bool there = lane % 8 < a.T;
    const uint32_t rows = hopper::shared_address(there ? memory + a.layout.hidden + lane % 8 * a.layout.hidden_pitch
                                                       : reinterpret_cast<char*>(s.nothing));
    hopper::barrier_wait(hopper::shared_address(&s.hidden), 0);
    int unit = shape.lo / shape.slices1, mine = shape.lo + warp;
    for (int begin = shape.lo, end; begin < shape.hi; begin = end, unit++) {
      const int unit_begin = unit * shape.slices1;
      end = min(unit_begin + shape.slices1, shape.hi);
      float sum[2][4] = {};
      for (; mine < end; mine += kWarps) {
        const int tile = (mine - unit_begin) * kPieces;
        multiply(sum, rows + (there ? tile * 128 : 0), there ? ~0u : 0u, min(kPieces, shape.along_h - tile));
      }
      float both[4];
#pragma unroll
      for (int l = 0; l < 4; l++) both[l] = sum[0][l] + sum[1][l];
      sums.put(both, warp);
    }
  }

  // All activations, once all blocks have written theirs
  __device__ __forceinline__ void fetch_active(int rows) {
    constexpr int kAtOnce = 4, kAll = 32 * kWarps;
    const int each = a.I / 8, total = rows * each;
    int32_t* ready = a.counters + gridDim.x;
    if (threadIdx.x == 0) {
      while (hopper::load_acquire(ready) != shape.entries * shape.units1) {
      }
    }
    hopper::named_barrier(1, kAll);
    for (int base = static_cast<int>(threadIdx.x); base < total; base += kAll * kAtOnce) {
      uint4 v[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        if (base + k * kAll < total) v[k] = __ldcg(static_cast<const uint4*>(a.active) + base + k * kAll);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        const int at = base + k * kAll, row = at / each;
        char* to = memory + a.layout.active + row * a.layout.active_pitch + (at - row * each) * 16;
        if (at < total) *reinterpret_cast<uint4*>(to) = v[k];
      }
    }
    hopper::named_barrier(1, kAll);
  }

  // down --------------------------------------------------------------------------------------------------------------

  // The products of one entry, and what they are multiplied by
  struct Weighted {
    float sum[2][4];
    uint32_t rows, there;  // for multiply
    int row[2];            // of this lane's two tokens, or -1
    float weight[2];
    const float* bias;
  };
  __device__ __forceinline__ void begin(Weighted& w, int entry) const {
    const int row = s.row[entry][lane % 8];
    w.there = row >= 0 ? ~0u : 0u;
    w.rows = hopper::shared_address(row >= 0 ? memory + a.layout.active + row * a.layout.active_pitch
                                             : reinterpret_cast<const char*>(s.nothing));
#pragma unroll
    for (int l = 0; l < 2; l++) {
      w.row[l] = s.row[entry][lane % 4 * 2 + l];
      w.weight[l] = a.weights_on_input || w.row[l] < 0 ? 1.0f : s.weight[w.row[l]];
    }
#pragma unroll
    for (int l = 0; l < 4; l++) w.sum[0][l] = w.sum[1][l] = 0;
    w.bias = nullptr;
  }
  __device__ __forceinline__ void add(float (&total)[4], const Weighted& w, int groups) const {
#pragma unroll
    for (int l = 0; l < 4; l++) {
      float value = w.sum[0][l] + w.sum[1][l];
      if (w.bias != nullptr && l / 2 < groups) value += w.bias[l / 2 * 8];
      if (w.row[l % 2] >= 0) total[l] = fmaf(w.weight[l % 2], value, total[l]);
    }
  }

  __device__ __forceinline__ void down() {
    DownWalk at(a, shape, warp);
    for (int group = shape.first2; group < shape.last2; group += 2) {
      const int groups = shape.groups_of(group);
      int begun = -1;
      float total[4] = {};
      Weighted w;
      for (; at.group == group; at.advance()) {
        if (at.entry != begun) {
          if (begun >= 0) add(total, w, groups);
          begin(w, begun = at.entry);
        }
        if (at.slice == 0 && a.experts.b2 != nullptr) {
          w.bias = a.experts.b2 + int64_t{s.slot[begun]} * a.H + group * 8 + lane / 4;
        }
        multiply(w.sum, w.rows + (at.slice * kPieces * 128 & w.there), w.there, at.pieces());
      }
      if (begun >= 0) add(total, w, groups);
      sums.put(total, warp);
    }
  }
};

}  // namespace moe::mlp::few
