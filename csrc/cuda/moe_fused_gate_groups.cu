// Launches gate_groups: what it covers, and lanes per token by experts and choices.
#include "moe_fused_gate_groups.cuh"

#include <algorithm>

namespace moe::gate {

namespace {

template <class Quad, int L, bool Sigmoid>
cudaError_t run(const Args& a, int sms, cudaStream_t stream) {
  constexpr int kWarps = 4, kTokens = 32 / L * kWarps;
  const auto kernel = gate_groups<Quad, L, Sigmoid>;
  const int bytes = 4 * (a.histogram + (Sigmoid ? 32 * L : 0)) + kTokens * static_cast<int>(sizeof(GroupScratch<L>));
  const int64_t blocks = (a.T + kTokens - 1) / kTokens;
  static const int resident = [&] {
    int count = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, 32 * kWarps, bytes);
    return std::max(count, 1);
  }();
  kernel<<<static_cast<int>(std::min<int64_t>(blocks, int64_t{sms} * resident)), 32 * kWarps, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <int L>
cudaError_t run(const Args& a, bool sigmoid, int sms, cudaStream_t stream) {
  if (a.dtype == DType::kF32) {
    return sigmoid ? run<uint4, L, true>(a, sms, stream) : run<uint4, L, false>(a, sms, stream);
  }
  return sigmoid ? run<uint2, L, true>(a, sms, stream) : run<uint2, L, false>(a, sms, stream);
}

bool by_sigmoid(const Args& a) { return a.scoring == Scoring::kSigmoid && a.selection == Selection::kScore; }

// Of a softmax the order of logits is that of scores, but not that of sums of scores.
bool by_logits(const Args& a) {
  if (a.bias != nullptr) return false;
  if (a.selection == Selection::kLogits) return a.scoring != Scoring::kSqrtSoftplus;
  return a.selection == Selection::kScore && a.scoring == Scoring::kSoftmax &&
         (a.top_groups == a.groups || !a.two_best);
}

}  // namespace

int group_lanes(const Args& a) {
  const bool quads = a.E % 4 == 0 && (a.top_groups == a.groups || (a.group_size % 4 == 0 && a.groups <= kMostGroups));
  if (!quads || !(by_sigmoid(a) || by_logits(a))) return 0;
  return a.E <= 256 && a.K <= 8 ? 8 : a.E <= 512 && a.K <= 16 ? 16 : 0;
}

cudaError_t launch_groups(const Args& a, int lanes, int sms, cudaStream_t stream) {
  return lanes == 8 ? run<8>(a, by_sigmoid(a), sms, stream) : run<16>(a, by_sigmoid(a), sms, stream);
}

}  // namespace moe::gate
