// Where moe_fused_gate counts the load one choice at a time. In the tensor itself 16 counters share a line of 128
// bytes, and the L2 cache serves a line in 2.35 ns, whoever adds: with 4,096 tokens that is 5 us. So they are counted
// apart, a line for every expert, in several copies, since a popular expert is one line to all tokens. What has been
// counted is added to the tensor, and the counters are cleared, before anything else is done with it (Backend::settle).
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "../ops.h"

namespace moe {

class DeviceMemory;

// Counters on the device, [copies][slots], kStride apart, that belong to a load tensor and are to be added to it.
struct SpreadCounters {
  static constexpr uint32_t kStride = 16;  // counters of 8 bytes: a line
  unsigned long long* data = nullptr;      // null: count in the tensor itself
  uint32_t copies = 0;                     // a power of two; a block takes the copy of its number modulo copies
};

// Copies for a load tensor: up to 16, and up to 1 MiB of counters; 0 where they are too many to be spread. With 16, ten
// thousand tokens that all choose the same eight experts take 0.1 us longer than others, with 4 3.4 us.
constexpr uint32_t copies_for(int64_t slots) {
  return slots < 1 || slots > 4096 ? 0 : std::bit_floor(static_cast<uint32_t>(std::min<int64_t>(16, 8192 / slots)));
}

// The spread counters of a context's load tensors, by the tensors' memory. A tensor's are made when it is first counted
// in and go when its memory goes, so that a graph that counts there keeps them by keeping the tensor. Without any:
//
// - Tensors that were used in another way in a graph when they had no counters: its replays add nothing to them first.
//   Those that a capture makes are among them, since they are written there first.
// - Tensors of so many slots that they have lines enough.
// - Where there is no memory for them: counting is slower then, and no reason to fail.
class LoadCounters {
 public:
  // The counters of a load tensor. New ones are cleared on `stream`, and are nobody else's yet.
  Status spread(const Tensor& load, DeviceMemory& memory, cudaStream_t stream, SpreadCounters* out);
  // Enqueues what makes the tensor hold all that was counted. `recording`: into a graph.
  Status settle(const Tensor& tensor, cudaStream_t stream, bool recording);
  // The tensor's memory is about to be given back. From any thread.
  void release(const void* load, DeviceMemory& memory);

 private:
  struct Entry {
    SpreadCounters counters;  // without data: there never will be any
    int64_t slots = 0;
    size_t count() const { return static_cast<size_t>(counters.copies) * static_cast<size_t>(slots); }
    size_t bytes() const { return count() * SpreadCounters::kStride * sizeof *counters.data; }
  };

  std::mutex mutex_;
  std::unordered_map<const void*, Entry> entries_;
};

}  // namespace moe
