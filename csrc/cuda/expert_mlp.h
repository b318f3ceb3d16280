// The expert MLP on tensor cores: what its kernels are called with. Three implementations, for bf16 and f16 rows with
// weights of the same dtype (experts_layout.h has how those lie in memory):
//
//   mma     expert_mlp_mma.cu            mma.sync, sm_80 and up; grouped rows
//   wgmma   expert_mlp_wgmma_sm90a.cu    Hopper; grouped rows, one persistent kernel for both products
//   stream  expert_mlp_stream_sm90a.cu   Hopper, few tokens: streams the weights of the experts hit once, from ids to
//   output
//
// In all of them weights are the rows (M) and tokens the columns (N) of a product: N takes any multiple of 8, so that
// an expert with few tokens wastes nothing, and the 8-by-8 alternation of w13 puts a gate value and its up value into
// one thread.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "experts_layout.h"

namespace moe::mlp {

// Rows first .. first + rows - 1 belong to `expert` (a slot). `alone`: 1 where they are all of its rows.
struct alignas(16) RowTile {
  int32_t expert, first, rows, alone;
};

// Inputs of the rows: row r of H elements is `rows[r]`, or `rows[order[r] / columns]`.
struct RowSource {
  const void* rows;
  const int32_t* order;
  int32_t columns;
};

// What a row's gate and up products are multiplied by before the bias: weights[order[r]], 0 for an order outside the
// choices; both null for 1.
struct RowWeights {
  const int32_t* order;
  const float* weights;
  int64_t choices;
};

// out[r] [H] = T(gates[r] * value + routed[r]), either null where there is none.
struct Finish {
  void* out;
  const void* routed;
  const float* gates;
};

// out = down(swiglu(gate_up(source))) for the rows of every tile (`mma` and `wgmma`).
struct GroupedCall {
  DType dtype;
  int64_t H, I;
  ExpertsView experts;
  SwiGLU swiglu;
  RowSource source;
  RowWeights weights;
  const RowTile* tiles;  // on the device, like the rest, in the order of expert_tiles.h
  int tile_rows;         // rows of a tile at most, as expert_paths.h chose
  const int32_t* tile_count;
  int64_t most_tiles;  // an upper bound of *tile_count known to the host
  int64_t rows;        // an upper bound of every tile's first + rows
  void* active;        // T [rows, 64 * weight_tiles(I)]: written by gate_up, read by down
  void* projected;     // not null: gate_up only, T [rows, 2I] (gate half, then up half), biases included, no activation
  bool activated;      // `active` holds the activations already: down only
  Finish finish;
  int32_t* counters;  // `wgmma`: wgmma_counters() of them, zero before, any value after
  float* parts;       // `wgmma`: wgmma_part_floats() of them, of any content
  int sm_count;
  cudaStream_t stream;
};

int64_t wgmma_counters(int64_t most_tiles, int sm_count);
int64_t wgmma_part_floats(int64_t rows, int sm_count);
cudaError_t launch_mma(const GroupedCall& call);
cudaError_t launch_wgmma(const GroupedCall& call);

// output[t] = T(output_scale * gates[t] * (sum over columns c of weights[t, c] * expert_ids[t, c](hidden[t])) +
// routed[t]), columns in ascending order of their expert or in column order, always the same (`stream`).
struct StreamCall {
  DType dtype;
  int64_t T, C, H, I, S;
  const void* hidden;    // T [T, H]
  const int32_t* ids;    // [T, C]; null: every token has the one column of slot 0, with weight 1
  const float* weights;  // [T, C]
  ExpertsView experts;
  SwiGLU swiglu;
  int32_t first_expert, zero, first_zero;  // zero experts, from first_zero on, add weight * hidden; others nothing
  bool weights_on_input;
  float output_scale;
  const float* gates;  // [T] or null
  const void* routed;  // T [T, H] or null
  void* output;        // T [T, H]
  void* scratch;       // stream_scratch() bytes of any content
  int32_t* counters;   // kStreamCounters words, zero before and after; one call at a time may use them
  int sm_count;
  cudaStream_t stream;
};

constexpr int64_t kStreamCounters = 32768;

// Whether `stream` takes a call of this size at all (its limits), and its scratch.
bool stream_takes(const StreamCall& call);
size_t stream_scratch(const StreamCall& call);
cudaError_t launch_stream(const StreamCall& call);

}  // namespace moe::mlp
