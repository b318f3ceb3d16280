// Which kernels of moe_dispatch sort what.
//
// A stable counting sort, without arithmetic on values. Limits: 2^31 - 1 places. Ids that are not local, negative ones
// included, get inverse -1. Counters are integers, so that no order of additions shows.
#include <algorithm>

#include "moe_dispatch.cuh"
#include "moe_dispatch_experts.cuh"
#include "moe_dispatch_few.cuh"
#include "moe_dispatch_gather.cuh"
#include "moe_dispatch_many.cuh"

namespace moe::dispatch {

namespace {

constexpr uint32_t kSharedBytes = 96 * 1024;
constexpr int kWholeMultiprocessor = 120 * 1024;  // of shared memory: more than half of what sm_90 has
constexpr uint32_t kFewPlaces = 512;              // per block where choices are few
constexpr uint32_t kClusterChoices = 36864;       // one cluster up to here, clusters on the whole device above
constexpr uint32_t kGridCluster = 8;
constexpr uint32_t kManyThreads = 512;  // more of them get in each other's way
constexpr uint32_t kSortedRounds = 2;   // from here on blocks sort in shared memory

struct Launch {
  uint32_t blocks, threads, bytes;
  cudaStream_t stream;
};

enum class Attribute { kNone, kProgrammatic, kCooperative };

template <class... Parameters, class... Arguments>
cudaError_t run(void (*kernel)(Parameters...), const Launch& launch, Attribute attribute, uint32_t cluster,
                const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.blocks;
  config.blockDim = launch.threads;
  config.dynamicSmemBytes = launch.bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  if (attribute == Attribute::kProgrammatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  } else if (attribute == Attribute::kCooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (launch.bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.bytes));
    if (error != cudaSuccess) return error;
  }
  if (cluster > 1) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// The shape that sorts on `blocks` blocks, or, where their shared memory does not hold that, on as many as it takes.
ManyShape shape_of(const MoeDispatch& p, uint32_t blocks, uint32_t cluster) {
  const uint32_t choices = static_cast<uint32_t>(p.T * p.C);
  ManyShape m{};
  m.pairs = (static_cast<uint32_t>(p.experts) + 1) / 2;
  m.cluster = cluster;
  const auto fits = [&](uint32_t rows, uint32_t rounds) {
    m.rows = rows, m.rounds = rounds, m.sorted = rounds >= kSortedRounds;
    return 4 * ManyMemory(nullptr, m).size <= kSharedBytes;
  };
  uint32_t rows = kManyThreads / 32, rounds = 1;
  while (rows > 1 && !fits(rows, 1)) rows /= 2;
  while (uint64_t{32} * rows * rounds * blocks < choices && rounds < kMostRounds && fits(rows, rounds + 1)) rounds++;
  // As few warps as these rounds allow.
  fits(std::min(rows, std::max(1u, (choices + 32 * rounds * blocks - 1) / (32 * rounds * blocks))), rounds);
  m.threads = std::max(kManyThreads, (m.pairs + 31) / 32 * 32);
  const uint32_t together = m.choices() * cluster;
  m.blocks = std::max(1u, (choices + together - 1) / together) * cluster;
  return m;
}

template <Exchange X>
cudaError_t run_many(const Args& a, const ManyShape& m, Attribute attribute, cudaStream_t stream) {
  return run(sort_many<X>, {m.blocks, m.threads, 4 * ManyMemory(nullptr, m).size, stream}, attribute, m.cluster, a, m);
}

// Blocks in clusters that run at once, one on a multiprocessor. A cluster keeps to one group of them, so some are left.
uint32_t grid_blocks(int sms) {
  static const int clusters = [&] {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kGridCluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = kGridCluster, config.blockDim = kManyThreads;
    config.dynamicSmemBytes = kWholeMultiprocessor;
    config.attrs = &attribute, config.numAttrs = 1;
    int count = 0;
    const auto kernel = sort_many<Exchange::kGrid>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWholeMultiprocessor);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    if (error == cudaSuccess) return count;
    cudaGetLastError();  // none then: two kernels do it
    return 0;
  }();
  return kGridCluster * static_cast<uint32_t>(std::min(clusters, sms / static_cast<int>(kGridCluster)));
}

template <class V>
cudaError_t run_gather(const MoeDispatch& p, int sms, Attribute attribute, cudaStream_t stream) {
  const int64_t vectors = p.H * static_cast<int64_t>(size_of(p.rows.dtype)) / static_cast<int64_t>(sizeof(V));
  const int64_t items = (p.T + (p.P + 31) / 32) * ((vectors + 127) / 128);
  const int64_t blocks = std::clamp<int64_t>((items + 7) / 8, 1, int64_t{sms} * 64);
  return run(gather<V>, {static_cast<uint32_t>(blocks), 256, 0, stream}, attribute, 1,
             static_cast<const V*>(p.hidden.data), static_cast<V*>(p.rows.data), p.inverse.as<const int32_t>(),
             p.order.as<const int32_t>(), p.T, static_cast<int>(p.C), vectors, p.P);
}

Args pack(const MoeDispatch& p, void* scratch) {
  Args a{};
  a.ids = p.ids.as<const int32_t>();
  a.order = p.order.as<int32_t>();
  a.inverse = p.inverse.as<int32_t>();
  a.counts = p.counts.as<int32_t>();
  a.offsets = p.offsets.as<int32_t>();
  a.block_experts = p.block_experts.as<int32_t>();
  a.rows = static_cast<uint32_t*>(scratch);
  a.choices = static_cast<uint32_t>(p.T * p.C);
  a.places = static_cast<uint32_t>(p.P);
  a.blocks = p.block_experts ? static_cast<uint32_t>(p.blocks) : 0;
  a.experts = static_cast<uint32_t>(p.experts);
  a.first_expert = static_cast<uint32_t>(p.first_expert);
  a.block_size = static_cast<uint32_t>(std::max(1, p.block_size));
  while (1u << a.block_shift < a.block_size) a.block_shift++;
  a.block_magic = static_cast<uint32_t>(((uint64_t{1} << (31 + a.block_shift)) + a.block_size - 1) / a.block_size);
  return a;
}

enum class Kind { kTiny, kFew, kCluster, kGrid, kTwoKernels, kManyExperts };

struct Choice {
  Kind kind;
  ManyShape shape;
};

Choice choose(const MoeDispatch& p, int sms, Chain chain) {
  const uint32_t choices = static_cast<uint32_t>(p.T * p.C), experts = static_cast<uint32_t>(p.experts);
  if (experts > kManyExperts) return {Kind::kManyExperts, {}};
  if (choices <= kTinyChoices) return {Kind::kTiny, {}};
  if (choices <= kFewChoices && 4 * FewShape(choices, experts).words() <= kSharedBytes) return {Kind::kFew, {}};
  if (chain == Chain::kCluster || (chain == Chain::kDefault && choices <= kClusterChoices)) {
    const ManyShape m = shape_of(p, kClusterBlocks, kClusterBlocks);
    if (m.blocks == kClusterBlocks && 4 * ManyMemory(nullptr, m).size <= kSharedBytes) return {Kind::kCluster, m};
  }
  if (chain != Chain::kPlain && chain != Chain::kOverlapped) {
    const uint32_t blocks = grid_blocks(sms);
    const ManyShape m = shape_of(p, blocks, kGridCluster);
    if (m.blocks <= blocks && 4 * ManyMemory(nullptr, m).size <= kSharedBytes) return {Kind::kGrid, m};
  }
  return {Kind::kTwoKernels, shape_of(p, static_cast<uint32_t>(sms), 1)};
}

}  // namespace

size_t scratch_bytes(const MoeDispatch& p, int sms, Chain chain) {
  const auto [kind, m] = choose(p, sms, chain);
  if (kind == Kind::kTiny || kind == Kind::kFew || kind == Kind::kCluster) return 0;
  if (kind == Kind::kManyExperts) return size_t{4} * p.experts;
  return size_t{8} * (m.blocks / m.cluster) * m.pairs;
}

cudaError_t launch(const MoeDispatch& p, int sms, void* scratch, cudaStream_t stream, const char** path, Chain chain) {
  const Args a = pack(p, scratch);
  const auto [kind, shape] = choose(p, sms, chain);
  const bool programmatic = chain != Chain::kPlain;
  const Attribute early = programmatic ? Attribute::kProgrammatic : Attribute::kNone;
  cudaError_t error = cudaSuccess;
  switch (kind) {
    case Kind::kTiny: {
      *path = programmatic ? "one warp, programmatic" : "one warp";
      const uint32_t blocks = std::max((a.places + kTinyPlaces - 1) / kTinyPlaces, a.experts / 32 + 1);
      error = run(sort_tiny, {blocks, 32, 0, stream}, early, 1, a);
      break;
    }
    case Kind::kFew: {
      *path = programmatic ? "every block sorts all, programmatic" : "every block sorts all";
      const FewShape few(a.choices, a.experts);
      // Blocks that run at once: with very large blocks of places more of them would sort in vain.
      const uint32_t blocks = std::clamp((a.places + kFewPlaces - 1) / kFewPlaces, 1u, 2 * static_cast<uint32_t>(sms));
      const uint32_t places = (a.places + blocks - 1) / blocks;
      error = run(sort_few, {blocks, few.threads, 4 * few.words(), stream}, early, 1, a, places);
      break;
    }
    case Kind::kCluster:
      *path = programmatic ? "one cluster, programmatic" : "one cluster";
      error = run_many<Exchange::kCluster>(a, shape, early, stream);
      break;
    case Kind::kGrid:
      *path = "one cooperative kernel";
      error = run_many<Exchange::kGrid>(a, shape, Attribute::kCooperative, stream);
      break;
    case Kind::kTwoKernels:
      *path = programmatic ? "count and place, programmatic" : "count and place";
      error = run_many<Exchange::kCount>(a, shape, early, stream);
      if (error == cudaSuccess) error = run_many<Exchange::kPlace>(a, shape, early, stream);
      break;
    case Kind::kManyExperts:
      *path = programmatic ? "one block, programmatic" : "one block";
      error = run(sort_many_experts, {1, 1024, 0, stream}, early, 1, a, static_cast<uint32_t*>(scratch));
      break;
  }
  if (error != cudaSuccess || !p.rows || p.P == 0 || p.H == 0) return error;
  const int64_t bytes = p.H * static_cast<int64_t>(size_of(p.rows.dtype));
  const auto whole = [&](int64_t size) {
    const auto multiple = [&](const void* at) { return reinterpret_cast<uintptr_t>(at) % size == 0; };
    return bytes % size == 0 && multiple(p.rows.data) && multiple(p.hidden.data);
  };
  if (whole(16)) return run_gather<int4>(p, sms, early, stream);
  if (whole(4)) return run_gather<int32_t>(p, sms, early, stream);
  return run_gather<int16_t>(p, sms, early, stream);
}

}  // namespace moe::dispatch
