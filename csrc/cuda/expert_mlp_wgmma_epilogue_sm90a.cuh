// What the consumer warpgroups of `wgmma` do with their sums: bias, activation, rounding, and rows of 128 or 256 bytes
// to global memory by way of 16 KiB of shared memory that are theirs.
//
// A warpgroup holds two or four tiles of 64 weight rows: thread t holds of tile a, in sum[a][4j + 2h + l], weight row
// 16 (t / 32) + 8h + t % 32 / 4 and token 8j + 2 (t % 4) + l. For gate_up h is 0 for a gate row and 1 for its up row.
// Two tiles are written at a time, in chunks of tokens that take the two halves of the 16 KiB in turn: so a barrier a
// chunk is enough.
//
// GENERAL adds row weights, `projected` and Finish: few calls need them, and so they have a kernel of their own, whose
// code does not lie between that of the others.
#pragma once
#include "expert_mlp_wgmma_sm90a.cuh"

namespace moe::mlp::wgmma {

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}
template <class T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// swiglu() of swiglu.cuh by approximations within a few ulp, NaN in, NaN out.
struct Activation {
  float slope, beta, limit;
  explicit __device__ __forceinline__ Activation(const SwiGLU& p)
      : slope(-1.44269504f * p.alpha), beta(p.beta), limit(p.limit > 0 ? p.limit : __builtin_inff()) {}

  __device__ __forceinline__ float operator()(float g, float u) const {
    float power, reciprocal;
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(g) : "f"(limit));
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(u) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(u) : "f"(-limit));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(slope * g));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
    return (u + beta) * (g * reciprocal);
  }
};

__device__ __forceinline__ float weight_of_row(const RowWeights& weights, int32_t row) {
  const int32_t choice = weights.order[row];
  return choice >= 0 && choice < weights.choices ? weights.weights[choice] : 0.0f;
}

// Copies tokens `begin` .. `begin` + TOKENS - 1 from shared memory, PIECES pieces of 16 bytes each, piece q of token t
// at place q ^ (t % 8); `out` is where token 0 goes in global memory, of which `pieces` pieces exist.
template <int TOKENS, int PIECES>
__device__ __forceinline__ void write_rows(uint32_t from, char* out, int64_t stride, int begin, int tokens, int pieces,
                                           int thread) {
  constexpr int kAtOnce = 128 / PIECES, kTimes = (TOKENS + kAtOnce - 1) / kAtOnce;
  const int piece = thread % PIECES, first = thread / PIECES;
  char* to = out + (begin + first) * stride + piece * 16;
  from += first * (PIECES * 16) + (piece ^ (first % 8)) * 16;
  tokens = piece < pieces ? min(tokens - begin, TOKENS) - first : 0;
  int4 values[kTimes];
#pragma unroll
  for (int i = 0; i < kTimes; i++) values[i] = hopper::load_shared(from + i * (kAtOnce * PIECES * 16));
#pragma unroll
  for (int i = 0; i < kTimes; i++) {
    if (i * kAtOnce < tokens) *reinterpret_cast<int4*>(to + i * kAtOnce * stride) = values[i];
  }
}

// Of a warpgroup's weight tiles: half of a block's or all.
template <int TILES>
__device__ __forceinline__ int32_t first_tile(const Item& item, int group) {
  return item.block * kBlockTiles + (TILES == kBlockTiles ? 0 : group * TILES);
}

// The activations of gate_up. `staging`: 16 KiB.
template <int N, class T, bool GENERAL, int TILES>
__device__ __forceinline__ void write_active(const Params& p, const Item& item, float (&sum)[TILES][N / 2],
                                             uint32_t staging, int group, int thread) {
  constexpr int kGroups = N / 8;  // of 8 tokens
  constexpr int kChunk = 8;       // groups at a time: 8 KiB
  constexpr int kChunks = (kGroups + kChunk - 1) / kChunk;
  const int warp = thread / 32, lane = thread % 32;
  const int32_t first_i = first_tile<TILES>(item, group) * 32;  // column of `active`
  if (GENERAL && p.weights.order != nullptr) {
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const int token = 8 * j + 2 * (lane % 4) + l;
        const float w = token < item.rows.rows ? weight_of_row(p.weights, item.rows.first + token) : 0.0f;
#pragma unroll
        for (int a = 0; a < TILES; a++) sum[a][4 * j + l] *= w, sum[a][4 * j + 2 + l] *= w;
      }
    }
  }
  if (p.b13 != nullptr) {
#pragma unroll
    for (int a = 0; a < TILES; a++) {
      const int32_t i = first_i + a * 32 + warp * 8 + lane / 4;
      const float* b13 = p.b13 + int64_t{item.rows.expert} * 2 * p.I + i;
      const float gate = i < p.I ? b13[0] : 0.0f, up = i < p.I ? b13[p.I] : 0.0f;
#pragma unroll
      for (int j = 0; j < kGroups; j++) {
        sum[a][4 * j] += gate, sum[a][4 * j + 1] += gate, sum[a][4 * j + 2] += up, sum[a][4 * j + 3] += up;
      }
    }
  }
  if (GENERAL && p.projected != nullptr) {
    T* out = static_cast<T*>(p.projected);
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const int token = 8 * j + 2 * (lane % 4) + l;
        if (token >= item.rows.rows) continue;
#pragma unroll
        for (int a = 0; a < TILES; a++) {
          const int32_t i = first_i + a * 32 + warp * 8 + lane / 4;
          if (i >= p.I) continue;
          T* row = out + int64_t{item.rows.first + token} * 2 * p.I;
          row[i] = rounded<T>(sum[a][4 * j + l]);
          row[p.I + i] = rounded<T>(sum[a][4 * j + 2 + l]);
        }
      }
    }
    return;
  }
  const int64_t stride = p.product[1].in_stride * int64_t{16};
  char* out = static_cast<char*>(p.active) + item.rows.first * stride + first_i * 2;
  const int pieces = (p.I - first_i) / 8;
  const Activation activation(p.swiglu);
  const auto value = [&](int a, int j) {
    return pack<T>(activation(sum[a][4 * j], sum[a][4 * j + 2]), activation(sum[a][4 * j + 1], sum[a][4 * j + 3]));
  };
  // Matrices of a store: groups j and j + 1 of the first tile, of the second.
  const uint32_t to = staging + (lane / 16 * 8 + lane % 8) * 128 + ((lane / 8 % 2 * 4 + warp) ^ (lane % 8)) * 16;
#pragma unroll
  for (int a = 0; a < TILES; a += 2) {
#pragma unroll
    for (int c = 0; c < kGroups; c += kChunk) {
      const uint32_t half = (a / 2 * kChunks + c / kChunk) % 2 * 8192;
#pragma unroll
      for (int j = c; j < c + kChunk && j < kGroups; j += 2) {
        if (j + 1 < kGroups) {
          hopper::store_transposed(to + half + (j - c) * 1024, value(a, j), value(a + 1, j), value(a, j + 1),
                                   value(a + 1, j + 1));
        } else {
          hopper::store_transposed(to + half + (j - c) * 1024, value(a, j), value(a + 1, j));
        }
      }
      hopper::named_barrier(1 + group, 128);
      constexpr int kLast = kGroups % kChunk == 0 ? kChunk : kGroups % kChunk;
      char* rows = out + a * 64;
      if (c + kChunk <= kGroups) {
        write_rows<8 * kChunk, 8>(staging + half, rows, stride, 8 * c, item.rows.rows, pieces - a * 4, thread);
      } else {
        write_rows<8 * kLast, 8>(staging + half, rows, stride, 8 * c, item.rows.rows, pieces - a * 4, thread);
      }
    }
  }
}

// The rows of down. `staging`: 16 KiB.
template <int N, class T, bool GENERAL, int TILES>
__device__ __forceinline__ void write_out(const Params& p, const Item& item, float (&sum)[TILES][N / 2],
                                          uint32_t staging, int group, int thread) {
  constexpr int kGroups = N / 8;  // of 8 tokens
  constexpr int kChunk = 4;       // groups at a time: 8 KiB
  constexpr int kChunks = (kGroups + kChunk - 1) / kChunk;
  const int warp = thread / 32, lane = thread % 32;
  const int32_t first_h = first_tile<TILES>(item, group) * 64;  // column of the output
  if (p.b2 != nullptr) {
#pragma unroll
    for (int m = 0; m < 2 * TILES; m++) {
      const int32_t h = first_h + m / 2 * 64 + warp * 16 + m % 2 * 8 + lane / 4;
      const float bias = h < p.H ? p.b2[int64_t{item.rows.expert} * p.H + h] : 0.0f;
#pragma unroll
      for (int j = 0; j < kGroups; j++) {
        sum[m / 2][4 * j + m % 2 * 2] += bias;
        sum[m / 2][4 * j + m % 2 * 2 + 1] += bias;
      }
    }
  }
  if (GENERAL && (p.finish.gates != nullptr || p.finish.routed != nullptr)) {
    const T* routed = static_cast<const T*>(p.finish.routed);
#pragma unroll
    for (int j = 0; j < kGroups; j++) {
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const int token = 8 * j + 2 * (lane % 4) + l;
        if (token >= item.rows.rows) continue;
        const int64_t row = item.rows.first + token;
        const float gate = p.finish.gates != nullptr ? p.finish.gates[row] : 1.0f;
#pragma unroll
        for (int m = 0; m < 2 * TILES; m++) {
          const int32_t h = first_h + m / 2 * 64 + warp * 16 + m % 2 * 8 + lane / 4;
          float& value = sum[m / 2][4 * j + m % 2 * 2 + l];
          value *= gate;
          if (routed != nullptr && h < p.H) value += to_float(routed[row * p.H + h]);
        }
      }
    }
  }
  const int64_t stride = int64_t{p.H} * 2;
  char* out = static_cast<char*>(p.finish.out) + item.rows.first * stride + first_h * 2;
  const int pieces = (p.H - first_h) / 8;
  // Matrices of a store: the upper and lower 8 rows of the first tile, of the second.
  const uint32_t to = staging + lane % 8 * 256 + ((lane / 16 * 8 + 2 * warp + lane / 8 % 2) ^ (lane % 8)) * 16;
#pragma unroll
  for (int a = 0; a < TILES; a += 2) {
#pragma unroll
    for (int c = 0; c < kGroups; c += kChunk) {
      const uint32_t half = (a / 2 * kChunks + c / kChunk) % 2 * 8192;
#pragma unroll
      for (int j = c; j < c + kChunk && j < kGroups; j++) {
        hopper::store_transposed(to + half + (j - c) * 2048, pack<T>(sum[a][4 * j], sum[a][4 * j + 1]),
                                 pack<T>(sum[a][4 * j + 2], sum[a][4 * j + 3]),
                                 pack<T>(sum[a + 1][4 * j], sum[a + 1][4 * j + 1]),
                                 pack<T>(sum[a + 1][4 * j + 2], sum[a + 1][4 * j + 3]));
      }
      hopper::named_barrier(1 + group, 128);
      constexpr int kLast = kGroups % kChunk == 0 ? kChunk : kGroups % kChunk;
      char* rows = out + a * 128;
      if (c + kChunk <= kGroups) {
        write_rows<8 * kChunk, 16>(staging + half, rows, stride, 8 * c, item.rows.rows, pieces - a * 8, thread);
      } else {
        write_rows<8 * kLast, 16>(staging + half, rows, stride, 8 * c, item.rows.rows, pieces - a * 8, thread);
      }
    }
  }
}

}  // namespace moe::mlp::wgmma
