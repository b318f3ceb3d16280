#include "backend.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "experts_layout.h"
#include "machine.h"

namespace moe {

namespace {
constexpr size_t kBlockHeader = 64;
constexpr size_t kFirstBlock = size_t{64} << 10;
constexpr int64_t kCopyGrain = int64_t{1} << 20;
constexpr int kMostThreads = 1024;
}  // namespace

CpuBackend::CpuBackend(int threads, int64_t scratch_budget, const Kernels& kernels)
    : scratch_budget_(scratch_budget), kernels_(kernels), pool_(std::clamp(threads, 1, kMostThreads)) {}

CpuBackend::~CpuBackend() {
  stop();
  while (block_ != nullptr) {
    Block* next = block_->next;
    allocator_.release_scratch(block_, block_->bytes);
    block_ = next;
  }
}

void CpuBackend::stop() {
  pool_.cancel();
  queue_.stop();
  pool_.stop();
}

Status CpuBackend::copy(void* to, const void* from, size_t bytes) {
  pool_.parallel_for(static_cast<int64_t>(bytes), kCopyGrain, [=](int64_t begin, int64_t end) {
    const auto count = static_cast<size_t>(end - begin);
    std::memcpy(static_cast<char*>(to) + begin, static_cast<const char*>(from) + begin, count);
  });
  return finished();
}

Status CpuBackend::fill_zero(void* device, size_t bytes) {
  pool_.parallel_for(static_cast<int64_t>(bytes), kCopyGrain, [=](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(device) + begin, 0, static_cast<size_t>(end - begin));
  });
  return finished();
}

Status CpuBackend::finished() const {
  if (!pool_.cancelled()) return Status::Ok();
  return Status::Error(Code::kAborted, "the context was closed while this was running");
}

size_t CpuBackend::expert_bytes(const ExpertsLayout& layout) const { return expert_sections(layout).bytes; }

std::string CpuBackend::device_name() const { return cpu_name(); }

Status CpuBackend::scratch(size_t bytes, void** out) {
  constexpr size_t kMost = std::numeric_limits<size_t>::max() / 4;
  const size_t size = bytes > kMost ? kMost : (bytes + 63) / 64 * 64;
  if (block_ == nullptr || size > block_->bytes - block_used_) {
    const size_t wanted = std::max({size + kBlockHeader, next_block_bytes_, kFirstBlock});
    void* data = nullptr;
    MOE_RETURN_IF_ERROR(allocator_.allocate_scratch(wanted, &data));
    block_ = new (data) Block{block_, wanted};
    block_used_ = kBlockHeader;
  }
  *out = reinterpret_cast<char*>(block_) + block_used_;
  block_used_ += size;
  return Status::Ok();
}

void CpuBackend::release_scratch() {
  block_used_ = kBlockHeader;
  if (block_ == nullptr) return;
  size_t total = 0;
  for (const Block* block = block_; block != nullptr; block = block->next) total += block->bytes;
  const size_t most_kept = static_cast<size_t>(scratch_budget_) + (size_t{16} << 20);
  if (block_->next == nullptr && total <= most_kept) return;
  next_block_bytes_ = std::min(total, most_kept);
  while (block_ != nullptr) {
    Block* next = block_->next;
    allocator_.release_scratch(block_, block_->bytes);
    block_ = next;
  }
}

const char* backend_name() { return "cpu"; }

Probe probe_backend() {
  Probe probe;
  const std::string name = cpu_name();
  const int threads = usable_threads();
  probe.state = "ready";
  probe.detail = name + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads");
  probe.devices = {name};
  probe.facts = {
      {"cpu", name},
      {"threads", std::to_string(threads)},
      {"memory", std::to_string(physical_memory())},
      {"features", cpu_features()},
      {"isa", usable_kernels().front()->name},
      {"usable isas", usable_isas(" ")},
  };
  return probe;
}

Status create_backend(const ContextOptions& options, std::unique_ptr<Backend>* out) {
  if (options.device != 0) {
    return Status::Error(Code::kInvalidArg,
                         "expected device: 0 (the CPU is one device) but received " + std::to_string(options.device),
                         "device");
  }
  const Kernels* kernels = options.isa.empty() ? usable_kernels().front() : kernels_named(options.isa);
  if (kernels == nullptr) {
    return Status::Error(Code::kUnsupported,
                         "expected isa: one of " + usable_isas(", ") +
                             " (what this processor and this addon have) but received '" + options.isa + "'",
                         "isa");
  }
  try {
    const int threads = options.threads > 0 ? options.threads : usable_threads();
    *out = std::make_unique<CpuBackend>(threads, CpuBackend::kScratchBudget, *kernels);
  } catch (const std::bad_alloc&) {
    return Status::Error(Code::kOutOfMemory, "no memory for a context");
  }
  return Status::Ok();
}

}  // namespace moe
