#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/float_formats.h"
#include "compiler.h"
#include "kernels.h"

#define MOE_ISA scalar
#include "simd_scalar.h"
#include "kernels_impl.h"
