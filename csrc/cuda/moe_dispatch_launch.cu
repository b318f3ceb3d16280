// Which kernels of moe_dispatch sort what.
//
// A stable counting sort, without arithmetic on values. Limits: 2^31 - 1 places. Ids that are not local, negative ones
// included, get inverse -1. Counters are integers, so that no order of additions shows.
#include <algorithm>

#include "launch_early.cuh"
#include "moe_dispatch.cuh"
#include "moe_dispatch_clusters.cuh"
#include "moe_dispatch_few.cuh"
#include "moe_dispatch_gather.cuh"
#include "moe_dispatch_many.cuh"

namespace moe::dispatch {

namespace {

constexpr uint32_t kSharedBytes = 96 * 1024;
constexpr int kWholeMultiprocessor = 120 * 1024;  // of shared memory: more than half of what sm_90 has
constexpr uint32_t kFewPlaces = 512;              // per block where choices are few
constexpr uint32_t kGridCluster = 8;
constexpr uint32_t kManyThreads = 512;  // more of them get in each other's way
constexpr uint32_t kSortedRounds = 2;   // from here on blocks sort in shared memory
constexpr uint32_t kBlocksPerRound = 20;
// What the copy engine is worth: measured quicker with rows of 4 KB and 31 tokens a multiprocessor, slower with rows of
// 2 KB, with 8 tokens, and where padding is cleared.
constexpr int64_t kLeastCopied = 4096, kLeastTokens = 24;

template <class... Parameters, class... Arguments>
cudaError_t run(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shape.shared > 48 * 1024) error = allow_most_shared(kernel);
  if (shape.cluster > 8 && error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error == cudaSuccess ? launch_shape(kernel, shape, arguments...) : error;
}

// The shape that sorts on `blocks` blocks, or, where their shared memory does not hold that, on as many as it takes.
ManyShape shape_of(const Args& a, uint32_t blocks, uint32_t cluster) {
  ManyShape m{};
  m.pairs = (a.experts + 1) / 2;
  m.cluster = cluster;
  const auto fits = [&](uint32_t rows, uint32_t rounds) {
    m.rows = rows, m.rounds = rounds, m.sorted = rounds >= kSortedRounds;
    return 4 * ManyMemory(nullptr, m).size <= kSharedBytes;
  };
  uint32_t rows = kManyThreads / 32, rounds = 1;
  while (rows > 1 && !fits(rows, 1)) rows /= 2;
  // A block on its own reads the counters of all blocks: rounds of its choices take as long as so many of those.
  const auto most_blocks = [&] { return cluster > 1 ? blocks : std::min(blocks, kBlocksPerRound * rounds); };
  while (uint64_t{32} * rows * rounds * most_blocks() < a.choices && rounds < kMostRounds && fits(rows, rounds + 1)) {
    rounds++;
  }
  blocks = most_blocks();
  // As few warps as these rounds allow.
  fits(std::min(rows, std::max(1u, (a.choices + 32 * rounds * blocks - 1) / (32 * rounds * blocks))), rounds);
  m.threads = std::max(kManyThreads, (m.pairs + 31) / 32 * 32);
  const uint32_t together = m.choices() * cluster;
  m.blocks = std::max(1u, (a.choices + together - 1) / together) * cluster;
  return m;
}

// Clusters that run at once, a block on a multiprocessor. A cluster keeps to one group of those, so some are left.
template <class... Parameters>
uint32_t clusters_at_once(void (*kernel)(Parameters...), uint32_t blocks, uint32_t threads) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = kWholeMultiprocessor;
  config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  cudaError_t error = allow_most_shared(kernel);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (error == cudaSuccess) return static_cast<uint32_t>(count);
  cudaGetLastError();  // none then: two kernels do it
  return 0;
}

// The shape whose clusters sort all choices each; clusters 0 where there is none.
ClustersShape clusters_of(const Args& a) {
  static const uint32_t at_once = clusters_at_once(sort_clusters, kClusterBlocks, kMostOfPiece);
  const auto piece = [&](uint32_t clusters) {
    const uint32_t together = 32 * kClusterBlocks * clusters;
    return (a.choices + together - 1) / together * 32;
  };
  ClustersShape c{};
  c.pairs = (a.experts + 1) / 2;
  uint32_t clusters = 1;
  while (clusters < std::min(at_once, kMostClusters) && piece(clusters) > kLeastOfPiece) clusters++;
  if (clusters > at_once || piece(clusters) > kMostOfPiece) return c;
  c.clusters = clusters, c.piece = piece(clusters);
  c.threads = std::max(c.piece, (c.pairs + 31) / 32 * 32);
  if (4 * ClustersMemory(nullptr, c).size > kSharedBytes) c.clusters = 0;
  return c;
}

// Blocks in clusters of a cooperative grid.
uint32_t grid_blocks(int sms) {
  static const uint32_t clusters = clusters_at_once(sort_many<Exchange::kGrid>, kGridCluster, kManyThreads);
  return kGridCluster * std::min(clusters, static_cast<uint32_t>(sms) / kGridCluster);
}

// As many experts as are sorted together, from the first-th.
Args pack(const MoeDispatch& p, int first, void* scratch) {
  Args a{};
  a.ids = p.ids.as<const int32_t>();
  a.order = p.order.as<int32_t>();
  a.inverse = p.inverse.as<int32_t>();
  a.counts = p.counts.as<int32_t>() + first;
  a.offsets = p.offsets.as<int32_t>() + first;
  a.block_experts = p.block_experts.as<int32_t>();
  a.rows = static_cast<uint32_t*>(scratch);
  a.choices = static_cast<uint32_t>(p.T * p.C);
  a.places = static_cast<uint32_t>(p.P);
  a.blocks = p.block_experts ? static_cast<uint32_t>(p.blocks) : 0;
  a.experts = std::min(static_cast<uint32_t>(p.experts - first), kManyExperts);
  a.first_expert = static_cast<uint32_t>(p.first_expert) + static_cast<uint32_t>(first);
  a.experts_before = static_cast<uint32_t>(first);
  a.block_size = static_cast<uint32_t>(std::max(1, p.block_size));
  while (1u << a.block_shift < a.block_size) a.block_shift++;
  a.block_magic = static_cast<uint32_t>(((uint64_t{1} << (31 + a.block_shift)) + a.block_size - 1) / a.block_size);
  return a;
}

enum class Kind { kTiny, kFew, kClusters, kGrid, kTwoKernels };

struct Choice {
  Kind kind;
  ManyShape many;
  ClustersShape clusters;
};

Choice choose(const Args& a, int sms, Chain chain) {
  if (a.choices <= kTinyChoices) return {Kind::kTiny, {}, {}};
  const bool few = a.choices <= kFewChoices && 4 * FewShape(a.choices, a.experts).words() <= kSharedBytes;
  if (few) return {Kind::kFew, {}, {}};
  if (chain == Chain::kClusters || chain == Chain::kDefault) {
    const ClustersShape c = clusters_of(a);
    if (c.clusters > 0) return {Kind::kClusters, {}, c};
  }
  if (chain != Chain::kPlain && chain != Chain::kOverlapped) {
    const uint32_t blocks = grid_blocks(sms);
    const ManyShape m = shape_of(a, blocks, kGridCluster);
    if (m.blocks <= blocks && 4 * ManyMemory(nullptr, m).size <= kSharedBytes) return {Kind::kGrid, m, {}};
  }
  return {Kind::kTwoKernels, shape_of(a, static_cast<uint32_t>(sms), 1), {}};
}

cudaError_t sort(const Args& a, const Choice& choice, int sms, cudaStream_t stream, const char** path, Chain chain) {
  const auto& [kind, many, clusters] = choice;
  const bool early = chain != Chain::kPlain;
  const auto shape_of_many = [&](bool cooperative) -> LaunchShape {
    const size_t bytes = 4 * ManyMemory(nullptr, many).size;
    return {many.blocks, many.threads, bytes, stream, early && !cooperative, cooperative, many.cluster};
  };
  switch (kind) {
    case Kind::kTiny: {
      *path = early ? "one warp, programmatic" : "one warp";
      const uint32_t blocks = std::max((a.places + kTinyPlaces - 1) / kTinyPlaces, a.experts / 32 + 1);
      return run(sort_tiny, {blocks, 32, 0, stream, early}, a);
    }
    case Kind::kFew: {
      *path = early ? "every block sorts all, programmatic" : "every block sorts all";
      const FewShape few(a.choices, a.experts);
      // Blocks that run at once: with very large blocks of places more of them would sort in vain.
      const uint32_t blocks = std::clamp((a.places + kFewPlaces - 1) / kFewPlaces, 1u, 2 * static_cast<uint32_t>(sms));
      return run(sort_few, {blocks, few.threads, 4 * few.words(), stream, early}, a, (a.places + blocks - 1) / blocks);
    }
    case Kind::kClusters: {
      *path = early ? "every cluster sorts all, programmatic" : "every cluster sorts all";
      const size_t bytes = 4 * ClustersMemory(nullptr, clusters).size;
      const uint32_t blocks = clusters.clusters * kClusterBlocks;
      return run(sort_clusters, {blocks, clusters.threads, bytes, stream, early, false, kClusterBlocks}, a, clusters);
    }
    case Kind::kGrid:
      *path = "one cooperative kernel";
      return run(sort_many<Exchange::kGrid>, shape_of_many(true), a, many);
    case Kind::kTwoKernels: {
      *path = early ? "count and place, programmatic" : "count and place";
      const cudaError_t error = run(sort_many<Exchange::kCount>, shape_of_many(false), a, many);
      return error == cudaSuccess ? run(sort_many<Exchange::kPlace>, shape_of_many(false), a, many) : error;
    }
  }
  return cudaErrorInvalidValue;
}

template <class V>
cudaError_t run_gather(const Rows& r, int sms, bool early, cudaStream_t stream) {
  const int64_t items = (r.tokens + (r.places + 31) / 32) * ((r.bytes / static_cast<int64_t>(sizeof(V)) + 127) / 128);
  const int64_t blocks = std::clamp<int64_t>((items + 7) / 8, 1, int64_t{sms} * 64);
  return run(gather<V>, {static_cast<unsigned>(blocks), 256, 0, stream, early}, r);
}

// Of shared memory that a block may have.
int64_t shared_bytes() {
  static const int bytes = [] {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return error == cudaSuccess ? most : 0;
  }();
  return bytes;
}

cudaError_t sort_rows(const MoeDispatch& p, int sms, Chain chain, cudaStream_t stream) {
  Rows r{};
  r.hidden = p.hidden.as<const char>(), r.rows = p.rows.as<char>();
  r.inverse = p.inverse.as<const int32_t>(), r.order = p.order.as<const int32_t>();
  r.tokens = p.T, r.columns = p.C, r.places = p.P, r.bytes = p.H * static_cast<int64_t>(size_of(p.rows.dtype));
  const bool early = chain != Chain::kPlain;
  const auto whole = [&](int64_t size) {
    const auto multiple = [&](const void* at) { return reinterpret_cast<uintptr_t>(at) % size == 0; };
    return r.bytes % size == 0 && multiple(r.rows) && multiple(r.hidden);
  };
  const int64_t fit =
      early ? (shared_bytes() - kLine) / std::max<int64_t>(r.bytes, kLeastCopied) : 0;  // rows of a block
  const bool many = r.bytes >= kLeastCopied && r.tokens >= kLeastTokens * sms && r.places == r.tokens * r.columns;
  if (whole(kLine) && many && fit > 0) {
    const int64_t most = (r.tokens + sms - 1) / sms, times = (most + fit - 1) / fit;
    const auto held = static_cast<uint32_t>((most + times - 1) / times);
    const uint32_t bytes = kLine + std::max(held * static_cast<uint32_t>(r.bytes), kZeroBytes);
    return run(copy_rows, {static_cast<unsigned>(sms), 256, bytes, stream, early}, r, held);
  }
  if (whole(16)) return run_gather<int4>(r, sms, early, stream);
  if (whole(4)) return run_gather<int32_t>(r, sms, early, stream);
  return run_gather<int16_t>(r, sms, early, stream);
}

}  // namespace

size_t scratch_bytes(const MoeDispatch& p, int sms, Chain chain) {
  size_t bytes = 0;
  for (int first = 0; first < p.experts; first += kManyExperts) {
    const auto [kind, many, clusters] = choose(pack(p, first, nullptr), sms, chain);
    if (kind != Kind::kGrid && kind != Kind::kTwoKernels) continue;
    bytes = std::max(bytes, size_t{8} * (many.blocks / many.cluster) * many.pairs);
  }
  return bytes;
}

cudaError_t launch(const MoeDispatch& p, int sms, void* scratch, cudaStream_t stream, const char** path, Chain chain) {
  for (int first = 0; first < p.experts; first += kManyExperts) {
    const Args a = pack(p, first, scratch);
    const cudaError_t error = sort(a, choose(a, sms, chain), sms, stream, path, chain);
    if (error != cudaSuccess) return error;
  }
  if (!p.rows || p.P == 0 || p.H == 0) return cudaSuccess;
  return sort_rows(p, sms, chain, stream);
}

}  // namespace moe::dispatch
