// What a kernel finds wrong with numbers on the device. A kernel drops the number, never follows it, and leaves a note
// in a page of host memory that is mapped into the device; the next wait of the context rejects with ERR_MOE_RANGE.
#pragma once
#include <cstdint>

namespace moe {

// One row for every argument that can be out of range: site, op, argument, and what was expected and received, where
// %v is the value, %e the end of a range that begins with it, %l the limit, %m the limit - 1 and %i an index. Add rows
// at the end.
#define MOE_FAULT_SITES(X)                                                                              \
  X(kCombineInverse, "moe_combine", "inverse", "inverse below %l (capacity from rows) but received %v") \
  X(kExpertsCounts, "moe_experts", "counts", "counts[%i] >= 0 but received %v")                         \
  X(kExpertsOffsets, "moe_experts", "offsets", "the rows of expert %i among 0..%m but received %v..%e") \
  X(kExpertsOverlap, "moe_experts", "offsets",                                                          \
    "every row to belong to one expert but row %v of expert %i belongs to another one too")             \
  X(kExpertsOrder, "moe_experts", "order", "order[%i] among the %l choices but received %v")            \
  X(kDispatchIds, "moe_dispatch", "ids", "ids below %l but received %v")                                \
  X(kGateIdMap, "moe_fused_gate", "idMap", "mapped ids below %l (slots of load) but received %v")

enum class FaultSite : int {
#define MOE_FAULT_SITE(site, op, arg, expected) site,
  MOE_FAULT_SITES(MOE_FAULT_SITE)
#undef MOE_FAULT_SITE
      kCount
};

// One note per site. Which of several bad numbers is noted is not determined.
struct FaultNote {
  int32_t raised, value, limit, index, end;
};

#ifdef __CUDACC__
// `notes` is CudaBackend::fault_notes().
__device__ inline void raise_fault(FaultNote* notes, FaultSite site, int32_t value, int32_t limit, int32_t index = 0,
                                   int32_t end = 0) {
  FaultNote* note = notes + static_cast<int>(site);
  note->value = value;
  note->limit = limit;
  note->index = index;
  note->end = end;
  __threadfence_system();
  *reinterpret_cast<volatile int32_t*>(&note->raised) = 1;
}
#endif

}  // namespace moe
