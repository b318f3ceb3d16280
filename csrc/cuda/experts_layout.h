// How packed experts lie in device memory: the four sections of expert_sections.h, each aligned to 256 bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../expert_sections.h"

namespace moe {

inline ExpertSections expert_sections(const ExpertsLayout& layout) { return expert_sections<256>(layout); }

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
