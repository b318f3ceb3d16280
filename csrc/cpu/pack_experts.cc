// pack_experts: copies weights into slots of the layout of experts_layout.h, converting the dtype.
//
// Algorithm: threads share blocks of 32 packed rows. Stored [out, in], a row is converted as it is; stored [in, out]
// (transposed), squares of 32 rows x 64 columns are turned on the stack. Interleaved gate and up rows are taken apart
// by a step of 2. Values are widened to f32 and rounded once (equal dtypes are copied bit by bit); biases become f32,
// and 0 where the slot has biases and none are given. Limits: none.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "expert_mlp.h"

namespace moe {

namespace {

constexpr int64_t kRows = 32, kColumns = 64;

// Rows of one source matrix [rows, columns], or [columns, rows] if transposed: start, start + step, ...
struct Source {
  const void* data;  // of this expert
  DType dtype;
  int64_t rows, columns;
  bool transposed;
  int64_t start, step;
};

void convert(const void* from, DType from_dtype, int64_t n, void* to, DType to_dtype) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, static_cast<size_t>(n) * size_of(to_dtype));
    return;
  }
  float wide[256];
  for (int64_t i = 0; i < n; i += 256) {
    const int64_t m = std::min<int64_t>(256, n - i);
    widen(element(from, from_dtype, i), from_dtype, m, wide);
    narrow(wide, m, element(to, to_dtype, i), to_dtype);
  }
}

// `count` <= kRows packed rows, one after the other.
void pack_rows(const Source& s, int64_t count, void* to, DType dtype) {
  if (!s.transposed) {
    for (int64_t r = 0; r < count; r++) {
      convert(element(s.data, s.dtype, (s.start + r * s.step) * s.columns), s.dtype, s.columns,
              element(to, dtype, r * s.columns), dtype);
    }
    return;
  }
  float square[kRows][kColumns], strip[2 * kRows];
  for (int64_t first = 0; first < s.columns; first += kColumns) {
    const int64_t n = std::min(kColumns, s.columns - first), span = (count - 1) * s.step + 1;
    for (int64_t c = 0; c < n; c++) {
      widen(element(s.data, s.dtype, (first + c) * s.rows + s.start), s.dtype, span, strip);
      for (int64_t r = 0; r < count; r++) square[r][c] = strip[r * s.step];
    }
    for (int64_t r = 0; r < count; r++) narrow(square[r], n, element(to, dtype, r * s.columns + first), dtype);
  }
}

}  // namespace

Status pack_experts(Backend& backend, const PackExperts& p) {
  const int64_t H = p.H, I = p.I;
  const DType dtype = p.experts.layout.dtype;
  const bool interleaved = p.gate_up == GateUp::kInterleaved;
  const ExpertsView experts(p.experts);
  if (!p.experts.layout.biases && (p.b13 || p.b2)) {
    const char* arg = p.b13 ? "b13" : "b2";
    return Status::Error(Code::kInvalidArg, "expected no biases: these experts were allocated without", arg);
  }
  backend.note_path("pack_experts", "portable");
  ThreadPool& pool = cpu(backend).pool();

  // Gate and up rows: a block lies in one half, for both start anew when they are interleaved
  const int64_t blocks = ceil_div(I, kRows), blocks2 = ceil_div(H, kRows);
  pool.parallel_for(p.count * 2 * blocks, 1, [&](int64_t task, int64_t) {
    const int64_t expert = task / (2 * blocks), half = task / blocks % 2, i = task % blocks * kRows;
    const Source source = {element(p.w13.data, p.w13.dtype, expert * 2 * I * H), p.w13.dtype, 2 * I, H, p.transposed,
                           interleaved ? 2 * i + half : half * I + i, interleaved ? 2 : 1};
    pack_rows(source, std::min(kRows, I - i), experts.w13(p.first_slot + expert, half * I + i), dtype);
  });
  pool.parallel_for(p.count * blocks2, 1, [&](int64_t task, int64_t) {
    const int64_t expert = task / blocks2, h = task % blocks2 * kRows;
    const Source source = {element(p.w2.data, p.w2.dtype, expert * H * I), p.w2.dtype, H, I, p.transposed, h, 1};
    pack_rows(source, std::min(kRows, H - h), experts.w2(p.first_slot + expert, h), dtype);
  });
  if (!p.experts.layout.biases) return cpu(backend).finished();

  pool.parallel_for(p.count, 1, [&](int64_t expert, int64_t) {
    float* b13 = experts.b13(p.first_slot + expert);
    float* b2 = experts.b2(p.first_slot + expert);
    std::fill_n(b13, 2 * I, 0.0f);
    std::fill_n(b2, H, 0.0f);
    if (p.b2) widen(element(p.b2.data, p.b2.dtype, expert * H), p.b2.dtype, H, b2);
    for (int64_t r = 0; r < 2 * I && p.b13; r++) {
      const int64_t from = !interleaved ? r : r < I ? 2 * r : 2 * (r - I) + 1;
      widen(element(p.b13.data, p.b13.dtype, expert * 2 * I + from), p.b13.dtype, 1, b13 + r);
    }
  });
  return cpu(backend).finished();
}

MOE_REGISTER(pack_experts, PackExperts);

}  // namespace moe
