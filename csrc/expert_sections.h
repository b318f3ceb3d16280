// Where the parts of packed experts begin, for backends that keep them as four sections, each holding all slots in
// order and aligned to `kAlignment` bytes:
//   w13 [S, rows13, columns13] and w2 [S, rows2, columns2] in the layout's dtype, at least [2I, H] and [H, I] a slot
//   b13 f32 [S, rows13] and b2 f32 [S, rows2] (or fewer of them a slot), only where there are any
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>

#include "ops.h"

namespace moe {

struct ExpertSections {
  size_t w2 = 0, b13 = 0, b2 = 0;  // offsets; w13 is at 0
  size_t bytes = 0;                // the maximum of size_t where it would not fit
};

// What a slot's matrices take, with what a backend pads them by.
struct ExpertExtents {
  int64_t rows13, columns13, rows2, columns2;
  static ExpertExtents of(const ExpertsLayout& layout) { return {2 * layout.I, layout.H, layout.H, layout.I}; }
};

template <size_t kAlignment>
ExpertSections expert_sections(const ExpertsLayout& layout, const ExpertExtents& extents) {
  constexpr size_t kMost = std::numeric_limits<size_t>::max();
  size_t end = 0;
  const auto add = [&end](int64_t slots, int64_t rows, int64_t columns, size_t width) {
    const size_t begin = end;
    size_t bytes = width;
    for (const int64_t factor : {slots, rows, columns}) {
      const auto times = static_cast<size_t>(factor);
      bytes = times != 0 && bytes > kMost / times ? kMost : bytes * times;
    }
    const bool fits = begin <= kMost - (kAlignment - 1) && bytes <= kMost - (kAlignment - 1) - begin;
    end = fits ? (begin + bytes + kAlignment - 1) / kAlignment * kAlignment : kMost;
    return begin;
  };
  const int64_t S = layout.S;
  ExpertSections sections;
  add(S, extents.rows13, extents.columns13, size_of(layout.dtype));
  sections.w2 = add(S, extents.rows2, extents.columns2, size_of(layout.dtype));
  if (layout.biases) {
    sections.b13 = add(S, extents.rows13, 1, sizeof(float));
    sections.b2 = add(S, extents.rows2, 1, sizeof(float));
  }
  sections.bytes = end;
  return sections;
}

}  // namespace moe
