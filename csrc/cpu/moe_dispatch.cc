// moe_dispatch: sorts the flat choices (token * C + column) by local expert and gathers their rows.
//
// Algorithm: a stable counting sort. Choices are cut into pieces (one, or up to 16 where there are many choices and
// few experts); every piece is counted, the counts are turned into first places expert by expert and piece by piece,
// and every piece places its choices: by counters that go on, or, where the instruction set has a way and all ids of a
// piece are local, by the ranks that counting told. Threads share pieces and, for the gather, places. The result is the
// same either way and for any number of pieces: buckets by expert, choices ascending inside, T * C in empty places. Ids
// that are not local, negative ones included, get inverse -1. Limits: 2^31 - 1 places. No arithmetic on values.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "expert_mlp.h"

namespace moe {

namespace {

constexpr int64_t kMostPieces = 16;
constexpr int64_t kWorthRanks = 1024;  // choices

// The experts from `first` on; what is negative wraps around and is none of them.
struct Local {
  uint32_t first, count;
  uint32_t operator()(int32_t id) const { return static_cast<uint32_t>(id) - first; }
};

// Whether all are local.
bool count_choices(const int32_t* ids, int64_t n, Local local, int32_t* counts) {
  std::fill_n(counts, local.count, 0);
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; i++) {
    const uint32_t expert = local(ids[i]);
    if (expert < local.count) counts[expert]++;
  }
  return std::accumulate(counts, counts + local.count, int64_t{0}) == n;
}

// Puts choices first .. first+n-1 into their next places.
template <bool kAllLocal>
void place_choices(const int32_t* ids, int64_t first, int64_t n, Local local, int32_t* next, int32_t* order,
                   int32_t* inverse) {
#pragma GCC unroll 8
  for (int64_t choice = first; choice < first + n; choice++) {
    const uint32_t expert = local(ids[choice]);
    if (!kAllLocal && expert >= local.count) {
      inverse[choice] = -1;
      continue;
    }
    const int64_t place = next[expert];
    next[expert] = static_cast<int32_t>(place + 1);
    inverse[choice] = static_cast<int32_t>(place);
    order[place] = static_cast<int32_t>(choice);
  }
}

// The same by ranks: places of a block, and what goes to those of the block before it. Stores that far apart take a
// cycle each; this way they never wait for where they go.
void place_ranked(const Kernels& kernels, const int32_t* ids, int64_t first, int64_t n, Local local,
                  const int32_t* next, const uint16_t* ranks, int32_t* order, int32_t* inverse) {
  constexpr int64_t kBlock = 64;
  FirstPlaces places{};
  for (uint32_t e = 0; e < local.count; e++) {
    places.low[e] = static_cast<uint16_t>(next[e]);
    places.high[e] = static_cast<uint16_t>(static_cast<uint32_t>(next[e]) >> 16);
  }
  const int64_t last = first + n;
  for (int64_t done = first, block = first; done < last; block = std::min(block + kBlock, last)) {
    const int64_t found = std::min(kBlock, last - block);
    kernels.find_places(ids + block, found, local.first, places, ranks + block, inverse + block);
#pragma GCC unroll 8
    for (; done < block; done++) order[inverse[done]] = static_cast<int32_t>(done);
  }
}

}  // namespace

Status moe_dispatch(Backend& backend, const MoeDispatch& p) {
  const int64_t choices = p.T * p.C, experts = p.experts;
  const int32_t* ids = p.ids.as<const int32_t>();
  int32_t* order = p.order.as<int32_t>();
  int32_t* inverse = p.inverse.as<int32_t>();
  int32_t* counts = p.counts.as<int32_t>();
  int32_t* offsets = p.offsets.as<int32_t>();
  int32_t* block_experts = p.block_experts.as<int32_t>();
  Workspace workspace(cpu(backend));
  ThreadPool& pool = cpu(backend).pool();
  const int64_t pieces = experts <= 4096 ? std::clamp(choices / 32768, int64_t{1}, kMostPieces) : 1;
  const int64_t piece = ceil_div(std::max(choices, int64_t{1}), pieces);
  const Kernels& kernels = cpu(backend).kernels();
  const bool ranked = kernels.rank_choices != nullptr && experts <= kRankedExperts && choices >= kWorthRanks &&
                      piece <= std::numeric_limits<uint16_t>::max();
  const bool parallel = pieces > 1;
  backend.note_path("moe_dispatch", ranked ? (parallel ? "counting sort by ranks, parallel" : "counting sort by ranks")
                                           : (parallel ? "counting sort, parallel" : "counting sort"));
  const Local local = {static_cast<uint32_t>(p.first_expert), static_cast<uint32_t>(experts)};
  const auto length = [&](int64_t at) { return std::max(std::min(choices - at * piece, piece), int64_t{0}); };

  // Count every piece
  int32_t* next = nullptr;  // [pieces, experts]: counts, then the next place
  uint16_t* ranks = nullptr;
  bool all_local[kMostPieces], all_ranked[kMostPieces] = {};
  MOE_RETURN_IF_ERROR(workspace.take(pieces * experts, &next));
  if (ranked) MOE_RETURN_IF_ERROR(workspace.take(choices, &ranks));
  pool.parallel_for(pieces, 1, [&](int64_t at, int64_t) {
    if (ranked) {
      uint16_t counts[kRankedExperts] = {};
      all_ranked[at] = kernels.rank_choices(ids + at * piece, length(at), local.first, local.count, counts, counts,
                                            ranks + at * piece);
      std::copy(counts, counts + experts, next + at * experts);
      if (all_ranked[at]) return;
    }
    all_local[at] = count_choices(ids + at * piece, length(at), local, next + at * experts);
  });
  MOE_RETURN_IF_ERROR(cpu(backend).finished());

  // First places
  int64_t place = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t first = place;
    for (int64_t at = 0; at < pieces; at++) {
      const int32_t count = next[at * experts + e];
      next[at * experts + e] = static_cast<int32_t>(place);
      place += count;
    }
    counts[e] = static_cast<int32_t>(place - first);
    offsets[e] = static_cast<int32_t>(first);
    if (p.block_size == 0) continue;
    place = ceil_div(place, p.block_size) * p.block_size;
    if (place > p.P) break;
    std::fill(order + first + counts[e], order + place, static_cast<int32_t>(choices));
    if (p.block_experts) {
      std::fill(block_experts + first / p.block_size, block_experts + place / p.block_size, static_cast<int32_t>(e));
    }
  }
  if (place > p.P) {
    return Status::Error(Code::kInvalidArg,
                         "expected room for " + std::to_string(place) + " rows but capacity is " + std::to_string(p.P),
                         "capacity");
  }
  offsets[experts] = static_cast<int32_t>(place);
  if (p.block_experts) std::fill(block_experts + place / p.block_size, block_experts + p.blocks, -1);

  // Place the choices
  std::fill(order + place, order + p.P, static_cast<int32_t>(choices));
  pool.parallel_for(pieces, 1, [&](int64_t at, int64_t) {
    if (all_ranked[at]) {
      return place_ranked(kernels, ids, at * piece, length(at), local, next + at * experts, ranks, order, inverse);
    }
    const auto place = all_local[at] ? place_choices<true> : place_choices<false>;
    place(ids, at * piece, length(at), local, next + at * experts, order, inverse);
  });
  if (!p.rows) return cpu(backend).finished();

  // Gather
  const size_t row_bytes = static_cast<size_t>(p.H) * size_of(p.rows.dtype);
  const auto grain = static_cast<int64_t>(std::max<size_t>(1, 65536 / std::max<size_t>(row_bytes, 1)));
  pool.parallel_for(p.P, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      void* row = element(p.rows.data, p.rows.dtype, at * p.H);
      if (order[at] == choices) {
        std::memset(row, 0, row_bytes);
      } else {
        std::memcpy(row, element(p.hidden.data, p.hidden.dtype, order[at] / p.C * p.H), row_bytes);
      }
    }
  });
  return cpu(backend).finished();
}

MOE_REGISTER(moe_dispatch, MoeDispatch);

}  // namespace moe
