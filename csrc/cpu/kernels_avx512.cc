#include "compiler.h"

#if defined(MOE_X86)
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "../common/float_formats.h"
#include "kernels.h"

MOE_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define MOE_ISA avx512
#include "simd_avx512.h"
#include "kernels_impl.h"

MOE_END_TARGET
#endif
