// What kernels run on: handles, the log of faults, the thread pool, the queue, the allocator and the backend around
// them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/binding/buffers.h"
#include "../../../csrc/binding/task.h"
#include "testing.h"

namespace moe::testing {

void test_handles() {
  HandleTable<int, 4> table;  // slots that wear out after three uses
  std::vector<double> seen;
  for (int i = 0; i < 1000; i++) {
    const double handle = table.add(std::make_shared<int>(i));
    const std::shared_ptr<int>* found = table.find(handle);
    check(found != nullptr && **found == i, "a handle finds its object, however often slots were used");
    check(std::find(seen.begin(), seen.end(), handle) == seen.end(), "a handle is never given out twice");
    seen.push_back(handle);
    check(table.remove(handle) != nullptr && table.find(handle) == nullptr, "a removed handle finds nothing");
  }
  for (const double forged : {0.0, -1.0, 0.5, 1e300, std::numeric_limits<double>::quiet_NaN(), 9007199254740992.0}) {
    check(table.find(forged) == nullptr, "an invented handle finds nothing");
  }
}

void test_faults() {
  const auto fault = [](const char* op) { return std::make_shared<const Fault>(Fault{Status{}, op}); };
  FaultLog log;
  const auto first = fault("first"), second = fault("second");
  log.add(first);
  log.add(second);
  log.reported(first);
  check(log.take() == second, "a failure that was told of does not hide the next");
  check(log.take() == nullptr, "a failure is told once");
}

void test_pool() {
  current = "pool";
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 7, 1000}) {
      std::vector<int> seen(static_cast<size_t>(n));
      std::atomic<bool> lanes_fit{true};
      for (int repeat = 0; repeat < 20; repeat++) {
        pool.parallel_for(n, 3, [&](int64_t begin, int64_t end) {
          if (ThreadPool::lane() < 0 || ThreadPool::lane() >= threads || end - begin > 3) lanes_fit = false;
          for (int64_t i = begin; i < end; i++) seen[static_cast<size_t>(i)]++;
        });
      }
      check(std::all_of(seen.begin(), seen.end(), [](int s) { return s == 20; }), "every item once per loop");
      check(lanes_fit, "lanes and grain");
    }
    std::atomic<int> inner{0};
    pool.parallel_for(4, 1, [&](int64_t, int64_t) {
      pool.parallel_for(10, 1, [&](int64_t begin, int64_t end) { inner += static_cast<int>(end - begin); });
    });
    check(inner == 40, "nested loops");

    std::atomic<int> two_callers{0};
    const auto loop = [&] {
      for (int i = 0; i < 50; i++) pool.parallel_for(16, 1, [&](int64_t, int64_t) { two_callers++; });
    };
    std::thread other(loop);
    loop();
    other.join();
    check(two_callers == 1600, "two callers at once");

    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the workers sleep by now
    std::atomic<int> after{0};
    pool.parallel_for(8, 1, [&](int64_t, int64_t) { after++; });
    check(after == 8, "wakes sleeping workers");
    std::atomic<int> ran{0};
    pool.parallel_for(100000, 1, [&](int64_t, int64_t) {
      if (ran++ == 10) pool.cancel();
    });
    check(ran < 100000 && pool.cancelled(), "cancelled");
    pool.stop();
    pool.stop();
  }
  ThreadPool stopped(4);
  stopped.stop();
  int ran = 0;
  stopped.parallel_for(8, 1, [&](int64_t, int64_t) { ran++; });
  check(ran == 8, "runs on the caller after stop");
}

void test_queue() {
  current = "queue";
  CpuBackend b(2);
  ok(b.wait());
  std::vector<int> order;
  std::atomic<int> notified{0};
  for (int i = 0; i < 200; i++) {
    b.submit([&order, i] { order.push_back(i); });
    if (i % 50 == 49) b.notify([&, i](Status s) { notified += s.ok() && order.size() == static_cast<size_t>(i) + 1; });
  }
  ok(b.wait());
  check(order.size() == 200 && std::is_sorted(order.begin(), order.end()), "in order");
  check(notified == 4, "notified after what came before");
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  std::promise<bool> done;
  b.notify([&](Status s) { done.set_value(s.ok()); });
  check(done.get_future().get(), "wakes a sleeping queue");

  // stop() with work pending: the running piece ends early, the rest is destroyed unrun
  auto alive = std::make_shared<int>(0);
  std::atomic<int> begun{0};
  std::atomic<bool> stopped_early{false};
  Status inside;
  b.submit([&, alive] {
    begun++;
    const auto piece = [](int64_t, int64_t) { std::this_thread::sleep_for(std::chrono::microseconds(200)); };
    b.pool().parallel_for(1000000, 1, piece);
    stopped_early = b.pool().cancelled();
    inside = b.finished();
  });
  for (int i = 0; i < 10; i++) b.submit([&, alive] { begun++; });
  b.notify([&, alive](Status) { begun++; });
  check(alive.use_count() == 13 || begun == 1, "queued work holds what it needs");
  while (begun == 0) std::this_thread::yield();
  b.stop();
  check(begun == 1 && alive.use_count() == 1, "queued work abandoned and destroyed");
  check(stopped_early && inside.code == Code::kAborted, "running work stopped early");
  b.submit([&, alive] { begun++; });
  b.notify([&, alive](Status) { begun++; });
  check(alive.use_count() == 1 && begun == 1, "nothing runs after stop");
  check(b.wait().code == Code::kOk || b.wait().code == Code::kAborted, "wait after stop returns");
  b.stop();

  CpuBackend never_used(4);
  never_used.stop();
  CpuBackend throwing(1);
  throwing.submit([] { throw std::runtime_error("lost"); });
  check(throwing.wait().code == Code::kInternal, "an exception is noticed");
}

void test_allocator() {
  current = "allocator";
  for (size_t bytes :
       {size_t{0}, size_t{1}, size_t{64}, size_t{65}, size_t{256}, size_t{257}, size_t{320}, size_t{321}, size_t{1000},
        size_t{1} << 20, (size_t{1} << 20) + 1, size_t{64} << 20, (size_t{64} << 20) + 1}) {
    const size_t block = Allocator::block_size(bytes);
    check(block >= bytes && block % 64 == 0 && block >= 64, "block of " + std::to_string(bytes));
    check(bytes < 256 || block <= bytes + bytes / 4 + 64, "waste of " + std::to_string(bytes));
  }
  CpuBackend b(2);
  std::map<void*, size_t> live;
  Random r(5);
  for (int i = 0; i < 4000; i++) {
    if (r.below(2) == 0 || live.empty()) {
      const size_t bytes = static_cast<size_t>(r.below(5)) << r.below(20);
      void* data = nullptr;
      ok(b.allocate(bytes, &data));
      check(data != nullptr && reinterpret_cast<uintptr_t>(data) % 64 == 0 && live.count(data) == 0, "block");
      std::memset(data, 0xab, bytes);
      live[data] = bytes;
    } else {
      auto it = std::next(live.begin(), r.below(static_cast<int>(live.size())));
      std::thread releasing([&] { b.release(it->first, it->second); });
      releasing.join();
      live.erase(it);
    }
  }
  size_t used = 0;
  for (const auto& [data, bytes] : live) used += bytes;
  check(b.memory().used == used && b.memory().reserved >= used, "used is what live tensors hold");
  for (const auto& [data, bytes] : live) b.release(data, bytes);
  check(b.memory().used == 0, "nothing used in the end");
  check(b.memory().reserved <= Allocator::kMostKept, "bounded retention");

  void *first = nullptr, *second = nullptr;
  ok(b.allocate(100000, &first));
  b.release(first, 100000);
  ok(b.allocate(99000, &second));
  check(first == second, "a block is used again");
  b.release(second, 99000);

  CpuBackend fresh(1);
  for (int i = 0; i < 40; i++) {  // far more than may be kept
    const size_t bytes = (size_t{1} << 20) << i % 2;
    std::vector<void*> blocks(i % 2 == 0 ? 16 : 8);
    for (void*& block : blocks) ok(fresh.allocate(bytes, &block));
    for (void* block : blocks) fresh.release(block, bytes);
  }
  check(fresh.memory().reserved <= size_t{17} << 20, "retention follows the peak");
  void *large = nullptr, *again = nullptr;
  ok(fresh.allocate(size_t{48} << 20, &large));
  fresh.release(large, size_t{48} << 20);
  ok(fresh.allocate(size_t{48} << 20, &again));
  check(large == again, "a block that was all of the peak is used again");
  fresh.release(again, size_t{48} << 20);
  check(fresh.memory().reserved <= size_t{49} << 20, "no more is kept than there was at once");

  void* none = nullptr;
  for (size_t bytes : {size_t{1} << 50, std::numeric_limits<size_t>::max()}) {
    const Status status = b.allocate(bytes, &none);
    check(status.code == Code::kOutOfMemory && none == nullptr, "absurd size refused");
    check(status.text.starts_with("requested " + std::to_string(bytes) + " bytes, ") &&
              status.text.ends_with(" bytes available"),
          "text: " + status.text);
  }
  ExpertsLayout huge{65536, int64_t{1} << 31, int64_t{1} << 30, DType::kF32, true, {}};
  check(b.allocate(b.expert_bytes(huge), &none).code == Code::kOutOfMemory, "experts beyond 64 bits of bytes");
  {
    Workspace workspace(b);
    float* scratch = nullptr;
    check(workspace.take(int64_t{1} << 48, &scratch).code == Code::kOutOfMemory, "scratch out of memory");
    for (int i = 0; i < 3; i++) {
      ok(workspace.take(100000, &scratch));
      std::fill_n(scratch, 100000, 1.0f);
    }
  }
  check(b.memory().used == 0, "scratch is not used memory");
  const Probe probe = probe_backend();
  check(probe.state == "ready" && probe.devices.size() == 1 && !probe.devices[0].empty(), "probe");
  std::unique_ptr<Backend> made;
  ok(create_backend({}, &made));
  check(create_backend({1, 0, {}}, &made).code == Code::kInvalidArg, "there is no second CPU");
  check(create_backend({0, 1, "mmx"}, &made).code == Code::kUnsupported, "nobody has kernels for MMX");
  check(create_backend({0, 1, "scalar"}, &made).ok(), "every processor runs the portable kernels");
  const std::vector<char> from(3000000, 'x');
  std::vector<char> to(from.size());
  ok(b.copy_in(to.data(), from.data(), from.size()));
  check(to == from, "copies");
  ok(b.fill_zero(to.data(), to.size()));
  check(to == std::vector<char>(from.size()), "zeroes");
}

}  // namespace moe::testing
