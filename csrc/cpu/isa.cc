#include "isa.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace moe {

extern const Kernels kernels_scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kernels_avx2, kernels_avx512;
#elif defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#elif defined(_M_X64)
// What the processor has and the system saves when it switches threads.
bool has(int leaf, int word, int bit, unsigned long long saved) {
  int words[4];
  __cpuidex(words, 1, 0);
  if ((words[2] >> 27 & 1) == 0 || (_xgetbv(0) & saved) != saved) return false;
  __cpuid(words, 0);
  if (words[0] < leaf) return false;
  __cpuidex(words, leaf, 0);
  return (words[word] >> bit & 1) != 0;
}
bool runs_avx2() { return has(1, 2, 12, 6) && has(1, 2, 29, 6) && has(7, 1, 5, 6); }  // fma, f16c, avx2
bool runs_avx512() {
  return runs_avx2() && has(7, 1, 16, 0xe6) && has(7, 1, 17, 0xe6) && has(7, 1, 30, 0xe6) && has(7, 1, 31, 0xe6);
}
#endif

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__GNUC__)
    __builtin_cpu_init();
#endif
    if (runs_avx512()) found.push_back(&kernels_avx512);
    if (runs_avx2()) found.push_back(&kernels_avx2);
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
