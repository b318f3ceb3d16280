// The instruction sets that kernels.h exists for, and which of them this processor runs.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace moe {

// Those that run here, the best first; never empty, for "scalar" always runs.
const std::vector<const Kernels*>& usable_kernels();

// The one of that name among them; null where it does not exist or does not run here.
const Kernels* kernels_named(const std::string& name);

// Their names, the best first, with `separator` between.
std::string usable_isas(const char* separator);

}  // namespace moe
