#include "thread_pool.h"

#include <algorithm>
#include <new>
#include <system_error>

namespace moe {

namespace {
thread_local int this_lane = 0;
thread_local bool inside_loop = false;
}  // namespace

int ThreadPool::lane() { return this_lane; }

void ThreadPool::take_chunks(const Job& job) {
  for (int i = 0; i < threads_; i++) {
    Share& share = shares_[static_cast<size_t>((this_lane + i) % threads_)];
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= share.end) break;
      if (cancelled()) return;
      const int64_t begin = chunk * job.grain;
      job.invoke(job.fn, begin, begin + std::min(job.grain, job.n - begin));
    }
  }
}

void ThreadPool::run(int64_t n, int64_t grain, Invoke invoke, void* fn) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  Job job{invoke, fn, n, grain};
  const int64_t chunks = (n - 1) / grain + 1;
  std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
  if (threads_ == 1 || chunks == 1 || inside_loop || !turn.try_lock()) {
    for (int64_t begin = 0; begin < n && !cancelled(); begin += grain) invoke(fn, begin, std::min(n, begin + grain));
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!started_ && !stopping_) start_workers();
    for (int64_t i = 0; i < threads_; i++) {
      Share& share = shares_[static_cast<size_t>(i)];
      share.next.store(chunks / threads_ * i + std::min(i, chunks % threads_), std::memory_order_relaxed);
      share.end = chunks / threads_ * (i + 1) + std::min(i + 1, chunks % threads_);
    }
    job_ = &job;
    generation_.fetch_add(1, std::memory_order_release);
    const int64_t wanted = std::min<int64_t>(chunks, threads_) - 1;
    if (wanted >= sleepers_) {
      wake_.notify_all();
    } else {
      for (int64_t i = 0; i < wanted; i++) wake_.notify_one();
    }
  }
  inside_loop = true;
  take_chunks(job);
  inside_loop = false;

  // `job` lives on this stack: let nobody else in, then wait for those who are.
  std::unique_lock<std::mutex> lock(mutex_);
  job_ = nullptr;
  if (active_ == 0) return;
  lock.unlock();
  const auto all_left = [this] { return active_.load(std::memory_order_acquire) == 0; };
  if (spin_until(all_left)) {
    lock.lock();  // whoever left last holds the mutex until it is done with this pool's state
    return;
  }
  lock.lock();
  idle_.wait(lock, all_left);
}

void ThreadPool::start_workers() {
  started_ = true;
  try {
    workers_.reserve(static_cast<size_t>(threads_ - 1));
    for (int lane = 1; lane < threads_; lane++) workers_.emplace_back([this, lane] { work(lane); });
  } catch (const std::system_error&) {
    // The system gives no more threads; those there are do all the work, with the same result.
  } catch (const std::bad_alloc&) {
  }
}

void ThreadPool::work(int lane) {
  this_lane = lane;
  inside_loop = true;
  uint64_t seen = 0;
  const auto called = [&] {
    return stopping_.load(std::memory_order_relaxed) || generation_.load(std::memory_order_acquire) != seen;
  };
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (!called()) {
      lock.unlock();
      spin_until(called);
      lock.lock();
    }
    sleepers_++;
    wake_.wait(lock, called);
    sleepers_--;
    if (stopping_) return;
    seen = generation_;
    if (job_ == nullptr) continue;  // came too late
    const Job& job = *job_;
    active_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    take_chunks(job);
    lock.lock();
    if (active_.fetch_sub(1, std::memory_order_release) == 1) idle_.notify_one();
  }
}

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

}  // namespace moe
