#include "isa.h"

#include "compiler.h"
#include "x86.h"

namespace moe {

extern const Kernels kernels_scalar;
#if defined(MOE_X86)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(MOE_ARM)
extern const Kernels kernels_neon;
#endif

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found;
#if defined(MOE_X86)
    const X86Sets here = x86_sets();
    if (here.avx512) found.push_back(&kernels_avx512);
    if (here.avx2) found.push_back(&kernels_avx2);
#elif defined(MOE_ARM)
    found.push_back(&kernels_neon);
#endif
    found.push_back(&kernels_scalar);
    return found;
  }();
  return all;
}

const Kernels* kernels_named(const std::string& name) {
  for (const Kernels* each : usable_kernels()) {
    if (each->name == name) return each;
  }
  return nullptr;
}

std::string usable_isas(const char* separator) {
  std::string names;
  for (const Kernels* each : usable_kernels()) {
    if (!names.empty()) names += separator;
    names += each->name;
  }
  return names;
}

}  // namespace moe
