// moe_router: logits[t, e] = hidden[t] . weight[e] + bias[e], everything widened to f32 first.
//
// Algorithm: tokens are widened in pieces that fit the scratch budget; tiles of 128 tokens x 16 experts go through
// Kernels::dots, which has the order of accumulation. Threads share the tiles. Limits: none. NaN and
// infinities take their course; there is nothing to tie.
#include <algorithm>
#include <cstdint>

#include "experts_layout.h"

namespace moe {

Status moe_router(Backend& backend, const MoeRouter& p) {
  constexpr int64_t kTokens = 128, kExperts = 16;
  const int64_t T = p.T, H = p.H, E = p.E;
  const Kernels& kernels = cpu(backend).kernels();
  backend.note_path("moe_router", kernels.name);
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();
  const int64_t fitting = cpu(backend).scratch_budget() / (FloatRows::bytes_per_place(p.hidden, H) + 1);
  const int64_t piece = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(T, 1));
  FloatRows rows;
  MOE_RETURN_IF_ERROR(rows.reserve(workspace, p.hidden, H, piece));

  for (int64_t begin = 0; begin < T && !pool.cancelled(); begin += piece) {
    const int64_t tokens = std::min(piece, T - begin), blocks = ceil_div(E, kExperts);
    pool.parallel_for(tokens, 16, [&](int64_t from, int64_t to) { rows.load(kernels, begin + from, to - from, from); });
    pool.parallel_for(ceil_div(tokens, kTokens) * blocks, 1, [&](int64_t task, int64_t) {
      const int64_t first = task / blocks * kTokens, e = task % blocks * kExperts;
      const int64_t m = std::min(kTokens, tokens - first), n = std::min(kExperts, E - e);
      const float* x[kTokens];
      for (int64_t r = 0; r < m; r++) x[r] = rows.row(begin + first + r, first + r);
      float* logits = p.logits.as<float>() + (begin + first) * E + e;
      kernels.dots(x, m, element(p.weight.data, p.weight.dtype, e * H), p.weight.dtype, n, H, logits, E);
      if (!p.bias) return;
      for (int64_t r = 0; r < m; r++) {
        for (int64_t c = 0; c < n; c++) logits[r * E + c] += p.bias.as<float>()[e + c];
      }
    });
  }
  return cpu(backend).finished();
}

MOE_REGISTER(moe_router, MoeRouter);

}  // namespace moe
