// Promises on their way through the queue, and the threads that tell when they are over.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "context.h"

namespace moe {

struct NativeContext::Wait {
  explicit Wait(Napi::Env env) : deferred(Napi::Promise::Deferred::New(env)) {}
  Napi::Promise::Deferred deferred;
  enum class Kind { kRead, kSynchronize, kClose } kind = Kind::kSynchronize;
  Status status;                       // of the wait itself
  std::shared_ptr<const Fault> fault;  // of the buffer that is read
  std::shared_ptr<uint8_t[]> host;     // what was read
  size_t bytes = 0;
  std::function<void()> arrive;  // what is left to do once the data is there; from any thread
};

// Finished waits on their way to the JS thread. `sender` is cleared, under the lock, before it becomes invalid.
struct NativeContext::Mailbox {
  std::mutex mutex;
  std::vector<std::shared_ptr<Wait>> finished;
  napi_threadsafe_function sender = nullptr;

  void post(std::shared_ptr<Wait> wait) {
    std::lock_guard lock(mutex);
    if (sender == nullptr) return;
    finished.push_back(std::move(wait));
    napi_call_threadsafe_function(sender, nullptr, napi_tsfn_nonblocking);
  }
};

}  // namespace moe
