#include "load_counters.h"

#include "check.h"
#include "memory.h"

namespace moe {

namespace {

constexpr int kThreads = 256;

// A thread for every counter. Nothing counts meanwhile, but the copies of a slot come to one place.
__global__ void fold(SpreadCounters counters, unsigned long long* load, uint32_t slots) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= counters.copies * slots) return;
  unsigned long long* counter = counters.data + i * size_t{SpreadCounters::kStride};
  const unsigned long long counted = *counter;
  if (counted == 0) return;
  *counter = 0;
  atomicAdd(load + i % slots, counted);
}

}  // namespace

Status LoadCounters::spread(const Tensor& load, DeviceMemory& memory, cudaStream_t stream, SpreadCounters* out) {
  std::lock_guard lock(mutex_);
  *out = {};
  if (const auto found = entries_.find(load.data); found != entries_.end()) {
    *out = found->second.counters;
    return Status::Ok();
  }
  Entry entry{{nullptr, copies_for(load.elements)}, load.elements};
  if (entry.bytes() == 0) return Status::Ok();
  void* data = nullptr;
  const Status status = memory.allocate(entry.bytes(), nullptr, false, &data);
  if (status.code == Code::kOutOfMemory) {
    entries_[load.data] = {};  // not tried again: what is refused was waited for
    return Status::Ok();
  }
  if (!status.ok()) return status;
  const cudaError_t error = cudaMemsetAsync(data, 0, entry.bytes(), stream);
  if (error != cudaSuccess) {
    memory.release(data, entry.bytes());
    return cuda_status(error, "cudaMemsetAsync");
  }
  entry.counters.data = static_cast<unsigned long long*>(data);
  entries_[load.data] = entry;
  *out = entry.counters;
  return Status::Ok();
}

Status LoadCounters::settle(const Tensor& tensor, cudaStream_t stream, bool recording) {
  Entry entry;
  {
    std::lock_guard lock(mutex_);
    if (recording) entries_.try_emplace(tensor.data);  // without counters: what is recorded would not fold later ones
    const auto found = entries_.find(tensor.data);
    if (found == entries_.end()) return Status::Ok();
    entry = found->second;
  }
  if (entry.counters.data == nullptr) return Status::Ok();
  const auto blocks = static_cast<unsigned>((entry.count() + kThreads - 1) / kThreads);
  fold<<<blocks, kThreads, 0, stream>>>(entry.counters, tensor.as<unsigned long long>(),
                                        static_cast<uint32_t>(entry.slots));
  MOE_CUDA_LAUNCHED("fold");
  return Status::Ok();
}

void LoadCounters::release(const void* load, DeviceMemory& memory) {
  std::lock_guard lock(mutex_);
  const auto found = entries_.find(load);
  if (found == entries_.end()) return;
  const Entry& entry = found->second;
  if (entry.counters.data != nullptr) memory.release(entry.counters.data, entry.bytes());
  entries_.erase(found);
}

}  // namespace moe
