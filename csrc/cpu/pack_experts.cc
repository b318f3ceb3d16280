// pack_experts: lays weights out in the panels of experts_layout.h, converting the dtype.
//
// Algorithm: threads share panels. What is stored [out, in] is taken where it lies if it has the packed dtype, else 256
// columns at a time are converted into rows on the stack; the vectors' own transposition makes panel rows of them. What
// is stored [in, out] has panel rows already: vectors of them are converted on their way into place, for several panels
// side by side, so that what is read in one piece is long; only panels that are not full go value by value. Interleaved
// gate and up rows are taken apart by a step of 2. Values are widened to f32 and rounded once (equal dtypes are copied
// bit by bit); biases become f32, and 0 where the slot has biases and none are given. Columns beyond the matrix are 0.
// Limits: none.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "expert_mlp.h"

namespace moe {

namespace {

// The 16 columns of half a panel in their source matrix, stored [rows, columns] or [columns, rows]: rows start,
// start + step, ... of it, `count` of them; the others of the half are zero.
struct Half {
  const void* data;  // of this expert
  DType dtype;
  int64_t rows, start, step, count;
};

struct Panel {
  Half halves[2];
  void* to;
};

// Panels that are packed side by side.
constexpr int64_t kMostPanels = 8;

// n values, at most kChunk; equal dtypes bit by bit.
void convert(const Kernels& kernels, const void* from, DType from_dtype, int64_t n, void* to, DType dtype) {
  if (from_dtype == dtype) {
    std::memcpy(to, from, static_cast<size_t>(n) * size_of(dtype));
  } else if (dtype == DType::kF32) {
    kernels.widen(from, from_dtype, n, static_cast<float*>(to));
  } else if (from_dtype == DType::kF32) {
    kernels.narrow(static_cast<const float*>(from), n, to, dtype);
  } else {
    float wide[kChunk];
    kernels.widen(from, from_dtype, n, wide);
    kernels.narrow(wide, n, to, dtype);
  }
}

// Columns begin .. begin+n-1 of a half's rows, stored [out, in], in the packed dtype, each at `width` elements from the
// one before.
void convert_rows(const Kernels& kernels, const Half& half, int64_t columns, int64_t begin, int64_t n, DType dtype,
                  char* to, int64_t width) {
  const auto row = [&](int64_t j) { return to + j * width * static_cast<int64_t>(size_of(dtype)); };
  for (int64_t j = half.count; j < kHalf; j++) std::memset(row(j), 0, static_cast<size_t>(n) * size_of(dtype));
  for (int64_t j = 0; j < half.count; j++) {
    const void* from = element(half.data, half.dtype, (half.start + j * half.step) * columns + begin);
    convert(kernels, from, half.dtype, n, row(j), dtype);
  }
}

// Row `k` of a half that is stored [in, out], in the packed dtype, whose bits T has.
template <class T>
void convert_line(const Kernels& kernels, const Half& half, int64_t k, DType dtype, T* to) {
  const int64_t span = half.count == 0 ? 0 : (half.count - 1) * half.step + 1;
  T line[2 * kHalf];
  convert(kernels, element(half.data, half.dtype, k * half.rows + half.start), half.dtype, span, line, dtype);
  for (int64_t j = 0; j < half.count; j++) to[j] = line[j * half.step];
}

// Panels of `columns` rows from what is stored [in, out], value by value.
template <class T>
void pack_lines(const Kernels& kernels, const Panel* panels, int64_t count, int64_t columns, DType dtype) {
  T lines[kMostPanels][2][kHalf] = {};
  for (int64_t k = 0; k < columns; k++) {
    for (int64_t i = 0; i < count; i++) {
      T* row = static_cast<T*>(panels[i].to) + k * kPanel;
      for (int64_t h = 0; h < 2; h++) convert_line(kernels, panels[i].halves[h], k, dtype, lines[i][h]);
      if constexpr (sizeof(T) == 2) {
        for (int64_t j = 0; j < kHalf; j++) row[2 * j] = lines[i][0][j], row[2 * j + 1] = lines[i][1][j];
      } else {
        std::memcpy(row, lines[i], sizeof lines[i]);
      }
    }
  }
}

// Panels of `columns` rows from what is stored [in, out], all of one matrix.
void pack_side_by_side(const Kernels& kernels, const Panel* panels, int64_t count, int64_t columns, DType dtype) {
  PanelRows whole[kMostPanels];
  Panel others[kMostPanels];
  int64_t wholes = 0, rest = 0;
  for (int64_t i = 0; i < count; i++) {
    const Half &first = panels[i].halves[0], &second = panels[i].halves[1];
    if (first.count < kHalf || second.count < kHalf) {
      others[rest++] = panels[i];
    } else {
      const void* apart = first.step == 1 ? element(second.data, second.dtype, second.start) : nullptr;
      whole[wholes++] = {element(first.data, first.dtype, first.start), apart, panels[i].to};
    }
  }
  const Half& any = panels[0].halves[0];
  if (wholes > 0) kernels.fill_rows(whole, wholes, any.dtype, any.rows, columns, dtype);
  if (rest == 0) return;
  if (size_of(dtype) == 2) return pack_lines<uint16_t>(kernels, others, rest, columns, dtype);
  pack_lines<uint32_t>(kernels, others, rest, columns, dtype);
}

// A panel of `columns` rows from what is stored [out, in].
void pack_panel(const Kernels& kernels, const Panel& panel, int64_t columns, DType dtype) {
  constexpr int64_t kColumns = kChunk;
  const auto bytes = static_cast<int64_t>(size_of(dtype));
  const void* rows[kPanel];
  const auto in_place = [&](const Half& half) { return half.dtype == dtype && half.count == kHalf; };
  if (in_place(panel.halves[0]) && in_place(panel.halves[1])) {
    for (int64_t j = 0; j < kPanel; j++) {
      const Half& half = panel.halves[j / kHalf];
      rows[j] = element(half.data, dtype, (half.start + j % kHalf * half.step) * columns);
    }
    return kernels.fill_panel(rows, bytes, columns, panel.to);
  }
  alignas(64) char converted[kPanel * kColumns * sizeof(float)];
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t n = std::min(kColumns, columns - begin);
    for (int64_t h = 0; h < 2; h++) {
      char* to = converted + h * kHalf * kColumns * bytes;
      convert_rows(kernels, panel.halves[h], columns, begin, n, dtype, to, kColumns);
    }
    for (int64_t j = 0; j < kPanel; j++) rows[j] = converted + j * kColumns * bytes;
    kernels.fill_panel(rows, bytes, n, element(panel.to, dtype, begin * kPanel));
  }
}

// Packs the `count` panels that panel_at(0), panel_at(1), ... describe, on all threads.
template <class PanelAt>
void pack_panels(ThreadPool& pool, const Kernels& kernels, int64_t count, int64_t columns, bool transposed, DType dtype,
                 PanelAt panel_at) {
  const int64_t side_by_side = transposed ? kMostPanels : 1;
  pool.parallel_for(ceil_div(count, side_by_side), 1, [&](int64_t task, int64_t) {
    const int64_t first = task * side_by_side, n = std::min(side_by_side, count - first);
    if (!transposed) return pack_panel(kernels, panel_at(first), columns, dtype);
    Panel panels[kMostPanels];
    for (int64_t i = 0; i < n; i++) panels[i] = panel_at(first + i);
    pack_side_by_side(kernels, panels, n, columns, dtype);
  });
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
  pack_panels(pool, kernels, p.count * panels, H, p.transposed, layout.dtype, [&](int64_t panel) {
    const int64_t expert = panel / panels, i = panel % panels * kHalf, n = std::min(kHalf, I - i);
    const void* data = element(p.w13.data, p.w13.dtype, expert * 2 * I * H);
    const int64_t step = interleaved ? 2 : 1;
    const Half gate = {data, p.w13.dtype, 2 * I, interleaved ? 2 * i : i, step, n};
    const Half up = {data, p.w13.dtype, 2 * I, interleaved ? 2 * i + 1 : I + i, step, n};
    return Panel{{gate, up}, experts.w13(p.first_slot + expert, panel % panels)};
  });
  pack_panels(pool, kernels, p.count * out_panels, I, p.transposed, layout.dtype, [&](int64_t panel) {
    const int64_t expert = panel / out_panels, h = panel % out_panels * kPanel;
    const void* data = element(p.w2.data, p.w2.dtype, expert * H * I);
    const auto half = [&](int64_t start) {
      return Half{data, p.w2.dtype, H, std::min(start, H), 1, std::clamp<int64_t>(H - start, 0, kHalf)};
    };
    return Panel{{half(h), half(h + kHalf)}, experts.w2(p.first_slot + expert, panel % out_panels)};
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
