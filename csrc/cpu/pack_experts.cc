// pack_experts: lays weights out in the panels of experts_layout.h, converting the dtype.
//
// Algorithm: threads share panels. A panel's 32 rows are taken where they lie if they are stored [out, in] in the
// packed dtype, else 128 columns at a time are converted into rows on the stack (turning what is stored [in, out]); the
// vectors' own transposition then makes panel rows of them. Interleaved gate and up rows are taken apart by a step of
// 2. Values are widened to f32 and rounded once (equal dtypes are copied bit by bit); biases become f32, and 0 where
// the slot has biases and none are given. Columns beyond the matrix are 0. Limits: none.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "expert_mlp.h"

namespace moe {

namespace {

// The 16 columns of half a panel in their source matrix [rows, columns], or [columns, rows] if transposed: rows start,
// start + step, ... of it, `count` of them; the others of the half are zero.
struct Half {
  const void* data;  // of this expert
  DType dtype;
  int64_t rows;
  bool transposed;
  int64_t start, step, count;
};

// Columns begin .. begin+n-1 of a half's rows in the packed dtype, each at `width` elements from the one before.
void convert_rows(const Kernels& kernels, const Half& half, int64_t columns, int64_t begin, int64_t n, DType dtype,
                  char* to, int64_t width) {
  constexpr int64_t kMost = 2 * kHalf;
  const auto row = [&](int64_t j) { return to + j * width * static_cast<int64_t>(size_of(dtype)); };
  const bool same = half.dtype == dtype;
  for (int64_t j = half.count; j < kHalf; j++) std::memset(row(j), 0, static_cast<size_t>(n) * size_of(dtype));
  if (!half.transposed) {
    float wide[kChunk];
    for (int64_t j = 0; j < half.count; j++) {
      const void* from = element(half.data, half.dtype, (half.start + j * half.step) * columns + begin);
      if (same) {
        std::memcpy(row(j), from, static_cast<size_t>(n) * size_of(dtype));
      } else {
        kernels.widen(from, half.dtype, n, wide);
        kernels.narrow(wide, n, row(j), dtype);
      }
    }
    return;
  }
  float wide[kMost];
  char line[kMost * sizeof(float)];
  const int64_t span = half.count == 0 ? 0 : (half.count - 1) * half.step + 1;
  for (int64_t c = 0; c < n && span > 0; c++) {
    const void* from = element(half.data, half.dtype, (begin + c) * half.rows + half.start);
    if (!same) {
      kernels.widen(from, half.dtype, span, wide);
      kernels.narrow(wide, span, line, dtype);
      from = line;
    }
    for (int64_t j = 0; j < half.count; j++) {
      std::memcpy(row(j) + c * static_cast<int64_t>(size_of(dtype)), element(from, dtype, j * half.step),
                  size_of(dtype));
    }
  }
}

// A panel of `columns` rows from its two halves.
void pack_panel(const Kernels& kernels, const Half (&halves)[2], int64_t columns, DType dtype, void* panel) {
  constexpr int64_t kColumns = 128;
  const auto bytes = static_cast<int64_t>(size_of(dtype));
  const void* rows[kPanel];
  const auto in_place = [&](const Half& half) {
    return !half.transposed && half.dtype == dtype && half.count == kHalf;
  };
  if (in_place(halves[0]) && in_place(halves[1])) {
    for (int64_t j = 0; j < kPanel; j++) {
      const Half& half = halves[j / kHalf];
      rows[j] = element(half.data, dtype, (half.start + j % kHalf * half.step) * columns);
    }
    return kernels.fill_panel(rows, bytes, columns, panel);
  }
  alignas(64) char converted[kPanel * kColumns * sizeof(float)];
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t n = std::min(kColumns, columns - begin);
    for (int64_t h = 0; h < 2; h++) {
      convert_rows(kernels, halves[h], columns, begin, n, dtype, converted + h * kHalf * kColumns * bytes, kColumns);
    }
    for (int64_t j = 0; j < kPanel; j++) rows[j] = converted + j * kColumns * bytes;
    kernels.fill_panel(rows, bytes, n, element(panel, dtype, begin * kPanel));
  }
}

}  // namespace

Status pack_experts(Backend& backend, const PackExperts& p) {
  const int64_t H = p.H, I = p.I;
  const ExpertsLayout& layout = p.experts.layout;
  const bool interleaved = p.gate_up == GateUp::kInterleaved;
  const ExpertsView experts(p.experts);
  if (!layout.biases && (p.b13 || p.b2)) {
    const char* arg = p.b13 ? "b13" : "b2";
    return Status::Error(Code::kInvalidArg, "expected no biases: these experts were allocated without", arg);
  }
  const Kernels& kernels = cpu(backend).kernels();
  backend.note_path("pack_experts", kernels.name);
  ThreadPool& pool = cpu(backend).pool();

  const int64_t panels = panels13(layout), out_panels = panels2(layout);
  pool.parallel_for(p.count * panels, 1, [&](int64_t task, int64_t) {
    const int64_t expert = task / panels, i = task % panels * kHalf, n = std::min(kHalf, I - i);
    const void* data = element(p.w13.data, p.w13.dtype, expert * 2 * I * H);
    const int64_t step = interleaved ? 2 : 1;
    const Half gate = {data, p.w13.dtype, 2 * I, p.transposed, interleaved ? 2 * i : i, step, n};
    const Half up = {data, p.w13.dtype, 2 * I, p.transposed, interleaved ? 2 * i + 1 : I + i, step, n};
    pack_panel(kernels, {gate, up}, H, layout.dtype, experts.w13(p.first_slot + expert, task % panels));
  });
  pool.parallel_for(p.count * out_panels, 1, [&](int64_t task, int64_t) {
    const int64_t expert = task / out_panels, h = task % out_panels * kPanel;
    const void* data = element(p.w2.data, p.w2.dtype, expert * H * I);
    const auto half = [&](int64_t start) {
      return Half{data, p.w2.dtype, H, p.transposed, std::min(start, H), 1, std::clamp<int64_t>(H - start, 0, kHalf)};
    };
    pack_panel(kernels, {half(h), half(h + kHalf)}, I, layout.dtype,
               experts.w2(p.first_slot + expert, task % out_panels));
  });
  if (!layout.biases) return cpu(backend).finished();

  pool.parallel_for(p.count, 1, [&](int64_t expert, int64_t) {
    float* b13 = experts.b13(p.first_slot + expert, 0);
    float* b2 = experts.b2(p.first_slot + expert, 0);
    std::fill_n(b13, panels * kPanel, 0.0f);
    std::fill_n(b2, out_panels * kPanel, 0.0f);
    if (p.b2) kernels.widen(element(p.b2.data, p.b2.dtype, expert * H), p.b2.dtype, H, b2);
    for (int64_t r = 0; r < 2 * I && p.b13; r++) {
      const int64_t half = r / I, i = r % I, from = interleaved ? 2 * i + half : r;
      float* to = b13 + i / kHalf * kPanel + half * kHalf + i % kHalf;
      kernels.widen(element(p.b13.data, p.b13.dtype, expert * 2 * I + from), p.b13.dtype, 1, to);
    }
  });
  return cpu(backend).finished();
}

MOE_REGISTER(pack_experts, PackExperts);

}  // namespace moe
