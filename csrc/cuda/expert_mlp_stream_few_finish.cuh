// What follows a product in the streaming expert MLP for few tokens: one warp, so that nobody who multiplies waits for
// other blocks or for a fence, which take microseconds while the memory is busy.
#pragma once
#include "expert_mlp_stream_few.cuh"
#include "swiglu.cuh"

namespace moe::mlp::few {

// The sums of a unit's 16 rows, from the warps that multiply to the one that finishes; `fragment` counts units.
struct Sums {
  const Args& a;
  Shared& s;
  float* memory;
  int fragment = 0;
  __device__ __forceinline__ Sums(const Args& a, Shared& s, char* memory)
      : a(a), s(s), memory(reinterpret_cast<float*>(memory + a.layout.sums)) {}
  __device__ __forceinline__ float* row(int warp, int row) const {
    return memory + ((fragment % kBuffers * kWarps + warp) * 16 + row) * ((a.T + 1) & ~1);
  }
  __device__ __forceinline__ void put(const float (&sum)[4], int warp) {
    const int lane = static_cast<int>(threadIdx.x) % 32, token = lane % 4 * 2, buffer = fragment % kBuffers;
    hopper::barrier_wait(hopper::shared_address(s.finished + buffer), (fragment / kBuffers & 1) ^ 1);
    if (token < a.T) {
      *reinterpret_cast<float2*>(row(warp, lane / 4) + token) = make_float2(sum[0], sum[1]);
      *reinterpret_cast<float2*>(row(warp, lane / 4 + 8) + token) = make_float2(sum[2], sum[3]);
    }
    __syncwarp();
    if (lane == 0) hopper::barrier_arrive(hopper::shared_address(s.summed + buffer));
    fragment++;
  }
  __device__ __forceinline__ void await() const {
    hopper::barrier_wait(hopper::shared_address(s.summed + fragment % kBuffers), fragment / kBuffers & 1);
  }
  __device__ __forceinline__ float get(int r, int token) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += row(w, r)[token];
    return sum;
  }
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) hopper::barrier_arrive(hopper::shared_address(s.finished + fragment % kBuffers));
    fragment++;
  }
};

// What follows the sums of a unit: one warp.
template <class T>
struct Finisher {
  const Args& a;
  const Shape& shape;
  Shared& s;
  int lane;
  Sums sums;

  __device__ __forceinline__ Finisher(const Args& a, const Shape& shape, Shared& s, char* memory)
      : a(a), shape(shape), s(s), lane(static_cast<int>(threadIdx.x) % 32), sums(a, s, memory) {}

  __device__ __forceinline__ void gate_up() {
    int unit = shape.lo / shape.slices1, whole = 0;
    for (int begin = shape.lo, end; begin < shape.hi; begin = end, unit++) {
      end = min((unit + 1) * shape.slices1, shape.hi);
      const bool begun = begin > unit * shape.slices1;
      finish_unit(unit, begun, end);
      whole += !begun;
    }
    __syncwarp();
    if (lane == 0 && whole > 0) hopper::add_release(a.counters + gridDim.x, whole);
  }

  // A unit whose beginning is in this span is finished, the rest of one is left to who has its beginning. end: the
  // first slice of it that is not in this span.
  __device__ __forceinline__ void finish_unit(int unit, bool begun, int end) {
    const int entry = unit / shape.units1, i = (unit - entry * shape.units1) * 8 + lane % 8;
    const int last = (unit + 1) * shape.slices1 - 1;
    const bool cut = !begun && end <= last;
    const int first_part = cut ? shape.owner(end) : 0, last_part = cut ? shape.owner(last) : -1;
    if (cut) {  // before the wait for this block's own sums
      int32_t* counter = a.counters + blockIdx.x;
      if (lane == 0) {
        while (hopper::load_acquire(counter) != last_part - first_part + 1) {
        }
        *counter = 0;
      }
      __syncwarp();
    }
    const int token = lane / 8;
    const bool there = token < a.T;
    float2 sum = make_float2(0, 0);
    for (int block = first_part; there && block <= last_part; block++) {
      const float2 more = __ldcg(part(block, token));
      sum.x += more.x, sum.y += more.y;
    }
    sums.await();
    if (there) sum.x += sums.get(lane % 8, token), sum.y += sums.get(lane % 8 + 8, token);
    sums.release();
    if (there && begun) __stcg(part(blockIdx.x, token), sum);
    if (there && !begun) activate(entry, token, i, sum.x, sum.y);
    if (!begun) return;
    __syncwarp();
    if (lane == 0) hopper::add_release(a.counters + shape.owner(unit * shape.slices1), 1);
  }
  __device__ __forceinline__ void activate(int entry, int token, int i, float gate, float up) {
    const int row = s.row[entry][token];
    if (row < 0) return;
    const float weight = a.weights_on_input ? s.weight[row] : 1.0f;
    float bias_g = 0, bias_u = 0;
    if (a.experts.b13 != nullptr) {
      const float* b13 = a.experts.b13 + int64_t{s.slot[entry]} * 2 * a.I + i;
      bias_g = b13[0], bias_u = b13[a.I];
    }
    const float value = swiglu(a.swiglu, gate * weight + bias_g, up * weight + bias_u);
    static_cast<T*>(a.active)[int64_t{row} * a.I + i] = narrow<T>(value);
  }
  // A block's part of a unit: gate and up of 8 rows
  __device__ __forceinline__ float2* part(int block, int token) const {
    return reinterpret_cast<float2*>(a.parts) + (int64_t{block} * a.T + token) * 8 + lane % 8;
  }

  __device__ __forceinline__ void down() {
    for (int group = shape.first2; group < shape.last2; group += 2) {
      const int rows = shape.groups_of(group) * 8;
      sums.await();
      for (int j = lane; j < rows * a.T; j += 32) {
        const int token = j / rows, r = j - token * rows;
        store(token, group * 8 + r, sums.get(r, token));
      }
      sums.release();
    }
  }
  __device__ __forceinline__ void store(int token, int h, float x) {
    const int64_t at = int64_t{token} * a.H + h;
    if (a.zero > 0 && s.zeros[token] != 0) x = fmaf(s.zeros[token], widen(static_cast<const T*>(a.hidden)[at]), x);
    x *= a.gates != nullptr ? a.output_scale * a.gates[token] : a.output_scale;
    if (a.routed != nullptr) x += widen(static_cast<const T*>(a.routed)[at]);
    static_cast<T*>(a.output)[at] = narrow<T>(x);
  }
};

}  // namespace moe::mlp::few
