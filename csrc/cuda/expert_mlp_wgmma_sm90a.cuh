// The persistent kernel of `wgmma`: what its parts share. See expert_mlp_wgmma_sm90a.cu for how it works.
#pragma once
#include "expert_mlp.h"
#include "hopper.cuh"

namespace moe::mlp::wgmma {

constexpr int kMaxRows = 176;      // of a row tile: twice 88 accumulators fit a thread
constexpr int kBlockTiles = 4;     // weight tiles (64 rows) of a block of weight rows, two per consumer warpgroup
constexpr int kStages = 4;
constexpr int kTileBytes = kWeightTileElements * 2;
constexpr int kWeightBytes = kBlockTiles * kTileBytes;
constexpr int kRowBytes = kWeightTile * 2;  // of 64 elements
constexpr int kStageBytes = kWeightBytes + kMaxRows * kRowBytes;

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kGatherWarps = 3;
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

constexpr int kItems = 2;  // places of work items in shared memory

// One of the two products: out [rows, M] = in [rows, K] weights^T [M, K].
struct Product {
  const char* weights;
  int64_t slot_bytes;
  int32_t weight_tiles, blocks;  // of 64 and of 256 weight rows
  int32_t steps;                 // of 64 along K
  const char* in;
  const int32_t* order;          // rows of `in`: order[row] / columns; null: row
  int32_t columns;
  uint32_t in_stride, in_pieces;  // bytes between rows / 16, 16-byte pieces of K
};

struct Params {
  Product product[2];  // gate_up, down
  bool gate_up, down;
  int32_t H, I;
  const RowTile* tiles;
  const int32_t* tile_count;
  int32_t* next;  // work item not yet taken, less the clusters' first ones
  int32_t* done;  // by tile: consumer warpgroups that have written their part of `active`
  const float *b13, *b2;
  SwiGLU swiglu;
  RowWeights weights;
  void *active, *projected;
  Finish finish;
};

// A row tile and a block of weight rows.
struct Item {
  int32_t product, block, tile;
  bool shared;  // the weights are those of the other block of the cluster: each loads half for both
  bool none;    // no more work
  RowTile rows;
};

// Shared memory: stages, then this.
struct Control {
  int4 items[kItems][2];
  uint64_t full[kStages], empty[kStages], item_full[kItems], item_empty[kItems];
};
constexpr int kSharedBytes = kStages * kStageBytes + sizeof(Control) + 1024;  // stages are aligned to 1024

__device__ __forceinline__ uint32_t control_at(uint32_t stages, size_t offset) {
  return stages + kStages * kStageBytes + static_cast<uint32_t>(offset);
}
__device__ __forceinline__ uint32_t full_at(uint32_t stages, int s) { return control_at(stages, offsetof(Control, full) + 8 * s); }
__device__ __forceinline__ uint32_t empty_at(uint32_t stages, int s) { return control_at(stages, offsetof(Control, empty) + 8 * s); }
__device__ __forceinline__ uint32_t item_at(uint32_t stages, int n) { return control_at(stages, offsetof(Control, items) + 32 * n); }
__device__ __forceinline__ uint32_t item_full_at(uint32_t stages, int n) { return control_at(stages, offsetof(Control, item_full) + 8 * n); }
__device__ __forceinline__ uint32_t item_empty_at(uint32_t stages, int n) { return control_at(stages, offsetof(Control, item_empty) + 8 * n); }

// Waits at a barrier, or with MOE_WATCHDOG defined traps after two seconds and says where.
__device__ __forceinline__ void wait_at(uint32_t barrier, uint32_t parity, [[maybe_unused]] const char* what) {
#ifdef MOE_WATCHDOG
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  while (true) {
    uint32_t done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    if (done) return;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (now - begin > 2000000000ull) {
      printf("block %d thread %d waits for %s, barrier %x parity %u\n", blockIdx.x, threadIdx.x, what, barrier, parity);
      __trap();
    }
  }
#else
  hopper::barrier_wait(barrier, parity);
#endif
}

// A place in the ring of stages.
struct Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

}  // namespace moe::mlp::wgmma
