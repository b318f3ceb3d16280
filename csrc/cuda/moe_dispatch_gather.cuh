// The kernel of moe_dispatch that copies rows: each token is read once and written to all its places, then empty places
// are cleared.
#pragma once
#include "moe_dispatch_sort.cuh"

namespace moe::dispatch {

struct Rows {
  const char* hidden;
  char* rows;
  const int32_t *inverse, *order;
  int64_t tokens, columns, places, bytes;  // bytes of a row
};

#ifdef __CUDACC__

// A warp has a piece of 4 vectors a lane, of a token, for all its places, or of zeros, for the empty
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
