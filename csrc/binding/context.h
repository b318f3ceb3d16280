// The native side of a context: handles, the queue's front end, recordings and waits. Everything here runs on the JS
// thread; what runs elsewhere is what it submits to the backend.
#pragma once
#include <napi.h>

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "buffers.h"
#include "task.h"

namespace moe {

// Per-environment state: one for the main thread and one for each worker.
struct AddonData {
  Napi::FunctionReference error_class;
  Napi::FunctionReference array_buffer;  // the constructor
};

// A MoeError for a status.
Napi::Error make_error(Napi::Env env, const Status& status, const std::string& op);

class NativeContext : public Napi::ObjectWrap<NativeContext> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit NativeContext(const Napi::CallbackInfo& info);
  ~NativeContext() override;

 private:
  // A promise on its way: settled on the JS thread when the queue has come to it.
  struct Wait;
  // What the backend's threads and the JS thread share; outlives the context while either holds it.
  struct Mailbox;
  // A wait that the JS thread asks about before it is left to another thread.
  struct Polled {
    std::shared_ptr<Wait> wait;
    std::unique_ptr<Milestone> milestone;
    std::chrono::steady_clock::time_point until;
  };

  Napi::Value device(const Napi::CallbackInfo&);
  Napi::Value allocate(const Napi::CallbackInfo&);
  Napi::Value allocate_experts(const Napi::CallbackInfo&);
  Napi::Value bytes(const Napi::CallbackInfo&);
  void release(const Napi::CallbackInfo&);
  void write(const Napi::CallbackInfo&);
  Napi::Value read(const Napi::CallbackInfo&);
  Napi::Value read_sync(const Napi::CallbackInfo&);
  void enqueue(const Napi::CallbackInfo&);
  Napi::Value synchronize(const Napi::CallbackInfo&);
  void synchronize_sync(const Napi::CallbackInfo&);
  void begin_capture(const Napi::CallbackInfo&);
  Napi::Value end_capture(const Napi::CallbackInfo&);
  void abort_capture(const Napi::CallbackInfo&);
  void replay(const Napi::CallbackInfo&);
  void take_lane(const Napi::CallbackInfo&);
  void release_capture(const Napi::CallbackInfo&);
  Napi::Value memory(const Napi::CallbackInfo&);
  Napi::Value paths(const Napi::CallbackInfo&);
  Napi::Value roofline(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);
  void abandon(const Napi::CallbackInfo&);
  Napi::Value poll(const Napi::CallbackInfo&);

  void assert_open(Napi::Env env, const char* op);
  void assert_joined(Napi::Env env, const char* op);
  void join_lanes();
  void assert_not_recording(Napi::Env env, const char* op);
  std::shared_ptr<Buffer> buffer_at(const Napi::CallbackInfo& info, size_t index, const char* op);
  void account(Napi::Env env, int64_t bytes);
  double add_buffer(Napi::Env env, const char* op, size_t bytes, DType dtype, int64_t elements,
                    std::optional<ExpertsLayout> experts);
  void submit(Napi::Env env, std::shared_ptr<const Task> task);
  void run_now(Napi::Env env, const Task& task);
  Napi::Promise wait_for(Napi::Env env, std::shared_ptr<Wait> wait);
  static std::function<void(Status)> finisher(std::shared_ptr<Wait> wait, std::shared_ptr<Mailbox> mailbox);
  void hand_over(Polled polled);
  std::shared_ptr<const Fault> device_fault();
  void settle(Napi::Env env, const std::shared_ptr<Wait>& wait);
  void shut_down();
  static void environment_ends(void* context);

  static void deliver(napi_env env, napi_value callback, void* context, void* data);

  std::shared_ptr<Backend> backend_;
  std::shared_ptr<FaultLog> faults_ = std::make_shared<FaultLog>();
  std::shared_ptr<Mailbox> mailbox_;
  HandleTable<Buffer> buffers_;
  HandleTable<Recording> captures_;
  std::shared_ptr<Recording> recording_;
  uint64_t recordings_ = 0;  // begun so far
  std::deque<Polled> polled_;
  std::deque<std::shared_ptr<Wait>> pending_;  // promises not settled yet, in order
  int64_t external_ = 0;                       // what the collector has been told of
  bool open_ = true;
  bool lanes_ = false;  // two lanes are open
  bool hooked_ = false;
  napi_env env_;
};

}  // namespace moe
