#include "compiler.h"

#if defined(MOE_X86)
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "../common/float_formats.h"
#include "kernels.h"

MOE_BEGIN_TARGET("avx2,fma,f16c")

#define MOE_ISA avx2
#include "simd_avx2.h"
#include "kernels_impl.h"

MOE_END_TARGET
#endif
