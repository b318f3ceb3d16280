#include "memory.h"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "check.h"

namespace moe {

// Device memory --------------------------------------------------------------------------------------------------

Status DeviceMemory::open(int device, cudaStream_t stream, cudaStream_t side, std::unique_ptr<DeviceMemory>* out) {
  std::unique_ptr<DeviceMemory> memory(new DeviceMemory);
  memory->device_ = device;
  memory->stream_ = stream;
  memory->side_ = side;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  MOE_CUDA_CHECK(cudaMemPoolCreate(&memory->pool_, &properties));
  uint64_t keep = UINT64_MAX;  // until a request fails or the context closes: giving memory back costs more than work
  MOE_CUDA_CHECK(cudaMemPoolSetAttribute(memory->pool_, cudaMemPoolAttrReleaseThreshold, &keep));
  *out = std::move(memory);
  return Status::Ok();
}

// The backend has waited for both streams.
DeviceMemory::~DeviceMemory() {
  if (pool_ == nullptr) return;
  release_kept();
  cudaMemPoolDestroy(pool_);
}

// Quarters between powers of two from 256 bytes up to kLargestKept; above, multiples of 64 KiB.
size_t DeviceMemory::block_size(size_t bytes) {
  constexpr size_t kMost = SIZE_MAX / 4;
  if (bytes <= 256) return 256;
  if (bytes > kMost) return kMost;
  if (bytes > kLargestKept) return (bytes + 65535) / 65536 * 65536;
  const size_t quarter = std::max<size_t>(std::bit_floor(bytes - 1) / 4, 256);
  return (bytes + quarter - 1) / quarter * quarter;
}

int DeviceMemory::class_of(size_t block) {
  if (block <= 256) return 0;
  const int power = std::bit_width(block - 1) - 1;  // block is in (2^power, 2^(power+1)]
  const size_t quarter = std::max<size_t>((size_t{1} << power) / 4, 256);
  const auto part = static_cast<int>((block - (size_t{1} << power) + quarter - 1) / quarter);  // 1..4
  return 4 * (power - 8) + part;
}

Status DeviceMemory::out_of_memory(size_t requested) const {
  size_t free = 0, total = 0;
  cudaGetLastError();
  cudaMemGetInfo(&free, &total);
  return Status::Error(Code::kOutOfMemory, "out of memory: requested " + std::to_string(requested) + " bytes but " +
                                               std::to_string(free) + " of " + std::to_string(total) +
                                               " are free on device " + std::to_string(device_));
}

Status DeviceMemory::take(size_t block, void** out) {
  const cudaStream_t stream = usable_stream();
  cudaError_t error = cudaMallocFromPoolAsync(out, block, pool_, stream);
  if (error == cudaErrorMemoryAllocation) {
    // What is kept, and what running work still holds, may be enough.
    cudaGetLastError();
    release_kept();
    cudaStreamSynchronize(stream);
    cudaMemPoolTrimTo(pool_, 0);
    error = cudaMallocFromPoolAsync(out, block, pool_, stream);
  }
  return cuda_status(error, "cudaMallocFromPoolAsync");
}

void DeviceMemory::give(void* data, size_t block) {
  if (block <= kLargestKept && kept_bytes_ + block <= kMostKept) {
    kept_[class_of(block)].push_back(data);
    kept_bytes_ += block;
  } else {
    cudaFreeAsync(data, usable_stream());
  }
}

void DeviceMemory::release_kept() {
  for (auto& list : kept_) {
    for (void* data : list) cudaFreeAsync(data, usable_stream());
    list.clear();
  }
  kept_bytes_ = 0;
}

Status DeviceMemory::allocate(size_t bytes, Arena* arena, bool lasting, void** out) {
  std::lock_guard lock(mutex_);
  const size_t block = block_size(bytes);
  if (arena != nullptr && !lasting) {
    Arena::Block* best = nullptr;
    for (Arena::Block& each : arena->blocks) {
      const bool fits = !each.in_use && !each.lasting && each.bytes >= block && each.bytes <= 2 * block;
      if (fits && (best == nullptr || each.bytes < best->bytes)) best = &each;
    }
    if (best != nullptr) {
      best->in_use = true;
      best->asked = bytes;
      arena_of_[best->data] = arena;
      *out = best->data;
      return Status::Ok();
    }
  }
  void* data = nullptr;
  std::vector<void*>* list = block <= kLargestKept ? &kept_[class_of(block)] : nullptr;
  if (list != nullptr && !list->empty()) {
    data = list->back();
    list->pop_back();
    kept_bytes_ -= block;
  } else {
    Status status = take(block, &data);
    if (status.code == Code::kOutOfMemory) return out_of_memory(bytes);
    if (!status.ok()) return status;
  }
  if (arena == nullptr) {
    used_ += bytes;
  } else {
    used_ += block;
    arena->blocks.push_back({data, block, bytes, true, lasting});
    arena_of_[data] = arena;
  }
  *out = data;
  return Status::Ok();
}

void DeviceMemory::hold() {
  std::lock_guard lock(mutex_);
  holding_ = true;
}

void DeviceMemory::let_go() {
  std::lock_guard lock(mutex_);
  holding_ = false;
  for (const auto& [data, bytes] : held_) release_now(data, bytes);
  held_.clear();
}

void DeviceMemory::release(void* data, size_t bytes) {
  std::lock_guard lock(mutex_);
  if (holding_) {
    held_.push_back({data, bytes});
  } else {
    release_now(data, bytes);
  }
}

void DeviceMemory::release_now(void* data, size_t bytes) {
  if (!arena_of_.empty()) {
    if (const auto found = arena_of_.find(data); found != arena_of_.end()) {
      for (Arena::Block& block : found->second->blocks) {
        if (block.data == data) block.in_use = false;
      }
      arena_of_.erase(found);
      return;
    }
  }
  used_ -= bytes;
  give(data, block_size(bytes));
}

void DeviceMemory::dissolve(Arena& arena) {
  std::lock_guard lock(mutex_);
  for (const Arena::Block& block : arena.blocks) {
    used_ -= block.bytes;
    if (!block.in_use || block.lasting) {
      arena_of_.erase(block.data);
      give(block.data, block.bytes);
    } else {
      arena_of_.erase(block.data);
      used_ += block.asked;
    }
  }
  arena.blocks.clear();
}

void DeviceMemory::set_capturing(bool capturing) {
  std::lock_guard lock(mutex_);
  capturing_ = capturing;
}

MemoryInfo DeviceMemory::info() const {
  std::lock_guard lock(mutex_);
  uint64_t reserved = 0;
  if (cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrReservedMemCurrent, &reserved) != cudaSuccess) cudaGetLastError();
  return {used_, std::max<size_t>(reserved, used_)};
}

// Host memory ----------------------------------------------------------------------------------------------------

Staging::~Staging() {
  for (Block& block : kept_) destroy(block);
}

void Staging::destroy(Block& block) {
  if (block.event != nullptr) {
    if (block.read) cudaEventSynchronize(block.event);
    cudaEventDestroy(block.event);
  }
  if (block.data != nullptr) cudaFreeHost(block.data);
  cudaGetLastError();
}

std::shared_ptr<uint8_t[]> Staging::take(size_t bytes) {
  if (bytes > SIZE_MAX / 4) return nullptr;
  const size_t size = std::bit_ceil(std::max<size_t>(bytes, 4096));
  Block block;
  {
    std::lock_guard lock(mutex_);
    // One that no copy reads any more; with enough blocks about, the one that will be free first.
    const bool enough = kept_bytes_ + size > kMostKept;
    for (size_t i = 0; i < kept_.size(); i++) {
      if (kept_[i].bytes != size) continue;
      if (kept_[i].read && !enough && cudaEventQuery(kept_[i].event) != cudaSuccess) {
        cudaGetLastError();  // cudaErrorNotReady stays otherwise
        continue;
      }
      if (kept_[i].read && enough) cudaEventSynchronize(kept_[i].event);
      block = kept_[i];
      kept_.erase(kept_.begin() + static_cast<ptrdiff_t>(i));
      kept_bytes_ -= size;
      break;
    }
  }
  if (block.data == nullptr) {
    cudaSetDevice(device_);
    // Above the kept sizes the block is exact: a power of two would waste gigabytes.
    block.bytes = size > kLargestKept ? bytes : size;
    if (cudaHostAlloc(&block.data, block.bytes, cudaHostAllocPortable) != cudaSuccess) {
      cudaGetLastError();
      return nullptr;
    }
  }
  block.read = false;
  auto* data = static_cast<uint8_t*>(block.data);
  {
    std::lock_guard lock(mutex_);
    taken_.emplace(block.data, block);
  }
  return {data, [self = shared_from_this()](uint8_t* pointer) { self->give(pointer); }};
}

Status Staging::read_by(const void* host, cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  const auto found = taken_.find(const_cast<void*>(host));
  if (found == taken_.end()) return Status::Error(Code::kInternal, "a copy from host memory that is no staging memory");
  Block& block = found->second;
  if (block.event == nullptr) {
    MOE_CUDA_CHECK(cudaEventCreateWithFlags(&block.event, cudaEventDisableTiming | cudaEventBlockingSync));
  }
  block.read = true;
  MOE_CUDA_CHECK(cudaEventRecord(block.event, stream));
  return Status::Ok();
}

void Staging::give(void* data) {
  Block block;
  {
    std::lock_guard lock(mutex_);
    const auto found = taken_.find(data);
    block = found->second;
    taken_.erase(found);
    if (block.bytes <= kLargestKept && kept_bytes_ + block.bytes <= kMostKept) {
      kept_.push_back(block);
      kept_bytes_ += block.bytes;
      return;
    }
  }
  cudaSetDevice(device_);
  destroy(block);
}

}  // namespace moe
