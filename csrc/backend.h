// The seam between the binding and a backend: memory, an in-order queue, and what the machine offers. A backend is
// csrc/<name>/backend.cc, which defines the functions at the end, plus one file for every op it has.
#pragma once
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"

namespace moe {

// What `doctor` and the loader want to know before any context exists.
struct Probe {
  std::string state;   // "ready", "no driver", "no device" or "failed"
  std::string detail;  // one sentence
  std::vector<std::string> devices;
  std::vector<std::pair<std::string, std::string>> facts;  // versions, CPU features
};

struct ContextOptions {
  int device = 0;
  int threads = 0;  // CPU backend: 0 for what the machine has
};

struct MemoryInfo {
  size_t used = 0;      // held by live tensors, packed experts and work in flight
  size_t reserved = 0;  // taken from the system by the pool, `used` included
};

// One context's memory and queue. Called from the JS thread except where said otherwise.
class Backend {
 public:
  virtual ~Backend() = default;

  // Memory aligned to at least 64 bytes, undefined content. Never null on Ok, zero bytes included.
  virtual Status allocate(size_t bytes, void** out) = 0;
  // Called when neither JS nor work in flight refers to the memory any more; from any thread.
  virtual void release(void* data, size_t bytes) = 0;

  // Runs `work` after everything submitted before: later and elsewhere on the CPU, at once on a backend whose kernels
  // go to a stream by themselves. `work` must not throw.
  virtual void submit(std::function<void()> work) = 0;
  // Calls `done` (from any thread) when everything submitted before is finished. An error says the device is lost.
  virtual void notify(std::function<void(Status)> done) = 0;
  // Blocks until everything submitted before is finished.
  virtual Status wait() = 0;
  // Abandons queued work, waits for what is running, and ends the backend's threads. Nothing may be submitted after.
  virtual void stop() = 0;

  // Whether memory from allocate() is ordinary host memory, so that a new tensor can be filled without staging.
  virtual bool is_host_memory() const { return false; }
  // Copies between host memory and memory from allocate(); called inside submitted work.
  virtual Status copy_in(void* device, const void* host, size_t bytes) = 0;
  virtual Status copy_out(void* host, const void* device, size_t bytes) = 0;
  virtual Status fill_zero(void* device, size_t bytes) = 0;

  virtual size_t expert_bytes(const ExpertsLayout& layout) const = 0;
  virtual MemoryInfo memory() const = 0;
  virtual std::string device_name() const = 0;

  // Which kernel an op took last, for context.describe().
  void note_path(const char* op, const char* path) {
    std::lock_guard lock(paths_mutex_);
    paths_[op] = path;
  }
  std::map<std::string, std::string> paths() const {
    std::lock_guard lock(paths_mutex_);
    return paths_;
  }

 private:
  mutable std::mutex paths_mutex_;
  std::map<std::string, std::string> paths_;
};

// Defined once per backend, in csrc/<name>/backend.cc.
const char* backend_name();
Probe probe_backend();
Status create_backend(const ContextOptions& options, std::unique_ptr<Backend>* out);

}  // namespace moe
