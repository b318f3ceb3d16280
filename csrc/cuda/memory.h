// The memory of one CUDA context: device blocks from a pool of its own, the arenas of captures, and pinned host memory.
//
// Everything that uses device memory is enqueued on the context's stream, so a block given back on the host may be
// handed out again at once: whatever uses it next comes later on the stream. (While work runs on two streams, blocks
// are held until they join.) Small blocks are therefore kept in lists (an allocation costs tens of nanoseconds instead
// of microseconds); larger ones go to cudaMallocAsync's pool. While a capture is recorded nothing runs on that stream,
// so the pool is used through the side stream, which the backend orders after it.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../backend.h"

namespace moe {

// The blocks that a capture's tensors and scratch came from. They belong to the graph: a tensor disposed while the
// capture is recorded gives its block to later tensors of the same capture, never to anybody else.
struct Arena {
  struct Block {
    void* data;
    size_t bytes;  // of the block
    size_t asked;  // by its current user
    bool in_use;   // a tensor or scratch refers to it
    bool lasting;  // holds data that every replay reads: not to be reused
  };
  std::vector<Block> blocks;
};

class DeviceMemory {
 public:
  static Status open(int device, cudaStream_t stream, cudaStream_t side, std::unique_ptr<DeviceMemory>* out);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  // From the arena, if one is given.
  Status allocate(size_t bytes, Arena* arena, bool lasting, void** out);
  // From any thread.
  void release(void* data, size_t bytes);
  // Tells which stream the pool may be used through.
  void set_capturing(bool capturing);
  // Between the two, released blocks are kept and not handed out again, because another stream may still use them; new
  // ones are for work on `stream`. Called again to change that stream.
  void hold(cudaStream_t stream);
  void let_go();
  // Gives the arena's blocks back; those that tensors still refer to become ordinary memory.
  void dissolve(Arena& arena);
  MemoryInfo info() const;

  // Bytes that a request takes.
  static size_t block_size(size_t bytes);

 private:
  static constexpr size_t kLargestKept = size_t{8} << 20;
  static constexpr size_t kMostKept = size_t{256} << 20;
  static constexpr int kClasses = 4 * (23 - 8) + 1;

  DeviceMemory() = default;
  static int class_of(size_t block);
  cudaStream_t usable_stream() const { return capturing_ ? side_ : holding_ ? lane_ : stream_; }
  Status take(size_t block, void** out);
  void give(void* data, size_t block);
  void release_now(void* data, size_t bytes);
  void release_kept();
  Status out_of_memory(size_t requested) const;

  int device_ = 0;
  cudaStream_t stream_ = nullptr, side_ = nullptr;
  cudaMemPool_t pool_ = nullptr;

  mutable std::mutex mutex_;
  bool capturing_ = false;
  bool holding_ = false;
  cudaStream_t lane_ = nullptr;                 // while holding
  std::vector<std::pair<void*, size_t>> held_;  // released since hold(), with the bytes asked for
  std::vector<void*> kept_[kClasses];
  size_t kept_bytes_ = 0;
  size_t used_ = 0;
  std::unordered_map<void*, Arena*> arena_of_;  // blocks of arenas that are in use
};

// Pinned host memory for copies, kept for the next one. A block may be given back while a copy still reads it: it is
// handed out again only after the event recorded behind that copy.
class Staging : public std::enable_shared_from_this<Staging> {
 public:
  explicit Staging(int device) : device_(device) {}
  ~Staging();

  // Null when there is none.
  std::shared_ptr<uint8_t[]> take(size_t bytes);
  // A copy from `host`, which take() gave, has been enqueued on the stream.
  Status read_by(const void* host, cudaStream_t stream);

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    cudaEvent_t event = nullptr;
    bool read = false;  // the event has been recorded since the block was taken
  };
  static constexpr size_t kLargestKept = size_t{32} << 20;
  static constexpr size_t kMostKept = size_t{256} << 20;

  void give(void* data);
  void destroy(Block& block);

  const int device_;
  std::mutex mutex_;
  std::unordered_map<void*, Block> taken_;
  std::vector<Block> kept_;  // the one given back first first
  size_t kept_bytes_ = 0;
};

}  // namespace moe
