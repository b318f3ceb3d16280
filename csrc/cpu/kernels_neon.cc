// Every 64-bit ARM processor has these instructions.
#include "compiler.h"

#if defined(MOE_ARM)
#include <arm_neon.h>

#include <cstdint>
#include <type_traits>

#include "../common/float_formats.h"
#include "kernels.h"

#define MOE_ISA neon
#include "simd_neon.h"
#include "kernels_impl.h"
#endif
