// The expert MLP in groups: up to kGroupRows rows of one expert, which share one pass over its weights. The rows of a
// group are cut into tiles of at most Kernels::tile_rows, about equally many each, and lie interleaved in memory: tile
// after tile, and in a tile [width][rows]. Ops make the list of groups, share groups x panels among threads, and
// decide what becomes of the results.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../common/thread_pool.h"
#include "experts_layout.h"

namespace moe {

// How many rows share one pass over the weights: more would leave the cache.
inline constexpr int64_t kGroupRows = 128;

struct Group {
  int64_t expert;
  int64_t rows;   // at most kGroupRows
  int64_t first;  // its first row among the op's rows
  int64_t place;  // its first row among the rows held in scratch
};

// Calls fn(start, m) for the parts of `rows` rows, as few as may be with `most` in each, and about equally long.
template <class F>
void for_each_part(int64_t rows, int64_t most, F&& fn) {
  const int64_t parts = ceil_div(rows, most);
  for (int64_t part = 0, start = 0; part < parts; part++) {
    const int64_t m = rows / parts + (part < rows % parts ? 1 : 0);
    fn(start, m);
    start += m;
  }
}
template <class F>
void for_each_tile(const Kernels& kernels, int64_t rows, F&& fn) {
  for_each_part(rows, kernels.tile_rows, std::forward<F>(fn));
}

// How many panels of `width` rows a thread takes at a time, of `total`: long runs of memory, but enough tasks for all.
constexpr int64_t panels_per_task(int64_t width, DType dtype, int64_t total) {
  const int64_t bytes = width * kPanel * static_cast<int64_t>(size_of(dtype));
  return std::clamp<int64_t>((int64_t{512} << 10) / bytes, 1, std::max<int64_t>(total / 64, 1));
}

// How many groups of rows of `width` values are loaded at a time: a few small ones are not worth a second thread.
constexpr int64_t groups_per_task(int64_t width) { return std::max<int64_t>(1, 16384 / width); }

// Interleaves `count` rows of `width` values, widened, as the tiles of one group.
void load_group(const Kernels& kernels, const void* const* rows, int64_t count, DType dtype, int64_t width, float* out);

// fn(group, panel) for every panel of every group, shared among threads. The rows of a group lie at its place in `in`,
// `width` values each; they are read before several panels go over them: a tile at a time they would be waited for.
template <class F>
void for_each_panel(ThreadPool& pool, const Kernels& kernels, const Group* groups, int64_t count, int64_t panels,
                    DType dtype, const float* in, int64_t width, F&& fn) {
  const int64_t total = count * panels;
  pool.parallel_for(total, panels_per_task(width, dtype, total), [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; task++) {
      const Group& group = groups[task / panels];
      const bool first = task == from || task % panels == 0;
      if (first && group.rows > kernels.tile_rows) kernels.read(in + group.place * width, group.rows * width);
      fn(group, task % panels);
    }
  });
}

// out[r * kPanel + c]: the columns of a panel of w13 for the rows of a group, w * (x W^T) + b, with w = 1 without
// row_weights: gates of columns kHalf * panel and on, then ups.
void project_gate_up(const Kernels& kernels, const ExpertsView& experts, int64_t expert, const float* x, int64_t rows,
                     int64_t panel, const float* row_weights, float* out);

// active: those columns activated, in the interleaved group of width I that project_down reads.
void activate(const Kernels& kernels, const ExpertsView& experts, const float* gate_up, int64_t rows, int64_t panel,
              float* active);

// out[r * kPanel + c]: the columns of a panel of w2, with the bias.
void project_down(const Kernels& kernels, const ExpertsView& experts, int64_t expert, const float* x, int64_t rows,
                  int64_t panel, float* out);

}  // namespace moe
