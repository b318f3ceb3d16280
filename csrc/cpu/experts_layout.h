// How packed experts lie in memory: the four sections of expert_sections.h, each aligned to a cache line.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../expert_sections.h"
#include "float_rows.h"

namespace moe {

inline ExpertSections expert_sections(const ExpertsLayout& layout) { return expert_sections<64>(layout); }

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
