#include "x86.h"

#include "compiler.h"

#if defined(MOE_X86)
#include <cstdint>
#include <cstring>

#if !defined(MOE_MSVC)
#include <cpuid.h>
#endif

namespace moe {

namespace {

struct Words {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};
Words cpuid(uint32_t leaf, uint32_t part = 0) {
  Words words;
#if defined(MOE_MSVC)
  int all[4];
  __cpuidex(all, static_cast<int>(leaf), static_cast<int>(part));
  std::memcpy(&words, all, sizeof words);
#else
  __cpuid_count(leaf, part, words.eax, words.ebx, words.ecx, words.edx);
#endif
  return words;
}

// The registers that the system keeps for every thread; only where it says that it keeps any.
uint32_t kept_registers() {
#if defined(MOE_MSVC)
  return static_cast<uint32_t>(_xgetbv(0));
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

struct Features {
  bool sse42, popcnt, avx, f16c, fma, bmi1, avx2, avx512f, avx512dq, avx512bw, avx512vl, vnni, bf16;
};
Features features() {
  const uint32_t highest = cpuid(0).eax;
  const uint32_t first = cpuid(1).ecx;
  const Words seventh = highest >= 7 ? cpuid(7) : Words{};
  const uint32_t second_part = seventh.eax >= 1 ? cpuid(7, 1).eax : 0;
  const auto has = [](uint32_t word, int bit) { return (word >> bit & 1) != 0; };
  const uint32_t kept = has(first, 27) ? kept_registers() : 0;
  const bool ymm = (kept & 0x06) == 0x06, zmm = (kept & 0xe6) == 0xe6;
  Features f;
  f.sse42 = has(first, 20);
  f.popcnt = has(first, 23);
  f.avx = ymm && has(first, 28);
  f.f16c = f.avx && has(first, 29);
  f.fma = f.avx && has(first, 12);
  f.bmi1 = has(seventh.ebx, 3);
  f.avx2 = f.avx && has(seventh.ebx, 5);
  f.avx512f = zmm && has(seventh.ebx, 16);
  f.avx512dq = f.avx512f && has(seventh.ebx, 17);
  f.avx512bw = f.avx512f && has(seventh.ebx, 30);
  f.avx512vl = f.avx512f && has(seventh.ebx, 31);
  f.vnni = f.avx512f && has(seventh.ecx, 11);
  f.bf16 = f.avx512f && has(second_part, 5);
  return f;
}

}  // namespace

X86Sets x86_sets() {
  const Features f = features();
  X86Sets sets;
  sets.avx2 = f.avx2 && f.fma && f.f16c && f.popcnt;
  sets.avx512 = sets.avx2 && f.avx512f && f.avx512dq && f.avx512bw && f.avx512vl && f.bmi1;
  return sets;
}

std::string x86_name() {
  constexpr uint32_t kFirst = 0x80000002u, kLast = kFirst + 2;
  if (cpuid(0x80000000u).eax < kLast) return "processor";
  char text[3 * sizeof(Words) + 1] = {};
  for (uint32_t leaf = kFirst; leaf <= kLast; leaf++) {
    const Words words = cpuid(leaf);
    std::memcpy(text + (leaf - kFirst) * sizeof words, &words, sizeof words);
  }
  const std::string name = text;  // filled up with spaces, before or after
  const size_t begin = name.find_first_not_of(' ');
  return begin == std::string::npos ? "processor" : name.substr(begin, name.find_last_not_of(' ') - begin + 1);
}

std::string x86_features() {
  const Features f = features();
  std::string names;
  const auto add = [&names](bool there, const char* name) {
    if (!there) return;
    if (!names.empty()) names += ' ';
    names += name;
  };
  add(f.sse42, "sse4.2");
  add(f.avx, "avx");
  add(f.avx2, "avx2");
  add(f.fma, "fma");
  add(f.avx512f, "avx512f");
  add(f.avx512bw, "avx512bw");
  add(f.vnni, "avx512vnni");
  add(f.bf16, "avx512bf16");
  return names;
}

}  // namespace moe
#endif
