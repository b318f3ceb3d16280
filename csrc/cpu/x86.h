// What an x86 processor says of itself. By its instructions: compilers differ in the features that their own tests
// know, and what those need cannot always be linked into a shared library.
#pragma once
#include <string>

namespace moe {

struct X86Sets {
  bool avx2 = false, avx512 = false;
};
// The sets of instructions that the kernels may use: the processor has them, and the system keeps their registers.
X86Sets x86_sets();

// E.g. "AMD EPYC 9B45 128-Core Processor".
std::string x86_name();

// E.g. "sse4.2 avx avx2 fma": what matters here, of what may be used.
std::string x86_features();

}  // namespace moe
