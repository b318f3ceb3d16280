#include "context.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "../common/float_formats.h"
#include "op_table.h"

namespace moe {

namespace {

// Floats that JavaScript has no array for: their values travel as f32.
bool widens(DType dtype) { return dtype == DType::kBF16 || dtype == DType::kF16 || dtype == DType::kF8E4M3; }

// Calls `visit` with a value of the C++ type of a dtype that widens.
template <class Visit>
void with_narrow_type(DType dtype, Visit visit) {
  if (dtype == DType::kBF16) return visit(bf16{});
  if (dtype == DType::kF16) return visit(f16{});
  visit(f8e4m3{});
}

// Copies `count` elements, rounding f32 to a narrower float where `from` is f32 and the buffer is not.
void convert(void* to, DType dtype, const void* from, bool from_f32, size_t count) {
  if (count == 0) return;
  if (!from_f32 || dtype == DType::kF32) {
    std::memcpy(to, from, count * size_of(dtype));
    return;
  }
  with_narrow_type(dtype, [=]<class T>(T) {
    const auto* values = static_cast<const float*>(from);
    for (size_t i = 0; i < count; i++) static_cast<T*>(to)[i] = from_float<T>(values[i]);
  });
}

void widen(float* to, DType dtype, const void* from, size_t count) {
  with_narrow_type(dtype, [=]<class T>(T) {
    for (size_t i = 0; i < count; i++) to[i] = to_float(static_cast<const T*>(from)[i]);
  });
}

Status no_host_memory(size_t bytes) {
  return Status::Error(Code::kOutOfMemory, "out of memory: requested " + std::to_string(bytes) + " bytes of host memory");
}

// Waits are polled from JS for this long: a thread would take longer to wake up than most kernels run.
constexpr std::chrono::microseconds kPolling{100};

// Data is written in pieces, so that staging memory stays small whatever a tensor's size.
constexpr size_t kPieceBytes = size_t{16} << 20;

// The typed array that a dtype's bits come in; f32 may also fill the narrower floats.
bool holds(napi_typedarray_type type, DType dtype) {
  switch (dtype) {
    case DType::kF32: return type == napi_float32_array;
    case DType::kBF16:
    case DType::kF16: return type == napi_uint16_array || type == napi_float32_array;
    case DType::kF8E4M3: return type == napi_uint8_array || type == napi_float32_array;
    case DType::kI32: return type == napi_int32_array;
    case DType::kI64: return type == napi_bigint64_array;
    case DType::kI8: return type == napi_int8_array;
    case DType::kU8:
    case DType::kBool: return type == napi_uint8_array;
  }
  return false;
}

}  // namespace

Napi::Error make_error(Napi::Env env, const Status& status, const std::string& op) {
  const char* code = kCodeNames[static_cast<int>(status.code)];
  auto* data = env.GetInstanceData<AddonData>();
  if (data == nullptr || data->error_class.IsEmpty()) {
    Napi::Error error = Napi::Error::New(env, "[" + op + "] " + status.text);
    error.Set("code", code);
    return error;
  }
  Napi::Object details = Napi::Object::New(env);
  details.Set("op", op);
  if (!status.arg.empty()) details.Set("arg", status.arg);
  Napi::Object error = data->error_class.New(
      {Napi::String::New(env, code), Napi::String::New(env, status.text), details});
  return Napi::Error(env, error);
}

struct NativeContext::Wait {
  explicit Wait(Napi::Env env) : deferred(Napi::Promise::Deferred::New(env)) {}
  Napi::Promise::Deferred deferred;
  enum class Kind { kRead, kSynchronize, kClose } kind = Kind::kSynchronize;
  Status status;                          // of the wait itself
  std::shared_ptr<const Fault> fault;     // of the buffer that is read
  std::shared_ptr<uint8_t[]> host;        // what was read
  size_t bytes = 0;
  std::function<void()> arrive;           // what is left to do once the data is there; from any thread
};

struct NativeContext::Polled {
  std::shared_ptr<Wait> wait;
  std::unique_ptr<Milestone> milestone;
  std::chrono::steady_clock::time_point until;
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

Napi::Function NativeContext::define(Napi::Env env) {
  return DefineClass(env, "NativeContext",
                     {
                         InstanceMethod<&NativeContext::device>("device"),
                         InstanceMethod<&NativeContext::allocate>("allocate"),
                         InstanceMethod<&NativeContext::allocate_experts>("allocateExperts"),
                         InstanceMethod<&NativeContext::bytes>("bytes"),
                         InstanceMethod<&NativeContext::release>("release"),
                         InstanceMethod<&NativeContext::write>("write"),
                         InstanceMethod<&NativeContext::read>("read"),
                         InstanceMethod<&NativeContext::read_sync>("readSync"),
                         InstanceMethod<&NativeContext::enqueue>("enqueue"),
                         InstanceMethod<&NativeContext::synchronize>("synchronize"),
                         InstanceMethod<&NativeContext::synchronize_sync>("synchronizeSync"),
                         InstanceMethod<&NativeContext::begin_capture>("beginCapture"),
                         InstanceMethod<&NativeContext::end_capture>("endCapture"),
                         InstanceMethod<&NativeContext::abort_capture>("abortCapture"),
                         InstanceMethod<&NativeContext::replay>("replay"),
                         InstanceMethod<&NativeContext::take_lane>("takeLane"),
                         InstanceMethod<&NativeContext::release_capture>("releaseCapture"),
                         InstanceMethod<&NativeContext::memory>("memory"),
                         InstanceMethod<&NativeContext::paths>("paths"),
                         InstanceMethod<&NativeContext::close>("close"),
                         InstanceMethod<&NativeContext::poll>("poll"),
                     });
}

NativeContext::NativeContext(const Napi::CallbackInfo& info) : Napi::ObjectWrap<NativeContext>(info), env_(info.Env()) {
  Napi::Env env = info.Env();
  ContextOptions options;
  if (info.Length() > 0 && info[0].IsObject()) {
    const auto given = info[0].As<Napi::Object>();
    const Napi::Value device = given.Get("device"), threads = given.Get("threads");
    if (device.IsNumber()) options.device = device.As<Napi::Number>().Int32Value();
    if (threads.IsNumber()) options.threads = threads.As<Napi::Number>().Int32Value();
  }
  std::unique_ptr<Backend> backend;
  Status status = create_backend(options, &backend);
  if (!status.ok()) {
    open_ = false;
    throw make_error(env, status, "createContext");
  }
  backend_ = std::move(backend);
  mailbox_ = std::make_shared<Mailbox>();
  napi_value name = Napi::String::New(env, "moe-kernels waits");
  napi_status created = napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this,
                                                        &NativeContext::deliver, &mailbox_->sender);
  if (created != napi_ok) {
    backend_->stop();
    open_ = false;
    throw make_error(env, Status::Error(Code::kInternal, "cannot create the context's wait queue"), "createContext");
  }
  napi_unref_threadsafe_function(env, mailbox_->sender);
  // Hooks run in reverse order, so this one ends the threads before the function they call is torn down.
  hooked_ = napi_add_env_cleanup_hook(env, &NativeContext::environment_ends, this) == napi_ok;
}

NativeContext::~NativeContext() {
  if (backend_ != nullptr && mailbox_ != nullptr) shut_down();
}

void NativeContext::environment_ends(void* context) {
  auto* self = static_cast<NativeContext*>(context);
  self->hooked_ = false;
  self->shut_down();
}

// Ends the backend's threads and abandons what they had not begun. Harmless when done before.
void NativeContext::shut_down() {
  open_ = false;
  if (backend_ == nullptr) return;
  if (std::exchange(hooked_, false)) napi_remove_env_cleanup_hook(env_, &NativeContext::environment_ends, this);
  backend_->stop();
  napi_threadsafe_function sender = nullptr;
  {
    std::lock_guard lock(mailbox_->mutex);
    sender = std::exchange(mailbox_->sender, nullptr);
  }
  if (sender != nullptr) napi_release_threadsafe_function(sender, napi_tsfn_abort);
  polled_.clear();
  recording_ = nullptr;
  captures_.clear();
  buffers_.clear();
  backend_ = nullptr;  // its memory goes now, not when the collector comes by
}

void NativeContext::assert_open(Napi::Env env, const char* op) {
  if (open_) return;
  throw make_error(env, Status::Error(Code::kDisposed, "expected an open context but it is closed"), op);
}

std::shared_ptr<Buffer> NativeContext::buffer_at(const Napi::CallbackInfo& info, size_t index, const char* op) {
  assert_open(info.Env(), op);
  const std::shared_ptr<Buffer>* found =
      info.Length() > index && info[index].IsNumber() ? buffers_.find(info[index].As<Napi::Number>().DoubleValue())
                                                      : nullptr;
  if (found != nullptr) return *found;
  throw make_error(info.Env(), Status::Error(Code::kDisposed, "expected a live handle"), op);
}

Napi::Value NativeContext::device(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), backend_->device_name());
}

// Lets the collector know what its small objects stand for.
void NativeContext::account(Napi::Env env, int64_t bytes) {
  external_ += bytes;
  Napi::MemoryManagement::AdjustExternalMemory(env, bytes);
}

double NativeContext::add_buffer(Napi::Env env, const char* op, size_t bytes, DType dtype, int64_t elements,
                                 std::optional<ExpertsLayout> experts) {
  auto buffer = std::make_shared<Buffer>();
  Status status = backend_->allocate(bytes, &buffer->data);
  if (!status.ok()) throw make_error(env, status, op);
  buffer->of_capture = recording_ != nullptr && backend_->has_graphs() && !experts.has_value();
  buffer->backend = backend_;
  buffer->bytes = bytes;
  buffer->dtype = dtype;
  buffer->elements = elements;
  buffer->experts = std::move(experts);
  // Until a replay has written it there is nothing in it.
  if (recording_ != nullptr && !buffer->experts.has_value()) {
    static const auto unwritten = std::make_shared<const Fault>(
        Fault{Status::Error(Code::kCapture, "expected a replay before the first read of what a capture made"), "capture"});
    buffer->fault = unwritten;
    recording_->made.push_back(buffer);
  }
  const double handle = buffers_.add(std::move(buffer));
  if (handle == 0) throw make_error(env, Status::Error(Code::kOutOfMemory, "out of memory: too many tensors"), op);
  account(env, static_cast<int64_t>(bytes));
  return handle;
}

Napi::Value NativeContext::allocate(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  assert_open(env, "allocate");
  const double code = info.Length() > 0 && info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : -1;
  const double elements = info.Length() > 1 && info[1].IsNumber() ? info[1].As<Napi::Number>().DoubleValue() : -1;
  const bool valid_code = code >= 0 && code < kDTypeCount && code == std::floor(code);
  if (!valid_code || !(elements >= 0 && elements < 0x1p50) || elements != std::floor(elements)) {
    throw make_error(env, Status::Error(Code::kInvalidArg, "expected a dtype code and a number of elements"), "allocate");
  }
  const auto dtype = static_cast<DType>(static_cast<int>(code));
  const auto count = static_cast<int64_t>(elements);
  return Napi::Number::New(env, add_buffer(env, "allocate", static_cast<size_t>(count) * size_of(dtype), dtype, count, {}));
}

Napi::Value NativeContext::allocate_experts(const Napi::CallbackInfo& info) {
  const char* op = "allocate_experts";
  Napi::Env env = info.Env();
  assert_open(env, op);
  ExpertsLayout layout;
  bool valid = info.Length() > 0 && info[0].IsTypedArray() &&
               info[0].As<Napi::TypedArray>().TypedArrayType() == napi_float64_array &&
               info[0].As<Napi::TypedArray>().ElementLength() == 8;
  if (valid) {
    const double* field = info[0].As<Napi::Float64Array>().Data();
    for (int i = 0; i < 5; i++) valid = valid && field[i] >= 0 && field[i] <= 0x1p31 && field[i] == std::floor(field[i]);
    valid = valid && field[0] >= 1 && field[0] <= 65536 && field[1] >= 1 && field[2] >= 1 && field[3] <= 2;
    for (int i = 5; i < 8; i++) valid = valid && std::isfinite(field[i]);
    if (valid) {
      layout = {static_cast<int64_t>(field[0]), static_cast<int64_t>(field[1]),
                static_cast<int64_t>(field[2]), static_cast<DType>(static_cast<int>(field[3])),
                field[4] != 0,                  {static_cast<float>(field[5]), static_cast<float>(field[6]),
                                                 static_cast<float>(field[7])}};
      // Three matrices of 4-byte elements must stay far from the end of the address space.
      const double elements = 3.0 * field[0] * field[1] * field[2];
      if (elements > 0x1p50) {
        throw make_error(env, Status::Error(Code::kOutOfMemory, "out of memory: requested " +
                                                                   std::to_string(static_cast<uint64_t>(elements)) +
                                                                   " weights"), op);
      }
    }
  }
  if (!valid) throw make_error(env, Status::Error(Code::kInvalidArg, "expected a layout of 8 numbers"), op);
  // Aside, even while a capture is recorded: weights are made once, not at every replay.
  double handle = 0;
  Status status = backend_->aside([&] {
    handle = add_buffer(env, op, backend_->expert_bytes(layout), layout.dtype, 0, layout);
    std::shared_ptr<Buffer> buffer = *buffers_.find(handle);
    auto task = std::make_shared<Task>();
    task->op = op;
    task->writes = {buffer};
    task->run = [data = buffer->data, bytes = buffer->bytes](Backend& backend) { return backend.fill_zero(data, bytes); };
    backend_->submit([backend = backend_.get(), task, faults = faults_] { execute(*backend, *task, *faults); });
    buffer->referenced = true;
    return Status::Ok();
  });
  if (!status.ok()) throw make_error(env, status, op);
  return Napi::Number::New(env, handle);
}

Napi::Value NativeContext::bytes(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), static_cast<double>(buffer_at(info, 0, "bytes")->bytes));
}

void NativeContext::release(const Napi::CallbackInfo& info) {
  if (!open_ || info.Length() == 0 || !info[0].IsNumber()) return;
  const auto buffer = buffers_.remove(info[0].As<Napi::Number>().DoubleValue());
  if (buffer == nullptr) return;
  account(info.Env(), -static_cast<int64_t>(buffer->bytes));
}

void NativeContext::submit(Napi::Env env, std::shared_ptr<const Task> task) {
  for (const auto& buffer : task->reads) buffer->referenced = true;
  for (const auto& buffer : task->writes) buffer->referenced = true;
  if (backend_->runs_at_once()) return run_now(env, *task);
  if (recording_ != nullptr) {
    recording_->tasks.push_back(std::move(task));
    return;
  }
  backend_->submit([backend = backend_.get(), task = std::move(task), faults = faults_] {
    execute(*backend, *task, *faults);
  });
}

// What cannot be enqueued throws at the call. Into a graph goes what the capture did not make itself, as a lease.
void NativeContext::run_now(Napi::Env env, const Task& task) {
  Status status;
  backend_->submit([&] { status = task.run(*backend_); });
  if (!status.ok()) throw make_error(env, status, task.op);
  if (recording_ == nullptr) return;
  for (const auto* buffers : {&task.reads, &task.writes}) {
    for (const auto& buffer : *buffers) {
      auto& leases = recording_->leases;
      const bool held = buffer->of_capture || std::find(leases.begin(), leases.end(), buffer) != leases.end();
      if (!held) leases.push_back(buffer);
    }
  }
}

void NativeContext::write(const Napi::CallbackInfo& info) {
  const char* op = "write";
  Napi::Env env = info.Env();
  std::shared_ptr<Buffer> buffer = buffer_at(info, 0, op);
  auto task = std::make_shared<Task>();
  task->op = op;
  task->writes = {buffer};
  if (info.Length() < 2 || info[1].IsUndefined()) {
    task->run = [data = buffer->data, bytes = buffer->bytes](Backend& backend) {
      return backend.fill_zero(data, bytes);
    };
    return submit(env, std::move(task));
  }
  napi_typedarray_type type = napi_uint8_array;
  size_t length = 0;
  void* source = nullptr;
  const bool typed = info[1].IsTypedArray() && napi_get_typedarray_info(env, info[1], &type, &length, &source, nullptr,
                                                                        nullptr) == napi_ok;
  if (!typed || buffer->experts.has_value() || !holds(type, buffer->dtype) ||
      length != static_cast<size_t>(buffer->elements)) {
    throw make_error(env, Status::Error(Code::kInvalidArg, std::string("expected data: ") +
                                                               std::to_string(buffer->elements) + " elements of " +
                                                               name_of(buffer->dtype), "data"), op);
  }
  const bool from_f32 = type == napi_float32_array;
  if (backend_->is_host_memory() && !buffer->referenced && recording_ == nullptr) {
    convert(buffer->data, buffer->dtype, source, from_f32, length);  // nobody else knows this memory yet
    return;
  }
  // Pieces of whole elements; empty data is one empty piece
  const size_t width = size_of(buffer->dtype), source_width = from_f32 ? sizeof(float) : width;
  size_t done = 0;
  do {
    const size_t count = std::min(kPieceBytes / width, length - done);
    std::shared_ptr<uint8_t[]> staged = backend_->staging(count * width);
    if (staged == nullptr) throw make_error(env, no_host_memory(count * width), op);
    convert(staged.get(), buffer->dtype, static_cast<const uint8_t*>(source) + done * source_width, from_f32, count);
    auto piece = std::make_shared<Task>();
    piece->op = op;
    piece->writes = {buffer};
    piece->run = [to = static_cast<uint8_t*>(buffer->data) + done * width, staged, bytes = count * width](Backend& backend) {
      return backend.copy_in(to, staged.get(), bytes);
    };
    submit(env, std::move(piece));
    done += count;
  } while (done < length);
}

void NativeContext::enqueue(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  assert_open(env, "enqueue");
  const bool valid = info.Length() == 2 && info[0].IsTypedArray() && info[1].IsNumber() &&
                     info[0].As<Napi::TypedArray>().TypedArrayType() == napi_float64_array;
  const double length = valid ? info[1].As<Napi::Number>().DoubleValue() : 0;
  if (!valid || !(length >= 1 && length <= static_cast<double>(info[0].As<Napi::TypedArray>().ElementLength()))) {
    throw make_error(env, Status::Error(Code::kInvalidArg, "expected a record and its length"), "enqueue");
  }
  const double* record = info[0].As<Napi::Float64Array>().Data();
  const double index = record[0];
  const auto& table = op_table();
  if (!(index >= 0 && index < static_cast<double>(table.size())) || index != std::floor(index)) {
    throw make_error(env, Status::Error(Code::kInvalidArg, "expected a record that begins with an op's number"), "enqueue");
  }
  const OpEntry& entry = table[static_cast<size_t>(index)];
  if (!entry.available()) {
    throw make_error(env, Status::Error(Code::kUnsupported, std::string("the ") + backend_name() +
                                                                " backend does not have this op"), entry.name);
  }
  auto task = std::make_shared<Task>();
  task->op = entry.name;
  Status status = entry.unpack(buffers_, record + 1, static_cast<size_t>(length) - 1, *task);
  if (!status.ok()) throw make_error(env, status, entry.name);
  submit(env, std::move(task));
}

// Waits ----------------------------------------------------------------------------------------------------------

Napi::Promise NativeContext::wait_for(Napi::Env env, std::shared_ptr<Wait> wait) {
  // Pending waits keep the process and this object alive; an idle context keeps neither.
  if (pending_++ == 0) {
    Ref();
    napi_ref_threadsafe_function(env, mailbox_->sender);
  }
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

void NativeContext::hand_over(Polled polled) {
  polled.milestone->notify(finisher(std::move(polled.wait), mailbox_));
}

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
      settle(env, *wait);
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
      self->settle(env, *wait);
    } catch (const Napi::Error&) {
      // No JavaScript can run any more: the worker is being terminated, and nobody waits for the answer.
    }
  }
}

void NativeContext::settle(Napi::Env env, Wait& wait) {
  std::shared_ptr<const Fault> found = wait.status.ok() && wait.fault == nullptr ? device_fault() : nullptr;
  if (wait.kind == Wait::Kind::kClose) {
    shut_down();
    account(env, -external_);
  }
  if (--pending_ == 0) {
    if (mailbox_->sender != nullptr) napi_unref_threadsafe_function(env, mailbox_->sender);
    Unref();
  }
  try {
    std::shared_ptr<const Fault> fault = wait.fault;
    if (wait.kind == Wait::Kind::kSynchronize && wait.status.ok()) fault = faults_->take();
    if (fault == nullptr) fault = std::move(found);
    if (!wait.status.ok()) {
      wait.deferred.Reject(make_error(env, wait.status, wait.kind == Wait::Kind::kRead ? "read" : "synchronize").Value());
    } else if (fault != nullptr) {
      faults_->reported(fault);
      wait.deferred.Reject(make_error(env, fault->status, fault->op).Value());
    } else if (wait.kind == Wait::Kind::kRead) {
      Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(env, wait.bytes);
      if (wait.bytes != 0) std::memcpy(buffer.Data(), wait.host.get(), wait.bytes);
      wait.deferred.Resolve(buffer);
    } else {
      wait.deferred.Resolve(env.Undefined());
    }
  } catch (const Napi::Error& error) {
    wait.deferred.Reject(error.Value());  // no memory for the ArrayBuffer
  }
}

// What kernels found wrong since the last wait.
std::shared_ptr<const Fault> NativeContext::device_fault() {
  Fault fault;
  fault.status = backend_->take_fault(&fault.op);
  return fault.status.ok() ? nullptr : std::make_shared<const Fault>(std::move(fault));
}

Napi::Value NativeContext::read(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::shared_ptr<Buffer> buffer = buffer_at(info, 0, "read");
  assert_joined(env, "read");
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
    if (wait->fault == nullptr) wait->status = backend->copy_out(raw.get(), buffer->data, buffer->bytes);
  });
  wait->arrive = [host = wait->host, buffer, raw, values] {
    if (values) widen(reinterpret_cast<float*>(host.get()), buffer->dtype, raw.get(), static_cast<size_t>(buffer->elements));
  };
  return wait_for(env, std::move(wait));
}

Napi::Value NativeContext::read_sync(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::shared_ptr<Buffer> buffer = buffer_at(info, 0, "readSync");
  assert_joined(env, "readSync");
  const bool values = info.Length() > 1 && info[1].ToBoolean().Value() && widens(buffer->dtype);
  std::shared_ptr<uint8_t[]> raw = backend_->staging(buffer->bytes);
  if (raw == nullptr) throw make_error(env, no_host_memory(buffer->bytes), "readSync");
  buffer->referenced = true;
  auto wait = std::make_shared<std::pair<Status, std::shared_ptr<const Fault>>>();
  backend_->submit([backend = backend_.get(), wait, buffer, raw] {
    wait->second = buffer->fault;
    if (wait->second == nullptr) wait->first = backend->copy_out(raw.get(), buffer->data, buffer->bytes);
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
  Napi::ArrayBuffer result = Napi::ArrayBuffer::New(env, values ? elements * sizeof(float) : buffer->bytes);
  if (values) {
    widen(static_cast<float*>(result.Data()), buffer->dtype, raw.get(), elements);
  } else if (buffer->bytes != 0) {
    std::memcpy(result.Data(), raw.get(), buffer->bytes);
  }
  return result;
}

Napi::Value NativeContext::synchronize(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "synchronize");
  assert_joined(info.Env(), "synchronize");
  return wait_for(info.Env(), std::make_shared<Wait>(info.Env()));
}

void NativeContext::synchronize_sync(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "synchronizeSync");
  assert_joined(info.Env(), "synchronizeSync");
  Status status = backend_->wait();
  if (!status.ok()) throw make_error(info.Env(), status, "synchronizeSync");
  if (const auto fault = faults_->take(); fault != nullptr) throw make_error(info.Env(), fault->status, fault->op);
  if (const auto fault = device_fault(); fault != nullptr) throw make_error(info.Env(), fault->status, fault->op);
}

Napi::Value NativeContext::close(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "close");
  assert_joined(info.Env(), "close");
  open_ = false;
  auto wait = std::make_shared<Wait>(info.Env());
  wait->kind = Wait::Kind::kClose;
  return wait_for(info.Env(), std::move(wait));
}

// Recordings -----------------------------------------------------------------------------------------------------

void NativeContext::begin_capture(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "capture");
  assert_joined(info.Env(), "capture");
  if (backend_->has_graphs()) {
    Status status = backend_->begin_capture();
    if (!status.ok()) throw make_error(info.Env(), status, "capture");
  }
  recording_ = std::make_shared<Recording>();
}

Napi::Value NativeContext::end_capture(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "capture");
  assert_joined(info.Env(), "capture");
  if (recording_ == nullptr) {
    throw make_error(info.Env(), Status::Error(Code::kCapture, "no capture is being recorded"), "capture");
  }
  const std::shared_ptr<Recording> recording = std::exchange(recording_, nullptr);
  if (backend_->has_graphs()) {
    Status status = backend_->end_capture(&recording->graph);
    if (!status.ok()) throw make_error(info.Env(), status, "capture");
  }
  return Napi::Number::New(info.Env(), captures_.add(recording));
}

void NativeContext::abort_capture(const Napi::CallbackInfo& info) {
  assert_joined(info.Env(), "capture");
  if (recording_ != nullptr && backend_->has_graphs()) backend_->abort_capture();
  recording_ = nullptr;
}

void NativeContext::take_lane(const Napi::CallbackInfo& info) {
  const char* op = "overlap";
  assert_open(info.Env(), op);
  const double lane = info.Length() > 0 && info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : -1;
  // 0 opens the lanes, 1 and 2 want them open.
  if (!(lane == 0 || lane == 1 || lane == 2) || (lane == 0) == lanes_) {
    throw make_error(info.Env(), Status::Error(Code::kInvalidArg, "expected a lane in its order"), op);
  }
  lanes_ = lane == 1;
  Status status = backend_->take_lane(static_cast<Backend::Lane>(lane));
  if (!status.ok()) throw make_error(info.Env(), status, op);
  lanes_ = lane != 2;
}

void NativeContext::assert_joined(Napi::Env env, const char* op) {
  if (lanes_) throw make_error(env, Status::Error(Code::kCapture, "not while two lanes are open"), op);
}

void NativeContext::replay(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "replay");
  assert_joined(info.Env(), "replay");
  const std::shared_ptr<Recording>* found =
      info.Length() > 0 && info[0].IsNumber() ? captures_.find(info[0].As<Napi::Number>().DoubleValue()) : nullptr;
  if (found == nullptr) {
    throw make_error(info.Env(), Status::Error(Code::kDisposed, "expected a live capture"), "replay");
  }
  if ((*found)->graph != nullptr) {
    Status status = backend_->replay(*(*found)->graph);
    if (!status.ok()) throw make_error(info.Env(), status, "replay");
    for (const auto& made : std::exchange((*found)->made, {})) {
      if (const auto buffer = made.lock(); buffer != nullptr) buffer->fault = nullptr;
    }
    return;
  }
  backend_->submit([backend = backend_.get(), recording = *found, faults = faults_] {
    for (const auto& task : recording->tasks) execute(*backend, *task, *faults);
  });
}

void NativeContext::release_capture(const Napi::CallbackInfo& info) {
  if (open_ && info.Length() > 0 && info[0].IsNumber()) captures_.remove(info[0].As<Napi::Number>().DoubleValue());
}

// What there is to know ------------------------------------------------------------------------------------------

Napi::Value NativeContext::memory(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "memory");
  const MemoryInfo memory = backend_->memory();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("used", static_cast<double>(memory.used));
  result.Set("reserved", static_cast<double>(memory.reserved));
  return result;
}

Napi::Value NativeContext::paths(const Napi::CallbackInfo& info) {
  Napi::Object result = Napi::Object::New(info.Env());
  if (!open_) return result;
  for (const auto& [op, path] : backend_->paths()) result.Set(op, path);
  return result;
}

}  // namespace moe
