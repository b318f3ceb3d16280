// The CPU backend: tensors in ordinary memory, kernels on a queue thread of their own that shares loops with a thread
// pool. Kernels run one at a time, so that scratch memory and pool belong to whichever runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>

#include "../backend.h"
#include "../common/thread_pool.h"
#include "allocator.h"
#include "isa.h"
#include "queue.h"

namespace moe {

class CpuBackend : public Backend {
 public:
  // Bytes of float rows that a kernel holds before it goes on in pieces.
  static constexpr int64_t kScratchBudget = int64_t{256} << 20;

  explicit CpuBackend(int threads, int64_t scratch_budget = kScratchBudget,
                      const Kernels& kernels = *usable_kernels().front());
  ~CpuBackend() override;

  Status allocate(size_t bytes, void** out) override { return allocator_.allocate(bytes, out); }
  void release(void* data, size_t bytes) override { allocator_.release(data, bytes); }

  void submit(std::function<void()> work) override { queue_.submit(std::move(work)); }
  void notify(std::function<void(Status)> done) override { queue_.notify(std::move(done)); }
  Status wait() override { return queue_.wait(); }
  void stop() override;

  bool is_host_memory() const override { return true; }
  // Nothing where it cannot be there: a system that overcommits would grant it and kill the process later.
  std::shared_ptr<uint8_t[]> staging(size_t bytes) override {
    return allocator_.affords(bytes) ? host_memory(bytes) : nullptr;
  }
  Status copy_in(void* device, const void* host, size_t bytes) override { return copy(device, host, bytes); }
  Status copy_out(void* host, const void* device, size_t bytes) override { return copy(host, device, bytes); }
  Status fill_zero(void* device, size_t bytes) override;

  Status roofline(Roofline* out) override;
  size_t expert_bytes(const ExpertsLayout& layout) const override;
  MemoryInfo memory() const override { return allocator_.info(); }
  std::string device_name() const override;

  // For kernels, on the queue's thread.
  ThreadPool& pool() { return pool_; }
  const Kernels& kernels() const { return kernels_; }
  int64_t scratch_budget() const { return scratch_budget_; }
  // Memory of undefined content, aligned to 64 bytes, until the Workspace around it ends.
  Status scratch(size_t bytes, void** out);
  void release_scratch();
  // What a kernel returns in the end: Ok, unless it was told to stop and its outputs are incomplete.
  Status finished() const;

 private:
  struct Block {
    Block* next;
    size_t bytes;  // of the whole block, this header included
  };

  Status copy(void* to, const void* from, size_t bytes);

  const int64_t scratch_budget_;
  const Kernels& kernels_;
  Allocator allocator_;
  ThreadPool pool_;
  Block* block_ = nullptr;       // the newest
  size_t block_used_ = 0;        // bytes taken from it
  size_t next_block_bytes_ = 0;  // so that what took several blocks finds one next time
  Queue queue_;                  // last, so that its thread ends before what it uses
};

// The scratch memory of one kernel call, given back at the end of its scope.
class Workspace {
 public:
  explicit Workspace(CpuBackend& backend) : backend_(backend) {}
  ~Workspace() { backend_.release_scratch(); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  Status take(int64_t count, T** out) {
    constexpr auto kMost = static_cast<size_t>(std::numeric_limits<int64_t>::max());
    const bool fits = static_cast<size_t>(count) <= kMost / sizeof(T);
    void* data = nullptr;
    MOE_RETURN_IF_ERROR(backend_.scratch(fits ? static_cast<size_t>(count) * sizeof(T) : kMost, &data));
    *out = static_cast<T*>(data);
    return Status::Ok();
  }

 private:
  CpuBackend& backend_;
};

// Kernels of this folder are only ever called with its own backend.
inline CpuBackend& cpu(Backend& backend) { return static_cast<CpuBackend&>(backend); }

}  // namespace moe
