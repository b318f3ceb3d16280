#include "isa.h"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__) || defined(__clang__)
#include <cpuid.h>
#else
#include <intrin.h>
#endif
#endif

namespace moe {

extern const Kernels kernels_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__) || defined(_M_X64)
// By the instruction itself: compilers differ in the features that their own tests know.
struct Cpuid {
  uint32_t eax, ebx, ecx, edx;
};
Cpuid cpuid(uint32_t leaf) {
  Cpuid words{};
#if defined(__GNUC__) || defined(__clang__)
  __cpuid_count(leaf, 0, words.eax, words.ebx, words.ecx, words.edx);
#else
  int all[4];
  __cpuidex(all, static_cast<int>(leaf), 0);
  words = {static_cast<uint32_t>(all[0]), static_cast<uint32_t>(all[1]), static_cast<uint32_t>(all[2]),
           static_cast<uint32_t>(all[3])};
#endif
  return words;
}

// The registers that the system keeps for every thread; only where it says that it keeps any (OSXSAVE).
uint32_t kept_registers() {
#if defined(__GNUC__) || defined(__clang__)
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#else
  return static_cast<uint32_t>(_xgetbv(0));
#endif
}

constexpr bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

struct Usable {
  bool avx2 = false, avx512 = false;
};
Usable usable() {
  constexpr uint32_t kFma = 1u << 12, kPopcnt = 1u << 23, kOsxsave = 1u << 27, kF16c = 1u << 29;  // leaf 1, ecx
  constexpr uint32_t kBmi1 = 1u << 3, kAvx2 = 1u << 5;                                            // leaf 7, ebx
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;               // of AVX-512, there
  constexpr uint32_t kYmm = 0x06, kZmm = 0xe6;  // registers up to those of AVX, up to those of AVX-512
  if (cpuid(0).eax < 7) return {};
  const uint32_t first = cpuid(1).ecx;
  if (!has(first, kOsxsave | kFma | kF16c | kPopcnt)) return {};
  const uint32_t kept = kept_registers(), seventh = cpuid(7).ebx;
  Usable found;
  found.avx2 = has(kept, kYmm) && has(seventh, kAvx2);
  found.avx512 = found.avx2 && has(kept, kZmm) && has(seventh, kF | kDq | kBw | kVl | kBmi1);
  return found;
}
#endif

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(_M_X64)
    const Usable here = usable();
    if (here.avx512) found.push_back(&kernels_avx512);
    if (here.avx2) found.push_back(&kernels_avx2);
#elif defined(__aarch64__) || defined(_M_ARM64)
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
