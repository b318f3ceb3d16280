// The threads of one context: the caller and up to N-1 workers, which start with the first loop worth sharing.
//
// A loop is cut into chunks of `grain` items whatever the number of threads. Each thread begins with consecutive chunks
// of its own, so that it finds in its cache what neighbours have in common, and then helps with those of others. A
// function that writes only what belongs to its items therefore gives the same bits on 1 thread and on 64. Idle threads
// spin for at most 50 us, because ops follow each other closely, and then sleep.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace moe {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads), shares_(static_cast<size_t>(threads_)) {}
  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls fn(begin, end) for consecutive pieces of [0, n), each at most `grain` long, and returns when all have run.
  // `fn` must not throw. Inside `fn`, or while another thread's loop is running, the loop runs on the caller alone.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, F&& fn) {
    using Fn = std::remove_reference_t<F>;
    run(
        n, grain, [](void* f, int64_t begin, int64_t end) { (*static_cast<Fn*>(f))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // Which thread of its pool this is: 0 for every caller, 1 .. threads()-1 for workers. Indexes per-thread scratch.
  static int lane();

  // From any thread: loops stop before their next chunk, now and ever after. What they were to write is undefined.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }

  // Ends the workers; loops still work afterwards, on their caller alone. Not while a loop is running.
  void stop();

 private:
  using Invoke = void (*)(void* fn, int64_t begin, int64_t end);
  struct Job {
    Invoke invoke;
    void* fn;
    int64_t n, grain;
  };
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};  // chunk
    int64_t end = 0;
  };

  void run(int64_t n, int64_t grain, Invoke invoke, void* fn);
  void take_chunks(const Job& job);
  void start_workers();
  void work(int lane);

  const int threads_;
  std::atomic<bool> cancelled_{false};
  std::mutex turn_;  // held by the thread whose loop is being shared

  std::mutex mutex_;  // guards what follows; the atomics are also read without it, while spinning
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  std::vector<Share> shares_;  // of that job, one for each thread
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  std::atomic<bool> stopping_{false};
  int sleepers_ = 0;
  bool started_ = false;
  std::vector<std::thread> workers_;
};

// Waits for `ready()` for a while without sleeping; true when it came. Yields, for the core may be wanted.
template <class Ready>
bool spin_until(Ready&& ready, std::chrono::microseconds most = std::chrono::microseconds(50)) {
  const auto end = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < 16; i++) {
      if (ready()) return true;
    }
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace moe
