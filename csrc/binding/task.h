// A piece of queued work with the buffers it uses. Holding them is the lease that defers disposal, and knowing which
// it writes lets a failure follow the data: what depends on failed work fails too, and nothing else does.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "buffers.h"

namespace moe {

struct Task {
  const char* op = "";
  std::vector<std::shared_ptr<Buffer>> reads;
  std::vector<std::shared_ptr<Buffer>> writes;
  std::vector<const Buffer*> counters;  // of those, what the op only adds to
  std::function<Status(Backend&)> run;
};

// The failures that no wait has reported yet.
class FaultLog {
 public:
  void add(std::shared_ptr<const Fault> fault) {
    std::lock_guard lock(mutex_);
    if (faults_.size() < kMost) faults_.push_back(std::move(fault));
  }
  // The first of them; the others are forgotten with it, for one wait can report only one.
  std::shared_ptr<const Fault> take() {
    std::lock_guard lock(mutex_);
    if (faults_.empty()) return nullptr;
    return std::exchange(faults_, {}).front();
  }
  // A read has told of this one.
  void reported(const std::shared_ptr<const Fault>& fault) {
    std::lock_guard lock(mutex_);
    std::erase(faults_, fault);
  }

 private:
  static constexpr size_t kMost = 64;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Fault>> faults_;
};

// A recorded sequence: the tasks, or, where the backend has graphs, the graph and the buffers it refers to. The graph
// goes first, so that what it uses is given back after it.
struct Recording {
  uint64_t number = 0;  // from 1, no two of a context the same
  std::vector<std::shared_ptr<const Task>> tasks;
  std::vector<std::shared_ptr<Buffer>> leases;
  std::vector<std::weak_ptr<Buffer>> made;  // tensors that hold nothing before the first replay
  std::shared_ptr<Graph> graph;
};

// Before work that does anything with a buffer but add to it. What is added to is i64.
inline Status settle(Backend& backend, const Buffer& buffer) {
  if (buffer.dtype != DType::kI64) return Status::Ok();
  return backend.settle({buffer.data, buffer.dtype, buffer.elements});
}

inline Status run(Backend& backend, const Task& task) {
  for (const auto* buffers : {&task.reads, &task.writes}) {
    for (const auto& buffer : *buffers) {
      const auto& only_added_to = task.counters;
      if (std::find(only_added_to.begin(), only_added_to.end(), buffer.get()) != only_added_to.end()) continue;
      MOE_RETURN_IF_ERROR(settle(backend, *buffer));
    }
  }
  return task.run(backend);
}

inline void execute(Backend& backend, const Task& task, FaultLog& log) {
  std::shared_ptr<const Fault> fault;
  for (const auto& buffer : task.reads) {
    if (buffer->fault != nullptr) fault = buffer->fault;
  }
  if (fault == nullptr) {
    Status status = run(backend, task);
    if (!status.ok()) {
      fault = std::make_shared<const Fault>(Fault{std::move(status), task.op});
      log.add(fault);
    }
  }
  for (const auto& buffer : task.writes) buffer->fault = fault;
}

}  // namespace moe
