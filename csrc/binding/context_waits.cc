// Reading and waiting: what comes to JavaScript when the queue has come to it.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "context_waits.h"
#include "host_data.h"

namespace moe {

namespace {

// Waits are polled from JS for this long: a thread would take longer to wake up than most kernels run.
constexpr std::chrono::microseconds kPolling{100};

// Enqueues the copy of what a buffer holds.
Status fetch(Backend& backend, const Buffer& buffer, uint8_t* to) {
  MOE_RETURN_IF_ERROR(settle(backend, buffer));
  return backend.copy_out(to, buffer.data, buffer.bytes);
}

constexpr const char* kWaitNames[] = {"read", "synchronize", "close"};  // by kind

}  // namespace

Napi::Promise NativeContext::wait_for(Napi::Env env, std::shared_ptr<Wait> wait) {
  // Pending waits keep the process and this object alive; an idle context keeps neither.
  if (pending_.empty()) {
    Ref();
    napi_ref_threadsafe_function(env, mailbox_->sender);
  }
  pending_.push_back(wait);
  Napi::Promise promise = wait->deferred.Promise();
  std::unique_ptr<Milestone> milestone = backend_->mark();
  if (milestone == nullptr) {
    backend_->notify(finisher(std::move(wait), mailbox_));
  } else if (wait->kind == Wait::Kind::kClose) {
    // The last of all: it must not overtake those that are with the other thread.
    while (!polled_.empty()) {
      hand_over(std::move(polled_.front()));
      polled_.pop_front();
    }
    hand_over({std::move(wait), std::move(milestone), {}});
  } else {
    polled_.push_back({std::move(wait), std::move(milestone), std::chrono::steady_clock::now() + kPolling});
  }
  return promise;
}

// What a thread of the backend does when a wait is over.
std::function<void(Status)> NativeContext::finisher(std::shared_ptr<Wait> wait, std::shared_ptr<Mailbox> mailbox) {
  return [wait = std::move(wait), mailbox = std::move(mailbox)](Status status) {
    if (wait->status.ok()) wait->status = std::move(status);
    if (wait->status.ok() && wait->fault == nullptr && wait->arrive) wait->arrive();
    mailbox->post(wait);
  };
}

void NativeContext::hand_over(Polled polled) { polled.milestone->notify(finisher(std::move(polled.wait), mailbox_)); }

// Settles the waits that are over, in order, and leaves to another thread what takes too long. True while there are
// others left to ask about.
Napi::Value NativeContext::poll(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  while (!polled_.empty()) {
    Status status;
    if (polled_.front().milestone->reached(&status)) {
      const std::shared_ptr<Wait> wait = std::move(polled_.front().wait);
      polled_.pop_front();
      if (wait->status.ok()) wait->status = std::move(status);
      if (wait->status.ok() && wait->fault == nullptr && wait->arrive) wait->arrive();
      settle(env, wait);
    } else if (std::chrono::steady_clock::now() >= polled_.front().until) {
      hand_over(std::move(polled_.front()));
      polled_.pop_front();
    } else {
      break;
    }
  }
  return Napi::Boolean::New(env, !polled_.empty());
}

void NativeContext::deliver(napi_env raw_env, napi_value, void* context, void*) {
  if (raw_env == nullptr || context == nullptr) return;  // the environment is ending
  auto* self = static_cast<NativeContext*>(context);
  Napi::Env env(raw_env);
  Napi::HandleScope scope(env);
  std::vector<std::shared_ptr<Wait>> finished;
  {
    std::lock_guard lock(self->mailbox_->mutex);
    finished.swap(self->mailbox_->finished);
  }
  for (const auto& wait : finished) {
    try {
      self->settle(env, wait);
    } catch (const Napi::Error&) {
      // No JavaScript can run any more: the worker is being terminated, and nobody waits for the answer.
    }
  }
}

void NativeContext::settle(Napi::Env env, const std::shared_ptr<Wait>& settled) {
  Wait& wait = *settled;
  std::shared_ptr<const Fault> found = wait.status.ok() && wait.fault == nullptr ? device_fault() : nullptr;
  if (wait.kind == Wait::Kind::kClose) {
    shut_down();
    account(env, -external_);
  }
  pending_.erase(std::find(pending_.begin(), pending_.end(), settled));
  if (pending_.empty()) {
    if (mailbox_->sender != nullptr) napi_unref_threadsafe_function(env, mailbox_->sender);
    Unref();
  }
  try {
    std::shared_ptr<const Fault> fault = wait.fault;
    if (wait.kind == Wait::Kind::kSynchronize && wait.status.ok()) fault = faults_->take();
    if (fault == nullptr) fault = std::move(found);
    if (!wait.status.ok()) {
      wait.deferred.Reject(make_error(env, wait.status, kWaitNames[static_cast<int>(wait.kind)]).Value());
    } else if (fault != nullptr) {
      faults_->reported(fault);
      wait.deferred.Reject(make_error(env, fault->status, fault->op).Value());
    } else if (wait.kind == Wait::Kind::kRead) {
      Napi::ArrayBuffer buffer = new_array_buffer(env, wait.bytes, "read");
      if (wait.bytes != 0) std::memcpy(buffer.Data(), wait.host.get(), wait.bytes);
      wait.deferred.Resolve(buffer);
    } else {
      wait.deferred.Resolve(env.Undefined());
    }
  } catch (const Napi::Error& error) {
    wait.deferred.Reject(error.Value());  // no memory for the ArrayBuffer, or an error class that throws
  }
}

// What kernels found wrong since the last wait.
std::shared_ptr<const Fault> NativeContext::device_fault() {
  if (backend_ == nullptr) return nullptr;
  Fault fault;
  fault.status = backend_->take_fault(&fault.op);
  return fault.status.ok() ? nullptr : std::make_shared<const Fault>(std::move(fault));
}

Napi::Value NativeContext::read(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  assert_not_recording(env, "read");
  std::shared_ptr<Buffer> buffer = buffer_at(info, 0, "read");
  const bool values = info.Length() > 1 && info[1].ToBoolean().Value() && widens(buffer->dtype);
  auto wait = std::make_shared<Wait>(env);
  wait->kind = Wait::Kind::kRead;
  wait->bytes = values ? static_cast<size_t>(buffer->elements) * sizeof(float) : buffer->bytes;
  std::shared_ptr<uint8_t[]> raw = backend_->staging(buffer->bytes);
  wait->host = values ? Backend::host_memory(wait->bytes) : raw;
  if (wait->host == nullptr || raw == nullptr) throw make_error(env, no_host_memory(wait->bytes), "read");
  buffer->referenced = true;
  backend_->submit([backend = backend_.get(), wait, buffer, raw] {
    wait->fault = buffer->fault;
    if (wait->fault == nullptr) wait->status = fetch(*backend, *buffer, raw.get());
  });
  wait->arrive = [host = wait->host, buffer, raw, values] {
    if (values)
      widen(reinterpret_cast<float*>(host.get()), buffer->dtype, raw.get(), static_cast<size_t>(buffer->elements));
  };
  return wait_for(env, std::move(wait));
}

Napi::Value NativeContext::read_sync(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  assert_not_recording(env, "readSync");
  std::shared_ptr<Buffer> buffer = buffer_at(info, 0, "readSync");
  const bool values = info.Length() > 1 && info[1].ToBoolean().Value() && widens(buffer->dtype);
  std::shared_ptr<uint8_t[]> raw = backend_->staging(buffer->bytes);
  if (raw == nullptr) throw make_error(env, no_host_memory(buffer->bytes), "readSync");
  buffer->referenced = true;
  auto wait = std::make_shared<std::pair<Status, std::shared_ptr<const Fault>>>();
  backend_->submit([backend = backend_.get(), wait, buffer, raw] {
    wait->second = buffer->fault;
    if (wait->second == nullptr) wait->first = fetch(*backend, *buffer, raw.get());
  });
  Status status = backend_->wait();
  if (status.ok()) status = wait->first;
  if (!status.ok()) throw make_error(env, status, "readSync");
  if (wait->second != nullptr) {
    faults_->reported(wait->second);
    throw make_error(env, wait->second->status, wait->second->op);
  }
  if (const auto fault = device_fault(); fault != nullptr) throw make_error(env, fault->status, fault->op);
  const size_t elements = static_cast<size_t>(buffer->elements);
  Napi::ArrayBuffer result = new_array_buffer(env, values ? elements * sizeof(float) : buffer->bytes, "readSync");
  if (values) {
    widen(static_cast<float*>(result.Data()), buffer->dtype, raw.get(), elements);
  } else if (buffer->bytes != 0) {
    std::memcpy(result.Data(), raw.get(), buffer->bytes);
  }
  return result;
}

Napi::Value NativeContext::synchronize(const Napi::CallbackInfo& info) {
  assert_not_recording(info.Env(), "synchronize");
  return wait_for(info.Env(), std::make_shared<Wait>(info.Env()));
}

void NativeContext::synchronize_sync(const Napi::CallbackInfo& info) {
  assert_not_recording(info.Env(), "synchronizeSync");
  Status status = backend_->wait();
  if (!status.ok()) throw make_error(info.Env(), status, "synchronizeSync");
  if (const auto fault = faults_->take(); fault != nullptr) throw make_error(info.Env(), fault->status, fault->op);
  if (const auto fault = device_fault(); fault != nullptr) throw make_error(info.Env(), fault->status, fault->op);
}

Napi::Value NativeContext::close(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "close");
  join_lanes();
  assert_not_recording(info.Env(), "close");
  open_ = false;
  auto wait = std::make_shared<Wait>(info.Env());
  wait->kind = Wait::Kind::kClose;
  return wait_for(info.Env(), std::move(wait));
}

// After close(): what has not been done yet is given up, and whoever waits for it is told.
void NativeContext::abandon(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (backend_ == nullptr) return;
  shut_down();  // from here on nothing is posted any more
  std::vector<std::shared_ptr<Wait>> finished;
  {
    std::lock_guard lock(mailbox_->mutex);
    finished.swap(mailbox_->finished);
  }
  for (const auto& wait : finished) settle(env, wait);
  const std::deque<std::shared_ptr<Wait>> left = pending_;
  for (const auto& wait : left) {
    wait->status = Status::Error(Code::kAborted, "the context was closed before its work was done");
    settle(env, wait);
  }
  account(env, -external_);
}

}  // namespace moe
