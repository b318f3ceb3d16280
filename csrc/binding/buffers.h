// Handles: what JavaScript holds instead of pointers. A handle is a number made of a slot and a generation, so a
// stale or invented one is noticed, never followed. A buffer lives as long as a handle or work in flight refers to it.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../backend.h"

namespace moe {

// Why a buffer's content is not to be trusted: the work that should have made it failed.
struct Fault {
  Status status;
  std::string op;
};

struct Buffer {
  std::shared_ptr<Backend> backend;
  void* data = nullptr;
  size_t bytes = 0;
  DType dtype = DType::kF32;
  int64_t elements = 0;
  std::optional<ExpertsLayout> experts;  // packed experts instead of a tensor
  bool referenced = false;               // JS thread: some work has been given this buffer
  uint64_t capture = 0;                  // whose graph its memory belongs to, by Recording::number; 0 for none
  std::shared_ptr<const Fault> fault;    // queue: set by the work that writes the buffer

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (data != nullptr) backend->release(data, bytes);
  }
};

// Slots with generations, reused in turn so that they wear evenly; a slot that has been through all its generations
// is never used again. Used on the JS thread only. Handle 0 is nothing.
template <class T, uint32_t kGenerations = uint32_t{1} << 29>
class HandleTable {
 public:
  // 0 when there is no room: more objects than any process has had.
  double add(std::shared_ptr<T> object) {
    uint32_t slot;
    if (free_.empty()) {
      if (slots_.size() == static_cast<size_t>(kSlots)) return 0;
      slot = static_cast<uint32_t>(slots_.size());
      slots_.push_back({});
    } else {
      slot = free_.front();
      free_.pop_front();
    }
    slots_[slot].object = std::move(object);
    return static_cast<double>(slots_[slot].generation) * kSlots + slot;
  }

  const std::shared_ptr<T>* find(double handle) const {
    const Slot* slot = locate(handle);
    return slot == nullptr ? nullptr : &slot->object;
  }

  std::shared_ptr<T> remove(double handle) {
    Slot* slot = const_cast<Slot*>(locate(handle));
    if (slot == nullptr) return nullptr;
    std::shared_ptr<T> object = std::move(slot->object);
    slot->object = nullptr;
    if (++slot->generation < kGenerations) free_.push_back(static_cast<uint32_t>(slot - slots_.data()));
    return object;
  }

  void clear() {
    slots_.clear();
    free_.clear();
  }

 private:
  static constexpr double kSlots = 16777216.0;  // 2^24 slots and 2^29 generations fit a double
  struct Slot {
    std::shared_ptr<T> object;
    uint32_t generation = 1;
  };

  const Slot* locate(double handle) const {
    if (!(handle >= kSlots && handle < 9007199254740992.0)) return nullptr;
    const auto bits = static_cast<uint64_t>(handle);
    const uint64_t slot = bits % static_cast<uint64_t>(kSlots);
    if (static_cast<double>(bits) != handle || slot >= slots_.size()) return nullptr;
    const Slot& found = slots_[slot];
    const bool live = found.object != nullptr && found.generation == bits / static_cast<uint64_t>(kSlots);
    return live ? &found : nullptr;
  }

  std::vector<Slot> slots_;
  std::deque<uint32_t> free_;
};

}  // namespace moe
