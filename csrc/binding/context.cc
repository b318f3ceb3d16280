#include "context.h"

#include <algorithm>
#include <utility>

#include "context_waits.h"
#include "host_data.h"
#include "op_table.h"

namespace moe {

namespace {

// Data is written in pieces, so that staging memory stays small whatever a tensor's size.
constexpr size_t kPieceBytes = size_t{16} << 20;

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
  Napi::Object error =
      data->error_class.New({Napi::String::New(env, code), Napi::String::New(env, status.text), details});
  return Napi::Error(env, error);
}

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
                         InstanceMethod<&NativeContext::roofline>("roofline"),
                         InstanceMethod<&NativeContext::close>("close"),
                         InstanceMethod<&NativeContext::abandon>("abandon"),
                         InstanceMethod<&NativeContext::poll>("poll"),
                     });
}

NativeContext::NativeContext(const Napi::CallbackInfo& info) : Napi::ObjectWrap<NativeContext>(info), env_(info.Env()) {
  Napi::Env env = info.Env();
  ContextOptions options;
  if (info.Length() > 0 && info[0].IsObject()) {
    const auto given = info[0].As<Napi::Object>();
    const Napi::Value device = given.Get("device"), threads = given.Get("threads"), isa = given.Get("isa");
    if (device.IsNumber()) options.device = device.As<Napi::Number>().Int32Value();
    if (threads.IsNumber()) options.threads = threads.As<Napi::Number>().Int32Value();
    if (isa.IsString()) options.isa = isa.As<Napi::String>().Utf8Value();
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
  int64_t ignored = 0;  // of a context that was never closed
  napi_adjust_external_memory(env_, -external_, &ignored);
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

// Copies to the host, waits and replays must not become part of a graph, and a wait is for both lanes.
void NativeContext::assert_not_recording(Napi::Env env, const char* op) {
  assert_open(env, op);
  assert_joined(env, op);
  if (recording_ == nullptr) return;
  throw make_error(env, Status::Error(Code::kCapture, "not while a capture is being recorded"), op);
}

std::shared_ptr<Buffer> NativeContext::buffer_at(const Napi::CallbackInfo& info, size_t index, const char* op) {
  assert_open(info.Env(), op);
  const std::shared_ptr<Buffer>* found = info.Length() > index && info[index].IsNumber()
                                             ? buffers_.find(info[index].As<Napi::Number>().DoubleValue())
                                             : nullptr;
  if (found != nullptr) return *found;
  throw make_error(info.Env(), Status::Error(Code::kDisposed, "expected a live handle"), op);
}

Napi::Value NativeContext::device(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "device");
  return Napi::String::New(info.Env(), backend_->device_name());
}

// Lets the collector know what its small objects stand for.
void NativeContext::account(Napi::Env env, int64_t bytes) {
  if (bytes == 0) return;
  external_ += bytes;
  Napi::MemoryManagement::AdjustExternalMemory(env, bytes);
}

double NativeContext::add_buffer(Napi::Env env, const char* op, size_t bytes, DType dtype, int64_t elements,
                                 std::optional<ExpertsLayout> experts) {
  auto buffer = std::make_shared<Buffer>();
  Status status = backend_->allocate(bytes, &buffer->data);
  if (!status.ok()) throw make_error(env, status, op);
  if (recording_ != nullptr && backend_->has_graphs() && !experts.has_value()) buffer->capture = recording_->number;
  buffer->backend = backend_;
  buffer->bytes = bytes;
  buffer->dtype = dtype;
  buffer->elements = elements;
  buffer->experts = std::move(experts);
  // Until a replay has written it there is nothing in it, unless there is nothing to write.
  if (recording_ != nullptr && !buffer->experts.has_value() && elements != 0) {
    static const auto unwritten = std::make_shared<const Fault>(Fault{
        Status::Error(Code::kCapture, "expected a replay before the first read of what a capture made"), "capture"});
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
    throw make_error(env, Status::Error(Code::kInvalidArg, "expected a dtype code and a number of elements"),
                     "allocate");
  }
  const auto dtype = static_cast<DType>(static_cast<int>(code));
  const auto count = static_cast<int64_t>(elements);
  return Napi::Number::New(env,
                           add_buffer(env, "allocate", static_cast<size_t>(count) * size_of(dtype), dtype, count, {}));
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
    for (int i = 0; i < 5; i++)
      valid = valid && field[i] >= 0 && field[i] <= 0x1p31 && field[i] == std::floor(field[i]);
    valid = valid && field[0] >= 1 && field[0] <= 65536 && field[1] >= 1 && field[2] >= 1 && field[3] <= 2;
    for (int i = 5; i < 8; i++) valid = valid && std::isfinite(field[i]);
    if (valid) {
      layout = {static_cast<int64_t>(field[0]),
                static_cast<int64_t>(field[1]),
                static_cast<int64_t>(field[2]),
                static_cast<DType>(static_cast<int>(field[3])),
                field[4] != 0,
                {static_cast<float>(field[5]), static_cast<float>(field[6]), static_cast<float>(field[7])}};
      // Three matrices of 4-byte elements must stay far from the end of the address space.
      const double elements = 3.0 * field[0] * field[1] * field[2];
      if (elements > 0x1p50) {
        throw make_error(
            env,
            Status::Error(Code::kOutOfMemory,
                          "out of memory: requested " + std::to_string(static_cast<uint64_t>(elements)) + " weights"),
            op);
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
    task->run = [data = buffer->data, bytes = buffer->bytes](Backend& backend) {
      return backend.fill_zero(data, bytes);
    };
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
  backend_->submit(
      [backend = backend_.get(), task = std::move(task), faults = faults_] { execute(*backend, *task, *faults); });
}

// What cannot be enqueued throws at the call. Into a graph goes what the capture did not make itself, as a lease.
void NativeContext::run_now(Napi::Env env, const Task& task) {
  Status status;
  backend_->submit([&] { status = run(*backend_, task); });
  if (!status.ok()) throw make_error(env, status, task.op);
  if (recording_ == nullptr) return;
  for (const auto* buffers : {&task.reads, &task.writes}) {
    for (const auto& buffer : *buffers) {
      auto& leases = recording_->leases;
      const bool own = buffer->capture == recording_->number;
      if (!own && std::find(leases.begin(), leases.end(), buffer) == leases.end()) leases.push_back(buffer);
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
  const bool typed = info[1].IsTypedArray() &&
                     napi_get_typedarray_info(env, info[1], &type, &length, &source, nullptr, nullptr) == napi_ok;
  if (!typed || buffer->experts.has_value() || !holds(type, buffer->dtype) ||
      length != static_cast<size_t>(buffer->elements)) {
    throw make_error(env,
                     Status::Error(Code::kInvalidArg,
                                   std::string("expected data: ") + std::to_string(buffer->elements) + " elements of " +
                                       name_of(buffer->dtype),
                                   "data"),
                     op);
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
    piece->run = [to = static_cast<uint8_t*>(buffer->data) + done * width, staged,
                  bytes = count * width](Backend& backend) { return backend.copy_in(to, staged.get(), bytes); };
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
    throw make_error(env, Status::Error(Code::kInvalidArg, "expected a record that begins with an op's number"),
                     "enqueue");
  }
  const OpEntry& entry = table[static_cast<size_t>(index)];
  if (!entry.available()) {
    throw make_error(
        env, Status::Error(Code::kUnsupported, std::string("the ") + backend_name() + " backend does not have this op"),
        entry.name);
  }
  auto task = std::make_shared<Task>();
  task->op = entry.name;
  Status status = entry.unpack(buffers_, record + 1, static_cast<size_t>(length) - 1, *task);
  if (!status.ok()) throw make_error(env, status, entry.name);
  submit(env, std::move(task));
}

Napi::Value NativeContext::memory(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "memory");
  const MemoryInfo memory = backend_->memory();
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("used", static_cast<double>(memory.used));
  result.Set("reserved", static_cast<double>(memory.reserved));
  return result;
}

// Blocks until it has measured.
Napi::Value NativeContext::roofline(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  assert_not_recording(env, "measureRoofline");
  auto found = std::make_shared<std::pair<Status, Roofline>>();
  backend_->submit([backend = backend_.get(), found] { found->first = backend->roofline(&found->second); });
  Status status = backend_->wait();
  if (status.ok()) status = found->first;
  if (!status.ok()) throw make_error(env, status, "measureRoofline");
  const Roofline& roofline = found->second;
  Napi::Object result = Napi::Object::New(env);
  result.Set("readOneThread", roofline.read_one);
  result.Set("readAllThreads", roofline.read_all);
  result.Set("flopsOneThread", roofline.flops_one);
  result.Set("flopsAllThreads", roofline.flops_all);
  return result;
}

Napi::Value NativeContext::paths(const Napi::CallbackInfo& info) {
  Napi::Object result = Napi::Object::New(info.Env());
  if (!open_) return result;
  for (const auto& [op, path] : backend_->paths()) result.Set(op, path);
  return result;
}

}  // namespace moe
