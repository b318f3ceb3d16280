// The persistent kernel of `wgmma`: what its parts share. See expert_mlp_wgmma_sm90a.cu for how it works.
#pragma once
#include "expert_items.h"
#include "expert_mlp.h"
#include "hopper.cuh"

namespace moe::mlp::wgmma {

constexpr int kBlockTiles = 4;  // weight tiles (64 rows) of a block of weight rows
constexpr int kStages = 4;
constexpr int kTileBytes = kWeightTileElements * 2;
constexpr int kWeightBytes = kBlockTiles * kTileBytes;
constexpr int kRowBytes = kWeightTile * 2;  // of 64 elements

constexpr int kConsumers = 2;  // warpgroups

// How they share the items. Together: each has half of the weight rows of every item. In turns, where rows are few:
// each has every second item, so that one writes while the other multiplies, and there is room for what they write
// beside the stages.
template <bool IN_TURNS>
struct Sharing {
  static constexpr int kRows = IN_TURNS ? 80 : 176;                         // of a row tile: 160 or 176 sums a thread
  static constexpr int kTiles = kBlockTiles / (IN_TURNS ? 1 : kConsumers);  // weight tiles of a warpgroup
  static constexpr int kStageBytes = kWeightBytes + kRows * kRowBytes;
  static constexpr int kStagingBytes = IN_TURNS ? 16 * 1024 : 0;     // of each warpgroup
  static constexpr int kReleases = 4 * (IN_TURNS ? 1 : kConsumers);  // of a stage: by so many warps
};
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kGatherWarps = 3;
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;

constexpr int64_t kMostAhead = int64_t{16} << 20;  // bytes of input that are brought into the L2 cache early

constexpr int kItems = 2;  // places of work items in shared memory

// One of the two products: out [rows, M] = in [rows, K] weights^T [M, K].
struct Product {
  const char* weights;
  int64_t slot_bytes;
  int32_t weight_tiles;  // of 64 weight rows
  Divisor blocks;        // of 256 weight rows
  int32_t steps;         // of 64 along K
  const char* in;
  const int32_t* order;  // rows of `in`: order[row] / columns; null: row
  Divisor columns;
  uint32_t in_stride, in_pieces;  // 16-byte pieces from row to row, and of K
};

struct Params {
  Product product[2];  // gate_up, down
  bool gate_up, down;
  int32_t H, I;
  int64_t source_bytes;  // of gate_up's input, where it is to be brought into the L2 cache early, else 0
  const RowTile* tiles;
  const int32_t* tile_count;
  int32_t* next;     // work items taken
  int32_t* done;     // by row tile: how often a consumer warpgroup has written its half of a block of `active`
  int32_t* arrived;  // [2][gridDim.x][kConsumers]: parts of a cut block that are there
  float* parts;      // [2][gridDim.x][kConsumers][part_floats]: their sums
  int64_t part_floats;
  const float *b13, *b2;
  SwiGLU swiglu;
  RowWeights weights;
  void *active, *projected;
  Finish finish;
};

// A row tile and a block of weight rows, along `steps` of K from `k` on.
struct Item {
  int32_t product, block, tile;
  bool none;  // no more work
  RowTile rows;
  int32_t k, steps;
  int32_t parts, part, slot;  // of a cut block: as a Piece has it
};

// Shared memory: stages, staging areas, then this.
struct Control {
  int4 items[kItems][3];
  uint64_t full[kStages], empty[kStages], item_full[kItems], item_empty[kItems];
  int32_t word[kConsumers];  // for add_parts
};
template <bool IN_TURNS>
constexpr int kBeforeControl = kStages * Sharing<IN_TURNS>::kStageBytes + kConsumers * Sharing<IN_TURNS>::kStagingBytes;
template <bool IN_TURNS>
constexpr int kSharedBytes = kBeforeControl<IN_TURNS> + sizeof(Control) + 1024;  // stages are aligned to 1024

// Addresses in shared memory, from that of the stages.
template <bool IN_TURNS>
struct Shared {
  uint32_t stages;

  __device__ uint32_t weights(int s) const { return stages + s * Sharing<IN_TURNS>::kStageBytes; }
  __device__ uint32_t rows(int s) const { return weights(s) + kWeightBytes; }
  __device__ uint32_t staging(int group) const { return weights(kStages) + group * Sharing<IN_TURNS>::kStagingBytes; }
  __device__ uint32_t full(int s) const { return control(offsetof(Control, full)) + 8 * s; }
  __device__ uint32_t empty(int s) const { return control(offsetof(Control, empty)) + 8 * s; }
  __device__ uint32_t item(int n) const { return control(offsetof(Control, items)) + 48 * (n % kItems); }
  __device__ uint32_t item_full(int n) const { return control(offsetof(Control, item_full)) + 8 * (n % kItems); }
  __device__ uint32_t item_empty(int n) const { return control(offsetof(Control, item_empty)) + 8 * (n % kItems); }
  __device__ uint32_t word(int group) const { return control(offsetof(Control, word)) + 4 * group; }

 private:
  __device__ uint32_t control(size_t offset) const {
    return stages + kBeforeControl<IN_TURNS> + static_cast<uint32_t>(offset);
  }
};

// Items go from the warp that loads weights to all others, which take item n = 0, 1, ... by await_item(n),
// item_at(n) as often as they like, and release_item(n).
template <class Shared>
__device__ __forceinline__ void send(Shared shared, int n, const Item& item) {
  hopper::barrier_wait(shared.item_empty(n), n / kItems % 2 ^ 1);
  hopper::store_shared(shared.item(n), {item.product, item.block, item.tile, item.none});
  hopper::store_shared(shared.item(n) + 16, {item.rows.expert, item.rows.first, item.rows.rows, item.k});
  hopper::store_shared(shared.item(n) + 32, {item.steps, item.parts, item.part, item.slot});
  hopper::barrier_arrive(shared.item_full(n));
}
template <class Shared>
__device__ __forceinline__ void await_item(Shared shared, int n) {
  hopper::barrier_wait(shared.item_full(n), n / kItems % 2);
}
template <class Shared>
__device__ __forceinline__ Item item_at(Shared shared, int n) {
  const uint32_t at = shared.item(n);
  const int4 a = hopper::load_shared(at), b = hopper::load_shared(at + 16), c = hopper::load_shared(at + 32);
  return {a.x, a.y, a.z, a.w != 0, {b.x, b.y, b.z}, b.w, c.x, c.y, c.z, c.w};
}
template <class Shared>
__device__ __forceinline__ void release_item(Shared shared, int n) {
  hopper::barrier_arrive(shared.item_empty(n));
}

// A place in the ring of stages.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
  __device__ __forceinline__ void advance(int steps) {
    index += steps;
    parity ^= index / kStages % 2;
    index %= kStages;
  }
};

}  // namespace moe::mlp::wgmma
