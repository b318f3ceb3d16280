// The parts of a block that `wgmma` has cut along K: their sums are added up along a binary tree over the parts in the
// order of K. Of two siblings the warpgroup that comes second adds the first one's sums and goes up; a sum of two does
// not depend on who adds, so the result is always the same. Nobody waits.
#pragma once
#include "expert_mlp_wgmma_sm90a.cuh"

namespace moe::mlp::wgmma {

// Whether this warpgroup came last and has the whole sums of item `n`, which is read each time: the sums leave no
// registers to keep it in.
template <bool IN_TURNS, int TILES, int SUMS>
__device__ __forceinline__ bool add_parts(const Params& p, Shared<IN_TURNS> shared, int n, float (&sum)[TILES][SUMS],
                                          int group, int thread) {
  static_assert(SUMS % 4 == 0);
#pragma unroll 1
  for (int width = 1;; width *= 2) {
    const Item item = item_at(shared, n);
    if (width >= item.parts) return true;
    const auto place = [&](int part) {
      const int slot = item.product * static_cast<int>(gridDim.x) + item.slot + part;
      return int64_t{slot} * kConsumers + (IN_TURNS ? 0 : group);
    };
    const int mine = carrier(item.part, width), sibling = sibling_of(mine, width);
    if (sibling >= item.parts) continue;
    float4* to = reinterpret_cast<float4*>(p.parts + place(mine) * p.part_floats) + thread;
#pragma unroll
    for (int a = 0; a < TILES; a++) {
#pragma unroll
      for (int i = 0; i < SUMS; i += 4) {
        __stcg(to + (a * SUMS + i) * 32, make_float4(sum[a][i], sum[a][i + 1], sum[a][i + 2], sum[a][i + 3]));
      }
    }
    hopper::named_barrier(1 + group, 128);
    if (thread == 0) {
      hopper::store_shared(shared.word(group), hopper::add_acquire_release(p.arrived + place(max(mine, sibling)), 1));
    }
    hopper::named_barrier(1 + group, 128);
    if (hopper::load_shared_word(shared.word(group)) == 0) return false;
    const float4* from = reinterpret_cast<const float4*>(p.parts + place(sibling) * p.part_floats) + thread;
#pragma unroll
    for (int a = 0; a < TILES; a++) {
#pragma unroll
      for (int i = 0; i < SUMS; i += 4) {
        const float4 v = __ldcg(from + (a * SUMS + i) * 32);
        sum[a][i] += v.x, sum[a][i + 1] += v.y, sum[a][i + 2] += v.z, sum[a][i + 3] += v.w;
      }
    }
  }
}

}  // namespace moe::mlp::wgmma
