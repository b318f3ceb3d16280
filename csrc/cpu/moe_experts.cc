// moe_experts: the expert MLP of every dispatched row.
//
// Algorithm: the rows of each expert are cut into tiles of at most 128. Tiles are taken in pieces that fit the scratch
// budget; per piece, threads share tile x block-of-I tasks that project gate and up and activate into f32 scratch, and
// then tile x block-of-H tasks that project down and round into the output. The weight of a row multiplies the
// accumulator before the bias. Places without a row are zeroed. Limits: none; an expert's rows may lie anywhere, but
// no place may belong to two of them. Order of accumulation: gemm.h. NaN and infinities take their course.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "expert_mlp.h"

namespace moe {

namespace {

std::string text(int64_t number) { return std::to_string(number); }

Status refuse(const char* arg, const std::string& expectation) {
  return Status::Error(Code::kRange, "expected " + expectation, arg);
}

// Marks the places that hold a row, counts tiles, and checks what only the data can tell.
Status check(const MoeExperts& p, uint8_t* taken, int64_t* tiles) {
  const int32_t* counts = p.counts.as<const int32_t>();
  const int32_t* offsets = p.offsets.as<const int32_t>();
  std::memset(taken, 0, static_cast<size_t>(p.P));
  for (int64_t e = 0; e < p.S; e++) {
    const int64_t count = counts[e], first = offsets[e];
    if (count < 0) return refuse("counts", "counts[" + text(e) + "] >= 0 but received " + text(count));
    if (count > 0 && (first < 0 || first + count > p.P)) {
      return refuse("offsets", "the rows of expert " + text(e) + " among 0.." + text(p.P - 1) + " but received " +
                                   text(first) + ".." + text(first + count - 1));
    }
    for (int64_t place = first; place < first + count; place++) {
      if (taken[place] != 0) {
        return refuse("offsets", "every row to belong to one expert but row " + text(place) + " of expert " + text(e) +
                                     " belongs to an earlier one too");
      }
      taken[place] = 1;
      if (!p.order) continue;
      const int64_t choice = p.order.as<const int32_t>()[place];
      if (choice < 0 || choice >= p.weights.elements) {
        return refuse("order", "order[" + text(place) + "] among the " + text(p.weights.elements) +
                                   " choices but received " + text(choice));
      }
    }
    *tiles += ceil_div(count, kTileRows);
  }
  return Status::Ok();
}

}  // namespace

Status moe_experts(Backend& backend, const MoeExperts& p) {
  const int64_t H = p.H, I = p.I;
  backend.note_path("moe_experts", "portable");
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();

  uint8_t* taken = nullptr;
  int64_t count = 0;
  MOE_RETURN_IF_ERROR(workspace.take(p.P, &taken));
  MOE_RETURN_IF_ERROR(check(p, taken, &count));
  const size_t output_bytes = static_cast<size_t>(H) * size_of(p.output.dtype);
  pool.parallel_for(p.P, std::max<int64_t>(1, 16384 / std::max<int64_t>(H, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; place++) {
      if (taken[place] == 0) std::memset(element(p.output.data, p.output.dtype, place * H), 0, output_bytes);
    }
  });

  // Tiles, placed in pieces of at most `room` rows
  const int64_t row_bytes = padded(I) * int64_t{sizeof(float)} + FloatRows::bytes_per_place(p.rows, H);
  const int64_t room = std::max(kTileRows, std::min(p.P, cpu(backend).scratch_budget() / row_bytes));
  Tile* tiles = nullptr;
  MOE_RETURN_IF_ERROR(workspace.take(count, &tiles));
  int64_t filled = 0, place = 0;
  for (int64_t e = 0; e < p.S; e++) {
    const int64_t rows = p.counts.as<const int32_t>()[e], first = p.offsets.as<const int32_t>()[e];
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t m = std::min(kTileRows, rows - r);
      if (place + m > room) place = 0;
      tiles[filled++] = {e, m, first + r, place};
      place += m;
    }
  }

  FloatRows rows;
  float* active = nullptr;
  MOE_RETURN_IF_ERROR(rows.reserve(workspace, p.rows, H, room));
  MOE_RETURN_IF_ERROR(workspace.take(room * padded(I), &active));
  const ExpertsView experts(p.experts);
  for (int64_t begin = 0, end = 0; begin < count && !pool.cancelled(); begin = end) {
    for (end = begin + 1; end < count && tiles[end].place != 0;) end++;
    const Tile* piece = tiles + begin;

    pool.parallel_for(end - begin, 1, [&](int64_t at, int64_t) {
      rows.load(piece[at].first, piece[at].rows, piece[at].place);
    });

    const int64_t width = columns_per_task(I), blocks = ceil_div(I, width);
    pool.parallel_for((end - begin) * blocks, 1, [&](int64_t task, int64_t) {
      const Tile& tile = piece[task / blocks];
      const int64_t i = task % blocks * width, n = std::min(width, I - i);
      const float* x[kTileRows];
      float weights[kTileRows], gate[kTileRows * kMostColumns], up[kTileRows * kMostColumns];
      for (int64_t r = 0; r < tile.rows; r++) {
        x[r] = rows.row(tile.first + r, tile.place + r);
        if (p.order) weights[r] = p.weights.as<const float>()[p.order.as<const int32_t>()[tile.first + r]];
      }
      project_gate_up(experts, tile.expert, x, tile.rows, i, n, p.order ? weights : nullptr, gate, up);
      activate(experts, tile.rows, i, n, gate, up, active + tile.place * padded(I));
    });

    const int64_t out_width = columns_per_task(H), out_blocks = ceil_div(H, out_width);
    pool.parallel_for((end - begin) * out_blocks, 1, [&](int64_t task, int64_t) {
      const Tile& tile = piece[task / out_blocks];
      const int64_t h = task % out_blocks * out_width, n = std::min(out_width, H - h);
      const float* x[kTileRows];
      float out[kTileRows * kMostColumns];
      for (int64_t r = 0; r < tile.rows; r++) x[r] = active + (tile.place + r) * padded(I);
      project_down(experts, tile.expert, x, tile.rows, h, n, out, n);
      for (int64_t r = 0; r < tile.rows; r++) {
        narrow(out + r * n, n, element(p.output.data, p.output.dtype, (tile.first + r) * H + h), p.output.dtype);
      }
    });
  }
  return cpu(backend).finished();
}

MOE_REGISTER(moe_experts, MoeExperts);

}  // namespace moe
