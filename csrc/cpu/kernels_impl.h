// The inner loops of kernels.h, in terms of the vectors V (kWidth floats) and U (kWidth words) that the including file
// has defined. Nothing of the standard library may be called in here: its inline functions would be compiled for this
// file's instruction set and could then be linked into others. Nor may lambdas: not all compilers give them the set.
#pragma once

namespace moe::MOE_ISA {

// Products ---------------------------------------------------------------------------------------------------------

// m rows by kN vectors of each half of a panel. Loops over an array of sums are unrolled before the compiler decides
// what lives in registers: sums that it keeps in memory around the loop over k cost more than 70 stores a call.
template <int64_t m, class T>
inline void multiply_tile(const float* x, const T* panel, int64_t k, Fetch fetch, bool adds, float* out,
                          int64_t stride) {
  constexpr int64_t kN = vectors_per_half(m);
  for (int64_t v = 0; v < kHalf / kWidth; v += kN) {
    V first[m][kN], second[m][kN];
    MOE_UNROLL for (int64_t r = 0; r < m; r++) {
      MOE_UNROLL for (int64_t c = 0; c < kN; c++) first[r][c] = second[r][c] = zero();
    }
    const float* values = x;
    const T* row = panel;
    const char* next = fetch.at;
    for (int64_t i = 0; i < k; i++, values += m, row += kPanel) {
      for (int64_t line = 0; line < kPanel * int64_t{sizeof(T)}; line += kLine, next += fetch.stride) prefetch(next);
      V a[kN], b[kN];
      MOE_UNROLL for (int64_t c = 0; c < kN; c++) load_halves(row, v + c, a[c], b[c]);
      MOE_UNROLL for (int64_t r = 0; r < m; r++) {
        const V value = splat(values[r]);
        MOE_UNROLL for (int64_t c = 0; c < kN; c++) {
          first[r][c] = fma(value, a[c], first[r][c]);
          second[r][c] = fma(value, b[c], second[r][c]);
        }
      }
    }
    MOE_UNROLL for (int64_t r = 0; r < m; r++) {
      MOE_UNROLL for (int64_t c = 0; c < kN; c++) {
        float* to = out + r * stride + (v + c) * kWidth;
        store(to, adds ? add(load(to), first[r][c]) : first[r][c]);
        store(to + kHalf, adds ? add(load(to + kHalf), second[r][c]) : second[r][c]);
      }
    }
  }
}

template <int64_t m, class T>
inline void multiply_rows(const float* x, int64_t rows, const T* panel, int64_t k, Fetch fetch, bool adds, float* out,
                          int64_t stride) {
  if constexpr (m > 1) {
    if (rows != m) return multiply_rows<m - 1>(x, rows, panel, k, fetch, adds, out, stride);
  }
  multiply_tile<m>(x, panel, k, fetch, adds, out, stride);
}

inline void multiply(DType dtype, const float* x, int64_t m, const void* panel, int64_t k, Fetch fetch, bool adds,
                     float* out, int64_t stride) {
  if (dtype == DType::kF32)
    return multiply_rows<kTileRows>(x, m, static_cast<const float*>(panel), k, fetch, adds, out, stride);
  if (dtype == DType::kBF16)
    return multiply_rows<kTileRows>(x, m, static_cast<const bf16*>(panel), k, fetch, adds, out, stride);
  multiply_rows<kTileRows>(x, m, static_cast<const f16*>(panel), k, fetch, adds, out, stride);
}

// `count` < kWidth values, and zeros.
template <class T>
inline V load_some(const T* p, int64_t count) {
  T values[kWidth] = {};
  for (int64_t i = 0; i < count; i++) values[i] = p[i];
  return load(values);
}

template <int64_t m, int64_t n, class T>
inline void dots_tile(const float* const* rows, const T* weights, int64_t k, float* out, int64_t stride) {
  V sums[m][n];
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) sums[i][j] = zero();
  }
  int64_t at = 0;
  for (; at + kWidth <= k; at += kWidth) {
    V w[n];
    for (int64_t j = 0; j < n; j++) w[j] = load(weights + j * k + at);
    for (int64_t i = 0; i < m; i++) {
      const V x = load(rows[i] + at);
      for (int64_t j = 0; j < n; j++) sums[i][j] = fma(x, w[j], sums[i][j]);
    }
  }
  if (at < k) {
    for (int64_t j = 0; j < n; j++) {
      const V w = load_some(weights + j * k + at, k - at);
      for (int64_t i = 0; i < m; i++) sums[i][j] = fma(load(rows[i] + at), w, sums[i][j]);
    }
  }
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < n; j++) out[i * stride + j] = sum_of(sums[i][j]);
  }
}

template <class T>
inline void dots_of(const float* const* rows, int64_t m, const T* weights, int64_t n, int64_t k, float* out,
                    int64_t stride) {
  for (int64_t j = 0; j < n;) {
    const int64_t count = n - j < kDotWeights ? 1 : kDotWeights;
    const T* w = weights + j * k;
    for (int64_t i = 0; i < m;) {
      const bool whole = m - i >= kDotRows;
      float* to = out + i * stride + j;
      if (count == 1) {
        whole ? dots_tile<kDotRows, 1>(rows + i, w, k, to, stride) : dots_tile<1, 1>(rows + i, w, k, to, stride);
      } else {
        whole ? dots_tile<kDotRows, kDotWeights>(rows + i, w, k, to, stride)
              : dots_tile<1, kDotWeights>(rows + i, w, k, to, stride);
      }
      i += whole ? kDotRows : 1;
    }
    j += count;
  }
}

inline void dots(const float* const* rows, int64_t m, const void* weights, DType dtype, int64_t n, int64_t k,
                 float* out, int64_t stride) {
  if (dtype == DType::kF32) return dots_of(rows, m, static_cast<const float*>(weights), n, k, out, stride);
  if (dtype == DType::kBF16) return dots_of(rows, m, static_cast<const bf16*>(weights), n, k, out, stride);
  dots_of(rows, m, static_cast<const f16*>(weights), n, k, out, stride);
}

// Panels -----------------------------------------------------------------------------------------------------------

inline void fill_panel(const void* const* rows, int64_t bytes, int64_t k, void* panel) {
  char* to = static_cast<char*>(panel);
  const bool pairs = bytes == 2;
  int64_t at = 0;
  for (; at + kWidth <= k; at += kWidth) {
    for (int64_t first = 0; first < (pairs ? kHalf : kPanel); first += kWidth) {
      U block[kWidth];
      for (int64_t j = 0; j < kWidth; j++) {
        const char* low = static_cast<const char*>(rows[first + j]) + at * bytes;
        block[j] = pairs ? zip(low, static_cast<const char*>(rows[first + j + kHalf]) + at * bytes) : load_words(low);
      }
      transpose(block);
      for (int64_t i = 0; i < kWidth; i++) store_words(to + (at + i) * kPanel * bytes + first * 4, block[i]);
    }
  }
  for (; at < k; at++) {
    for (int64_t j = 0; j < kPanel; j++) {
      const int64_t column = !pairs ? j : 2 * (j % kHalf) + j / kHalf;
      const char* from = static_cast<const char*>(rows[j]) + at * bytes;
      for (int64_t b = 0; b < bytes; b++) to[(at * kPanel + column) * bytes + b] = from[b];
    }
  }
}

// A row of a panel from its halves; equal types bit by bit.
template <class From, class To>
inline void fill_row(const From* first, const From* second, To* row) {
  for (int64_t i = 0; i < kHalf; i += kWidth) {
    if constexpr (sizeof(To) == 4) {
      store(row + i, load(first + i));
      store(row + kHalf + i, load(second + i));
    } else if constexpr (std::is_same_v<From, To>) {
      store_words(row + 2 * i, zip(first + i, second + i));
    } else {
      To low[kWidth], high[kWidth];
      store(low, load(first + i));
      store(high, load(second + i));
      store_words(row + 2 * i, zip(low, high));
    }
  }
}

// From both halves in turns, which is what rows of two-byte types hold.
template <class From, class To>
inline void fill_row(const From* both, To* row) {
  if constexpr (sizeof(To) == 4) {
    To values[kPanel];
    for (int64_t i = 0; i < kPanel; i += kWidth) store(values + i, load(both + i));
    for (int64_t i = 0; i < kHalf; i++) row[i] = values[2 * i], row[kHalf + i] = values[2 * i + 1];
  } else if constexpr (std::is_same_v<From, To>) {
    for (int64_t i = 0; i < kHalf; i += kWidth) store_words(row + 2 * i, load_words(both + 2 * i));
  } else {
    for (int64_t i = 0; i < kPanel; i += kWidth) store(row + i, load(both + i));
  }
}

template <class From, class To>
inline void fill_rows_of(const PanelRows* panels, int64_t count, int64_t stride, int64_t k) {
  for (int64_t at = 0; at < k; at++) {
    for (int64_t i = 0; i < count; i++) {
      const PanelRows& rows = panels[i];
      const From* first = static_cast<const From*>(rows.first) + at * stride;
      To* row = static_cast<To*>(rows.panel) + at * kPanel;
      if (rows.second == nullptr) {
        fill_row(first, row);
      } else {
        fill_row(first, static_cast<const From*>(rows.second) + at * stride, row);
      }
    }
  }
}
template <class From>
inline void fill_rows_from(const PanelRows* panels, int64_t count, int64_t stride, int64_t k, DType to) {
  if (to == DType::kF32) return fill_rows_of<From, float>(panels, count, stride, k);
  if (to == DType::kBF16) return fill_rows_of<From, bf16>(panels, count, stride, k);
  fill_rows_of<From, f16>(panels, count, stride, k);
}
inline void fill_rows(const PanelRows* panels, int64_t count, DType from, int64_t stride, int64_t k, DType to) {
  if (from == DType::kF32) return fill_rows_from<float>(panels, count, stride, k, to);
  if (from == DType::kBF16) return fill_rows_from<bf16>(panels, count, stride, k, to);
  fill_rows_from<f16>(panels, count, stride, k, to);
}

// Elementwise ------------------------------------------------------------------------------------------------------

// e^x to about one unit in the last place; 0 and infinity beyond the floats, NaN for NaN.
inline V exponential(V x) {
  x = least(splat(90.0f), most(splat(-105.0f), x));  // NaN stays: it is the second operand
  const V n = nearest(mul(x, splat(1.44269504f)));
  const V r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(0.5f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return times_power(p, n);
}

inline V sigmoid(V x) { return div(splat(1.0f), add(splat(1.0f), exponential(sub(zero(), x)))); }

// NaN passes through the clamps, as their second operand.
inline V activation(const SwiGLU& p, V g, V u) {
  if (p.limit > 0) {
    g = least(splat(p.limit), g);
    u = most(splat(-p.limit), least(splat(p.limit), u));
  }
  return mul(add(u, splat(p.beta)), mul(g, sigmoid(mul(splat(p.alpha), g))));
}

// Turned over in a small buffer, so that `out` gets whole vectors: few lines that are not in the cache may be waited
// for at once, and a line written value by value keeps its place for long.
inline void interleave(const float* const* rows, int64_t m, int64_t n, float* out) {
  float turned[kWidth * kTileRows + kWidth];
  for (int64_t first = 0; first < n; first += kWidth, out += kWidth * m) {
    // Columns run over into the start of the next, which is written later
    for (int64_t r = (m - 1) / kWidth * kWidth; r >= 0; r -= kWidth) {
      U block[kWidth];
      for (int64_t j = 0; j < kWidth; j++) block[j] = load_words(rows[r + j < m ? r + j : r] + first);
      transpose(block);
      for (int64_t j = 0; j < kWidth; j++) store_words(turned + j * m + r, block[j]);
    }
    if (n - first >= kWidth) {
      for (int64_t i = 0; i < kWidth * m; i += kWidth) store(out + i, load(turned + i));
    } else {
      for (int64_t i = 0; i < (n - first) * m; i++) out[i] = turned[i];
    }
  }
}

inline void activate(const SwiGLU& swiglu, const float* rows, int64_t m, int64_t n, float* active) {
  float values[kTileRows][kHalf];
  const float* activated[kTileRows];
  for (int64_t r = 0; r < m; r++, rows += kPanel) {
    activated[r] = values[r];
    for (int64_t c = 0; c < kHalf; c += kWidth) {
      store(values[r] + c, activation(swiglu, load(rows + c), load(rows + kHalf + c)));
    }
  }
  interleave(activated, m, n, active);
}

template <class From, class To>
inline void convert(const From* from, int64_t n, To* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(from + i));
  if (i == n) return;
  To values[kWidth];
  store(values, load_some(from + i, n - i));
  for (int64_t j = 0; i + j < n; j++) to[i + j] = values[j];
}

inline void widen(const void* from, DType dtype, int64_t n, float* to) {
  if (dtype == DType::kF32) return convert(static_cast<const float*>(from), n, to);
  if (dtype == DType::kBF16) return convert(static_cast<const bf16*>(from), n, to);
  convert(static_cast<const f16*>(from), n, to);
}

inline void narrow(const float* from, int64_t n, void* to, DType dtype) {
  if (dtype == DType::kF32) return convert(from, n, static_cast<float*>(to));
  if (dtype == DType::kBF16) return convert(from, n, static_cast<bf16*>(to));
  convert(from, n, static_cast<f16*>(to));
}

inline void add_scaled(float* sums, const float* row, float weight, int64_t n) {
  int64_t i = 0;
  const V factor = splat(weight);
  for (; i + kWidth <= n; i += kWidth) store(sums + i, fma(factor, load(row + i), load(sums + i)));
  if (i == n) return;
  float values[kWidth];
  store(values, fma(factor, load_some(row + i, n - i), load_some(sums + i, n - i)));
  for (int64_t j = 0; i + j < n; j++) sums[i + j] = values[j];
}

inline void sigmoids(const float* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, sigmoid(load(x + i)));
  if (i == n) return;
  float values[kWidth];
  store(values, sigmoid(load_some(x + i, n - i)));
  for (int64_t j = 0; i + j < n; j++) out[i + j] = values[j];
}

// Rooflines --------------------------------------------------------------------------------------------------------

inline float read(const float* from, int64_t n) {
  V sums[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int64_t j = 0; j < 4; j++) sums[j] = add(sums[j], load(from + i + j * kWidth));
  }
  return sum_of(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

inline double multiply_add(int64_t rounds, float* result) {
  constexpr int64_t kRows = kTileRows, kColumns = 2 * vectors_per_half(kTileRows);
  V sums[kRows][kColumns];
  for (int64_t r = 0; r < kRows; r++) {
    for (int64_t c = 0; c < kColumns; c++) sums[r][c] = splat(static_cast<float>(r + c));
  }
  const V factor = splat(0.999f), summand = splat(0.001f);
  for (int64_t i = 0; i < rounds; i++) {
    for (int64_t r = 0; r < kRows; r++) {
      for (int64_t c = 0; c < kColumns; c++) sums[r][c] = fma(sums[r][c], factor, summand);
    }
  }
  V all = zero();
  for (int64_t r = 0; r < kRows; r++) {
    for (int64_t c = 0; c < kColumns; c++) all = add(all, sums[r][c]);
  }
  *result = sum_of(all);
  return static_cast<double>(rounds * kRows * kColumns * kWidth);
}

}  // namespace moe::MOE_ISA

#include "gate_impl.h"

namespace moe {

#define MOE_TABLE_(isa) kernels_##isa
#define MOE_TABLE(isa) MOE_TABLE_(isa)
#define MOE_NAME_(isa) #isa
#define MOE_NAME(isa) MOE_NAME_(isa)

extern const Kernels MOE_TABLE(MOE_ISA);
const Kernels MOE_TABLE(MOE_ISA) = {
    MOE_NAME(MOE_ISA),   MOE_ISA::kTileRows, MOE_ISA::multiply,   MOE_ISA::dots,  MOE_ISA::fill_panel,
    MOE_ISA::fill_rows,  MOE_ISA::activate,  MOE_ISA::interleave, MOE_ISA::widen, MOE_ISA::narrow,
    MOE_ISA::add_scaled, MOE_ISA::sigmoids,  MOE_ISA::softmax,    MOE_ISA::top,   MOE_ISA::best_two,
    MOE_ISA::choose,     MOE_ISA::rank,      MOE_ISA::find,       MOE_ISA::read,  MOE_ISA::multiply_add,
};

}  // namespace moe
