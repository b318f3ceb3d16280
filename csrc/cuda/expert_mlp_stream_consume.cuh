// The consumers of the streaming expert MLP. A warpgroup multiplies one tile of 64 rows of weights by the rows of an
// entry; what follows a product is each warp's own business for its 16 rows of weights: no barrier between warps.
#pragma once
#include "expert_mlp_stream.cuh"
#include "swiglu.cuh"
#include "tensor_tile.cuh"

namespace moe::mlp::stream {

// f(N) as a type for the N columns of the product
template <class F>
__device__ __forceinline__ void with_columns(int columns, F f) {
  switch (columns) {
    case 8: return f(std::integral_constant<int, 8>{});
    case 16: return f(std::integral_constant<int, 16>{});
    case 24: return f(std::integral_constant<int, 24>{});
    case 32: return f(std::integral_constant<int, 32>{});
    case 48: return f(std::integral_constant<int, 48>{});
    case 64: return f(std::integral_constant<int, 64>{});
    case 96: return f(std::integral_constant<int, 96>{});
    default: return f(std::integral_constant<int, 128>{});
  }
}

// Parts of cut blocks: who begins a block waits for the others and adds them up.
__device__ __forceinline__ void announce_part(int32_t* counter) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) hopper::add_release(counter, 1);
}
__device__ __forceinline__ void await_parts(int32_t* counter, int parts) {
  if (threadIdx.x % 32 == 0) {
#ifdef MOE_STREAM_WATCHDOG
    const long long begin = clock64();
#endif
    while (hopper::load_acquire(counter) != parts) {
#ifdef MOE_STREAM_WATCHDOG
      if (clock64() - begin > 3000000000ll) {
        printf("block %d warp %d waits for parts: %d of %d\n", blockIdx.x, threadIdx.x / 32, *counter, parts);
        __trap();
      }
#endif
    }
    *counter = 0;
  }
  __syncwarp();
}

template <class T>
struct Consumer {
  const Args& a;
  const Shape& shape;
  const Entry* list;
  const PlanRow* rows;
  Barriers* barriers;
  char* memory;
  int repeats;
  int warp, lane, half;  // of 8; half: which tile of a step
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ Consumer(const Args& a, const Shape& shape, const Entry* list, const PlanRow* rows,
                                      Barriers* barriers, char* memory, int repeats)
      : a(a),
        shape(shape),
        list(list),
        rows(rows),
        barriers(barriers),
        memory(memory),
        repeats(repeats),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(hopper::lane_id()),
        half(warp / 4) {}

  // Waits for the next step's weights and rows; where the rows are.
  __device__ __forceinline__ int await_step(int product, RowRing& ring, int size) {
    const int at = ring.take(size);
    wait(barriers->weights_full + stage, parity, 3);
    wait(barriers->rows_full[product] + ring.stage, ring.parity, 4 + product);
    return at;
  }
  __device__ __forceinline__ void next_step(RowRing& ring) {
    ring.next();
    if (++stage == a.layout.stages) stage = 0, parity ^= 1;
  }

  // sum = tile rows x the N rows in the ring, over `steps` steps
  template <int N>
  __device__ __forceinline__ void multiply(float (&sum)[N / 2], int product, RowRing& ring, int steps) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] = 0;
    if constexpr (N <= kFewRows) {
      multiply_few<N>(sum, product, ring, steps);
    } else {
      multiply_many<N>(sum, product, ring, steps);
    }
  }

  // By mma.sync: less ceremony a step than wgmma, which is what counts while there are few rows
  template <int N>
  __device__ __forceinline__ void multiply_few(float (&sum)[N / 2], int product, RowRing& ring, int steps) {
    constexpr int kChains = N == 8 ? 2 : 1;  // of dependent products
    const int r = lane % 8;
    const uint32_t weights = hopper::shared_address(memory) + half * kTileBytes +
                             (warp % 4 * 16 + lane / 8 % 2 * 8 + r) * 128 + ((lane / 16 ^ r) << 4);
    const uint32_t rows_at = hopper::shared_address(memory) + a.layout.ring + r * 128 + ((lane / 8 ^ r) << 4);
    float c[kChains][N / 8][4] = {};
    for (int step = 0; step < steps; step++) {
      const uint32_t y = rows_at + await_step(product, ring, N * 128), x = weights + stage * kStepBytes;
      uint32_t left[4][4], right[N / 8][2][4];
#pragma unroll
      for (int k = 0; k < 4; k++) load_matrices(left[k], x ^ (k << 5));
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int k = 0; k < 2; k++) load_matrices(right[j][k], (y ^ (k << 6)) + j * 1024);
      }
      release(stage, ring.stage, product);
#pragma unroll
      for (int k = 0; k < 4; k++) {
#pragma unroll
        for (int j = 0; j < N / 8; j++)
          mma_16x8x16(c[k % kChains][j], left[k], right[j][k / 2] + k % 2 * 2, static_cast<T*>(nullptr));
      }
      next_step(ring);
    }
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) sum[4 * j + i] = kChains == 1 ? c[0][j][i] : c[0][j][i] + c[kChains - 1][j][i];
    }
  }

  template <int N>
  __device__ __forceinline__ void multiply_many(float (&sum)[N / 2], int product, RowRing& ring, int steps) {
    const uint32_t weights = hopper::shared_address(memory) + half * kTileBytes;
    const uint32_t rows_at = hopper::shared_address(memory) + a.layout.ring;
    int last_stage = 0, last_row_stage = 0;
    for (int step = 0; step < steps; step++) {
      const int at = await_step(product, ring, N * 128);
      if (product == 0) hopper::fence_proxy_shared();  // rows of gate_up are written by ordinary copies
      const uint64_t x = hopper::describe(weights + stage * kStepBytes), y = hopper::describe(rows_at + at);
      hopper::product_fence();
#pragma unroll
      for (int k = 0; k < 4; k++) hopper::product<N, T>(sum, x + 2 * k, y + 2 * k, true);
      hopper::product_commit();
      if (step > 0) {
        hopper::product_wait<1>();
        release(last_stage, last_row_stage, product);
      }
      last_stage = stage, last_row_stage = ring.stage;
      next_step(ring);
    }
    hopper::product_wait<0>();
    release(last_stage, last_row_stage, product);
#pragma unroll
    for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(sum[i])::"memory");  // not to be read before the wait
  }
  __device__ __forceinline__ void release(int weights, int rows, int product) {
    arrive(barriers->weights_free + weights);
    arrive(barriers->rows_free[product] + rows);
  }

  __device__ __forceinline__ float* part(int owner) const {
    return a.parts + (int64_t{owner} * kConsumerWarps + warp) * a.part_rows * 16;
  }

  // For a block of rows that is cut: true with the whole sum where this span begins the block, else the part is left to
  // who does.
  template <int N>
  __device__ __forceinline__ bool gather_sum(float (&sum)[N / 2], const Span& span, int first_step, int last_step) {
    const int first = span.owner(first_step), last = span.owner(last_step), me = static_cast<int>(blockIdx.x);
    int32_t* counter = part_counter(a, 0, first, warp);
    if (me != first) {
      float4* mine = reinterpret_cast<float4*>(part(me)) + lane;
#pragma unroll
      for (int i = 0; i < N / 8; i++)
        __stcg(mine + 32 * i, make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
      announce_part(counter);
      return false;
    }
    await_parts(counter, last - first);
#pragma unroll(N <= 16 ? 4 : 1)
    for (int owner = first + 1; owner <= last; owner++) {
      const float4* from = reinterpret_cast<const float4*>(part(owner)) + lane;
#pragma unroll
      for (int i = 0; i < N / 8; i++) {
        const float4 v = __ldcg(from + 32 * i);
        sum[4 * i] += v.x, sum[4 * i + 1] += v.y, sum[4 * i + 2] += v.z, sum[4 * i + 3] += v.w;
      }
    }
    return true;
  }

  // gate_up of one block of 128 packed rows: 64 activations of each of the entry's rows, 8 of them this warp's
  template <int N>
  __device__ __forceinline__ void activate(const float (&sum)[N / 2], const Entry& entry, int block) {
    const int r = lane / 4, i = block * 64 + warp * 8 + r, rows8 = (entry.rows + 7) & ~7;
    float bias_g = 0, bias_u = 0;
    if (a.experts.b13 != nullptr && i < a.I) {
      bias_g = a.experts.b13[int64_t{entry.slot} * 2 * a.I + i];
      bias_u = a.experts.b13[int64_t{entry.slot} * 2 * a.I + a.I + i];
    }
    T* out = static_cast<T*>(a.active) + (int64_t{entry.first8} * shape.along_i + int64_t{block} * rows8) * 64;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const int n = 8 * j + lane % 4 * 2 + l;
        if (n >= entry.rows) continue;
        const float weight = a.weights_on_input ? rows[entry.first + n].weight : 1.0f;
        const float value = swiglu(a.swiglu, sum[4 * j + l] * weight + bias_g, sum[4 * j + 2 + l] * weight + bias_u);
        out[n * 64 + ((warp ^ (n & 7)) << 3) + r] = narrow<T>(i < a.I ? value : 0.0f);
      }
    }
    hopper::fence_proxy();  // the copy engine reads them
    __syncwarp();
    if (lane == 0) hopper::add_release(ready_counter(a), 1);
  }

  __device__ __forceinline__ void gate_up() {
    const Span span(shape.steps1());
    RowRing ring{a.layout.ring_bytes};
    for_segments(span, shape.along_h, [&](int block, int from, int to) {
      const Entry entry = list[block % shape.entries];
      with_columns(columns_for(entry.rows), [&](auto n) {
        constexpr int N = n();
        float sum[N / 2];
        multiply<N>(sum, 0, ring, to - from);
        if (to - from < shape.along_h) {
          const int first = block * shape.along_h;
          if (!gather_sum<N>(sum, span, first, first + shape.along_h - 1)) return;
        }
        activate<N>(sum, entry, block / shape.entries);
      });
    });
  }

  // This warp's sums of down: [T][16] f32, h swapped by 8 where bit 1 of the token is set (banks)
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(memory + a.layout.sums) + warp * a.T * 16;
  }
  static __device__ __forceinline__ int sum_at(int token, int h) { return token * 16 + (h ^ ((token & 2) << 2)); }

  template <int N>
  __device__ __forceinline__ void accumulate(const float (&sum)[N / 2], const Entry& entry, int h, bool bias) {
    const int r = lane / 4;
    float* out = sums();
    float bias0 = 0, bias1 = 0;
    if (bias && a.experts.b2 != nullptr) {
      const float* b2 = a.experts.b2 + int64_t{entry.slot} * a.H + h + r;
      if (h + r < a.H) bias0 = b2[0];
      if (h + r + 8 < a.H) bias1 = b2[8];
    }
    for (int round = 0; round <= repeats; round++) {
#pragma unroll
      for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int l = 0; l < 2; l++) {
          const int n = 8 * j + lane % 4 * 2 + l;
          if (n >= entry.rows) continue;
          const PlanRow row = rows[entry.first + n];
          if (row.round != round) continue;
          const float weight = a.weights_on_input ? 1.0f : row.weight;
          float *low = out + sum_at(row.token, r), *high = out + sum_at(row.token, r + 8);
          *low = fmaf(weight, sum[4 * j + l] + bias0, *low);
          *high = fmaf(weight, sum[4 * j + 2 + l] + bias1, *high);
        }
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ void clear() {
    float4* out = reinterpret_cast<float4*>(sums());
    for (int i = lane; i < a.T * 4; i += 32) out[i] = make_float4(0, 0, 0, 0);
    __syncwarp();
  }

  // Four values of a token: zero experts, scale, gate, routed, one rounding
  __device__ __forceinline__ void store_four(const float* zeros, int token, int h, float4 v) {
    if (h >= a.H) return;
    const int64_t at = int64_t{token} * a.H + h;
    float x[4] = {v.x, v.y, v.z, v.w};
    if (a.zero > 0 && zeros[token] != 0) {
      const Vec<T, 4> hidden = load<T, 4>(static_cast<const T*>(a.hidden) + at);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = fmaf(zeros[token], widen(hidden.v[i]), x[i]);
    }
    const float scale = a.gates != nullptr ? a.output_scale * a.gates[token] : a.output_scale;
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] *= scale;
    if (a.routed != nullptr) {
      const Vec<T, 4> routed = load<T, 4>(static_cast<const T*>(a.routed) + at);
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] += widen(routed.v[i]);
    }
    Vec<T, 4> out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[i] = narrow<T>(x[i]);
    store<T, 4>(static_cast<T*>(a.output) + at, out);
  }

  // Writes the output of rows h .. h + 15, or leaves the sums to who does.
  __device__ __forceinline__ void finish(const Span& span, int block, bool whole, int h) {
    const float* zeros = reinterpret_cast<const float*>(memory + a.layout.zeros);
    const int length = shape.entries * shape.along_i, all = a.T * 4;
    const float* own = sums();
    const auto own_four = [&](int i) { return *reinterpret_cast<const float4*>(own + sum_at(i / 4, i % 4 * 4)); };
    if (whole) {
      for (int i = lane; i < all; i += 32) store_four(zeros, i / 4, h + i % 4 * 4, own_four(i));
      return;
    }
    const int first = span.owner(block * length), last = span.owner(block * length + length - 1);
    const int me = static_cast<int>(blockIdx.x);
    int32_t* counter = part_counter(a, 1, first, warp);
    if (me != first) {
      float4* mine = reinterpret_cast<float4*>(part(me));
      for (int i = lane; i < all; i += 32) __stcg(mine + i, own_four(i));
      return announce_part(counter);
    }
    await_parts(counter, last - first);
    constexpr int kEach = 4;
    for (int i = lane; i < all; i += 32 * kEach) {
      float4 sum[kEach] = {};
#pragma unroll
      for (int k = 0; k < kEach; k++) {
        if (i + 32 * k < all) sum[k] = own_four(i + 32 * k);
      }
#pragma unroll 2
      for (int owner = first + 1; owner <= last; owner++) {
        const float4* from = reinterpret_cast<const float4*>(part(owner));
        float4 v[kEach] = {};
#pragma unroll
        for (int k = 0; k < kEach; k++) {
          if (i + 32 * k < all) v[k] = __ldcg(from + i + 32 * k);
        }
#pragma unroll
        for (int k = 0; k < kEach; k++) sum[k].x += v[k].x, sum[k].y += v[k].y, sum[k].z += v[k].z, sum[k].w += v[k].w;
      }
#pragma unroll
      for (int k = 0; k < kEach; k++) {
        const int at = i + 32 * k;
        if (at < all) store_four(zeros, at / 4, h + at % 4 * 4, sum[k]);
      }
    }
  }

  __device__ __forceinline__ void down() {
    const Span span(shape.steps2());
    if (shape.entries == 0) {
      clear();
      for (int block = blockIdx.x; block < shape.blocks2; block += gridDim.x)
        finish(span, block, true, block * 128 + warp * 16);
      return;
    }
    RowRing ring{a.layout.ring_bytes};
    const int length = shape.entries * shape.along_i;
    bool begun = false;
    for_segments(span, shape.along_i, [&](int unit, int from, int to) {
      const int block = unit / shape.entries, e = unit - block * shape.entries, h = block * 128 + warp * 16;
      const bool there = 2 * block + half < shape.tiles2;
      const Entry entry = list[e];
      if (!begun) clear();
      begun = true;
      with_columns(columns_for(entry.rows), [&](auto n) {
        constexpr int N = n();
        float sum[N / 2];
        multiply<N>(sum, 1, ring, to - from);
        if (there) accumulate<N>(sum, entry, h, from == 0);
      });
      const int at = unit * shape.along_i + to;
      if (at == span.hi || at == (block + 1) * length) {
        const bool whole = span.lo <= block * length && (block + 1) * length <= span.hi;
        if (there) finish(span, block, whole, h);
        begun = false;
        __syncwarp();
      }
    });
  }
};

}  // namespace moe::mlp::stream
