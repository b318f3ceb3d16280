// The memory of one CPU context. Freed blocks are kept for the next tensor of about their size, because fresh pages
// cost more than most kernels that fill them; how much is kept is bounded.
//
// Size classes are the quarters between powers of two (at most 25 % over the request), so that a layer's changing
// batch sizes still meet their old blocks. Blocks above 64 MiB go straight back to the system.
#pragma once
#include <cstddef>
#include <mutex>

#include "../backend.h"

namespace moe {

class Allocator {
 public:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kLargestKept = size_t{64} << 20;
  static constexpr size_t kMostKept = size_t{256} << 20;

  Allocator() = default;
  ~Allocator() { trim(); }
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  Status allocate(size_t bytes, void** out);
  void release(void* data, size_t bytes) noexcept;

  // Memory that is not a tensor's: counted as reserved but not as used, never kept.
  Status allocate_scratch(size_t bytes, void** out);
  void release_scratch(void* data, size_t bytes) noexcept;

  // Whether the system can back as much now.
  static bool affords(size_t bytes);

  // Gives all unused blocks back to the system.
  void trim() noexcept;
  MemoryInfo info() const;

  // Bytes that a request takes.
  static size_t block_size(size_t bytes);

 private:
  // What an unused block holds.
  struct Unused {
    Unused *next, *previous;  // of its class, the one freed last first
    Unused *newer, *older;    // of all
    size_t bytes;
    int size_class;
  };
  static_assert(sizeof(Unused) <= kAlignment);
  static constexpr int kClasses = 4 + 4 * (26 - 8);

  static int class_of(size_t bytes);
  Status take_from_system(size_t bytes, size_t requested, void** out);
  Status out_of_memory(size_t requested) const;
  void unlink(Unused* block);
  void release_kept();
  size_t most_kept() const;

  mutable std::mutex mutex_;
  Unused* first_[kClasses] = {};
  Unused *newest_ = nullptr, *oldest_ = nullptr;
  size_t kept_ = 0;     // bytes of unused blocks
  size_t live_ = 0;     // bytes of blocks in use
  size_t used_ = 0;     // what was asked for in them
  size_t scratch_ = 0;  // bytes of scratch
  size_t peak_ = 0;     // of live_
};

}  // namespace moe
