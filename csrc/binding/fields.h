// The fields of every op's record, in the order of its spec in lib/ops: dimensions, inputs, outputs, options. One list
// serves both visitors: Unpacker, which fills the struct and checks it, and Describer, which tells the contract test.
#pragma once
#include <algorithm>

#include "../ops.h"

namespace moe {

inline constexpr DTypes kF32 = one(DType::kF32), kI32 = one(DType::kI32);
inline constexpr int64_t kMaxInt32 = 0x7fffffff;

template <class V>
void fields(V& v, MoeRouter& p) {
  v.dim("tokens", p.T), v.dim("hidden", p.H), v.dim("experts", p.E);
  v.in("hidden", p.hidden, kFloats, {p.T, p.H});
  v.in("weight", p.weight, kFloats, {p.E, p.H});
  v.optional("bias", p.bias, kF32, {p.E});
  v.out("logits", p.logits, kF32, {p.T, p.E});
}

template <class V>
void fields(V& v, MoeFusedGate& p) {
  v.dim("tokens", p.T), v.dim("experts", p.E), v.dim("rounds", p.rounds), v.dim("slots", p.slots);
  v.in("logits", p.logits, kFloats, {p.T, p.E});
  v.optional("bias", p.bias, kF32, {p.E});
  v.count("validTokens", p.valid_tokens, p.T);
  v.optional("idMap", p.id_map, kI32, {});  // its width depends on an option: checked below
  v.optional_counters("load", p.load, {p.slots});
  v.out("ids", p.ids, kI32, {});
  v.out("weights", p.weights, kF32, {});
  v.optional_out("logicalIds", p.logical_ids, kI32, {});
  v.integer("topK", p.K, 1, kMaxTopK);
  v.choice("scoring", p.scoring, {"softmax", "sigmoid", "sqrtSoftplus"});
  v.choice("selection", p.selection, {"score", "logits", "uniform"});
  v.integer("groups", p.groups, 1, kMaxExperts);
  v.integer("topGroups", p.top_groups, 1, kMaxExperts);
  v.choice("groupScore", p.group_score, {"max", "top2Sum"});
  v.flag("renormalize", p.renormalize);
  v.real("routedScalingFactor", p.scale);
  v.choice("scalePlacement", p.scale_placement, {"inWeights", "onOutput"});
  v.integer("sharedExperts", p.shared, 0, kMaxShared);
  v.integer("zeroExperts", p.zero, 0, kMaxExperts);
  v.flag("captureLogicalIds", p.capture_logical_ids);
  v.integer("seed", p.seed, 0, 0xffffffffll);
  v.same("ids", p.ids, {p.T, p.K + p.shared});
  v.same("weights", p.weights, {p.T, p.K + p.shared});
  if (p.logical_ids) v.same("logicalIds", p.logical_ids, {p.T, p.K});
  if (p.id_map) v.same("idMap", p.id_map, {p.rounds, p.E + p.shared});
  v.require(p.E >= 1 && p.E <= kMaxExperts, "experts", "1 to 1024 experts");
  v.require(p.groups >= 1 && p.E % p.groups == 0, "groups", "a divisor of experts");
  v.require(p.top_groups <= p.groups, "topGroups", "at most groups");
  v.require(p.groups >= 1 && p.K <= p.E / p.groups * p.top_groups, "topK", "at most the experts in the chosen groups");
  v.require(p.zero < p.E, "zeroExperts", "fewer than experts");
  v.require(!p.id_map || p.rounds >= 1, "idMap", "at least 1 round");
}

template <class V>
void fields(V& v, MoeDispatch& p) {
  v.dim("tokens", p.T), v.dim("columns", p.C), v.dim("hidden", p.H), v.dim("capacity", p.P), v.dim("blocks", p.blocks);
  v.in("ids", p.ids, kI32, {p.T, p.C});
  v.optional("hidden", p.hidden, kFloats, {p.T, p.H});
  v.out("order", p.order, kI32, {p.P});
  v.out("inverse", p.inverse, kI32, {p.T, p.C});
  v.out("counts", p.counts, kI32, {});
  v.out("offsets", p.offsets, kI32, {});
  v.optional_out("blockExperts", p.block_experts, kI32, {p.blocks});
  v.optional_out_like("rows", p.rows, "hidden", p.hidden, {p.P, p.H});
  v.integer("experts", p.experts, 1, 65536);
  v.integer("firstExpert", p.first_expert, 0, kMaxInt32);
  v.integer("blockSize", p.block_size, 0, 65536);
  v.same("counts", p.counts, {p.experts});
  v.same("offsets", p.offsets, {p.experts + int64_t{1}});
  // The worst case over all routings, from the same formula as the spec's: kernels rely on it.
  const int64_t choices = v.product({p.T, p.C}), block = p.block_size;
  const int64_t worst =
      block == 0
          ? choices
          : (std::min(choices + p.experts * (block - 1), v.product({choices, block})) + block - 1) / block * block;
  v.require(p.P == worst && p.P <= kMaxInt32, "capacity", "the worst case of rows");
  v.require(p.blocks == (block == 0 ? 0 : p.P / block), "blocks", "capacity / blockSize");
  v.require(bool(p.block_experts) == (block != 0), "blockExperts", "with blockSize, and only then");
  v.require(!p.rows || p.hidden, "rows", "only with hidden");
}

template <class V>
void fields(V& v, MoeExperts& p) {
  v.dim("capacity", p.P), v.dim("hidden", p.H), v.dim("slots", p.S), v.dim("intermediate", p.I);
  v.dim("tokens", p.T), v.dim("columns", p.C);
  v.in("rows", p.rows, kFloats, {p.P, p.H});
  v.in("counts", p.counts, kI32, {p.S});
  v.in("offsets", p.offsets, kI32, {p.S + 1});
  v.experts("experts", p.experts, p.S, p.H, p.I);
  v.optional("order", p.order, kI32, {p.P});
  v.optional("weights", p.weights, kF32, {p.T, p.C});
  v.out_like("output", p.output, "rows", p.rows, {p.P, p.H});
  v.require(bool(p.order) == bool(p.weights), "order", "order and weights together");
}

template <class V>
void fields(V& v, MoeCombine& p) {
  v.dim("capacity", p.P), v.dim("hidden", p.H), v.dim("tokens", p.T), v.dim("columns", p.C);
  v.in("rows", p.rows, kFloats, {p.P, p.H});
  v.in("inverse", p.inverse, kI32, {p.T, p.C});
  v.in("weights", p.weights, kF32, {p.T, p.C});
  v.optional("ids", p.ids, kI32, {p.T, p.C});
  v.optional_like("hidden", p.hidden, "rows", p.rows, {p.T, p.H});
  v.out_like("output", p.output, "rows", p.rows, {p.T, p.H});
  v.real("outputScale", p.output_scale);
  v.integer("zeroExperts", p.zero, 0, 65536);
  v.integer("firstZeroExpert", p.first_zero, 0, kMaxInt32);
  v.flag("weightsOnInput", p.weights_on_input);
  v.require(p.zero == 0 || (p.ids && p.hidden), "zeroExperts", "ids and hidden with zeroExperts");
}

template <class V>
void fields(V& v, FusedMoe& p) {
  v.dim("tokens", p.T), v.dim("hidden", p.H), v.dim("columns", p.C), v.dim("slots", p.S), v.dim("intermediate", p.I);
  v.in("hidden", p.hidden, kFloats, {p.T, p.H});
  v.in("ids", p.ids, kI32, {p.T, p.C});
  v.in("weights", p.weights, kF32, {p.T, p.C});
  v.experts("experts", p.experts, p.S, p.H, p.I);
  v.out_like("output", p.output, "hidden", p.hidden, {p.T, p.H});
  v.real("outputScale", p.output_scale);
  v.integer("firstExpert", p.first_expert, 0, kMaxInt32);
  v.integer("zeroExperts", p.zero, 0, 65536);
  v.integer("firstZeroExpert", p.first_zero, 0, kMaxInt32);
  v.flag("weightsOnInput", p.weights_on_input);
}

template <class V>
void fields(V& v, SharedExperts& p) {
  v.dim("tokens", p.T), v.dim("hidden", p.H), v.dim("slots", p.S), v.dim("intermediate", p.I);
  v.in("hidden", p.hidden, kFloats, {p.T, p.H});
  v.experts("experts", p.experts, p.S, p.H, p.I);
  v.optional_like("projected", p.projected_in, "hidden", p.hidden, {p.T, 2 * p.I});
  v.optional("expertGate", p.expert_gate, kFloats, {p.H});
  v.optional_like("routed", p.routed, "hidden", p.hidden, {p.T, p.H});
  v.optional_out_like("projected", p.projected, "hidden", p.hidden, {p.T, 2 * p.I});
  v.optional_out_like("output", p.output, "hidden", p.hidden, {p.T, p.H});
  v.choice("part", p.part, {"whole", "gateUp", "down"});
  v.require(p.S == 1, "experts", "1 slot");
  v.require(bool(p.projected_in) == (p.part == SharedPart::kDown), "projected", "projected with part 'down' only");
  v.require(bool(p.projected) == (p.part == SharedPart::kGateUp), "part", "the outputs of this part");
  v.require(bool(p.output) == (p.part != SharedPart::kGateUp), "part", "the outputs of this part");
}

template <class V>
void fields(V& v, PackExperts& p) {
  v.dim("slots", p.S), v.dim("hidden", p.H), v.dim("intermediate", p.I), v.dim("count", p.count);
  v.dim("rows13", p.rows13), v.dim("columns13", p.columns13), v.dim("rows2", p.rows2), v.dim("columns2", p.columns2);
  v.inout_experts("experts", p.experts, p.S, p.H, p.I);
  v.in("w13", p.w13, kFloats, {p.count, p.rows13, p.columns13});
  v.in("w2", p.w2, kFloats, {p.count, p.rows2, p.columns2});
  v.optional("b13", p.b13, kFloats, {p.count, 2 * p.I});
  v.optional("b2", p.b2, kFloats, {p.count, p.H});
  v.choice("gateUp", p.gate_up, {"halves", "interleaved"});
  v.flag("transposed", p.transposed);
  v.integer("firstSlot", p.first_slot, 0, 65535);
  const int64_t rows13 = p.transposed ? p.columns13 : p.rows13, columns13 = p.transposed ? p.rows13 : p.columns13;
  const int64_t rows2 = p.transposed ? p.columns2 : p.rows2, columns2 = p.transposed ? p.rows2 : p.columns2;
  v.require(rows13 == 2 * p.I && columns13 == p.H, "w13", "[count, 2*intermediate, hidden]");
  v.require(rows2 == p.H && columns2 == p.I, "w2", "[count, hidden, intermediate]");
  v.require(p.first_slot + p.count <= p.S, "firstSlot", "slots among those of experts");
  v.require(p.experts.layout.biases || (!p.b13 && !p.b2), "b13", "no biases: experts were allocated without");
}

}  // namespace moe
