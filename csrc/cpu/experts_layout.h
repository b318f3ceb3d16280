// How packed experts lie in memory: four sections, each aligned to 64 bytes and each holding all slots in order.
//   w13 [S, 2I, H] gate rows, then up rows, in the layout's dtype     w2 [S, H, I] in the same dtype
//   b13 f32 [S, 2I]                                            b2 f32 [S, H]; the biases only where there are any
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>

#include "float_rows.h"

namespace moe {

struct ExpertSections {
  size_t w2 = 0, b13 = 0, b2 = 0;  // offsets; w13 is at 0
  size_t bytes = 0;                // the maximum of size_t where it would not fit
};

inline ExpertSections expert_sections(const ExpertsLayout& layout) {
  constexpr size_t kMost = std::numeric_limits<size_t>::max();
  size_t end = 0;
  const auto add = [&end](int64_t slots, int64_t rows, int64_t columns, size_t width) {
    const size_t begin = end;
    size_t bytes = width;
    for (const int64_t factor : {slots, rows, columns}) {
      const auto times = static_cast<size_t>(factor);
      bytes = times != 0 && bytes > kMost / times ? kMost : bytes * times;
    }
    end = bytes > kMost - 63 - begin ? kMost : (begin + bytes + 63) / 64 * 64;
    if (end < begin) end = kMost;
    return begin;
  };
  const int64_t S = layout.S, H = layout.H, I = layout.I;
  ExpertSections sections;
  add(S, 2 * I, H, size_of(layout.dtype));
  sections.w2 = add(S, H, I, size_of(layout.dtype));
  if (layout.biases) {
    sections.b13 = add(S, 2 * I, 1, sizeof(float));
    sections.b2 = add(S, H, 1, sizeof(float));
  }
  sections.bytes = end;
  return sections;
}

// Where the parts of packed experts are.
class ExpertsView {
 public:
  explicit ExpertsView(const Experts& experts)
      : layout(experts.layout), data_(static_cast<char*>(experts.data)), sections_(expert_sections(experts.layout)) {}

  const ExpertsLayout layout;

  void* w13(int64_t slot, int64_t row) const {
    return element(data_, layout.dtype, (slot * 2 * layout.I + row) * layout.H);
  }
  void* w2(int64_t slot, int64_t row) const {
    return element(data_ + sections_.w2, layout.dtype, (slot * layout.H + row) * layout.I);
  }
  // Null without biases.
  float* b13(int64_t slot) const { return bias(sections_.b13, slot * 2 * layout.I); }
  float* b2(int64_t slot) const { return bias(sections_.b2, slot * layout.H); }

 private:
  float* bias(size_t section, int64_t index) const {
    return layout.biases ? reinterpret_cast<float*>(data_ + section) + index : nullptr;
  }

  char* data_;
  ExpertSections sections_;
};

}  // namespace moe
