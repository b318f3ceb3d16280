#include "backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "experts_layout.h"

namespace moe {

#ifdef MOE_TEST_HOOKS
void break_device_if_asked(cudaStream_t stream);  // test_hooks.cu
#endif

namespace {

// The oldest device that the kernels are compiled for.
constexpr int kOldestCapability = 80;

// Whether the driver is told to leave machine code aside and compile PTX. Kernels of one architecture alone
// (*_sm90a.cu) have none, so that the portable ones, those of the oldest device, have to be taken then.
bool ptx_is_forced() {
  const char* forced = std::getenv("CUDA_FORCE_PTX_JIT");
  return forced != nullptr && std::strcmp(forced, "1") == 0;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

constexpr struct {
  const char *op, *arg, *expected;
} kFaults[] = {
#define MOE_FAULT(site, op, arg, expected) {op, arg, expected},
    MOE_FAULT_SITES(MOE_FAULT)
#undef MOE_FAULT
};
constexpr int kFaultCount = static_cast<int>(FaultSite::kCount);

}  // namespace

// A recorded sequence: its leases are the binding's, its memory is the arena.
class CudaGraph : public Graph {
 public:
  CudaGraph(CudaBackend& backend, std::shared_ptr<Arena> arena) : backend_(backend), arena_(std::move(arena)) {}
  // An executable graph in flight is freed by CUDA when it ends, and its memory goes back in the order of the stream.
  ~CudaGraph() override {
    backend_.enter();
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    backend_.memory_->dissolve(*arena_);
  }
  cudaGraphExec_t exec = nullptr;

 private:
  CudaBackend& backend_;  // the binding keeps it longer than its captures
  std::shared_ptr<Arena> arena_;
};

class CudaMilestone : public Milestone {
 public:
  CudaMilestone(CudaBackend& backend, cudaEvent_t event, Status status)
      : backend_(backend), event_(event), status_(std::move(status)) {}
  ~CudaMilestone() override {
    if (event_ != nullptr) backend_.return_event(event_);
  }
  bool reached(Status* status) override {
    if (event_ == nullptr) {
      *status = status_;
      return true;
    }
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    *status = cuda_status(error, "the work enqueued before");
    return true;
  }
  void notify(std::function<void(Status)> done) override {
    if (event_ == nullptr) return done(status_);
    backend_.wait_for(std::exchange(event_, nullptr), std::move(done));
  }

 private:
  CudaBackend& backend_;
  cudaEvent_t event_;
  Status status_;
};

// Opening and closing --------------------------------------------------------------------------------------------

Status CudaBackend::create(const ContextOptions& options, std::unique_ptr<Backend>* out) {
  std::unique_ptr<CudaBackend> backend(new CudaBackend);
  MOE_RETURN_IF_ERROR(backend->open(options.device));
  *out = std::move(backend);
  return Status::Ok();
}

Status CudaBackend::open(int device) {
  int count = 0;
  MOE_CUDA_CHECK(cudaGetDeviceCount(&count));
  if (device < 0 || device >= count) {
    return Status::Error(Code::kInvalidArg,
                         "expected device: 0 to " + std::to_string(count - 1) + " (this machine has " +
                             std::to_string(count) + " CUDA devices) but received " + std::to_string(device),
                         "device");
  }
  cudaDeviceProp properties{};
  MOE_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  device_ = device;
  sm_count_ = properties.multiProcessorCount;
  compute_capability_ = 10 * properties.major + properties.minor;
  name_ = properties.name;
  if (compute_capability_ < kOldestCapability) {
    return Status::Error(Code::kUnsupported,
                         name_ + " has compute capability " + std::to_string(properties.major) + "." +
                             std::to_string(properties.minor) + "; 8.0 or newer is needed, or backend 'cpu'",
                         "device");
  }
  if (ptx_is_forced()) compute_capability_ = kOldestCapability;
  MOE_CUDA_CHECK(cudaSetDevice(device));
  MOE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  MOE_CUDA_CHECK(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking));
  void* notes = nullptr;
  MOE_CUDA_CHECK(cudaHostAlloc(&notes, sizeof(FaultNote) * kFaultCount, cudaHostAllocMapped));
  notes_ = static_cast<FaultNote*>(notes);
  std::memset(notes, 0, sizeof(FaultNote) * kFaultCount);
  void* mapped = nullptr;
  MOE_CUDA_CHECK(cudaHostGetDevicePointer(&mapped, notes, 0));
  notes_device_ = static_cast<FaultNote*>(mapped);
  void* counters = nullptr;
  MOE_CUDA_CHECK(cudaMalloc(&counters, 2 * kCounters * sizeof(int32_t)));
  counters_ = static_cast<int32_t*>(counters);
  // On the stream: the default stream and this one do not wait for each other.
  MOE_CUDA_CHECK(cudaMemsetAsync(counters, 0, 2 * kCounters * sizeof(int32_t), stream_));
  staging_ = std::make_shared<Staging>(device);
  return DeviceMemory::open(device, stream_, side_, &memory_);
}

CudaBackend::~CudaBackend() {
  stop();
  enter();
  memory_.reset();
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  if (notes_ != nullptr) cudaFreeHost(notes_);
  if (counters_ != nullptr) cudaFree(counters_);
  if (side_ != nullptr) cudaStreamDestroy(side_);
  if (beside_ != nullptr) cudaStreamDestroy(beside_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
  cudaGetLastError();
}

void CudaBackend::stop() {
  if (std::exchange(stopped_, true)) return;
  enter();
  if (recording_ != nullptr) abort_capture();
  // Work that has been launched cannot be taken back, and its memory must outlive it.
  if (side_ != nullptr) cudaStreamSynchronize(side_);
  if (beside_ != nullptr) cudaStreamSynchronize(beside_);
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  beside_now_ = two_lanes_ = false;
  if (memory_ != nullptr) memory_->let_go();
  std::deque<Waiting> abandoned;
  {
    std::lock_guard lock(waiting_mutex_);
    ending_ = true;
    abandoned.swap(waiting_);
  }
  called_.notify_all();
  if (waiter_.joinable()) waiter_.join();
  for (Waiting& each : abandoned) return_event(each.event);
}

// Work -----------------------------------------------------------------------------------------------------------

Status CudaBackend::allocate(size_t bytes, void** out) {
  enter();
  return memory_->allocate(bytes, aside_ ? nullptr : recording_.get(), false, out);
}

void CudaBackend::release(void* data, size_t bytes) {
  enter();
  load_counters_.release(data, *memory_);
  memory_->release(data, bytes);
}

Status CudaBackend::scratch(size_t bytes, void** out) {
  MOE_RETURN_IF_ERROR(memory_->allocate(bytes, aside_ ? nullptr : recording_.get(), false, out));
  scratch_.push_back({*out, bytes});
  return Status::Ok();
}

void CudaBackend::submit(std::function<void()> work) {
  enter();
  work();
#ifdef MOE_TEST_HOOKS
  break_device_if_asked(stream());
#endif
  for (const auto& [data, bytes] : scratch_) memory_->release(data, bytes);
  scratch_.clear();
}

std::shared_ptr<uint8_t[]> CudaBackend::staging(size_t bytes) { return staging_->take(bytes); }

Status CudaBackend::copy_in(void* device, const void* host, size_t bytes) {
  if (bytes == 0) return Status::Ok();
  if (recording_ == nullptr || aside_) {
    MOE_CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream()));
    return staging_->read_by(host, stream());
  }
  // Data frozen in a capture is uploaded once, now; every replay copies it from there.
  void* frozen = nullptr;
  MOE_RETURN_IF_ERROR(memory_->allocate(bytes, recording_.get(), true, &frozen));
  MOE_CUDA_CHECK(cudaMemcpyAsync(frozen, host, bytes, cudaMemcpyHostToDevice, side_));
  MOE_RETURN_IF_ERROR(staging_->read_by(host, side_));
  MOE_CUDA_CHECK(cudaMemcpyAsync(device, frozen, bytes, cudaMemcpyDeviceToDevice, stream()));
  return Status::Ok();
}

Status CudaBackend::copy_out(void* host, const void* device, size_t bytes) {
  if (bytes == 0) return Status::Ok();
  MOE_CUDA_CHECK(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream()));
  return Status::Ok();
}

Status CudaBackend::fill_zero(void* device, size_t bytes) {
  if (bytes == 0) return Status::Ok();
  MOE_CUDA_CHECK(cudaMemsetAsync(device, 0, bytes, stream()));
  return Status::Ok();
}

// New counters are not the graph's: they are made and cleared aside.
Status CudaBackend::spread_counters(const Tensor& load, SpreadCounters* out) {
  return load_counters_.spread(load, *memory_, recording_ != nullptr ? side_ : stream(), out);
}

Status CudaBackend::settle(const Tensor& counters) {
  return load_counters_.settle(counters, stream(), recording_ != nullptr && !aside_);
}

size_t CudaBackend::expert_bytes(const ExpertsLayout& layout) const { return expert_sections(layout).bytes; }

MemoryInfo CudaBackend::memory() const {
  enter();
  return memory_->info();
}

// Waits ----------------------------------------------------------------------------------------------------------

Status CudaBackend::take_event(cudaEvent_t* out) {
  {
    std::lock_guard lock(events_mutex_);
    if (!events_.empty()) {
      *out = events_.back();
      events_.pop_back();
      return Status::Ok();
    }
  }
  MOE_CUDA_CHECK(cudaEventCreateWithFlags(out, cudaEventDisableTiming | cudaEventBlockingSync));
  return Status::Ok();
}

void CudaBackend::return_event(cudaEvent_t event) {
  std::lock_guard lock(events_mutex_);
  events_.push_back(event);
}

std::unique_ptr<Milestone> CudaBackend::mark() {
  enter();
  cudaEvent_t event = nullptr;
  Status status = take_event(&event);
  if (status.ok()) status = cuda_status(cudaEventRecord(event, stream_), "cudaEventRecord");
  if (!status.ok() && event != nullptr) return_event(std::exchange(event, nullptr));
  return std::make_unique<CudaMilestone>(*this, event, std::move(status));
}

void CudaBackend::notify(std::function<void(Status)> done) { mark()->notify(std::move(done)); }

void CudaBackend::wait_for(cudaEvent_t event, std::function<void(Status)> done) {
  try {
    std::lock_guard lock(waiting_mutex_);
    if (!waiter_.joinable() && !ending_) waiter_ = std::thread([this] { wait_in_thread(); });
    waiting_.push_back({event, done});
  } catch (const std::system_error& error) {
    return_event(event);
    return done(Status::Error(Code::kBackend, std::string("cannot start the thread that waits: ") + error.what()));
  }
  called_.notify_one();
}

void CudaBackend::wait_in_thread() {
  enter();
  std::unique_lock lock(waiting_mutex_);
  for (;;) {
    called_.wait(lock, [this] { return ending_ || !waiting_.empty(); });
    if (ending_) return;
    Waiting waiting = std::move(waiting_.front());
    waiting_.pop_front();
    lock.unlock();
    Status status = cuda_status(cudaEventSynchronize(waiting.event), "the work enqueued before");
    return_event(waiting.event);
    waiting.done(std::move(status));
    waiting.done = nullptr;  // what it holds goes before the lock is taken
    lock.lock();
  }
}

Status CudaBackend::wait() {
  enter();
  return cuda_status(cudaStreamSynchronize(stream_), "the work enqueued before");
}

Status CudaBackend::take_fault(std::string* op) {
  for (int site = 0; site < kFaultCount; site++) {
    volatile FaultNote* note = notes_ + site;
    if (note->raised == 0) continue;
    std::string text = "expected ";
    for (const char* c = kFaults[site].expected; *c != 0; c++) {
      if (*c != '%') {
        text += *c;
        continue;
      }
      switch (*++c) {
        case 'v': text += std::to_string(note->value); break;
        case 'e': text += std::to_string(note->end); break;
        case 'l': text += std::to_string(note->limit); break;
        case 'm': text += std::to_string(note->limit - 1); break;
        default: text += std::to_string(note->index);
      }
    }
    note->raised = 0;
    *op = kFaults[site].op;
    return Status::Error(Code::kRange, std::move(text), kFaults[site].arg);
  }
  return Status::Ok();
}

// Captures -------------------------------------------------------------------------------------------------------

Status CudaBackend::begin_capture() {
  enter();
  // The side stream comes after everything so far: it may use memory that the main stream has just given back.
  MOE_RETURN_IF_ERROR(order(stream_, side_));
  MOE_CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
  recording_ = std::make_shared<Arena>();
  memory_->set_capturing(true);
  return Status::Ok();
}

// Everything later on the main stream comes after what went aside.
Status CudaBackend::leave_capture() {
  memory_->set_capturing(false);
  return order(side_, stream_);
}

// What is enqueued on `second` from now on comes after everything on `first`.
Status CudaBackend::order(cudaStream_t first, cudaStream_t second) {
  cudaEvent_t event = nullptr;
  MOE_RETURN_IF_ERROR(take_event(&event));
  Status status = cuda_status(cudaEventRecord(event, first), "cudaEventRecord");
  if (status.ok()) status = cuda_status(cudaStreamWaitEvent(second, event, 0), "cudaStreamWaitEvent");
  return_event(event);
  return status;
}

// Memory that one lane gives back may still be in use in the other: it is kept until they join.
Status CudaBackend::take_lane(Lane lane) {
  enter();
  beside_now_ = false;
  switch (lane) {
    case Lane::kBeside:  // the binding has seen to it that no lane is open
      if (beside_ == nullptr) MOE_CUDA_CHECK(cudaStreamCreateWithFlags(&beside_, cudaStreamNonBlocking));
      MOE_RETURN_IF_ERROR(order(stream_, beside_));
      memory_->hold(beside_);
      beside_now_ = two_lanes_ = true;
      return Status::Ok();
    case Lane::kMain: memory_->hold(stream_); return Status::Ok();
    case Lane::kJoin: {
      Status status = order(beside_, stream_);
      if (!status.ok()) cudaStreamSynchronize(beside_);
      memory_->let_go();
      two_lanes_ = false;
      return status;
    }
  }
  return Status::Ok();
}

Status CudaBackend::end_capture(std::shared_ptr<Graph>* out) {
  enter();
  cudaGraph_t graph = nullptr;
  auto result = std::make_shared<CudaGraph>(*this, std::exchange(recording_, nullptr));
  Status status = cuda_status(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
  Status left = leave_capture();
  if (status.ok()) status = std::move(left);
  if (status.ok()) status = cuda_status(cudaGraphInstantiate(&result->exec, graph, 0), "cudaGraphInstantiate");
  if (status.ok()) status = cuda_status(cudaGraphUpload(result->exec, stream_), "cudaGraphUpload");
  if (graph != nullptr) cudaGraphDestroy(graph);
  MOE_RETURN_IF_ERROR(std::move(status));
  *out = std::move(result);
  return Status::Ok();
}

void CudaBackend::abort_capture() {
  if (recording_ == nullptr) return;
  enter();
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream_, &graph);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();
  Status ignored = leave_capture();
  memory_->dissolve(*std::exchange(recording_, nullptr));
}

Status CudaBackend::replay(Graph& graph) {
  enter();
  MOE_CUDA_CHECK(cudaGraphLaunch(static_cast<CudaGraph&>(graph).exec, stream_));
  return Status::Ok();
}

Status CudaBackend::aside(const std::function<Status()>& work) {
  struct Scope {
    bool& aside;
    ~Scope() { aside = false; }
  } scope{aside_};
  aside_ = recording_ != nullptr;
  return work();
}

// The addon ------------------------------------------------------------------------------------------------------

const char* backend_name() { return "cuda"; }

Probe probe_backend() {
  Probe probe;
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  probe.facts.push_back({"runtime", version_text(runtime)});
  if (driver != 0) probe.facts.push_back({"driver supports", version_text(driver)});
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (driver == 0) {
    probe.state = "no driver";
    probe.detail = "no NVIDIA driver (libcuda.so.1) on this machine; install one, or use backend 'cpu'";
    return probe;
  }
  if (error == cudaErrorInsufficientDriver) {
    probe.state = "no driver";
    probe.detail = "the NVIDIA driver is too old: it supports CUDA " + version_text(driver) + ", this addon needs " +
                   version_text(runtime);
    return probe;
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    probe.state = "no device";
    probe.detail = "the NVIDIA driver sees no device; is one there, and does CUDA_VISIBLE_DEVICES show it?";
    return probe;
  }
  if (error != cudaSuccess) {
    probe.state = "failed";
    probe.detail = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
    return probe;
  }
  int usable = 0;
  for (int device = 0; device < count; device++) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    const std::string capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    probe.devices.push_back(properties.name);
    probe.facts.push_back({"device " + std::to_string(device),
                           std::string(properties.name) + ", compute capability " + capability + ", " +
                               std::to_string(properties.multiProcessorCount) + " multiprocessors, " +
                               std::to_string(properties.totalGlobalMem >> 20) + " MiB"});
    if (10 * properties.major + properties.minor >= kOldestCapability) usable++;
  }
  cudaGetLastError();
  if (usable == 0) {
    probe.state = "no device";
    probe.detail = "no device of compute capability 8.0 or newer";
    return probe;
  }
  probe.state = "ready";
  probe.detail = probe.devices[0] + (count > 1 ? " and " + std::to_string(count - 1) + " more" : "");
  return probe;
}

Status create_backend(const ContextOptions& options, std::unique_ptr<Backend>* out) {
  try {
    return CudaBackend::create(options, out);
  } catch (const std::bad_alloc&) {
    return Status::Error(Code::kOutOfMemory, "no host memory for a context");
  }
}

}  // namespace moe
