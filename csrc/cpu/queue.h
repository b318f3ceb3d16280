// The in-order queue of one CPU context and its thread, which starts with the first work. Work runs outside the lock
// and is destroyed on the thread that ran it, or by stop().
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>

#include "../common/status.h"

namespace moe {

class Queue {
 public:
  Queue() = default;
  ~Queue() { stop(); }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  void submit(std::function<void()> work);
  // `done` runs on the queue's thread, or at once where there is none, with the first thing that went wrong with the
  // queue itself, if any.
  void notify(std::function<void(Status)> done);
  Status wait();
  // Destroys what has not begun and waits for what is running. Later submissions are destroyed at once.
  void stop();

 private:
  static constexpr uint64_t kNobody = std::numeric_limits<uint64_t>::max();

  Status push(std::function<void()>& work);
  void run();

  std::mutex mutex_;
  std::condition_variable wake_, progress_;
  std::deque<std::function<void()>> work_;
  std::atomic<uint64_t> submitted_{0}, finished_{0};
  uint64_t awaited_ = kNobody;  // the first that somebody sleeps for: waking costs more than many a kernel
  std::atomic<bool> stopping_{false};
  Status fault_;  // work was lost: whoever waits has to know
  std::thread thread_;
};

}  // namespace moe
