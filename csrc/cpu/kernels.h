// The inner loops that depend on the instruction set, one table per set. The same source (kernels_impl.h) is compiled
// for every set that the compiler knows, each in a file of its own that switches its functions alone to that set, so
// that one addon runs on every processor of a platform; which table a context takes is decided when it is made.
//
// Packed weights lie in panels of kPanel columns: for every k one row of kPanel values, first kHalf ("first half") and
// then kHalf ("second half") columns. Two-byte dtypes store column j of the first half beside column j of the second,
// so that one 32-bit lane holds a pair which a shift and a mask take apart.
//
// Order of accumulation of multiply: k is cut into chunks of kChunk; within a chunk products are added in ascending k
// with fused multiply-adds (a product and a sum on the scalar path), and chunks are added in order. Of dots: lane l of
// the vector sums k = l mod lanes in ascending order, and the lanes are added pairwise. A row's result depends neither
// on its neighbours nor on the number of threads; it may differ in the last bits from one instruction set to another.
#pragma once
#include <cstdint>

#include "../ops.h"

namespace moe {

inline constexpr int64_t kPanel = 32, kHalf = 16;
inline constexpr int64_t kChunk = 256;  // a panel's chunk of f32 and a tile's rows stay in a 48 KiB L1

inline constexpr int kGateRows = 16;
inline constexpr int64_t kGatePad = 64;

// Of each expert, where the first of its choices goes, as two words.
inline constexpr int kRankedExperts = 320;
struct alignas(64) FirstPlaces {
  uint16_t low[kRankedExperts], high[kRankedExperts];
};

// What multiply brings into the cache on its way: a line from `at` on, and every `stride` bytes, for each line of the
// panel that it reads.
inline constexpr int64_t kLine = 64;
struct Fetch {
  const char* at;
  int64_t stride;
};

// Where fill_rows finds the halves of a panel, and where the panel goes. Without `second`, the values of both halves
// take turns from `first` on.
struct PanelRows {
  const void *first, *second;
  void* panel;
};

struct Kernels {
  const char* name;
  int64_t tile_rows;  // the most rows that multiply takes at once

  // out[r * stride + c] (+)= sum over k of x[k * m + r] * panel[k][c] for r < m <= tile_rows: rows interleaved.
  void (*multiply)(DType dtype, const float* x, int64_t m, const void* panel, int64_t k, Fetch fetch, bool adds,
                   float* out, int64_t stride);

  // out[i * stride + j] = sum over k of rows[i][k] * weights[j, k] for i < m, j < n. Weights are n rows of k values;
  // rows must be readable and zero up to padded(k).
  void (*dots)(const float* const* rows, int64_t m, const void* weights, DType dtype, int64_t n, int64_t k, float* out,
               int64_t stride);

  // 32 rows of k elements of 2 or 4 bytes become the k rows of a panel.
  void (*fill_panel)(const void* const* rows, int64_t bytes, int64_t k, void* panel);

  // The k rows of `count` panels side by side, converted. The values of a row follow each other, and those of the next
  // begin `stride` elements later.
  void (*fill_rows)(const PanelRows* panels, int64_t count, DType from, int64_t stride, int64_t k, DType to);

  // active[c * m + r] = swiglu(gate, up) for c < n <= kHalf, from m rows [kHalf gates, kHalf ups].
  void (*activate)(const SwiGLU& swiglu, const float* rows, int64_t m, int64_t n, float* active);

  // out[c * m + r] = rows[r][c] for r < m <= tile_rows and c < n; rows must be readable up to padded(n).
  void (*interleave)(const float* const* rows, int64_t m, int64_t n, float* out);

  // n values to f32, exactly; and back, rounded to nearest, ties to even.
  void (*widen)(const void* from, DType dtype, int64_t n, float* to);
  void (*narrow)(const float* from, int64_t n, void* to, DType dtype);

  // sums[i] += weight * row[i].
  void (*add_scaled)(float* sums, const float* row, float weight, int64_t n);

  // out[i] = 1 / (1 + e^-x[i]); NaN for NaN.
  void (*sigmoids)(const float* x, int64_t n, float* out);

  // The next three take rows of n values, a multiple of kGatePad, whose end is NaN, and may decline: false where a
  // value is out of the ordinary, or there are too many equal ones, and a slower way is needed.
  //
  // out[i] = e^(x[i] - the highest) by the reciprocal of their sum, NaN for NaN, which is left out of the sum.
  bool (*softmax)(const float* x, int64_t n, float* out);
  // The k <= 32 highest of them, highest first, the lower index first among equals.
  bool (*top)(const float* values, int64_t n, int k, int32_t* chosen);
  // The highest and the second of every group of `size` values; both outputs have room for a multiple of kGatePad.
  bool (*best_two)(const float* values, int64_t groups, int64_t size, float* firsts, float* seconds);

  // For up to kGateRows rows of 256 experts in 8 groups, of which at least 3 are kept: the 8 best by sigmoid score and
  // bias (which may be null, and must be finite), best first, in chosen[8 * row ..]. Bit `row` of the result is 0 where
  // the row needs the general path. Null where this set has none.
  uint32_t (*choose_of_256)(const float* logits, int rows, const float* bias, int top_groups, bool sum,
                            int32_t* chosen);

  // For moe_dispatch; both null where this set has none. Counts n < 2^16 ids, each `first` and less than `experts`
  // more, and tells how many of the same expert came before it. False where an id is outside: counts and ranks are
  // then of no use. `seen` is `counts` again.
  bool (*rank_choices)(const int32_t* ids, int64_t n, uint32_t first, uint32_t experts, uint16_t* counts,
                       const uint16_t* seen, uint16_t* ranks);
  // inverse[i] = where the first of the expert of ids[i] goes + ranks[i].
  void (*find_places)(const int32_t* ids, int64_t n, uint32_t first, const FirstPlaces& places, const uint16_t* ranks,
                      int32_t* inverse);

  // For rooflines: reads n values; runs `rounds` of independent fused multiply-adds and tells how many those were. What
  // they compute is of no interest but depends on all of it.
  float (*read)(const float* from, int64_t n);
  double (*multiply_add)(int64_t rounds, float* result);
};

}  // namespace moe
