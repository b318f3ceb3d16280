// The CUDA backend: one stream and one memory pool per context. Work runs at once on the JS thread, where it only
// enqueues; waiting is an event that the JS thread polls or the context's waiter thread blocks on.
//
// Memory is ordered by the stream: everything that uses it is enqueued on the one stream, so a freed block may be
// handed out again at once. Two lanes of work (take_lane) are two streams, between which freed blocks are held back.
// While a capture is recorded the stream builds a graph instead of running; tensors and scratch then come from an arena
// that the graph owns, and what has to happen once and now (uploads, weights) goes to a side stream.
#pragma once
#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../backend.h"
#include "check.h"
#include "fault.h"
#include "load_counters.h"
#include "memory.h"

namespace moe {

class CudaGraph;
class CudaMilestone;

class CudaBackend : public Backend {
 public:
  static Status create(const ContextOptions& options, std::unique_ptr<Backend>* out);
  ~CudaBackend() override;

  // For kernels, called inside submitted work ------------------------------------------------------------------

  // Where kernels go. Ask every time: it is another one while weights are made inside a capture, and in a second lane.
  cudaStream_t stream() const { return aside_ ? side_ : beside_now_ ? beside_ : stream_; }
  // Whether two lanes run side by side: a kernel whose blocks wait for each other may then not count on the whole
  // device.
  bool two_lanes() const { return two_lanes_; }
  int sm_count() const { return sm_count_; }
  int device() const { return device_; }
  // Whose kernels may be taken, 10 * major + minor: 90 on Hopper, 80 wherever only PTX is used.
  int compute_capability() const { return compute_capability_; }
  // Device memory of undefined content, aligned to 256 bytes, for the kernels of this call; it goes back by itself when
  // the call returns, in the order of the stream. Allowed in captures.
  Status scratch(size_t bytes, void** out);
  template <class T>
  Status scratch(size_t count, T** out) {
    void* data = nullptr;
    MOE_RETURN_IF_ERROR(scratch(count * sizeof(T), &data));
    *out = static_cast<T*>(data);
    return Status::Ok();
  }
  // kCounters of them for each lane, zero between its kernels: a kernel that counts on them leaves them zero.
  int32_t* counters() const { return counters_ + (beside_now_ ? kCounters : 0); }
  static constexpr int64_t kCounters = 32768;  // mlp::kStreamCounters
  // Where to add to a load tensor, by atomics.
  Status spread_counters(const Tensor& load, SpreadCounters* out);
  // Device pointer for raise_fault().
  FaultNote* fault_notes() const { return notes_device_; }

  // Backend -----------------------------------------------------------------------------------------------------

  Status allocate(size_t bytes, void** out) override;
  void release(void* data, size_t bytes) override;

  bool runs_at_once() const override { return true; }
  void submit(std::function<void()> work) override;
  void notify(std::function<void(Status)> done) override;
  std::unique_ptr<Milestone> mark() override;
  Status wait() override;
  void stop() override;
  Status take_fault(std::string* op) override;

  std::shared_ptr<uint8_t[]> staging(size_t bytes) override;
  Status copy_in(void* device, const void* host, size_t bytes) override;
  Status copy_out(void* host, const void* device, size_t bytes) override;
  Status fill_zero(void* device, size_t bytes) override;
  Status settle(const Tensor& counters) override;

  bool has_graphs() const override { return true; }
  Status begin_capture() override;
  Status end_capture(std::shared_ptr<Graph>* out) override;
  void abort_capture() override;
  Status replay(Graph& graph) override;
  Status aside(const std::function<Status()>& work) override;

  Status take_lane(Lane lane) override;

  size_t expert_bytes(const ExpertsLayout& layout) const override;
  MemoryInfo memory() const override;
  std::string device_name() const override { return name_; }

 private:
  friend class CudaGraph;
  friend class CudaMilestone;
  struct Waiting {
    cudaEvent_t event;
    std::function<void(Status)> done;
  };

  CudaBackend() = default;
  Status open(int device);
  void enter() const { cudaSetDevice(device_); }
  Status take_event(cudaEvent_t* out);
  void return_event(cudaEvent_t event);
  void wait_for(cudaEvent_t event, std::function<void(Status)> done);
  void wait_in_thread();
  Status leave_capture();
  Status order(cudaStream_t first, cudaStream_t second);

  int device_ = 0, sm_count_ = 0, compute_capability_ = 0;
  std::string name_;
  cudaStream_t stream_ = nullptr, side_ = nullptr;
  cudaStream_t beside_ = nullptr;  // the second lane, made when it is first asked for
  bool aside_ = false, beside_now_ = false, two_lanes_ = false;
  bool stopped_ = false;
  FaultNote *notes_ = nullptr, *notes_device_ = nullptr;
  int32_t* counters_ = nullptr;
  std::unique_ptr<DeviceMemory> memory_;
  LoadCounters load_counters_;
  std::shared_ptr<Staging> staging_;
  std::shared_ptr<Arena> recording_;               // while a capture is recorded
  std::vector<std::pair<void*, size_t>> scratch_;  // of the call that is running

  std::mutex events_mutex_;
  std::vector<cudaEvent_t> events_;  // not in use

  std::mutex waiting_mutex_;
  std::condition_variable called_;
  std::deque<Waiting> waiting_;
  bool ending_ = false;
  std::thread waiter_;
};

// Kernels of this folder are only ever called with its own backend.
inline CudaBackend& cuda(Backend& backend) { return static_cast<CudaBackend&>(backend); }

}  // namespace moe
