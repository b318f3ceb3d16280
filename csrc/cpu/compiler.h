// What differs between compilers, once. MOE_MSVC stands for Microsoft's own; test/native/cross.sh defines it for
// another, so that what MSVC takes is compiled where there is no MSVC.
#pragma once

#if defined(_MSC_VER) && !defined(__clang__)
#define MOE_MSVC
#endif
#if defined(MOE_MSVC)
#include <intrin.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define MOE_X86
#elif defined(__aarch64__) || defined(_M_ARM64)
#define MOE_ARM
#endif

#define MOE_PRAGMA(...) _Pragma(#__VA_ARGS__)

// Functions between the two are compiled for an instruction set of their own, e.g. "avx2,fma", and what was included
// before is not: it could be linked into files that run everywhere. MSVC has only a switch for whole files, which
// binding.gyp gives.
#if defined(MOE_MSVC)
#define MOE_BEGIN_TARGET(features)
#define MOE_END_TARGET
#elif defined(__clang__)
#define MOE_BEGIN_TARGET(features) \
  MOE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MOE_END_TARGET MOE_PRAGMA(clang attribute pop)
#else
// The warnings are about the compiler's own intrinsics.
#define MOE_BEGIN_TARGET(features)                     \
  MOE_PRAGMA(GCC push_options)                         \
  MOE_PRAGMA(GCC target(features))                     \
  MOE_PRAGMA(GCC diagnostic push)                      \
  MOE_PRAGMA(GCC diagnostic ignored "-Wuninitialized") \
  MOE_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized")
#define MOE_END_TARGET MOE_PRAGMA(GCC diagnostic pop) MOE_PRAGMA(GCC pop_options)
#endif

// Before a loop of a constant number of rounds.
#if defined(MOE_MSVC)
#define MOE_UNROLL
#elif defined(__clang__)
#define MOE_UNROLL MOE_PRAGMA(clang loop unroll(full))
#else
#define MOE_UNROLL MOE_PRAGMA(GCC unroll 16)
#endif
