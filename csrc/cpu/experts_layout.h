// How packed experts lie in memory: the four sections of expert_sections.h, each aligned to a cache line, with the
// weights in the panels of kernels.h. A panel of w13 holds kHalf gate columns and the same up columns, so that the
// activation finds both in one product; a panel of w2 holds kPanel columns. The last panel of a slot is filled up
// with zero columns, and biases lie as the columns of the panels do.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../expert_sections.h"
#include "float_rows.h"
#include "kernels.h"

namespace moe {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t panels13(const ExpertsLayout& layout) { return ceil_div(layout.I, kHalf); }
inline int64_t panels2(const ExpertsLayout& layout) { return ceil_div(layout.H, kPanel); }

inline ExpertSections expert_sections(const ExpertsLayout& layout) {
  return expert_sections<64>(layout, {panels13(layout) * kPanel, layout.H, panels2(layout) * kPanel, layout.I});
}

// Where the parts of packed experts are.
class ExpertsView {
 public:
  explicit ExpertsView(const Experts& experts)
      : layout(experts.layout), data_(static_cast<char*>(experts.data)), sections_(expert_sections(experts.layout)) {}

  const ExpertsLayout layout;

  void* w13(int64_t slot, int64_t panel) const {
    return element(data_, layout.dtype, (slot * panels13(layout) + panel) * kPanel * layout.H);
  }
  void* w2(int64_t slot, int64_t panel) const {
    return element(data_ + sections_.w2, layout.dtype, (slot * panels2(layout) + panel) * kPanel * layout.I);
  }
  // The kPanel biases of a panel; null without biases.
  float* b13(int64_t slot, int64_t panel) const { return bias(sections_.b13, slot * panels13(layout) + panel); }
  float* b2(int64_t slot, int64_t panel) const { return bias(sections_.b2, slot * panels2(layout) + panel); }

 private:
  float* bias(size_t section, int64_t panel) const {
    return layout.biases ? reinterpret_cast<float*>(data_ + section) + panel * kPanel : nullptr;
  }

  char* data_;
  ExpertSections sections_;
};

}  // namespace moe
