// The expert MLP in groups: up to kGroupRows rows of one expert, which share one pass over its weights. The rows of a
// group are cut into tiles of at most Kernels::tile_rows, about equally many each, and lie interleaved in memory in the
// order in which a panel goes over them: chunk after chunk of kChunk columns, in a chunk tile after tile, and in a tile
// [columns][rows]. Ops make the list of groups, share groups x panels among threads, and decide what becomes of the
// results.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "../common/thread_pool.h"
#include "backend.h"
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

// Interleaves `count` rows of `width` values, widened, as the tiles of one group.
void load_group(const Kernels& kernels, const void* const* rows, int64_t count, DType dtype, int64_t width, float* out);

// The group that each thread is working on, interleaved. A thread loads it for itself, into memory that stays in its
// cache while panels go over it; several do so with the same group only where there are fewer groups than threads, or
// at the end.
class LaneGroups {
 public:
  // For groups of an op that has `rows` rows of `width` values: of kGroupRows, or as many as half of `budget` holds.
  LaneGroups(const ThreadPool& pool, int64_t rows, int64_t width, int64_t budget)
      : lanes_(pool.threads()),
        width_(width),
        most_rows_(std::clamp<int64_t>(std::min(rows, budget / 2 / (lanes_ * row_bytes())), 1, kGroupRows)) {}

  int64_t most_rows() const { return most_rows_; }
  int64_t bytes() const { return lanes_ * most_rows_ * row_bytes(); }
  Status reserve(Workspace& workspace) {
    MOE_RETURN_IF_ERROR(workspace.take(lanes_, &held_));
    forget();
    return workspace.take(lanes_ * most_rows_ * width_, &data_);
  }
  // Before the groups that were held mean something else.
  void forget() { std::fill_n(held_, lanes_, nullptr); }

  // The rows of `group` for this thread; row(r) is where its row r lies.
  template <class Row>
  const float* load(const Kernels& kernels, const Group& group, DType dtype, Row&& row) {
    const int lane = ThreadPool::lane();
    float* out = data_ + lane * most_rows_ * width_;
    if (held_[lane] == &group) return out;
    const void* rows[kGroupRows];
    for (int64_t r = 0; r < group.rows; r++) rows[r] = row(r);
    load_group(kernels, rows, group.rows, dtype, width_, out);
    held_[lane] = &group;
    return out;
  }

 private:
  int64_t row_bytes() const { return width_ * int64_t{sizeof(float)}; }

  const int64_t lanes_, width_, most_rows_;
  const Group** held_ = nullptr;
  float* data_ = nullptr;
};

// fn(group, panel) for every panel of every group, shared among threads; a panel has `width` rows of the dtype.
template <class F>
void for_each_panel(ThreadPool& pool, const Group* groups, int64_t count, int64_t panels, DType dtype, int64_t width,
                    F&& fn) {
  const int64_t total = count * panels;
  pool.parallel_for(total, panels_per_task(width, dtype, total), [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; task++) fn(groups[task / panels], task % panels);
  });
}

// out[r * kPanel + c]: the columns of a panel of w13 for the rows of a group, w * (x W^T) + b, with w = 1 without
// row_weights: gates of columns kHalf * panel and on, then ups.
void project_gate_up(const Kernels& kernels, const ExpertsView& experts, int64_t expert, const float* x, int64_t rows,
                     int64_t panel, const float* row_weights, float* out);

// active: those columns activated, in the interleaved group of width I that project_down reads.
void activate(const Kernels& kernels, const ExpertsView& experts, const float* gate_up, int64_t rows, int64_t panel,
              float* active);

// out[r * stride + c], c < kPanel: the columns of a panel of w2, with the bias.
void project_down(const Kernels& kernels, const ExpertsView& experts, int64_t expert, const float* x, int64_t rows,
                  int64_t panel, float* out, int64_t stride);

}  // namespace moe
