#include "queue.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "../common/thread_pool.h"

namespace moe {

namespace {

// Who waits has nothing else to do, and sleep ends 20 us late where it lets a virtual processor go idle.
constexpr std::chrono::microseconds kSpinning{200};

}  // namespace

void Queue::submit(std::function<void()> work) {
  Status status = push(work);
  if (status.ok()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (fault_.ok()) fault_ = std::move(status);
}

void Queue::notify(std::function<void(Status)> done) {
  Status status;
  try {
    std::function<void()> work = [this, done] {
      Status fault;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        fault = fault_;
      }
      done(std::move(fault));
    };
    status = push(work);
  } catch (const std::bad_alloc&) {
    status = Status::Error(Code::kOutOfMemory, "no memory left to queue work");
  }
  if (!status.ok()) done(std::move(status));
}

// An error means that `work` was not queued.
Status Queue::push(std::function<void()>& work) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return Status::Ok();
  try {
    if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
    work_.push_back(std::move(work));
  } catch (const std::bad_alloc&) {
    return Status::Error(Code::kOutOfMemory, "no memory left to queue work");
  } catch (const std::system_error& error) {
    return Status::Error(Code::kBackend, std::string("cannot start the queue's thread: ") + error.what());
  }
  submitted_.fetch_add(1, std::memory_order_release);
  wake_.notify_one();
  return Status::Ok();
}

void Queue::run() {
  uint64_t done = 0;
  const auto called = [&] {
    return stopping_.load(std::memory_order_relaxed) || submitted_.load(std::memory_order_acquire) != done;
  };
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (!called()) {
      lock.unlock();
      spin_until(called);
      lock.lock();
    }
    wake_.wait(lock, called);
    if (stopping_) return;
    std::function<void()> work = std::move(work_.front());
    work_.pop_front();
    lock.unlock();
    Status fault;
    try {
      work();
    } catch (const std::exception& error) {
      fault = Status::Error(Code::kInternal, std::string("queued work threw: ") + error.what());
    } catch (...) {
      fault = Status::Error(Code::kInternal, "queued work threw");
    }
    work = nullptr;
    lock.lock();
    if (!fault.ok() && fault_.ok()) fault_ = std::move(fault);
    finished_.store(++done, std::memory_order_release);
    if (done < awaited_) continue;
    awaited_ = kNobody;  // who waits for a later one says so again
    progress_.notify_all();
  }
}

Status Queue::wait() {
  const uint64_t ticket = submitted_.load(std::memory_order_relaxed);
  const auto reached = [&] {
    return stopping_.load(std::memory_order_relaxed) || finished_.load(std::memory_order_acquire) >= ticket;
  };
  spin_until(reached, kSpinning);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!reached()) {
    awaited_ = std::min(awaited_, ticket);
    progress_.wait(lock);
  }
  if (!fault_.ok()) return fault_;
  if (finished_ < ticket) return Status::Error(Code::kAborted, "the context was closed before its work was done");
  return Status::Ok();
}

void Queue::stop() {
  std::deque<std::function<void()>> abandoned;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    abandoned.swap(work_);
  }
  wake_.notify_all();
  progress_.notify_all();
  if (thread_.joinable()) thread_.join();
}

}  // namespace moe
