// The expert MLP on Hopper for more rows than a few: one persistent kernel for both products.
//
// A work item is a tile of at most 176 rows of one expert times a block of 256 weight rows, along all of K or, where
// blocks are few, a part of it (expert_items.h). First come all items of gate_up, then those of down, which wait until
// their row tile has been through all blocks of gate_up. Items are handed out in this order by an atomic counter, to
// blocks of threads that run, so what is waited for is always under way; and late, so that nobody has a second item
// while others have none.
//
// Warpgroup 0 loads: one warp the weights, by bulk copies of the packed tiles, three warps the rows, gathered 16
// bytes at a time into the same swizzle. Warpgroups 1 and 2 multiply (weights are M, tokens N, so that N fits the tile
// to 16 rows) and write out; the loads for the next item go on meanwhile. A stage is 64 along K. They do it together,
// 128 weight rows each, or where experts have few rows in turns, an item each (Sharing): items are short then, and
// memory would have to wait for what is done between one item's products and the next one's.
//
// The kernel starts while the one before it still runs, and then waits for it (programmatic.cuh); meanwhile it brings
// the input into the L2 cache.
//
// Order of accumulation: K ascending by 16, in f32; parts of K in a binary tree.
#include <algorithm>

#include "expert_mlp_wgmma_epilogue_sm90a.cuh"
#include "expert_mlp_wgmma_parts_sm90a.cuh"
#include "launch_early.cuh"

namespace moe::mlp {
namespace wgmma {

using namespace hopper;

// Quick, because no weights are asked for meanwhile: `gate_up` and `down` stay in registers.
__device__ __forceinline__ Item item_of(const Params& p, int32_t index, const Blocks& gate_up, const Blocks& down) {
  Item item{};
  item.product = index >= gate_up.items;
  if (item.product == 1) index -= gate_up.items;
  item.none = item.product == 1 && index >= down.items;
  if (item.none) return item;
  const Product& product = p.product[item.product];
  const auto of = [&](int32_t Blocks::* field) { return item.product == 0 ? gate_up.*field : down.*field; };
  const Blocks blocks = {of(&Blocks::items), of(&Blocks::whole), of(&Blocks::parts)};
  const Piece piece = piece_of(blocks, index, product.steps);
  item.tile = static_cast<int32_t>(quotient(piece.block, product.blocks));
  item.block = piece.block - item.tile * product.blocks.value;
  item.rows = p.tiles[item.tile];
  item.k = piece.first, item.steps = piece.steps;
  item.parts = piece.parts, item.part = piece.part, item.slot = piece.slot;
  return item;
}

__device__ __forceinline__ int32_t from_first_lane(int32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// One warp: the weights, and the items. All lanes have the same, taken from the first where the compiler would not know
// it: so addresses are in uniform registers, where a copy wants them. It takes a loop over the lanes to bring them
// there from others, and the copies of a step then come late.
template <class Shared>
__device__ __forceinline__ void load_weights(const Params& p, Shared shared) {
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto take = [&] { return first_lane ? atomicAdd(p.next, 1) : 0; };
  const int32_t first = take();  // on its way together with the number of tiles
  const int32_t tiles = from_first_lane(*p.tile_count);
  const auto cut = [&](const Product& product) {
    return blocks_of(tiles * static_cast<int32_t>(product.blocks.value), gridDim.x, product.steps);
  };
  const Blocks gate_up = p.gate_up ? cut(p.product[0]) : Blocks{}, down = p.down ? cut(p.product[1]) : Blocks{};
  const uint64_t once = evict_first_policy();
  Stage stage;
  Item item = item_of(p, from_first_lane(first), gate_up, down);
  for (int n = 0;; n++) {
    if (first_lane) send(shared, n, item);
    if (item.none) return let_next_kernel_start();
    int32_t next = 0;
    const Product& product = p.product[item.product];
    const int32_t block = from_first_lane(item.block), steps = from_first_lane(item.steps);
    const bool read_once = from_first_lane(item.rows.alone) != 0;
    const int present = min(kBlockTiles, product.weight_tiles - block * kBlockTiles);
    const int64_t tile_run = int64_t{product.steps} * kTileBytes;
    const char* from = product.weights + from_first_lane(item.rows.expert) * product.slot_bytes +
                       block * kBlockTiles * tile_run + int64_t{from_first_lane(item.k)} * kTileBytes;
    for (int k = 0; k < steps; k++, from += kTileBytes) {
      // Early enough for the counter's answer, then the tile, to come.
      if (k == max(steps - 6, 0)) next = take();
      if (k == max(steps - 3, 0)) item = item_of(p, from_first_lane(next), gate_up, down);
      barrier_wait(shared.empty(stage.index), stage.parity ^ 1);
      if (elected()) {
        const uint32_t full = shared.full(stage.index), to = shared.weights(stage.index);
        barrier_arrive_expect(full, present * kTileBytes);
        const auto copy = [&](auto... hint) {
#pragma unroll
          for (int j = 0; j < kBlockTiles; j++) {
            if (j < present) copy_bulk(to + j * kTileBytes, from + j * tile_run, kTileBytes, full, hint...);
          }
        };
        if (read_once) {
          copy(once);
        } else {
          copy();  // not the same as with evict_normal, which costs V3-TP8 7% at 4,096 tokens
        }
      }
      __syncwarp();
      stage.advance();
    }
  }
}

// Three warps: the rows. Eight lanes take a row's 128 bytes, so a warp has four rows at a time, and twelve rows later
// the next four. Each lane keeps its pointers: a pointer computed in front of its copy would have to wait until the
// copy before it has read its own.
template <bool IN_TURNS>
__device__ __forceinline__ void gather_rows(const Params& p, Shared<IN_TURNS> shared, int thread) {
  constexpr int kAtOnce = kGatherWarps * 4, kPasses = (Sharing<IN_TURNS>::kRows + kAtOnce - 1) / kAtOnce;
  constexpr int kUnrolled = 4;
  const int first = thread / 8;
  const uint32_t piece = thread % 8;
  // Row first + 12 i is row (first + 4 i) % 8 of its group.
  const uint32_t place = first * kRowBytes + (piece ^ (first % 8)) * 16;
  Stage stage;
  for (int n = 0;; n++) {
    await_item(shared, n);
    const Item item = item_at(shared, n);
    release_item(shared, n);
    if (item.none) return;
    const Product& product = p.product[item.product];
    if (item.product == 1 && p.gate_up) {
      const int32_t written = kConsumers * static_cast<int32_t>(p.product[0].blocks.value);
      while (load_acquire(p.done + item.tile) < written) __nanosleep(64);
    }
    // What a warp has of rows beyond the tile is the last row once more. All loads before the first use: one wait.
    const int warp_row = thread / 32 * 4, passes = (item.rows.rows - warp_row + kAtOnce - 1) / kAtOnce;
    int32_t row[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; i++) row[i] = item.rows.first + min(first + i * kAtOnce, item.rows.rows - 1);
    if (product.order != nullptr) {
#pragma unroll
      for (int i = 0; i < kPasses; i++) row[i] = product.order[row[i]];
#pragma unroll
      for (int i = 0; i < kPasses; i++) row[i] = quotient(row[i], product.columns);
    }
    const char* from[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; i++) {
      from[i] = product.in + (static_cast<uint32_t>(row[i]) * uint64_t{product.in_stride} + item.k * 8 + piece) * 16;
    }
    const int steps = item.steps;
    // This lane's pieces of K lie in the steps before it.
    const int last = static_cast<int>(product.in_pieces - piece + 7) / 8 - item.k;
#pragma unroll 1
    for (int k = 0; k < steps; k += kUnrolled) {
#pragma unroll
      for (int u = 0; u < kUnrolled; u++) {
        if (k + u >= steps) break;
        barrier_wait(shared.empty(stage.index), stage.parity ^ 1);
        const uint32_t even = shared.rows(stage.index) + place, odd = even ^ 64;
        const bool there = k + u < last;
#pragma unroll
        for (int i = 0; i < kPasses; i++) {
          const uint32_t to = (i % 2 == 0 ? even : odd) + i * (kAtOnce * kRowBytes);
          if (i < passes) copy_async(to, from[i] + u * kRowBytes, there);
        }
        copy_async_arrive(shared.full(stage.index));
        stage.advance();
      }
#pragma unroll
      for (int i = 0; i < kPasses; i++) {
        from[i] += kUnrolled * kRowBytes;
        asm volatile("" : "+l"(from[i]));  // a pointer of its own, not a sum in front of each copy
      }
    }
  }
}

// Read anew, so that nothing that follows from it is kept in registers, or spilled, meanwhile: memory of a thread's own
// is never in the L1 cache here.
__device__ __forceinline__ int thread_of_warpgroup() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread % 128);
}

// Consumer warpgroups that take turns: the stages of an item come in only when those of the one before have been seen,
// because a barrier tells one phase from the next, but not from the one after that.
__device__ __forceinline__ void await_turn(int group) { named_barrier(1 + kConsumers + group, 128 * kConsumers); }
__device__ __forceinline__ void give_turn(int group) {
  named_barrier_arrive(1 + kConsumers + (group ^ 1), 128 * kConsumers);
}

// A consumer warpgroup's part of one item. What there is to know of the item is read behind the products: the sums
// leave few registers.
template <int N, class T, bool GENERAL, bool IN_TURNS>
__device__ __forceinline__ void multiply(const Params& p, Shared<IN_TURNS> shared, int n, int steps, Stage& stage,
                                         int group) {
  constexpr int kTiles = Sharing<IN_TURNS>::kTiles;
  // Zero instead of skipped by the first product: ptxas would make copies, and the sums leave no registers for any.
  float sum[kTiles][N / 2] = {};
  const uint32_t own = IN_TURNS ? 0 : group * kTiles * kTileBytes;  // of a stage's weights
  int before = 0;
  const auto release = [&] {
    if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty(before));
  };
  if (IN_TURNS) await_turn(group);
#pragma unroll 1
  for (int k = 0; k < steps; k++) {
    barrier_wait(shared.full(stage.index), stage.parity);
    fence_proxy_shared();  // the rows were not copied by the copy engine
    const uint64_t a = describe(shared.weights(stage.index) + own);
    const uint64_t b = describe(shared.rows(stage.index));
    product_fence();
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
      for (int t = 0; t < kTiles; t++) product<N, T>(sum[t], a + t * (kTileBytes >> 4) + 2 * kk, b + 2 * kk, true);
    }
    product_commit();
    product_wait<1>();
    if (k > 0) release();
    before = stage.index;
    stage.advance();
  }
  if (IN_TURNS) give_turn(group);
  product_wait<0>();
#pragma unroll
  for (int t = 0; t < kTiles; t++) product_done(sum[t]);
  const int thread = thread_of_warpgroup();
  if (IN_TURNS) {
    release();
  } else {
    named_barrier(1 + group, 128);  // what it has multiplied of the last stage's weights becomes its staging area
  }
  const bool done = add_parts(p, shared, n, sum, group, thread);
  const Item item = item_at(shared, n);
  release_item(shared, n);
  if (done) {
    const uint32_t staging = IN_TURNS ? shared.staging(group) : shared.weights(before) + own;
    if (item.product == 0) {
      write_active<N, T, GENERAL>(p, item, sum, staging, group, thread);
      named_barrier(1 + group, 128);
      // In front of release(): behind it this takes longer, among the copies that the stage is then filled by.
      if (thread == 0 && p.down) add_release(p.done + item.tile, IN_TURNS ? kConsumers : 1);
    } else {
      write_out<N, T, GENERAL>(p, item, sum, staging, group, thread);
    }
    if (!IN_TURNS) fence_proxy_shared();
  }
  if (IN_TURNS) return;
  __syncwarp();
  release();
}

template <class T, bool GENERAL, bool IN_TURNS>
__global__ void __launch_bounds__(kThreads, 1) expert_mlp(const __grid_constant__ Params p) {
  extern __shared__ unsigned char memory[];
  const Shared<IN_TURNS> shared{(shared_address(memory) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) {
      barrier_init(shared.full(s), 1 + 32 * kGatherWarps);
      barrier_init(shared.empty(s), Sharing<IN_TURNS>::kReleases);
    }
    for (int n = 0; n < kItems; n++) {
      barrier_init(shared.item_full(n), 1);
      barrier_init(shared.item_empty(n), 32 * (kGatherWarps + 4 * kConsumers));
    }
    fence_barrier_init();
    const int64_t slice = (p.source_bytes / 16 + gridDim.x - 1) / gridDim.x * 16, at = slice * blockIdx.x;
    if (at < p.source_bytes) {
      prefetch_l2(p.product[0].in + at, static_cast<uint32_t>(min(slice, p.source_bytes - at)));
    }
  }
  wait_for_previous_kernel();
  __syncthreads();
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x < 32) {
      load_weights(p, shared);
    } else {
      gather_rows(p, shared, threadIdx.x - 32);
    }
  } else {
    more_registers<kConsumerRegisters>();
    // The same in all lanes, for the compiler to know: what follows from it then takes uniform registers.
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0) - 1;
    Stage stage;
    if (IN_TURNS && group == 1) give_turn(group);
    for (int n = 0;; n++) {
      await_item(shared, n);
      const Item item = item_at(shared, n);
      const bool own = !IN_TURNS || n % kConsumers == group;
      if (item.none) {
        if (IN_TURNS && own) await_turn(group);  // given by the other, which no barrier should be left with
        return;
      }
      if (!own) {
        stage.advance(item.steps);
        release_item(shared, n);
        continue;
      }
#define MOE_ROWS(N) \
  case N: multiply<N, T, GENERAL>(p, shared, n, item.steps, stage, group); break;
      // Few sizes in the general kernel, for the sake of what it takes to compile.
      if constexpr (GENERAL) {
        switch (min((item.rows.rows + 31) / 32 * 32, Sharing<IN_TURNS>::kRows)) {
          MOE_ROWS(32) MOE_ROWS(64) MOE_ROWS(96) MOE_ROWS(128) MOE_ROWS(160) MOE_ROWS(176)
        }
      } else if constexpr (IN_TURNS) {
        switch ((item.rows.rows + 15) / 16 * 16) { MOE_ROWS(16) MOE_ROWS(32) MOE_ROWS(48) MOE_ROWS(64) MOE_ROWS(80) }
      } else {
        switch ((item.rows.rows + 15) / 16 * 16) {
          MOE_ROWS(16)
          MOE_ROWS(32)
          MOE_ROWS(48)
          MOE_ROWS(64) MOE_ROWS(80) MOE_ROWS(96) MOE_ROWS(112) MOE_ROWS(128) MOE_ROWS(144) MOE_ROWS(160) MOE_ROWS(176)
        }
      }
#undef MOE_ROWS
    }
  }
}

// Of one warpgroup's part of a block, for a tile of that many rows at most.
int64_t part_floats(int64_t rows) {
  return std::min<int64_t>((rows + 31) / 32 * 32, Sharing<false>::kRows) * (kBlockTiles / kConsumers) * kWeightTile;
}

// `size` and `in_stride` in elements.
Product product_of(int64_t M, int64_t K, const void* weights, int64_t size, const RowSource& in, int64_t in_stride) {
  const int64_t tiles = weight_tiles(M);
  Product p{};
  p.weights = static_cast<const char*>(weights), p.slot_bytes = size * 2;
  p.weight_tiles = static_cast<int32_t>(tiles);
  p.blocks = divisor(static_cast<uint32_t>((tiles + kBlockTiles - 1) / kBlockTiles));
  p.steps = static_cast<int32_t>(weight_tiles(K));
  p.in = static_cast<const char*>(in.rows), p.order = in.order, p.columns = divisor(in.columns);
  p.in_stride = static_cast<uint32_t>(in_stride / 8), p.in_pieces = static_cast<uint32_t>(K / 8);
  return p;
}

template <class T, bool GENERAL, bool IN_TURNS>
cudaError_t launch(const Params& p, int sm_count, cudaStream_t stream) {
  constexpr int kBytes = kSharedBytes<IN_TURNS>;
  const auto kernel = expert_mlp<T, GENERAL, IN_TURNS>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return launch_early(true, kernel, sm_count, kThreads, kBytes, stream, p);
}

template <class T>
cudaError_t launch(const Params& p, int tile_rows, int sm_count, cudaStream_t stream) {
  const bool finish = p.finish.gates != nullptr || p.finish.routed != nullptr;
  if (p.weights.order != nullptr || p.projected != nullptr || finish) {
    return launch<T, true, false>(p, sm_count, stream);
  }
  const bool in_turns = tile_rows <= Sharing<true>::kRows;
  return in_turns ? launch<T, false, true>(p, sm_count, stream) : launch<T, false, false>(p, sm_count, stream);
}

}  // namespace wgmma

int64_t wgmma_counters(int64_t most_tiles, int sm_count) { return 1 + most_tiles + 2 * sm_count * wgmma::kConsumers; }

int64_t wgmma_part_floats(int64_t rows, int sm_count) {
  return 2 * sm_count * wgmma::kConsumers * wgmma::part_floats(rows);
}

cudaError_t launch_wgmma(const GroupedCall& call) {
  using namespace wgmma;
  if (call.tile_rows > Sharing<false>::kRows) return cudaErrorInvalidValue;
  if (call.most_tiles == 0) return cudaSuccess;
  const int64_t H = call.H, I = call.I;
  const RowSource active = {call.active, nullptr, 1};
  Params p{};
  p.product[0] = product_of(2 * I, H, call.experts.w13, call.experts.size13, call.source, H);
  p.product[1] = product_of(H, I, call.experts.w2, call.experts.size2, active, weight_tiles(I) * kWeightTile);
  p.gate_up = !call.activated;
  p.down = call.projected == nullptr;
  p.H = static_cast<int32_t>(H), p.I = static_cast<int32_t>(I);
  const int64_t source = (call.source.order != nullptr ? call.rows / call.source.columns : call.rows) * H * 2;
  p.source_bytes = p.gate_up && source <= kMostAhead ? source : 0;
  p.tiles = call.tiles, p.tile_count = call.tile_count;
  p.next = call.counters, p.done = p.next + 1, p.arrived = p.done + call.most_tiles;
  p.parts = call.parts;
  p.part_floats = part_floats(call.rows);
  p.b13 = call.experts.b13, p.b2 = call.experts.b2;
  p.swiglu = call.swiglu, p.weights = call.weights;
  p.active = call.active, p.projected = call.projected, p.finish = call.finish;
  const auto run = call.dtype == DType::kBF16 ? launch<__nv_bfloat16> : launch<__half>;
  return run(p, call.tile_rows, call.sm_count, call.stream);
}

}  // namespace moe::mlp
