// How packed experts lie in device memory: four sections, each aligned to 256 bytes and each holding all slots in order.
//   w13 [S, 2I, H] gate rows, then up rows, in the layout's dtype     w2 [S, H, I] in the same dtype
//   b13 f32 [S, 2I]                                                   b2 f32 [S, H]; the biases only where there are any
#pragma once
#include <cstddef>
#include <cstdint>

#include "../ops.h"

namespace moe {

struct ExpertSections {
  size_t w2 = 0, b13 = 0, b2 = 0;  // offsets; w13 is at 0
  size_t bytes = 0;                // SIZE_MAX where it would not fit
};

inline ExpertSections expert_sections(const ExpertsLayout& layout) {
  size_t end = 0;
  const auto add = [&end](int64_t slots, int64_t rows, int64_t columns, size_t width) {
    const size_t begin = end;
    size_t bytes = width;
    for (const int64_t factor : {slots, rows, columns}) {
      const auto times = static_cast<size_t>(factor);
      bytes = times != 0 && bytes > SIZE_MAX / times ? SIZE_MAX : bytes * times;
    }
    end = bytes > SIZE_MAX - 255 - begin ? SIZE_MAX : (begin + bytes + 255) / 256 * 256;
    if (end < begin) end = SIZE_MAX;
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

// Where the parts of packed experts are, for kernels: slots are one after the other in each.
struct ExpertsView {
  void *w13, *w2;
  float *b13, *b2;  // null without biases
};

inline ExpertsView view_of(const Experts& experts) {
  const ExpertSections at = expert_sections(experts.layout);
  char* data = static_cast<char*>(experts.data);
  const bool biases = experts.layout.biases;
  return {data, data + at.w2, biases ? reinterpret_cast<float*>(data + at.b13) : nullptr,
          biases ? reinterpret_cast<float*>(data + at.b2) : nullptr};
}

}  // namespace moe
