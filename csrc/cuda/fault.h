// What a kernel finds wrong with numbers on the device. A kernel drops the number, never follows it, and leaves a note
// in a page of host memory that is mapped into the device; the next wait of the context rejects with ERR_MOE_RANGE.
#pragma once
#include <cstdint>

namespace moe {

// One row for every argument that can be out of range: site, op, argument, what is expected. Add rows at the end.
#define MOE_FAULT_SITES(X)                                                              \
  X(kCombineInverse, "moe_combine", "inverse", "inverse below the capacity of rows")    \
  X(kExpertsCounts, "moe_experts", "counts", "counts >= 0 with all rows in the capacity")  \
  X(kExpertsOrder, "moe_experts", "order", "order among the choices of weights")        \
  X(kDispatchIds, "moe_dispatch", "ids", "ids in range")                                \
  X(kGateIdMap, "moe_fused_gate", "idMap", "mapped ids below the slots of load")

enum class FaultSite : int {
#define MOE_FAULT_SITE(site, op, arg, expected) site,
  MOE_FAULT_SITES(MOE_FAULT_SITE)
#undef MOE_FAULT_SITE
      kCount
};

// One note per site. Which of several bad numbers is noted is not determined.
struct FaultNote {
  int32_t raised, value, limit, unused;
};

#ifdef __CUDACC__
// `notes` is CudaBackend::fault_notes().
__device__ inline void raise_fault(FaultNote* notes, FaultSite site, int32_t value, int32_t limit) {
  FaultNote* note = notes + static_cast<int>(site);
  note->value = value;
  note->limit = limit;
  __threadfence_system();
  *reinterpret_cast<volatile int32_t*>(&note->raised) = 1;
}
#endif

}  // namespace moe
