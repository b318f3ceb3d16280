// The kernel of moe_dispatch that copies rows: each token is read once and written to all its places, then empty places
// are cleared.
#pragma once
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

#ifdef __CUDACC__

// A warp copies up to 4 vectors a lane of one token to all its places; after the tokens, 32 places a warp are looked
// through for empty ones. The first vectors are on their way before the sort is over.
template <class V>
__global__ void __launch_bounds__(256) gather(const V* hidden, V* rows, const int32_t* inverse, const int32_t* order,
                                              int64_t tokens, int columns, int64_t vectors, int64_t places) {
  constexpr int kEach = 4;
  const int lane = threadIdx.x % 32;
  const int64_t pieces = (vectors + 32 * kEach - 1) / (32 * kEach), copies = tokens * pieces;
  const int64_t choices = tokens * columns, items = copies + (places + 31) / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  bool waited = false;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; item < items; item += warps) {
    const int64_t t = item / pieces, first = item % pieces * (32 * kEach) + lane;
    V values[kEach];
#pragma unroll
    for (int k = 0; k < kEach; k++) {
      if (item < copies && first + 32 * k < vectors) values[k] = __ldcs(hidden + t * vectors + first + 32 * k);
    }
    if (!waited) wait_for_previous_kernel();
    waited = true;
    if (item < copies) {
      for (int base = 0; base < columns; base += 32) {
        const int mine = base + lane < columns ? inverse[t * columns + base + lane] : -1;
        for (int c = 0; c < min(32, columns - base); c++) {
          const int64_t place = __shfl_sync(kAll, mine, c);
          if (place < 0 || place >= places) continue;
#pragma unroll
          for (int k = 0; k < kEach; k++) {
            if (first + 32 * k < vectors) __stcs(rows + place * vectors + first + 32 * k, values[k]);
          }
        }
      }
    } else {
      const int64_t mine = (item - copies) * 32 + lane;
      unsigned empty = __ballot_sync(kAll, mine < places && order[mine < places ? mine : 0] == choices);
      for (; empty != 0; empty &= empty - 1) {
        const int64_t place = (item - copies) * 32 + __ffs(static_cast<int>(empty)) - 1;
        for (int64_t i = lane; i < vectors; i += 32) __stcs(rows + place * vectors + i, V{});
      }
    }
  }
}

#endif  // __CUDACC__

}  // namespace moe::dispatch
