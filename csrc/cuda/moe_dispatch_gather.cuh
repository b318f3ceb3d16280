// The kernels of moe_dispatch that copy rows: each token is read once and written to all its places, then empty places
// are cleared.
#pragma once
#include "hopper.cuh"
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

struct Rows {
  const char* hidden;
  char* rows;
  const int32_t *inverse, *order;
  int64_t tokens, columns, places, bytes;  // bytes of a row
};

// Lines of memory: the copy engine writes rows that begin elsewhere, in either memory, at half of the speed.
constexpr uint32_t kLine = 128;
constexpr uint32_t kZeroBytes = 16 * 1024;

#ifdef __CUDACC__

// `bytes` (a multiple of 16, both addresses too) from shared to global memory.
__device__ __forceinline__ void store_bulk(char* to, const char* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(hopper::shared_address(from)), "r"(bytes)
               : "memory");
}
// Until this thread's stores have read what they store.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// By the copy engine, where rows are whole lines. Memory is slower when it is read and written at once than
// one after the other, so a block on every multiprocessor reads as much as its shared memory holds, all of them at the
// same time, then writes that to all places, and so on. Neighbouring blocks have neighbouring tokens, so that what is
// written at the same time lies together for each expert.
__global__ void __launch_bounds__(256) copy_rows(const __grid_constant__ Rows r, uint32_t held) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  char* const buffer = shared + kLine;
  const uint32_t barrier = hopper::shared_address(shared), columns = static_cast<uint32_t>(r.columns);
  const uint32_t bytes = static_cast<uint32_t>(r.bytes);
  const auto token_of = [&](int64_t i) { return blockIdx.x + i * gridDim.x; };
  if (threadIdx.x == 0) {
    hopper::barrier_init(barrier, 1);
    hopper::fence_barrier_init();
  }
  __syncthreads();
  const int64_t mine = blockIdx.x < r.tokens ? (r.tokens - 1 - blockIdx.x) / gridDim.x + 1 : 0;
  uint32_t phase = 0;
  for (int64_t first = 0; first < mine; first += held, phase ^= 1) {
    const uint32_t n = static_cast<uint32_t>(min(mine - first, static_cast<int64_t>(held)));
    if (threadIdx.x == 0) hopper::barrier_arrive_expect(barrier, n * bytes);
    for (uint32_t i = threadIdx.x; i < n; i += blockDim.x) {
      hopper::copy_bulk(hopper::shared_address(buffer + i * bytes), r.hidden + token_of(first + i) * r.bytes, bytes,
                        barrier);
    }
    wait_for_previous_kernel();  // it wrote the places, but not the hidden states
    for (uint32_t i = threadIdx.x; i < n * columns; i += blockDim.x) {
      const int64_t place = r.inverse[token_of(first + i / columns) * columns + i % columns];
      hopper::barrier_wait(barrier, phase);
      if (place < 0 || place >= r.places) continue;
      store_bulk(r.rows + place * r.bytes, buffer + i / columns * bytes, bytes);
    }
    wait_for_stores();
    __syncthreads();
  }

  // Empty places
  wait_for_previous_kernel();
  const uint32_t zeros = static_cast<uint32_t>(min(r.bytes, static_cast<int64_t>(kZeroBytes)));
  for (uint32_t i = 16 * threadIdx.x; i < zeros; i += 16 * blockDim.x) {
    *reinterpret_cast<int4*>(buffer + i) = make_int4(0, 0, 0, 0);
  }
  hopper::fence_proxy_shared();
  __syncthreads();
  const int64_t choices = r.tokens * r.columns, threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = (static_cast<int64_t>(threadIdx.x / 32) * gridDim.x + blockIdx.x) * 32 + threadIdx.x % 32;
  for (int64_t place = thread; place < r.places; place += threads) {
    if (r.order[place] != choices) continue;
    for (int64_t i = 0; i < r.bytes; i += zeros) {
      store_bulk(r.rows + place * r.bytes + i, buffer, static_cast<uint32_t>(min(r.bytes - i, int64_t{zeros})));
    }
  }
  wait_for_stores();
#endif
}

// By any device: a warp has a piece of 4 vectors a lane, of a token, for all its places, or of zeros, for the empty
// ones of 32 places. The first vectors are on their way before the sort is over.
template <class V>
__global__ void __launch_bounds__(256) gather(const __grid_constant__ Rows r) {
  constexpr int kEach = 4;
  const int lane = threadIdx.x % 32;
  const V* const hidden = reinterpret_cast<const V*>(r.hidden);
  V* const rows = reinterpret_cast<V*>(r.rows);
  const int64_t vectors = r.bytes / static_cast<int64_t>(sizeof(V));
  const int64_t pieces = (vectors + 32 * kEach - 1) / (32 * kEach), choices = r.tokens * r.columns;
  const int64_t items = (r.tokens + (r.places + 31) / 32) * pieces;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  bool waited = false;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  for (int64_t item = begin; item < items; item += warps) {
    const int64_t t = item / pieces, first = item % pieces * (32 * kEach) + lane;
    V values[kEach] = {};
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      if (t < r.tokens && first + 32 * k < vectors) values[k] = __ldcs(hidden + t * vectors + first + 32 * k);
    }
    if (!waited) wait_for_previous_kernel();
    waited = true;
    const int64_t candidates = t < r.tokens ? r.columns : 32;
    for (int64_t base = 0; base < candidates; base += 32) {
      int64_t mine = -1;
      if (t < r.tokens) {
        if (base + lane < r.columns) mine = r.inverse[t * r.columns + base + lane];
      } else {
        const int64_t place = (t - r.tokens) * 32 + lane;
        if (place < r.places && r.order[place] == choices) mine = place;
      }
      for (unsigned rest = __ballot_sync(kAll, mine >= 0 && mine < r.places); rest != 0; rest &= rest - 1) {
        const int64_t place = __shfl_sync(kAll, mine, __ffs(static_cast<int>(rest)) - 1);
#pragma unroll
        for (int k = 0; k < kEach; k++) {
          if (first + 32 * k < vectors) __stcs(rows + place * vectors + first + 32 * k, values[k]);
        }
      }
    }
  }
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
