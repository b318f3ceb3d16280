// A piece of queued work with the buffers it uses. Holding them is the lease that defers disposal, and knowing which
// it writes lets a failure follow the data: what depends on failed work fails too, and nothing else does.
#pragma once
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
  std::function<Status(Backend&)> run;
};

// The first failure that no wait has reported yet.
class FaultLog {
 public:
  void add(std::shared_ptr<const Fault> fault) {
    std::lock_guard lock(mutex_);
    if (first_ == nullptr) first_ = std::move(fault);
  }
  std::shared_ptr<const Fault> take() {
    std::lock_guard lock(mutex_);
    return std::exchange(first_, nullptr);
  }
  // A read has told of it.
  void reported(const std::shared_ptr<const Fault>& fault) {
    std::lock_guard lock(mutex_);
    if (first_ == fault) first_ = nullptr;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<const Fault> first_;
};

// A recorded sequence: the tasks, or, where the backend has graphs, the graph and the buffers it refers to. The graph
// goes first, so that what it uses is given back after it.
struct Recording {
  std::vector<std::shared_ptr<const Task>> tasks;
  std::vector<std::shared_ptr<Buffer>> leases;
  std::shared_ptr<Graph> graph;
};

inline void execute(Backend& backend, const Task& task, FaultLog& log) {
  std::shared_ptr<const Fault> fault;
  for (const auto& buffer : task.reads) {
    if (buffer->fault != nullptr) fault = buffer->fault;
  }
  if (fault == nullptr) {
    Status status = task.run(backend);
    if (!status.ok()) {
      fault = std::make_shared<const Fault>(Fault{std::move(status), task.op});
      log.add(fault);
    }
  }
  for (const auto& buffer : task.writes) buffer->fault = fault;
}

}  // namespace moe
