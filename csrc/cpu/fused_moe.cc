// fused_moe: dispatch, experts and combine without gathered rows and without expert outputs in memory.
//
// Algorithm: tokens are taken in pieces that fit the scratch budget. Per piece, the local choices are counting-sorted
// by expert and cut into tiles of at most 128 rows, which refer to the tokens' rows where they are. Threads share
// tile x block-of-I tasks (gate, up, activation into f32 scratch), and then blocks of 32 columns of H: the thread
// projects all rows of the piece down to its columns and adds every token's columns up, in column order, before
// anything is rounded. So f32 gives the bits of moe_dispatch, moe_experts and moe_combine; narrow dtypes are rounded
// once instead of twice. Zero experts and weights_on_input as in moe_combine; ids neither local nor zero add nothing.
// Limits: T * C of one piece below 2^31. Order of accumulation: gemm.h, then column order.
#include <algorithm>
#include <cstdint>

#include "expert_mlp.h"

namespace moe {

namespace {

constexpr int32_t kNowhere = -1;     // not local: adds nothing
constexpr int32_t kZeroExpert = -2;  // adds weight * hidden

}  // namespace

Status fused_moe(Backend& backend, const FusedMoe& p) {
  const int64_t T = p.T, C = p.C, H = p.H, S = p.S, I = p.I;
  const int32_t* ids = p.ids.as<const int32_t>();
  const float* weights = p.weights.as<const float>();
  backend.note_path("fused_moe", "portable");
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();

  // Scratch
  const int64_t width = columns_per_task(I), blocks = ceil_div(I, width);
  const int64_t out_width = columns_per_task(H), out_blocks = ceil_div(H, out_width);
  const int64_t lanes = pool.threads();
  const int64_t choice_bytes = (padded(I) + lanes * out_width) * int64_t{sizeof(float)} + 16;
  const int64_t token_bytes = C * choice_bytes + FloatRows::bytes_per_place(p.hidden, H);
  const int64_t fitting = cpu(backend).scratch_budget() / std::max<int64_t>(token_bytes, 1);
  const int64_t piece = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(T, 1));
  const int64_t room = piece * C;
  FloatRows hidden;
  float *active = nullptr, *down = nullptr;
  int32_t *places = nullptr, *tokens = nullptr, *next = nullptr;
  float* row_weights = nullptr;
  Tile* tiles = nullptr;
  MOE_RETURN_IF_ERROR(hidden.reserve(workspace, p.hidden, H, piece));
  MOE_RETURN_IF_ERROR(workspace.take(room * padded(I), &active));
  MOE_RETURN_IF_ERROR(workspace.take(room * out_width * lanes, &down));
  MOE_RETURN_IF_ERROR(workspace.take(room, &places));       // of each choice
  MOE_RETURN_IF_ERROR(workspace.take(room, &tokens));       // of each place, within the piece
  MOE_RETURN_IF_ERROR(workspace.take(room, &row_weights));  // of each place
  MOE_RETURN_IF_ERROR(workspace.take(S + 1, &next));
  MOE_RETURN_IF_ERROR(workspace.take(std::min(S, room) + room / kTileRows, &tiles));
  const ExpertsView experts(p.experts);

  for (int64_t begin = 0; begin < T && !pool.cancelled(); begin += piece) {
    const int64_t here = std::min(piece, T - begin), choices = here * C;
    pool.parallel_for(here, 16, [&](int64_t from, int64_t to) { hidden.load(begin + from, to - from, from); });

    // Sort the choices
    std::fill_n(next, S + 1, 0);
    for (int64_t choice = 0; choice < choices; choice++) {
      const int64_t id = ids[begin * C + choice], zero = id - p.first_zero, expert = id - p.first_expert;
      places[choice] = kNowhere;
      if (p.zero > 0 && zero >= 0 && zero < p.zero) {
        places[choice] = kZeroExpert;
      } else if (id >= 0 && expert >= 0 && expert < S) {
        places[choice] = 0;
        next[expert + 1]++;
      }
    }
    int64_t count = 0;
    for (int64_t e = 0; e < S; e++) {
      const int64_t first = next[e], rows = next[e + 1];
      next[e + 1] += next[e];
      for (int64_t r = 0; r < rows; r += kTileRows) {
        tiles[count++] = {e, std::min(kTileRows, rows - r), first + r, first + r};
      }
    }
    for (int64_t choice = 0; choice < choices; choice++) {
      if (places[choice] < 0) continue;
      const int32_t place = next[ids[begin * C + choice] - p.first_expert]++;
      places[choice] = place;
      tokens[place] = static_cast<int32_t>(choice / C);
      row_weights[place] = weights[begin * C + choice];
    }

    pool.parallel_for(count * blocks, 1, [&](int64_t task, int64_t) {
      const Tile& tile = tiles[task / blocks];
      const int64_t i = task % blocks * width, n = std::min(width, I - i);
      const float* x[kTileRows];
      float gate[kTileRows * kMostColumns], up[kTileRows * kMostColumns];
      for (int64_t r = 0; r < tile.rows; r++) {
        const int64_t token = tokens[tile.place + r];
        x[r] = hidden.row(begin + token, token);
      }
      project_gate_up(experts, tile.expert, x, tile.rows, i, n, p.weights_on_input ? row_weights + tile.place : nullptr,
                      gate, up);
      activate(experts, tile.rows, i, n, gate, up, active + tile.place * padded(I));
    });

    pool.parallel_for(out_blocks, 1, [&](int64_t block, int64_t) {
      const int64_t h = block * out_width, n = std::min(out_width, H - h);
      float* out = down + ThreadPool::lane() * room * out_width;
      for (int64_t at = 0; at < count; at++) {
        const Tile& tile = tiles[at];
        const float* x[kTileRows];
        for (int64_t r = 0; r < tile.rows; r++) x[r] = active + (tile.place + r) * padded(I);
        project_down(experts, tile.expert, x, tile.rows, h, n, out + tile.place * out_width, out_width);
      }
      for (int64_t t = 0; t < here; t++) {
        float sums[kMostColumns] = {};
        for (int64_t choice = t * C; choice < (t + 1) * C; choice++) {
          const float weight = weights[begin * C + choice];
          if (places[choice] == kZeroExpert) {
            add_scaled(sums, hidden.row(begin + t, t) + h, weight, n);
          } else if (places[choice] != kNowhere) {
            add_scaled(sums, out + places[choice] * out_width, p.weights_on_input ? 1.0f : weight, n);
          }
        }
        for (int64_t c = 0; c < n; c++) sums[c] *= p.output_scale;
        narrow(sums, n, element(p.output.data, p.output.dtype, (begin + t) * H + h), p.output.dtype);
      }
    });
  }
  return cpu(backend).finished();
}

MOE_REGISTER(fused_moe, FusedMoe);

}  // namespace moe
