#include "expert_mlp.h"

namespace moe {

namespace {

// What is fetched while a chunk is multiplied. Alone, a tile streams: memory takes about as long to bring kAhead bytes
// as the sums before them take. Several tiles bring the next chunk together, each its part.
constexpr int64_t kAhead = 8192;

void project(const Kernels& kernels, const void* panel, DType dtype, const float* x, int64_t rows, int64_t width,
             float* out, int64_t stride) {
  const int64_t tiles = ceil_div(rows, kernels.tile_rows);
  for (int64_t begin = 0; begin < width; begin += kChunk) {
    const int64_t length = std::min(kChunk, width - begin);
    const int64_t bytes = length * kPanel * static_cast<int64_t>(size_of(dtype));
    const char* chunk = static_cast<const char*>(element(panel, dtype, begin * kPanel));
    Fetch fetch = {chunk + (tiles == 1 ? kAhead : bytes), ceil_div(kLine, tiles)};
    for_each_tile(kernels, rows, [&](int64_t start, int64_t m) {
      kernels.multiply(dtype, x, m, chunk, length, fetch, begin > 0, out + start * stride, stride);
      x += length * m;
      fetch.at += bytes / tiles;
    });
  }
}

void add_bias(const float* bias, int64_t rows, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows && bias != nullptr; r++) {
    for (int64_t c = 0; c < kPanel; c++) out[r * stride + c] += bias[c];
  }
}

// Where in an interleaved group of `rows` rows column `column` of the tile at row `start`, with m rows, begins.
int64_t tile_at(int64_t rows, int64_t width, int64_t start, int64_t m, int64_t column) {
  const int64_t begin = column / kChunk * kChunk, length = std::min(kChunk, width - begin);
  return begin * rows + start * length + (column - begin) * m;
}

}  // namespace

void load_group(const Kernels& kernels, const void* const* rows, int64_t count, DType dtype, int64_t width,
                float* out) {
  constexpr int64_t kBlock = 64, kMostRows = 16;
  static_assert(kChunk % kBlock == 0);
  if (count == 1) return kernels.widen(rows[0], dtype, width, out);
  for_each_tile(kernels, count, [&](int64_t start, int64_t m) {
    float wide[kMostRows][kBlock];
    const float* block[kMostRows];
    for (int64_t begin = 0; begin < width; begin += kBlock) {
      const int64_t n = std::min(kBlock, width - begin);
      for (int64_t r = 0; r < m; r++) {
        const void* from = element(rows[start + r], dtype, begin);
        const bool in_place = dtype == DType::kF32 && n == kBlock;
        if (!in_place) kernels.widen(from, dtype, n, wide[r]);
        block[r] = in_place ? static_cast<const float*>(from) : wide[r];
      }
      kernels.interleave(block, m, n, out + tile_at(count, width, start, m, begin));
    }
  });
}

void project_gate_up(const Kernels& kernels, const ExpertsView& experts, int64_t expert, const float* x, int64_t rows,
                     int64_t panel, const float* row_weights, float* out) {
  project(kernels, experts.w13(expert, panel), experts.layout.dtype, x, rows, experts.layout.H, out, kPanel);
  for (int64_t r = 0; r < rows && row_weights != nullptr; r++) {
    for (int64_t c = 0; c < kPanel; c++) out[r * kPanel + c] *= row_weights[r];
  }
  add_bias(experts.b13(expert, panel), rows, out, kPanel);
}

void activate(const Kernels& kernels, const ExpertsView& experts, const float* gate_up, int64_t rows, int64_t panel,
              float* active) {
  const int64_t I = experts.layout.I, i = panel * kHalf, n = std::min(kHalf, I - i);
  for_each_tile(kernels, rows, [&](int64_t start, int64_t m) {
    kernels.activate(experts.layout.swiglu, gate_up + start * kPanel, m, n, active + tile_at(rows, I, start, m, i));
  });
}

void project_down(const Kernels& kernels, const ExpertsView& experts, int64_t expert, const float* x, int64_t rows,
                  int64_t panel, float* out, int64_t stride) {
  project(kernels, experts.w2(expert, panel), experts.layout.dtype, x, rows, experts.layout.I, out, stride);
  add_bias(experts.b2(expert, panel), rows, out, stride);
}

}  // namespace moe
