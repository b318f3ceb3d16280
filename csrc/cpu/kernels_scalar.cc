#include <bit>
#include <cstdint>
#include <cstring>

#include "../common/float_formats.h"
#include "kernels.h"

#define MOE_ISA scalar
#include "kernels_impl.h"
#include "simd_scalar.h"
