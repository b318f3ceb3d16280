#include "allocator.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <new>
#include <string>

#include "machine.h"

namespace moe {

namespace {

// Large blocks ask for large pages: streams through them meet fewer page boundaries, and fewer faults at first.
constexpr size_t kLargePage = size_t{2} << 20;

std::align_val_t alignment_of(size_t bytes) {
  return std::align_val_t{bytes >= 2 * kLargePage ? kLargePage : Allocator::kAlignment};
}

void* system_allocate(size_t bytes) noexcept {
  void* data = ::operator new(bytes, alignment_of(bytes), std::nothrow);
  if (data != nullptr && bytes >= 2 * kLargePage) want_large_pages(data, bytes);
  return data;
}
void system_release(void* data, size_t bytes) noexcept { ::operator delete(data, alignment_of(bytes)); }

constexpr size_t kWorthAsking = size_t{32} << 20;  // below it, asking the system costs more than the block

}  // namespace

// Classes 0..3 are 64, 128, 192, 256; then four for every power of two from 256 on.
int Allocator::class_of(size_t bytes) {
  if (bytes <= 256) return bytes == 0 ? 0 : static_cast<int>((bytes - 1) / 64);
  const int power = static_cast<int>(std::bit_width(bytes - 1)) - 1;
  const size_t quarter = size_t{1} << (power - 2);
  return 4 + 4 * (power - 8) + static_cast<int>((bytes - 1 - (size_t{1} << power)) / quarter);
}

size_t Allocator::block_size(size_t bytes) {
  if (bytes > std::numeric_limits<size_t>::max() - 63) return bytes;
  if (bytes > kLargestKept) return (bytes + 63) / 64 * 64;
  const int size_class = class_of(bytes);
  if (size_class < 4) return 64 * (static_cast<size_t>(size_class) + 1);
  const size_t power = size_t{1} << (8 + (size_class - 4) / 4);
  return power + power / 4 * (static_cast<size_t>((size_class - 4) % 4) + 1);
}

Status Allocator::out_of_memory(size_t requested) const {
  const size_t most = physical_memory(), held = live_ + scratch_;
  const size_t available = std::min(available_memory() + kept_, most - std::min(most, held));
  return Status::Error(Code::kOutOfMemory, "requested " + std::to_string(requested) + " bytes, " +
                                               std::to_string(available) + " bytes available");
}

bool Allocator::affords(size_t bytes) { return bytes < kWorthAsking || bytes <= available_memory(); }

// With the mutex held. A system that overcommits would grant anything and kill the process when it is touched, so
// that what cannot be there is refused here.
Status Allocator::take_from_system(size_t bytes, size_t requested, void** out) {
  const size_t most = physical_memory(), held = live_ + scratch_;
  if (bytes > most || held > most - bytes) return out_of_memory(requested);
  if (!affords(bytes)) {
    release_kept();
    if (!affords(bytes)) return out_of_memory(requested);
  }
  *out = system_allocate(bytes);
  if (*out == nullptr) {
    release_kept();
    *out = system_allocate(bytes);
  }
  return *out == nullptr ? out_of_memory(requested) : Status::Ok();
}

Status Allocator::allocate(size_t bytes, void** out) {
  const size_t size = block_size(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  Unused* kept = size <= kLargestKept ? first_[class_of(bytes)] : nullptr;
  if (kept != nullptr) {
    unlink(kept);
    *out = kept;
  } else {
    MOE_RETURN_IF_ERROR(take_from_system(size, bytes, out));
  }
  live_ += size;
  used_ += bytes;
  peak_ = std::max(peak_, live_);
  return Status::Ok();
}

void Allocator::release(void* data, size_t bytes) noexcept {
  if (data == nullptr) return;
  const size_t size = block_size(bytes);
  Unused* surplus = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    live_ -= size;
    used_ -= bytes;
    if (size > kLargestKept) {
      surplus = new (data) Unused{nullptr, nullptr, nullptr, nullptr, size, 0};
    } else {
      const int size_class = class_of(bytes);
      Unused* block = new (data) Unused{first_[size_class], nullptr, nullptr, newest_, size, size_class};
      if (block->next != nullptr) block->next->previous = block;
      if (newest_ != nullptr) newest_->newer = block;
      if (oldest_ == nullptr) oldest_ = block;
      first_[size_class] = newest_ = block;
      kept_ += size;
      while (kept_ > most_kept()) {
        Unused* old = oldest_;
        unlink(old);
        old->next = surplus;
        surplus = old;
      }
    }
  }
  // Unmapping takes long: outside the lock
  while (surplus != nullptr) {
    Unused* next = surplus->next;
    system_release(surplus, surplus->bytes);
    surplus = next;
  }
}

Status Allocator::allocate_scratch(size_t bytes, void** out) {
  std::lock_guard<std::mutex> lock(mutex_);
  MOE_RETURN_IF_ERROR(take_from_system(bytes, bytes, out));
  scratch_ += bytes;
  return Status::Ok();
}

void Allocator::release_scratch(void* data, size_t bytes) noexcept {
  if (data == nullptr) return;
  system_release(data, bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  scratch_ -= bytes;
}

void Allocator::trim() noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  release_kept();
}

void Allocator::release_kept() {
  while (oldest_ != nullptr) {
    Unused* block = oldest_;
    unlink(block);
    system_release(block, block->bytes);
  }
}

MemoryInfo Allocator::info() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return {used_, live_ + kept_ + scratch_};
}

// Up to the peak it costs no more than there was at once; half of that beyond it lets a layer alternate between two
// sets of blocks; small contexts keep what they have.
size_t Allocator::most_kept() const {
  return std::min(kMostKept, std::max({size_t{16} << 20, peak_ / 2, peak_ - live_}));
}

void Allocator::unlink(Unused* block) {
  (block->previous != nullptr ? block->previous->next : first_[block->size_class]) = block->next;
  if (block->next != nullptr) block->next->previous = block->previous;
  (block->newer != nullptr ? block->newer->older : newest_) = block->older;
  (block->older != nullptr ? block->older->newer : oldest_) = block->newer;
  kept_ -= block->bytes;
}

}  // namespace moe
