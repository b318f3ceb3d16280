// Which kernel routes which batch: the fast kernels where their limits hold, else the general one.
#include <algorithm>

#include "launch_early.cuh"
#include "moe_fused_gate_pairs.cuh"
#include "moe_fused_gate_tokens.cuh"

namespace moe::gate {

namespace {

constexpr int kPlainBytes = 48 * 1024;       // of shared memory, without asking for more
constexpr int kHistogramSlots = 4096;        // counted in shared memory up to here
constexpr int64_t kSmallBatch = 4096;        // tokens of gate_few
constexpr int64_t kHistogramChoices = 8192;  // and from this many choices on. 48 KB of shared memory hold the rest too

template <class T, int E, int L, Family F, int Warps, int Blocks = 0, bool Ragged = false>
cudaError_t run_lanes(const Args& a, int sms, cudaStream_t stream) {
  constexpr int kTokens = 32 / L * Warps;
  constexpr bool kBiasInShared = F != Family::kSoftmax && E / L > 16;
  const auto kernel = gate_lanes<T, E, L, F, Warps, Blocks, Ragged>;
  const int bytes = 4 * (a.histogram + (kBiasInShared ? E : 0) + Warps * kLanesScratch<E, L>);
  const int64_t blocks = (a.T + kTokens - 1) / kTokens;
  static const int resident = [&] {
    int count = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, 32 * Warps, bytes);
    return std::max(count, 1);
  }();
  kernel<<<static_cast<int>(std::min<int64_t>(blocks, int64_t{sms} * resident)), 32 * Warps, bytes, stream>>>(a);
  return cudaGetLastError();
}

// Tokens per multiprocessor for 256/8/4: up to `few` a warp per token is fastest, above `many` 2 lanes, half a warp
// between them (f32 alone). Where the load is counted in the tensor itself, 8 lanes up to `counted`. Lines through
// measured times cross there.
struct Limits {
  int64_t few, many, counted;
};
constexpr Limits kHalfLimits{285, 285, 50}, kFloatLimits{455, 1000, 65};

unsigned blocks_of(int64_t tokens, int tokens_of_block) {
  return static_cast<unsigned>((tokens + tokens_of_block - 1) / tokens_of_block);
}

// Shared memory: the counters, then that of each warp.
template <class Kernel>
cudaError_t run_blocks(Kernel kernel, const Args& a, int64_t blocks, int warps, int bytes_of_warp,
                       cudaStream_t stream) {
  const int bytes = 4 * a.histogram + warps * bytes_of_warp;
  if (bytes > kPlainBytes) {
    const cudaError_t error = allow_most_shared(kernel);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), 32 * warps, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <class Kernel>
cudaError_t run_warps(Kernel kernel, const Args& a, int tokens_of_warp, int warps, int bytes_of_warp,
                      cudaStream_t stream) {
  return run_blocks(kernel, a, blocks_of(a.T, tokens_of_warp * warps), warps, bytes_of_warp, stream);
}

// A warp per token. Many tokens want more warps of fewer registers.
template <class T, bool Small, uint32_t Allowed, uint32_t... More>
cudaError_t run_few(const Args& a, cudaStream_t stream) {
  if constexpr (sizeof...(More) > 0) {
    if ((a.asks & ~Allowed) != 0) return run_few<T, Small, More...>(a, stream);
  }
  constexpr int kWarps = Small ? 2 : 3, kWarpsOfSm = Small ? 36 : 63;
  gate_few<T, kWarps, kWarpsOfSm, Small, Allowed><<<blocks_of(a.T, kWarps), 32 * kWarps, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T>
cudaError_t run_few(Args a, cudaStream_t stream) {
  constexpr uint32_t kOften = kMapped | kCounted | kShared;
  a.histogram = 0;
  return a.T <= kSmallBatch ? run_few<T, true, 0, kOften, kAnything>(a, stream)
                            : run_few<T, false, 0, kMapped, kCounted, kShared, kOften, kAnything>(a, stream);
}

cudaError_t run_few_dtype(const Args& a, cudaStream_t stream) {
  if (a.dtype == DType::kF32) return run_few<float>(a, stream);
  if (a.dtype == DType::kBF16) return run_few<__nv_bfloat16>(a, stream);
  return run_few<__half>(a, stream);
}

// Two tokens per warp.
cudaError_t run_pairs(Args a, cudaStream_t stream) {
  constexpr int kWarps = 2;
  a.histogram = 0;
  gate_pairs<float, kWarps><<<blocks_of(a.T, 2 * kWarps), 32 * kWarps, 0, stream>>>(a);
  return cudaGetLastError();
}

// One block for every multiprocessor where it can hold all warps. Beyond that small blocks fill the device evenly; with
// load counting, larger ones, so that few add their counters to the load.
template <class T>
cudaError_t run_tokens(const Args& a, int sms, cudaStream_t stream) {
  int device = 0, bytes = kPlainBytes;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int most = std::min(kMostTokenWarps, (bytes - 4 * a.histogram) / kTokenWarpBytes);
  const int64_t all = (a.T + kTokensOfWarp - 1) / kTokensOfWarp, each = (all + sms - 1) / sms;
  const int warps = each <= most ? static_cast<int>(each) : std::min(most, a.histogram > 0 ? 8 : 4);
  return run_warps(gate_tokens<T>, a, kTokensOfWarp, warps, kTokenWarpBytes, stream);
}

cudaError_t run_tokens_dtype(const Args& a, int sms, cudaStream_t stream) {
  if (a.dtype == DType::kF32) return run_tokens<float>(a, sms, stream);
  if (a.dtype == DType::kBF16) return run_tokens<__nv_bfloat16>(a, sms, stream);
  return run_tokens<__half>(a, sms, stream);
}

template <int E, bool Ragged>
cudaError_t run_softmax(const Args& a, cudaStream_t stream) {
  const int warps = a.histogram > 0 ? 8 : 2;  // with load counting, few blocks add their counters to the load
  constexpr int kBytes = 32 * kRowStride<E>;
  if (a.dtype == DType::kBF16) return run_warps(gate_softmax<__nv_bfloat16, E, Ragged>, a, 32, warps, kBytes, stream);
  return run_warps(gate_softmax<__half, E, Ragged>, a, 32, warps, kBytes, stream);
}

template <int N>
cudaError_t run_rows(const Args& a, int sms, cudaStream_t stream) {
  constexpr int kWarps = 4;
  const int bytes = 4 * (a.histogram + kWarps * (row_scratch(a.E, a.top_groups < a.groups ? a.groups : 0) + 1 & ~1));
  const int64_t blocks = (a.T + kWarps - 1) / kWarps;
  gate_rows<N><<<static_cast<int>(std::min<int64_t>(blocks, int64_t{sms} * 16)), 32 * kWarps, bytes, stream>>>(a);
  return cudaGetLastError();
}

template <int N, int... More>
cudaError_t run_smallest_rows(const Args& a, int sms, cudaStream_t stream) {
  if constexpr (sizeof...(More) > 0) {
    if (a.E > 32 * N) return run_smallest_rows<More...>(a, sms, stream);
  }
  return run_rows<N>(a, sms, stream);
}

// Lanes per token by batch: few tokens want short chains of dependent work, many want little work per token.
template <class T, int E, Family F, int L, int... More>
cudaError_t run_variant(const Args& a, int lanes, int sms, cudaStream_t stream) {
  if constexpr (sizeof...(More) > 0) {
    if (lanes != L) return run_variant<T, E, F, More...>(a, lanes, sms, stream);
  }
  if constexpr (L == 32) {
    if (a.T <= 4 * sms) return run_lanes<T, E, L, F, 1>(a, sms, stream);
  }
  // 80 registers and 24 warps per multiprocessor are best where 16-bit logits allow it without spills.
  // With 384 experts, what the rarely taken gate_row_apart keeps registers for must not cost warps.
  constexpr int kBlocks = L != 8 ? 0 : F == Family::kGrouped && sizeof(T) == 2 ? 6 : E == 384 ? 4 : 0;
  return run_lanes<T, E, L, F, 4, kBlocks>(a, sms, stream);
}

template <int E, Family F, int... L>
cudaError_t run_dtype(const Args& a, int lanes, int sms, cudaStream_t stream) {
  if (a.dtype == DType::kF32) return run_variant<float, E, F, L...>(a, lanes, sms, stream);
  if (a.dtype == DType::kBF16) return run_variant<__nv_bfloat16, E, F, L...>(a, lanes, sms, stream);
  return run_variant<__half, E, F, L...>(a, lanes, sms, stream);
}

template <int E, int L>
cudaError_t run_ragged(const Args& a, int sms, cudaStream_t stream) {
  if (a.dtype == DType::kF32) return run_lanes<float, E, L, Family::kSoftmax, 4, 0, true>(a, sms, stream);
  if (a.dtype == DType::kBF16) return run_lanes<__nv_bfloat16, E, L, Family::kSoftmax, 4, 0, true>(a, sms, stream);
  return run_lanes<__half, E, L, Family::kSoftmax, 4, 0, true>(a, sms, stream);
}

const char* name(int lanes) {
  switch (lanes) {
    case 8: return "8 lanes per token";
    case 16: return "16 lanes per token";
    case 32: return "32 lanes per token";
    default: return "general: a warp per token";
  }
}

Args pack(const MoeFusedGate& p, const SpreadCounters& spread) {
  Args a{};
  a.logits = p.logits.data;
  a.bias = p.bias.as<const float>();
  a.valid_device = p.valid_tokens.device;
  a.valid_host = p.valid_tokens.host;
  a.tokens = static_cast<int32_t>(std::min<int64_t>(p.T, 0x7fffffff));
  a.valid = static_cast<int32_t>(std::clamp<int64_t>(p.valid_tokens.host, 0, a.tokens));
  a.id_map = p.id_map.as<const int32_t>();
  const bool apart = p.load && spread.data != nullptr;
  a.counters = static_cast<char*>(apart ? static_cast<void*>(spread.data) : p.load.data);
  a.copy_mask = apart ? spread.copies - 1 : 0;
  a.stride = apart ? 8 * SpreadCounters::kStride : 8;
  a.ids = p.ids.as<int32_t>();
  a.weights = p.weights.as<float>();
  a.logical_ids = p.logical_ids.as<int32_t>();
  a.T = p.T;
  a.E = static_cast<int32_t>(p.E);
  a.K = p.K;
  a.shared = p.shared;
  a.zero = p.zero;
  a.routed = a.E - p.zero;
  a.columns = p.K + p.shared;
  a.groups = p.groups;
  a.group_size = a.E / p.groups;
  a.top_groups = p.top_groups;
  a.column_magic = a.columns % 2 == 0 ? static_cast<uint32_t>((int64_t{1} << 32) / a.columns + 1) : 0;
  a.group_magic = static_cast<uint32_t>(((1 << 20) + a.group_size - 1) / a.group_size);
  a.map_row = a.E + a.shared;
  a.rounds = static_cast<uint32_t>(std::max<int64_t>(p.rounds, 1));
  a.round_magic = static_cast<uint32_t>(std::min<uint64_t>((uint64_t{1} << 32) / a.rounds, 0xffffffffu));
  a.slots = static_cast<int32_t>(std::min<int64_t>(p.slots, 0x7fffffff));
  const bool counted_here = p.load && p.slots <= kHistogramSlots && p.T * a.columns >= kHistogramChoices;
  a.histogram = counted_here ? (a.slots + 3) / 4 * 4 : 0;
  const bool in_weights = p.scale_placement == ScalePlacement::kInWeights;
  a.scale = in_weights ? p.scale : 1.0f;
  a.shared_weight = in_weights ? 1.0f : 1.0f / p.scale;
  a.dtype = p.logits.dtype;
  a.scoring = p.scoring;
  a.selection = p.selection;
  a.two_best = p.group_score == GroupScore::kTop2Sum;
  a.renormalize = p.renormalize;
  const bool padded = p.valid_tokens.device != nullptr || p.valid_tokens.host < p.T;
  a.asks = (p.id_map ? kMapped : 0) | (p.load ? kCounted : 0) | (p.shared > 0 ? kShared : 0) |
           (p.logical_ids ? kCaptured : 0) | (padded ? kPadded : 0) | (p.bias ? 0 : kUnbiased) |
           (a.two_best ? 0 : kOneBest) | (p.K < 8 ? kFewer : 0) | (p.shared > 0 && p.zero > 0 ? kMoved : 0) |
           (p.renormalize ? 0 : kUndivided);
  a.seed = p.seed;
  return a;
}

}  // namespace

cudaError_t launch(const MoeFusedGate& p, const SpreadCounters& spread, int sms, cudaStream_t stream, const char** path,
                   int force) {
  if (p.T == 0) {
    *path = "nothing to do";
    return cudaSuccess;
  }
  const Args a = pack(p, spread);
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  const bool fits = force != 1 && a.K <= 8 && aligned(a.logits) && aligned(a.bias);
  const bool single = a.top_groups == a.groups;
  const bool sigmoid = a.scoring == Scoring::kSigmoid && a.selection == Selection::kScore;
  const bool any_softmax = a.scoring == Scoring::kSoftmax && single && a.bias == nullptr &&
                           (a.selection == Selection::kScore || a.selection == Selection::kLogits);
  const bool softmax = any_softmax && (a.renormalize || a.selection == Selection::kLogits);  // of the chosen alone
  const auto pick = [&](int few, int some, int many) {
    const int lanes = force != 0 && force < 100 ? force : a.T <= 8 * sms ? few : a.T <= 48 * sms ? some : many;
    *path = name(lanes);
    return lanes;
  };
  // The kernels for large batches; the limits are where they were measured to win.
  const auto large = [&](int lanes, int64_t tokens) {
    if (a.columns > kTokenColumns || (force == 0 ? a.T <= tokens : force != 100 + lanes)) return false;
    *path = lanes == 1 ? "one lane per token" : "2 lanes per token";
    return true;
  };
  const bool halves = a.dtype != DType::kF32;
  if (fits && sigmoid && a.E == 256 && a.groups == 8 && a.top_groups == 4) {
    const Limits limits = halves ? kHalfLimits : kFloatLimits;
    // Counters too close to each other to be added to one by one.
    const bool close = a.histogram > 0 && a.stride < 8 * SpreadCounters::kStride;
    const int64_t many = close ? limits.counted : limits.many;
    if (aligned(a.ids) && aligned(a.weights) && large(2, many * sms)) return run_tokens_dtype(a, sms, stream);
    const bool small = a.T * a.columns < int64_t{1} << 31 && int64_t{a.rounds} * a.map_row < int64_t{1} << 31;
    const bool few = small && a.shared <= 16 && a.T < int64_t{1} << 27;
    if (few && (force == 0 ? !close && (halves || a.T <= limits.few * sms) : force == 32)) {
      *path = name(32);
      return run_few_dtype(a, stream);
    }
    if (small && !halves && (force == 0 ? !close : force == 16)) {
      *path = name(16);
      return run_pairs(a, stream);
    }
    *path = name(8);
    return run_dtype<256, Family::kGrouped, 8>(a, 8, sms, stream);
  }
  if (fits && sigmoid && single && a.E == 384)
    return run_dtype<384, Family::kSigmoid, 8, 16>(a, pick(16, 16, 8), sms, stream);
  if (fits && sigmoid && single && a.E == 256)
    return run_dtype<256, Family::kSigmoid, 8, 32>(a, pick(32, 8, 8), sms, stream);
  if (fits && any_softmax && halves) {
    if (a.E == 128 && large(1, 24 * sms)) return run_softmax<128, false>(a, stream);
    if (a.E == 64 && large(1, 0)) return run_softmax<64, false>(a, stream);
    if (a.E >= 32 && a.E < 64 && a.E % 4 == 0 && large(1, 0)) return run_softmax<64, true>(a, stream);
  }
  if (fits && softmax && a.E == 256) return run_dtype<256, Family::kSoftmax, 8, 32>(a, pick(32, 8, 8), sms, stream);
  if (fits && softmax && a.E == 128) return run_dtype<128, Family::kSoftmax, 8, 16>(a, pick(16, 8, 8), sms, stream);
  if (fits && softmax && a.E == 64) return run_dtype<64, Family::kSoftmax, 8>(a, pick(8, 8, 8), sms, stream);
  const int lanes = force != 1 && aligned(a.logits) && aligned(a.bias) ? group_lanes(a) : 0;
  if (lanes > 0) {
    *path = lanes == 8 ? "8 lanes per token, any groups" : "16 lanes per token, any groups";
    return launch_groups(a, lanes, sms, stream);
  }
  if (force != 1 && softmax && a.K <= 8 && a.E >= 8 && a.E < 64) {
    *path = "8 lanes per token, ragged";
    return run_ragged<64, 8>(a, sms, stream);
  }
  *path = name(1);
  return run_smallest_rows<2, 4, 5, 6, 8, 12, 16, 24, 32>(a, sms, stream);
}

}  // namespace moe::gate
