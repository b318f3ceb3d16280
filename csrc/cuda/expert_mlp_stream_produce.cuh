// The producers of the streaming expert MLP: one warp streams the weights of both products through a deep ring, as far
// ahead as there is room and whatever the state of the activations; three warps gather the rows that they meet.
#pragma once
#include "expert_mlp_stream.cuh"

namespace moe::mlp::stream {

// Weights: steps of two tiles, of which the second may not exist.
struct WeightRing {
  uint32_t memory;
  Barriers* barriers;
  int stages, stage = 0;
  uint32_t parity = 0;
  uint64_t policy;
  int count = 0;  // up to kAhead

  __device__ __forceinline__ void put(const char* first, const char* second) {
    wait(barriers->weights_free + stage, parity ^ 1, 1);
    if (count < kAhead) {
      count++;
    } else {
      const int before = stage - kAhead;
      wait(barriers->weights_full + (before < 0 ? before + stages : before), before < 0 ? parity ^ 1 : parity, 9);
    }
    const uint32_t full = hopper::shared_address(barriers->weights_full + stage), to = memory + stage * kStepBytes;
    hopper::barrier_arrive_expect(full, second != nullptr ? kStepBytes : kTileBytes);
    hopper::copy_bulk(to, first, kTileBytes, full, policy);
    if (second != nullptr) hopper::copy_bulk(to + kTileBytes, second, kTileBytes, full, policy);
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  // Steps from .. to - 1 of the rows of tiles `row` and `row + 1` of a matrix of `rows` x `columns` tiles
  __device__ __forceinline__ void put_block(const void* matrix, int row, int rows, int columns, int from, int to) {
    const char* first = static_cast<const char*>(matrix) + (int64_t{row} * columns + from) * kTileBytes;
    const char* second = row + 1 < rows ? first + int64_t{columns} * kTileBytes : nullptr;
    for (int step = from; step < to; step++) {
      put(first, second);
      first += kTileBytes;
      if (second != nullptr) second += kTileBytes;
    }
  }
};

// One thread
__device__ __forceinline__ void stream_weights(const Args& a, const Shape& shape, const Entry* list, Barriers* barriers,
                                               char* memory) {
  WeightRing ring{hopper::shared_address(memory), barriers, a.layout.stages};
  ring.policy = hopper::evict_first_policy();
  const char *w13 = static_cast<const char*>(a.experts.w13), *w2 = static_cast<const char*>(a.experts.w2);
  for_segments(Span(shape.steps1()), shape.along_h, [&](int block, int from, int to) {
    const int row = block / shape.entries, entry = block - row * shape.entries;
    ring.put_block(w13 + list[entry].slot * a.experts.size13 * 2, 2 * row, shape.tiles1, shape.along_h, from, to);
  });
  for_segments(Span(shape.steps2()), shape.along_i, [&](int block, int from, int to) {
    const int row = block / shape.entries, entry = block - row * shape.entries;
    ring.put_block(w2 + list[entry].slot * a.experts.size2 * 2, 2 * row, shape.tiles2, shape.along_i, from, to);
  });
}

// The producers' end of the ring of rows: which room is free again. A warp keeps the beginnings of the stages in use,
// one per lane, counted on without end.
struct RowRoom {
  RowRing ring;
  uint64_t* free;
  uint32_t total = 0, begin = 0;
  int used = 0, oldest = 0;
  uint32_t oldest_parity = 0;

  __device__ __forceinline__ void release() {
    wait(free + oldest, oldest_parity, 2);
    if (++oldest == kRowStages) oldest = 0, oldest_parity ^= 1;
    used--;
  }
  // For ring.stage
  __device__ __forceinline__ int take(int size) {
    const int was = ring.at, at = ring.take(size);
    if (at < was) total += ring.bytes - was;
    while (used > 0) {
      const uint32_t oldest_begin = __shfl_sync(0xffffffffu, begin, oldest);
      if (total + size - oldest_begin <= static_cast<uint32_t>(ring.bytes) && used < kRowStages) break;
      release();
    }
    if (threadIdx.x % 32 == ring.stage) begin = total;
    total += size;
    used++;
    return at;
  }
};

// Rows of `hidden` for gate_up, swizzled as the tensor cores want them: 16 bytes a thread. Thread 0 .. 95.
template <class T>
__device__ __forceinline__ RowRoom gather_rows(const Args& a, const Shape& shape, const Entry* list,
                                               const PlanRow* rows, Barriers* barriers, char* memory, int thread) {
  constexpr int kRowsAtOnce = 4 * kGatherWarps, kEach = (kMostRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kRowsAtOnce % 8 == 4);  // so that the swizzle of a thread's rows alternates between two
  RowRoom room{{a.layout.ring_bytes}, barriers->rows_free[0]};
  const int piece = thread % 8, first = thread / 8;
  const uint32_t base = hopper::shared_address(memory) + first * 128;
  const uint32_t even = base + ((piece ^ (first & 7)) << 4), odd = base + ((piece ^ ((first + kRowsAtOnce) & 7)) << 4);
  const T* hidden = static_cast<const T*>(a.hidden) + piece * 8;
  for_segments(Span(shape.steps1()), shape.along_h, [&](int block, int from, int to) {
    const Entry entry = list[block % shape.entries];
    const int size = columns_for(entry.rows) * 128;
    const T* source[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int row = first + i * kRowsAtOnce;
      source[i] = hidden + from * 64 + (row < entry.rows ? int64_t{rows[entry.first + row].token} * a.H : 0);
    }
    for (int step = from; step < to; step++) {
      const uint32_t full = hopper::shared_address(barriers->rows_full[0] + room.ring.stage);
      const uint32_t at = room.take(size), even_at = even + at, odd_at = odd + at;
      if (step * 64 + 64 <= a.H) {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
          if (i * kRowsAtOnce >= entry.rows) break;
          hopper::copy_async_if(first + i * kRowsAtOnce < entry.rows,
                                (i % 2 == 0 ? even_at : odd_at) + i * kRowsAtOnce * 128, source[i]);
          source[i] += 64;
        }
      } else {  // the last step, with zeros beyond H
        const bool there = step * 64 + piece * 8 < a.H;
#pragma unroll
        for (int i = 0; i < kEach; i++) {
          if (first + i * kRowsAtOnce >= entry.rows) break;
          hopper::copy_async((i % 2 == 0 ? even_at : odd_at) + i * kRowsAtOnce * 128, there ? source[i] : hidden,
                             there);
        }
      }
      hopper::copy_async_arrive(full);
      room.ring.next();
    }
  });
  return room;
}

// Activations for down, by one warp, once all blocks have written theirs. `before`: the room of gate_up, to be left.
template <class T>
__device__ __forceinline__ void fetch_active(const Args& a, const Shape& shape, const Entry* list, Barriers* barriers,
                                             char* memory, RowRoom& before) {
  const Span span(shape.steps2());
  if (span.lo == span.hi) return;
  while (before.used > 0) before.release();
  int32_t* ready = ready_counter(a);
  const bool leader = threadIdx.x % 32 == 0;
  if (leader) {
    const int all = shape.entries * shape.blocks1 * kConsumerWarps;
#ifdef MOE_STREAM_WATCHDOG
    const long long begin = clock64();
#endif
    while (hopper::load_acquire(ready) != all) {
#ifdef MOE_STREAM_WATCHDOG
      if (clock64() - begin > 3000000000ll) {
        printf("block %d waits for activations: %d of %d\n", blockIdx.x, *ready, all);
        __trap();
      }
#endif
    }
    // The last block to know leaves the counters as they were.
    if (atomicAdd(ready + 1, 1) == span.blocks - 1) ready[0] = 0, ready[1] = 0;
  }
  __syncwarp();
  hopper::fence_proxy();
  RowRoom room{{a.layout.ring_bytes}, barriers->rows_free[1]};
  const uint32_t base = hopper::shared_address(memory);
  for_segments(span, shape.along_i, [&](int block, int from, int to) {
    const Entry entry = list[block % shape.entries];
    const int size = columns_for(entry.rows) * 128, bytes = ((entry.rows + 7) & ~7) * 128;
    const char* active = static_cast<const char*>(a.active) + int64_t{entry.first8} * shape.along_i * 128;
    for (int step = from; step < to; step++) {
      const uint32_t full = hopper::shared_address(barriers->rows_full[1] + room.ring.stage);
      const uint32_t at = base + room.take(size);
      if (leader) {
        hopper::barrier_arrive_expect(full, bytes);
        hopper::copy_bulk(at, active + int64_t{step} * bytes, bytes, full);
      }
      room.ring.next();
    }
  });
}

}  // namespace moe::mlp::stream
