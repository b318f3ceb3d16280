// The expert MLP on Hopper for more rows than a few: one persistent kernel for both products.
//
// A work item is a tile of at most 176 rows of one expert times a block of 256 weight rows, along all of K. First come all
// items of gate_up, then those of down, which wait until their row tile has been through all blocks of gate_up; as every
// block (or cluster of two) takes items in this order, what is waited for is always under way. Items are handed out by an
// atomic counter.
//
// Warpgroup 0 loads: one thread the weights, by bulk copies of the packed tiles, three warps the rows, gathered 16 bytes
// at a time into the same swizzle. Warpgroups 1 and 2 multiply, 128 weight rows each (weights are M, tokens N, so that N
// fits the tile to 8 rows), and write out; the loads for the next item go on meanwhile. A stage is 64 along K.
//
// In a cluster of two, blocks take neighbouring row tiles and the same weight rows; if the tiles belong to one expert,
// each loads half of the weights for both.
//
// Order of accumulation: K ascending by 16, in f32.
#include <cstdio>
#include <cstdlib>

#include "expert_mlp_wgmma_epilogue_sm90a.cuh"

namespace moe::mlp {
namespace wgmma {

using namespace hopper;

// Of the work item `index` the part of block `rank` of the cluster.
template <int CLUSTER>
__device__ __forceinline__ Item item_of(const Params& p, int32_t index, int32_t tiles, uint32_t rank) {
  const int32_t units = (tiles + CLUSTER - 1) / CLUSTER, gate_up = p.gate_up ? units * p.product[0].blocks : 0;
  Item item{};
  item.product = index >= gate_up;
  if (item.product == 1) index -= gate_up;
  item.none = item.product == 1 && (!p.down || index >= units * p.product[1].blocks);
  if (item.none) return item;
  const int32_t blocks = item.product == 0 ? p.product[0].blocks : p.product[1].blocks, unit = index / blocks;
  item.block = index - unit * blocks;
  item.tile = unit * CLUSTER + static_cast<int32_t>(rank);
  item.rows = item.tile < tiles ? p.tiles[item.tile] : RowTile{0, 0, 0};
  if constexpr (CLUSTER == 2) {
    const int32_t other = item.tile ^ 1;
    item.shared = item.tile < tiles && other < tiles && p.tiles[other].expert == item.rows.expert;
  }
  return item;
}

// Items go from the first block's weight thread to all of the cluster: {product, shared and block; expert; first; rows}
// and {tile, none}.
__device__ __forceinline__ void send(uint32_t stages, int place, uint32_t rank, const Item& item) {
  const uint32_t at = in_block(item_at(stages, place), rank), full = in_block(item_full_at(stages, place), rank);
  barrier_arrive_expect_cluster(full, 32);
  store_async(at, {item.product | item.shared << 1 | item.block << 2, item.rows.expert, item.rows.first, item.rows.rows}, full);
  store_async(at + 16, {item.tile, item.none, 0, 0}, full);
}

// Called by whole warps, or by one thread of one.
template <int CLUSTER>
__device__ __forceinline__ Item receive(uint32_t stages, int n, bool whole_warp) {
  const int place = n % kItems;
  wait_at(item_full_at(stages, place), n / kItems % 2, "an item");
  const int4 a = load_shared(item_at(stages, place)), b = load_shared(item_at(stages, place) + 16);
  if (whole_warp) __syncwarp();
  if (!whole_warp || threadIdx.x % 32 == 0) barrier_arrive_cluster(in_block(item_empty_at(stages, place), 0));
  Item item;
  item.product = a.x & 1, item.shared = a.x >> 1 & 1, item.block = a.x >> 2;
  item.rows = {a.y, a.z, a.w};
  item.tile = b.x, item.none = b.y;
  return item;
}

// One thread: the weights, and in the first block of a cluster the items.
template <int CLUSTER>
__device__ __forceinline__ void load_weights(const Params& p, uint32_t stages, uint32_t rank, int32_t cluster, int32_t clusters) {
  const int32_t tiles = *p.tile_count;
  Stage stage;
  Item item{}, other{};
  if (rank == 0) {
    item = item_of<CLUSTER>(p, cluster, tiles, 0);
    if constexpr (CLUSTER == 2) other = item_of<CLUSTER>(p, cluster, tiles, 1);
  }
  for (int n = 0;; n++) {
    int32_t next = 0;
    if (rank == 0) {
      wait_at(item_empty_at(stages, n % kItems), n / kItems % 2 ^ 1, "a place for an item");
      send(stages, n % kItems, 0, item);
      if constexpr (CLUSTER == 2) send(stages, n % kItems, 1, other);
      if (!item.none) next = clusters + atomicAdd(p.next, 1);
    } else {
      item = receive<CLUSTER>(stages, n, false);
    }
    if (item.none) return;
    const Product& product = p.product[item.product];
    const int steps = product.steps, present = min(kBlockTiles, product.weight_tiles - item.block * kBlockTiles);
    const int64_t tile_run = int64_t{steps} * kTileBytes;
    const char* weights = product.weights + item.rows.expert * product.slot_bytes + item.block * kBlockTiles * tile_run;
    Item next_item{}, next_other{};
    for (int k = 0; k < steps; k++) {
      // Late enough for `next` to be known, early enough for the tile to come.
      if (rank == 0 && k == min(1, steps - 1)) {
        next_item = item_of<CLUSTER>(p, next, tiles, 0);
        if constexpr (CLUSTER == 2) next_other = item_of<CLUSTER>(p, next, tiles, 1);
      }
      wait_at(empty_at(stages, stage.index), stage.parity ^ 1, "an empty stage (weights)");
      const uint32_t full = full_at(stages, stage.index), to = stages + stage.index * kStageBytes;
      if (CLUSTER > 1 && item.rows.rows == 0) {
        barrier_arrive(full);
      } else {
        barrier_arrive_expect(full, present * kTileBytes);
        const char* from = weights + int64_t{k} * kTileBytes;
        if (CLUSTER > 1 && item.shared) {
          for (int j = 2 * static_cast<int>(rank); j < min(2 * static_cast<int>(rank) + 2, present); j++) {
            copy_bulk_to_all(to + j * kTileBytes, from + j * tile_run, kTileBytes, full, 3);
          }
        } else {
          for (int j = 0; j < present; j++) copy_bulk(to + j * kTileBytes, from + j * tile_run, kTileBytes, full);
        }
      }
      stage.advance();
    }
    item = next_item, other = next_other;
  }
}

// Three warps: the rows. Eight lanes take a row's 128 bytes, so a warp has four rows at a time.
template <int CLUSTER>
__device__ __forceinline__ void gather_rows(const Params& p, uint32_t stages, int thread) {
  constexpr int kAtOnce = kGatherWarps * 4, kPasses = (kMaxRows + kAtOnce - 1) / kAtOnce;
  const int first = thread / 8;
  const uint32_t piece = thread % 8;
  // Row first + 12 i is row (first + 4 i) % 8 of its group.
  const uint32_t even = first * kRowBytes + (piece ^ (first % 8)) * 16, odd = first * kRowBytes + (piece ^ (first % 8) ^ 4) * 16;
  Stage stage;
  for (int n = 0;; n++) {
    const Item item = receive<CLUSTER>(stages, n, true);
    if (item.none) return;
    const Product& product = p.product[item.product];
    uint32_t at[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      const int r = first + i * kAtOnce;
      at[i] = 0;
      if (r >= item.rows.rows) continue;
      int32_t row = item.rows.first + r;
      if (product.order != nullptr) row = product.order[row] / product.columns;
      at[i] = static_cast<uint32_t>(row) * product.in_stride + piece;
    }
    if (item.product == 1 && p.gate_up && item.rows.rows > 0) {
      const int32_t wanted = kConsumers * p.product[0].blocks;
#ifdef MOE_WATCHDOG
      const int64_t begin = clock64();
#endif
      while (load_acquire(p.done + item.tile) < wanted) {
        __nanosleep(64);
#ifdef MOE_WATCHDOG
        if (clock64() - begin > 4000000000ll) {
          printf("block %d thread %d waits for tile %d\n", blockIdx.x, threadIdx.x, item.tile);
          __trap();
        }
#endif
      }
    }
    const char* in = product.in;
    const uint32_t pieces = product.in_pieces;
    for (int k = 0; k < product.steps; k++, in += kRowBytes) {
      wait_at(empty_at(stages, stage.index), stage.parity ^ 1, "an empty stage (rows)");
      const uint32_t to = stages + stage.index * kStageBytes + kWeightBytes;
      const bool there = k * 8 + piece < pieces;
#pragma unroll
      for (int i = 0; i < kPasses; i++) {
        if (first + i * kAtOnce < item.rows.rows) {
          copy_async(to + (i % 2 == 0 ? even : odd) + i * (kAtOnce * kRowBytes), in + uint64_t{at[i]} * 16, there);
        }
      }
      copy_async_arrive(full_at(stages, stage.index));
      stage.advance();
    }
  }
}

// A consumer warpgroup's part of one item.
template <int N, class T, int CLUSTER>
__device__ __forceinline__ void multiply(const Params& p, const Item& item, uint32_t stages, Stage& stage, int group, int thread) {
  float sum[2][N / 2] = {};
  const int steps = p.product[item.product].steps, lane = thread % 32;
  const auto release = [&](int index) {
    if (lane < CLUSTER) {
      if constexpr (CLUSTER > 1) {
        barrier_arrive_cluster(in_block(empty_at(stages, index), lane));
      } else {
        barrier_arrive(empty_at(stages, index));
      }
    }
  };
  int before = 0;
#ifdef LAG
  const int lag = steps < kStages ? 0 : steps == kStages ? kStages : LAG;
  if (group == 1 && lag > 0) named_barrier(3, 256);
#endif
#pragma unroll 1
  for (int k = 0; k < steps; k++) {
    wait_at(full_at(stages, stage.index), stage.parity, "a full stage");
#ifndef NO_FENCE
    fence_proxy_shared();
#endif
    const uint32_t at = stages + stage.index * kStageBytes;
    const uint64_t a = describe(at + group * (2 * kTileBytes)), b = describe(at + kWeightBytes);
    product_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      product<N, T>(sum[0], a + 2 * kk, b + 2 * kk, true);
      product<N, T>(sum[1], a + (kTileBytes >> 4) + 2 * kk, b + 2 * kk, true);
    }
    product_commit();
    product_wait<1>();
    if (k > 0) release(before);
#ifdef LAG
    if (group == 0 && k == lag && lag > 0) named_barrier_arrive(3, 256);
#endif
    before = stage.index;
    stage.advance();
  }
  product_wait<0>();
#ifdef LAG
  if (group == 0 && lag == steps) named_barrier_arrive(3, 256);
#endif
  product_done(sum[0]);
  product_done(sum[1]);
  if (item.rows.rows > 0) {
    // The last stage's weights of this warpgroup are the staging area.
    named_barrier(1 + group, 128);
    const uint32_t staging = stages + before * kStageBytes + group * (2 * kTileBytes);
    if (item.product == 0) {
      write_active<N, T>(p, item, sum, staging, group, thread);
      named_barrier(1 + group, 128);
      if (thread == 0 && p.down) add_release(p.done + item.tile, 1);
    } else {
      write_out<N, T>(p, item, sum, staging, group, thread);
    }
    fence_proxy_shared();
    __syncwarp();
  }
  release(before);
}

template <class T, int CLUSTER>
__global__ void __launch_bounds__(kThreads, 1) expert_mlp(const __grid_constant__ Params p) {
  extern __shared__ unsigned char shared[];
  const uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const uint32_t rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : 0;
  const int32_t cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      barrier_init(full_at(stages, s), 1 + 32 * kGatherWarps);
      barrier_init(empty_at(stages, s), 4 * kConsumers * CLUSTER);
    }
    for (int n = 0; n < kItems; n++) {
      barrier_init(item_full_at(stages, n), 1);
      barrier_init(item_empty_at(stages, n), CLUSTER * (kGatherWarps + 4 * kConsumers) + CLUSTER - 1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if constexpr (CLUSTER > 1) cluster_barrier();
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      load_weights<CLUSTER>(p, stages, rank, cluster, clusters);
    } else if (threadIdx.x >= 32) {
      gather_rows<CLUSTER>(p, stages, threadIdx.x - 32);
    }
  } else {
    more_registers<kConsumerRegisters>();
    const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
    Stage stage;
    for (int n = 0;; n++) {
      const Item item = receive<CLUSTER>(stages, n, true);
      if (item.none) break;
      switch ((item.rows.rows + 7) / 8) {
#define MOE_ROWS(GROUPS) \
  case GROUPS: multiply<8 * GROUPS, T, CLUSTER>(p, item, stages, stage, group, thread); break;
#ifdef MOE_QUICK
        MOE_ROWS(5) MOE_ROWS(16)
#else
        MOE_ROWS(2) MOE_ROWS(3) MOE_ROWS(4) MOE_ROWS(5) MOE_ROWS(6) MOE_ROWS(7) MOE_ROWS(8) MOE_ROWS(9) MOE_ROWS(10)
        MOE_ROWS(11) MOE_ROWS(12) MOE_ROWS(13) MOE_ROWS(14) MOE_ROWS(15) MOE_ROWS(16) MOE_ROWS(17) MOE_ROWS(18)
        MOE_ROWS(19) MOE_ROWS(20) MOE_ROWS(21) 
#endif
        MOE_ROWS(22)
        default: multiply<8, T, CLUSTER>(p, item, stages, stage, group, thread);
#undef MOE_ROWS
      }
    }
  }
  // No block leaves while the other may still arrive at its barriers.
  if constexpr (CLUSTER > 1) {
    __syncwarp();
    cluster_barrier();
  }
}

template <class T, int CLUSTER>
cudaError_t launch(const Params& p, int sm_count, cudaStream_t stream) {
  const auto kernel = expert_mlp<T, CLUSTER>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(sm_count / CLUSTER * CLUSTER));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace wgmma

int64_t wgmma_counters(int64_t most_tiles) { return 1 + most_tiles; }

cudaError_t launch_wgmma(const GroupedCall& call) {
  using namespace wgmma;
  const int64_t H = call.H, I = call.I;
  Params p{};
  p.product[0] = {static_cast<const char*>(call.experts.w13), call.experts.size13 * 2,
                  static_cast<int32_t>(weight_tiles(2 * I)), static_cast<int32_t>((weight_tiles(2 * I) + kBlockTiles - 1) / kBlockTiles),
                  static_cast<int32_t>(weight_tiles(H)), static_cast<const char*>(call.source.rows), call.source.order, call.source.columns,
                  static_cast<uint32_t>(H / 8), static_cast<uint32_t>(H / 8)};
  p.product[1] = {static_cast<const char*>(call.experts.w2), call.experts.size2 * 2,
                  static_cast<int32_t>(weight_tiles(H)), static_cast<int32_t>((weight_tiles(H) + kBlockTiles - 1) / kBlockTiles),
                  static_cast<int32_t>(weight_tiles(I)), static_cast<const char*>(call.active), nullptr, 1,
                  static_cast<uint32_t>(weight_tiles(I) * kWeightTile / 8), static_cast<uint32_t>(I / 8)};
  p.gate_up = !call.activated;
  p.down = call.projected == nullptr;
  p.H = static_cast<int32_t>(H), p.I = static_cast<int32_t>(I);
  p.tiles = call.tiles, p.tile_count = call.tile_count;
  p.next = call.counters, p.done = call.counters + 1;
  p.b13 = call.experts.b13, p.b2 = call.experts.b2;
  p.swiglu = call.swiglu, p.weights = call.weights;
  p.active = call.active, p.projected = call.projected, p.finish = call.finish;
  if (call.most_tiles == 0) return cudaSuccess;
  // Pairs of row tiles share their weights only where an expert has several tiles.
  const int64_t experts = call.most_tiles - call.rows / call.tile_rows;
  bool pairs = call.sm_count >= 2 && call.rows > 2 * experts * call.tile_rows;
  if (const char* wanted = std::getenv("MOE_WGMMA_CLUSTER")) pairs = wanted[0] == '2';
#ifdef MOE_ONE
  return launch<__nv_bfloat16, MOE_ONE>(p, call.sm_count, call.stream);
#endif
#ifdef MOE_BF16
  return pairs ? launch<__nv_bfloat16, 2>(p, call.sm_count, call.stream) : launch<__nv_bfloat16, 1>(p, call.sm_count, call.stream);
#elif !defined(MOE_ONE)
  if (call.dtype == DType::kBF16) {
    return pairs ? launch<__nv_bfloat16, 2>(p, call.sm_count, call.stream) : launch<__nv_bfloat16, 1>(p, call.sm_count, call.stream);
  }
  return pairs ? launch<__half, 2>(p, call.sm_count, call.stream) : launch<__half, 1>(p, call.sm_count, call.stream);
#endif
}

}  // namespace moe::mlp
