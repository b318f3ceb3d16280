// The seam between the binding and a backend: memory, an in-order queue, and what the machine offers. A backend is
// csrc/<name>/backend.cc, which defines the functions at the end, plus one file for every op it has.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
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
  std::string isa;  // CPU backend: a name of Kernels, or empty for the best that runs here
};

// What the hardware gives to loops that do nothing else, for benches: bytes read and floating-point operations (two for
// a fused multiply-add) per second, on one thread and on all of the context's.
struct Roofline {
  double read_one = 0, read_all = 0, flops_one = 0, flops_all = 0;
};

struct MemoryInfo {
  size_t used = 0;      // held by live tensors, packed experts and work in flight
  size_t reserved = 0;  // taken from the system by the pool, `used` included
};

// A point of the queue that can be asked for cheaply, so that a short wait needs no other thread.
class Milestone {
 public:
  virtual ~Milestone() = default;
  // Whether everything before it is finished; an error says the device is lost. From the JS thread.
  virtual bool reached(Status* status) = 0;
  // As Backend::notify, for this point. Ends the use of the milestone.
  virtual void notify(std::function<void(Status)> done) = 0;
};

// A recorded sequence in the backend's own form; gives back what it holds when the replays in flight are done.
class Graph {
 public:
  virtual ~Graph() = default;
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
  // Whether submit() runs its work before it returns, so that its failure can be thrown at the call.
  virtual bool runs_at_once() const { return false; }
  // Calls `done` (from any thread) when everything submitted before is finished. An error says the device is lost.
  virtual void notify(std::function<void(Status)> done) = 0;
  // This point of the queue, on a backend that can be polled; null on others.
  virtual std::unique_ptr<Milestone> mark() { return nullptr; }
  // Takes what kernels found wrong with numbers on the device, and the op that did; Ok when nothing. After a wait.
  virtual Status take_fault(std::string* /*op*/) { return Status::Ok(); }
  // Blocks until everything submitted before is finished.
  virtual Status wait() = 0;
  // Abandons queued work, waits for what is running, and ends the backend's threads. Nothing may be submitted after.
  virtual void stop() = 0;

  // Whether memory from allocate() is ordinary host memory, so that a new tensor can be filled without staging.
  virtual bool is_host_memory() const { return false; }
  // Host memory that copies may use until the last reference goes, whatever is in flight then; null when there is none.
  virtual std::shared_ptr<uint8_t[]> staging(size_t bytes) { return host_memory(bytes); }
  static std::shared_ptr<uint8_t[]> host_memory(size_t bytes) {
    try {
      return std::shared_ptr<uint8_t[]>(new uint8_t[bytes == 0 ? 1 : bytes]);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
  // Copies between staging memory and memory from allocate(); called inside submitted work. copy_out arrives with the
  // next wait, copy_in may be forgotten.
  virtual Status copy_in(void* device, const void* host, size_t bytes) = 0;
  virtual Status copy_out(void* host, const void* device, size_t bytes) = 0;
  virtual Status fill_zero(void* device, size_t bytes) = 0;
  // Makes a tensor hold all that ops have added to it: a backend may keep additions to counters apart until something
  // else is done with them. Called inside submitted work, before that.
  virtual Status settle(const Tensor& /*counters*/) { return Status::Ok(); }

  // Recordings. A backend without graphs leaves these alone: the binding keeps the tasks and submits them again. With
  // graphs, submitted work is recorded between begin_capture and end_capture instead of run, and memory from allocate()
  // lives as long as the graph.
  virtual bool has_graphs() const { return false; }
  virtual Status begin_capture() { return Status::Error(Code::kInternal, "no graphs"); }
  virtual Status end_capture(std::shared_ptr<Graph>* /*out*/) { return Status::Error(Code::kInternal, "no graphs"); }
  virtual void abort_capture() {}
  virtual Status replay(Graph& /*graph*/) { return Status::Error(Code::kInternal, "no graphs"); }
  // Runs `work` at once, with memory of its own, even while a capture is recorded.
  virtual Status aside(const std::function<Status()>& work) { return work(); }

  // Two sequences of work beside each other: what is submitted after kBeside may run beside what is submitted after
  // kMain; everything after kJoin comes after both. A backend that runs one thing at a time ignores it.
  enum class Lane { kBeside, kMain, kJoin };
  virtual Status take_lane(Lane /*lane*/) { return Status::Ok(); }

  // Measures, inside submitted work; takes about a second.
  virtual Status roofline(Roofline* /*out*/) {
    return Status::Error(Code::kUnsupported, "this backend has no roofline");
  }

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
