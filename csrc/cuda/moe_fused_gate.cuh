// What the kernels of moe_fused_gate share: their arguments, scores, and how one choice becomes a column of the row.
//
// Legend: T tokens, E experts (columns of logits), K routed choices, n shared experts, C = K + n columns.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../ops.h"
#include "load_counters.h"
#include "programmatic.cuh"

namespace moe::gate {

// What a call may ask for besides eight choices by sums of two under a bias, for every token.
enum Asks : uint32_t {
  kMapped = 1,       // an id map
  kCounted = 2,      // the load
  kShared = 4,       // shared experts
  kCaptured = 8,     // logical ids
  kPadded = 16,      // tokens that are not valid
  kUnbiased = 32,    // no bias
  kOneBest = 64,     // groups by their best alone
  kFewer = 128,      // fewer choices
  kMoved = 256,      // zero experts behind shared ones
  kUndivided = 512,  // weights that are not renormalised
  kAnything = 1023
};

// Constants that a launch finds cold are fetched a line of 64 bytes at a time, and arguments begin 16 bytes into one.
// The first line of them is all that gate_few reads where a call asks for nothing; the second has what it is asked for
// often.
struct Args {
  const void* logits;
  const float* bias;
  int32_t* ids;
  float* weights;
  int32_t tokens;  // T, where outputs have fewer than 2^31 cells
  float scale;
  uint32_t asks;  // of Asks
  int32_t columns;

  const int32_t* id_map;
  char* counters;                // of the load, on the device; null: none
  uint32_t rounds, round_magic;  // mulhi(t, magic) is t / rounds or one less
  int32_t map_row;               // ids in a row of the map: E + shared
  int32_t slots;
  uint32_t copy_mask, stride;        // of the counters: copies - 1, and bytes from one to the next
  int32_t K, routed, shared, valid;  // valid: what the host gave, from 0 to tokens
  float shared_weight;

  const int32_t* valid_device;
  int32_t* logical_ids;
  int64_t T, valid_host;
  bool two_best;  // the score of a group is the sum of its two best, not its best
  bool renormalize;
  DType dtype;
  Scoring scoring;
  Selection selection;
  int32_t E, zero;
  int32_t groups, group_size, top_groups;
  uint32_t group_magic;   // e * magic >> 20 is e / group_size
  uint32_t column_magic;  // mulhi(i, magic) is i / columns where columns are even, 0 where they are odd
  int32_t histogram;      // counters in shared memory, 0 where choices are counted one at a time
  uint32_t seed;
};
static_assert(offsetof(Args, id_map) == 48 && offsetof(Args, valid_device) == 48 + 64);

// Enqueues the op, which counts the load in `spread` where that has counters. `path` becomes the name of the kernel
// that was taken; `force` is for benchmarks and tests: lanes per token of the fast kernel, 100 more of the kernel for
// large batches, 1 for the general kernel, 0 for the choice of moe_fused_gate_launch.cu.
cudaError_t launch(const MoeFusedGate& p, const SpreadCounters& spread, int sm_count, cudaStream_t stream,
                   const char** path, int force = 0);

// gate_groups (moe_fused_gate_groups.cu): lanes per token that it takes for this, 0 where it does not cover it, and its
// launch. Logits and bias aligned to 16 bytes.
int group_lanes(const Args& a);
cudaError_t launch_groups(const Args& a, int lanes, int sms, cudaStream_t stream);

#ifdef __CUDACC__

inline constexpr unsigned kAll = 0xffffffffu;
inline constexpr float kLeastTotal = 0x1p-126f;  // of weights, none of which is smaller: where all are 0 they stay 0
inline constexpr float kLog2E = 1.4426950408889634f;

__device__ inline float nan_value() { return __int_as_float(0x7fffffff); }
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

template <class T>
__device__ inline float widen(T x);
template <>
__device__ inline float widen(float x) {
  return x;
}
template <>
__device__ inline float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ inline float widen(__half x) {
  return __half2float(x);
}

__device__ inline float load_logit(const Args& a, int64_t at) {
  if (a.dtype == DType::kF32) return static_cast<const float*>(a.logits)[at];
  if (a.dtype == DType::kBF16) return widen(static_cast<const __nv_bfloat16*>(a.logits)[at]);
  return widen(static_cast<const __half*>(a.logits)[at]);
}

__device__ inline int64_t valid_tokens(const Args& a) {
  const int64_t given = a.valid_device != nullptr ? *a.valid_device : a.valid_host;
  return given < 0 ? 0 : given < a.T ? given : a.T;
}

__device__ inline float fast_inverse(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / (1 + e^-x) within about 2e-7, two special-function instructions; the same x gives the same bits everywhere.
__device__ inline float fast_sigmoid(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -kLog2E));
  return fast_inverse(1.0f + power);
}

// e^(x - most) for top = most * kLog2E, two instructions. What top was rounded by is a common factor of all powers of a
// row, which their sum takes out. Defined for |most| < kMostLogit and x <= most.
inline constexpr float kMostLogit = 0x1p126f;
__device__ inline float power_under(float x, float top) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(fmaf(x, kLog2E, -top)));
  return result;
}

__device__ inline float sqrt_softplus(float x) {
  if (isnan(x)) return x;
  return __fsqrt_rn(x > 20.0f ? x : log1pf(expf(x)));
}

// Unsigned keys in the order of the floats: -0 equals 0, NaN is below -inf, and 0 is left for "no candidate".
__device__ inline uint32_t rank_key(float value) {
  if (isnan(value)) return 1;
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The float of a key that is no NaN.
__device__ inline float key_value(uint32_t key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Adds to a counter on the device. Every block has one of the copies.
__device__ __forceinline__ void add_load(const Args& a, uint32_t id, unsigned long long n) {
  const uint32_t at = (blockIdx.x & a.copy_mask) * a.slots + id;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(a.counters + uint64_t{at} * a.stride), "l"(n)
               : "memory");
}

__device__ inline void count_load(const Args& a, uint32_t* histogram, int32_t id) {
  if (static_cast<uint32_t>(id) >= static_cast<uint32_t>(a.slots)) return;
  if (a.histogram > 0) {
    atomicAdd(histogram + id, 1u);
  } else {
    add_load(a, id, 1);
  }
}

// t % rounds without a division
__device__ inline uint32_t map_round(const Args& a, int64_t t) {
  const uint32_t token = static_cast<uint32_t>(t);
  const uint32_t rest = token - __umulhi(token, a.round_magic) * a.rounds;
  return min(rest, rest - a.rounds);
}

__device__ inline int32_t mapped(const Args& a, uint32_t round, int32_t id) {
  return a.id_map == nullptr ? id : a.id_map[static_cast<int64_t>(round) * a.map_row + id];
}

// Outputs from token `first` on: the offsets of a warp's tokens fit into 32 bits.
struct Rows {
  int32_t *ids, *logical_ids;
  float* weights;
  __device__ Rows(const Args& a, int64_t first)
      : ids(a.ids + first * a.columns),
        logical_ids(a.logical_ids != nullptr ? a.logical_ids + first * a.K : nullptr),
        weights(a.weights + first * a.columns) {}
};

// Column `slot` of a valid token, a routed choice: `expert` is its column of logits, `at` the token after the first.
__device__ inline void write_choice(const Args& a, const Rows& rows, int at, uint32_t round, int slot, int32_t expert,
                                    float weight, uint32_t* histogram) {
  const int32_t logical = expert < a.routed ? expert : expert + a.shared;
  if (rows.logical_ids != nullptr) rows.logical_ids[at * a.K + slot] = logical;
  const int32_t id = mapped(a, round, logical);
  const int column = at * a.columns + slot;
  rows.ids[column] = id;
  rows.weights[column] = weight * a.scale;
  if (a.counters != nullptr) count_load(a, histogram, id);
}

__device__ inline void write_shared(const Args& a, const Rows& rows, int at, uint32_t round, int which,
                                    uint32_t* histogram) {
  const int32_t id = mapped(a, round, a.routed + which);
  const int column = at * a.columns + a.K + which;
  rows.ids[column] = id;
  rows.weights[column] = a.shared_weight;
  if (a.counters != nullptr) count_load(a, histogram, id);
}

// Column `column` of a padding row.
__device__ inline void write_padding(const Args& a, const Rows& rows, int at, int column) {
  rows.ids[at * a.columns + column] = -1;
  rows.weights[at * a.columns + column] = 0.0f;
  if (rows.logical_ids != nullptr && column < a.K) rows.logical_ids[at * a.K + column] = -1;
}

__device__ inline void clear_histogram(const Args& a, uint32_t* histogram) {
  for (int i = threadIdx.x; i < a.histogram; i += blockDim.x) histogram[i] = 0;
}

__device__ inline void add_histogram(const Args& a, const uint32_t* histogram) {
  for (int i = threadIdx.x; i < a.histogram; i += blockDim.x) {
    if (histogram[i] != 0) add_load(a, i, histogram[i]);
  }
}

#endif  // __CUDACC__

}  // namespace moe::gate
