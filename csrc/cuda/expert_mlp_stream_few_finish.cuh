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
    hopper::barrier_arrive(hopper::shared_address(s.summed + buffer));
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
    hopper::barrier_arrive(hopper::shared_address(s.finished + fragment % kBuffers));
    fragment++;
  }
};

// What follows the sums of a unit: one warp.
template <class T>
struct Finisher {
  const Args& a;
  const Shape& shape;
  Shared& s;
  int lane, token;  // of a unit's sums
  Sums sums;

  __device__ __forceinline__ Finisher(const Args& a, const Shape& shape, Shared& s, char* memory)
      : a(a), shape(shape), s(s), lane(static_cast<int>(threadIdx.x) % 32), token(lane / 8), sums(a, s, memory) {}

  // A unit whose beginning is in this span is finished, the rest of one is left to who has its beginning.
  __device__ __forceinline__ void gate_up() {
    if (shape.lo == shape.hi) return;
    const int first = shape.unit, last = (shape.hi - 1) / shape.slices1, first_here = first + begun(first);
    const bool cut = first_here <= last && shape.hi < (last + 1) * shape.slices1;
    float2 rest = make_float2(0, 0);  // of the last unit, from others
    int entry = shape.entry, in_entry = first - entry * shape.units1;
    for (int unit = first; unit <= last; unit++, in_entry++) {
      if (in_entry == shape.units1) entry++, in_entry = 0;
      // It has long been there: the next span begins with it.
      if (cut && unit == max(last - 1, first_here)) rest = fetch_rest(last);
      float2 sum = unit == last ? rest : make_float2(0, 0);
      const Place place = place_of(entry, in_entry * 8 + lane % 8);
      sums.await();
      if (token < a.T) sum.x += sums.get(lane % 8, token), sum.y += sums.get(lane % 8 + 8, token);
      sums.release();
      if (begun(unit)) {
        leave_rest(sum);
      } else {
        activate(place, sum.x, sum.y);
      }
    }
    __syncwarp();
    if (lane == 0) hopper::add_relaxed(a.counters, last + 1 - first_here);
  }
  __device__ __forceinline__ bool begun(int unit) const { return unit * shape.slices1 < shape.lo; }

  // Gate and up of 8 rows, from a block to the one that has the unit's beginning
  __device__ __forceinline__ uint32_t* part(int block) const {
    return a.parts + ((block * a.T + token) * 8 + lane % 8) * 2;
  }
  __device__ __forceinline__ void leave_rest(float2 sum) const {
    if (token < a.T) {
      hopper::store_relaxed(part(blockIdx.x), word_of(__float_as_uint(sum.x)), word_of(__float_as_uint(sum.y)));
    }
  }
  __device__ __forceinline__ float2 fetch_rest(int unit) const {
    float2 sum = make_float2(0, 0);
    if (token >= a.T) return sum;
    const int last = shape.owner((unit + 1) * shape.slices1 - 1);
    for (int block = shape.owner(shape.hi); block <= last; block++) {
      uint2 words;
      do {
        words = hopper::load_relaxed2(part(block));
      } while (words.x == 0 || words.y == 0);
      hopper::store_relaxed(part(block), 0, 0);
      sum.x += __uint_as_float(~words.x), sum.y += __uint_as_float(~words.y);
    }
    return sum;
  }
  // What is known of this lane's activation of a unit before its sums
  struct Place {
    int at;  // in the activations, or -1
    float weight, bias_g, bias_u;
  };
  __device__ __forceinline__ Place place_of(int entry, int i) const {
    const int row = s.row[entry][token];
    Place p = {row >= 0 ? row * a.I + i : -1, 1, 0, 0};
    if (a.weights_on_input && row >= 0) p.weight = s.weight[entry][token];
    if (a.experts.b13 != nullptr) {
      const float* b13 = a.experts.b13 + int64_t{s.slot[entry]} * 2 * a.I + i;
      p.bias_g = b13[0], p.bias_u = b13[a.I];
    }
    return p;
  }
  __device__ __forceinline__ void activate(const Place& p, float gate, float up) const {
    const T value = narrow<T>(swiglu(a.swiglu, gate * p.weight + p.bias_g, up * p.weight + p.bias_u));
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(&value), next = __shfl_down_sync(kAll, bits, 1);
    if (p.at >= 0 && lane % 2 == 0) hopper::store_relaxed(a.active + p.at / 2, word_of(bits | next << 16));
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
