// moe_fused_gate: the launch shell. The kernels are moe_fused_gate_lanes.cuh (fast), moe_fused_gate_tokens.cuh (fast,
// for large batches), moe_fused_gate_softmax.cuh (fast, few experts), moe_fused_gate_groups.cuh (any groups) and
// moe_fused_gate_row.cuh (general); moe_fused_gate_launch.cu says which one routes what.
#include <string>

#include "backend.h"
#include "check.h"
#include "moe_fused_gate.cuh"

namespace moe {

Status moe_fused_gate(Backend& backend, const MoeFusedGate& p) {
  if (p.E > kMaxExperts || p.K > kMaxTopK) {
    return Status::Error(Code::kUnsupported, "expected at most 1024 experts and topK 32 but received " +
                                                 std::to_string(p.E) + " and " + std::to_string(p.K));
  }
  const char* path = "";
  SpreadCounters spread;
  if (p.load && p.T > 0) MOE_RETURN_IF_ERROR(cuda(backend).spread_counters(p.load, &spread));
  MOE_CUDA_CHECK(gate::launch(p, spread, cuda(backend).sm_count(), cuda(backend).stream(), &path));
  backend.note_path("moe_fused_gate", path);
  return Status::Ok();
}

MOE_REGISTER(moe_fused_gate, MoeFusedGate);

}  // namespace moe
