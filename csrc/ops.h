// The native table of contents: one plain parameter struct and one prototype per op, and what tensors and packed
// experts are. Kernels see raw pointers only; nothing here knows JavaScript.
//
// Legend of dimensions: T tokens, E experts (columns of logits), K routed choices, C columns of a row (K + shared),
// H hidden, I intermediate, S slots (local experts), P places (capacity) of dispatched rows.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace moe {

class Backend;

// Limits that kernels may rely on; lib/ops refuses more, and so does the binding.
inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTopK = 32;
inline constexpr int kMaxShared = 8;

// A view of a tensor's memory; `data` is null where an optional argument was left out.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t elements = 0;

  explicit constexpr operator bool() const { return data != nullptr; }
  template <class T>
  constexpr T* as() const {
    return static_cast<T*>(data);
  }
};

// `validTokens`: a number of the host, or an i32 on the device that is read when the work runs.
struct Count {
  const int32_t* device = nullptr;
  int64_t host = 0;
};

// (u + beta) * g * sigmoid(alpha * g); with limit > 0, g = min(g, limit) and u = clamp(u, -limit, limit) first.
struct SwiGLU {
  float alpha = 1.0f, beta = 0.0f, limit = 0.0f;
};

// What packed weights hold. How they lie in memory is the backend's own business (Backend::expert_bytes,
// pack_experts and the kernels that read them).
struct ExpertsLayout {
  int64_t S = 0, H = 0, I = 0;
  DType dtype = DType::kF32;
  bool biases = false;
  SwiGLU swiglu;
};

struct Experts {
  ExpertsLayout layout;
  void* data = nullptr;
};

enum class Scoring : int { kSoftmax, kSigmoid, kSqrtSoftplus };
enum class Selection : int { kScore, kLogits, kUniform };
enum class GroupScore : int { kMax, kTop2Sum };
enum class ScalePlacement : int { kInWeights, kOnOutput };
enum class GateUp : int { kHalves, kInterleaved };
enum class SharedPart : int { kWhole, kGateUp, kDown };

struct MoeRouter {
  int64_t T, H, E;
  Tensor hidden, weight, bias;  // [T,H], [E,H], f32 [E]
  Tensor logits;                // f32 [T,E]
};

struct MoeFusedGate {
  int64_t T, E, rounds, slots;
  Tensor logits, bias;  // [T,E], f32 [E]
  Count valid_tokens;
  Tensor id_map, load;               // i32 [rounds, E + shared], i64 [slots]
  Tensor ids, weights, logical_ids;  // i32 [T, K + shared], f32 of the same shape, i32 [T,K]
  int32_t K;
  Scoring scoring;
  Selection selection;
  int32_t groups, top_groups;
  GroupScore group_score;
  bool renormalize;
  float scale;
  ScalePlacement scale_placement;
  int32_t shared, zero;
  bool capture_logical_ids;
  uint32_t seed;
};

struct MoeDispatch {
  int64_t T, C, H, P, blocks;
  Tensor ids, hidden;                      // i32 [T,C], [T,H]
  Tensor order, inverse, counts, offsets;  // i32 [P], [T,C], [experts], [experts + 1]
  Tensor block_experts, rows;              // i32 [blocks], [P,H]
  int32_t experts, first_expert, block_size;
};

struct MoeExperts {
  int64_t P, H, S, I, T, C;
  Tensor rows, counts, offsets;  // [P,H], i32 [S], i32 [S + 1]
  Experts experts;
  Tensor order, weights;  // i32 [P], f32 [T,C]
  Tensor output;          // [P,H]
};

struct MoeCombine {
  int64_t P, H, T, C;
  Tensor rows, inverse, weights, ids, hidden;  // [P,H], i32 [T,C], f32 [T,C], i32 [T,C], [T,H]
  Tensor output;                               // [T,H]
  float output_scale;
  int32_t zero, first_zero;
  bool weights_on_input;
};

struct FusedMoe {
  int64_t T, H, C, S, I;
  Tensor hidden, ids, weights;  // [T,H], i32 [T,C], f32 [T,C]
  Experts experts;
  Tensor output;  // [T,H]
  float output_scale;
  int32_t first_expert, zero, first_zero;
  bool weights_on_input;
};

struct SharedExperts {
  int64_t T, H, S, I;
  Tensor hidden;  // [T,H]
  Experts experts;
  Tensor projected_in, expert_gate, routed;  // [T,2I], [H], [T,H]
  Tensor projected, output;                  // [T,2I], [T,H]
  SharedPart part;
};

struct PackExperts {
  int64_t S, H, I, count, rows13, columns13, rows2, columns2;
  Experts experts;
  Tensor w13, w2, b13, b2;  // [count,2I,H], [count,H,I] (the last two swapped if transposed), [count,2I], [count,H]
  GateUp gate_up;
  bool transposed;
  int32_t first_slot;
};

Status moe_router(Backend&, const MoeRouter&);
Status moe_fused_gate(Backend&, const MoeFusedGate&);
Status moe_dispatch(Backend&, const MoeDispatch&);
Status moe_experts(Backend&, const MoeExperts&);
Status moe_combine(Backend&, const MoeCombine&);
Status fused_moe(Backend&, const FusedMoe&);
Status shared_experts(Backend&, const SharedExperts&);
Status pack_experts(Backend&, const PackExperts&);

#define MOE_OPS(X)                 \
  X(moe_router, MoeRouter)         \
  X(moe_fused_gate, MoeFusedGate)  \
  X(moe_dispatch, MoeDispatch)     \
  X(moe_experts, MoeExperts)       \
  X(moe_combine, MoeCombine)       \
  X(fused_moe, FusedMoe)           \
  X(shared_experts, SharedExperts) \
  X(pack_experts, PackExperts)

// A backend registers the ops it has; one it lacks is reported as unsupported.
template <class Params>
using Kernel = Status (*)(Backend&, const Params&);
template <class Params>
inline Kernel<Params> registered_kernel = nullptr;

#define MOE_REGISTER(op, Params) \
  [[maybe_unused]] static const bool moe_registered_##op = (::moe::registered_kernel<::moe::Params> = ::moe::op, true)

}  // namespace moe
