// SPDX-License-Identifier: Apache-2.0
// A small persistent pool. Workers spin for some microseconds after a job before they sleep, because the layers of a
// decoded token follow one another within that time and a wake-up costs as much as a small layer.
#include "core/pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "fewbit.h"

namespace fewbit {
namespace {

constexpr int kMaxWorkers = 255;
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int64_t units, int helpers, void (*work)(void*, int64_t), void* context) {
    grow(helpers);
    helpers = helpers < workers_ ? helpers : workers_;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work, context_ = context, units_ = units, shares_ = helpers + 1;
      next_.store(0, std::memory_order_relaxed);
      busy_.store(helpers, std::memory_order_relaxed);
      seats_.store(helpers, std::memory_order_release);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain();
    // Seats nobody has taken yet need not be waited for: the units are all handed out.
    const int untaken = seats_.exchange(0, std::memory_order_acq_rel);
    if (untaken > 0) busy_.fetch_sub(untaken, std::memory_order_acq_rel);
    for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; spin++) {
      if (spin < kSpins) relax(); else std::this_thread::yield();
    }
  }

 private:
  void grow(int wanted) {
    wanted = wanted < kMaxWorkers ? wanted : kMaxWorkers;
    const uint64_t seen = generation_.load(std::memory_order_relaxed);
    while (workers_ < wanted) {
      try {
        std::thread([this, seen] { loop(seen); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer do the same work
      }
      workers_++;
    }
  }

  // Neighbouring units lie side by side in memory, which is read faster from end to end than by turns: a thread takes some
  // at a time, fewer towards the end.
  void drain() {
    for (int64_t unit = next_.load(std::memory_order_relaxed); unit < units_;) {
      const int64_t share = (units_ - unit) / shares_, end = unit + (share > 1 ? share : 1);
      if (!next_.compare_exchange_weak(unit, end, std::memory_order_relaxed)) continue;
      while (unit < end) work_(context_, unit++);
      unit = next_.load(std::memory_order_relaxed);
    }
  }

  void loop(uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; spin++) relax();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      int seats = seats_.load(std::memory_order_acquire);
      while (seats > 0 && !seats_.compare_exchange_weak(seats, seats - 1, std::memory_order_acq_rel)) {}
      if (seats <= 0) continue;
      drain();
      busy_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> seats_{0}, busy_{0};
  std::atomic<int64_t> next_{0};
  int workers_ = 0;
  void (*work_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t units_ = 0, shares_ = 1;
};

// The pool belongs to who has claimed it. It is never destroyed: its threads may outlive static destructors.
Pool* pool = nullptr;
std::atomic<bool> claimed{false};

// A forked child has none of its parent's threads, so it starts a pool of its own; nor has it who had claimed that one.
void forget() {
  pool = nullptr;
  claimed.store(false);
}
[[maybe_unused]] const int told = pthread_atfork(nullptr, nullptr, forget);

std::atomic<int32_t> thread_limit{0};  // 0: each call says

}  // namespace

int32_t thread_count(int32_t threads) {
  const int32_t limit = thread_limit.load();
  return limit ? limit : threads;
}

void parallel(int64_t units, int32_t threads, void (*work)(void*, int64_t), void* context) {
  const int64_t helpers = (threads < units ? threads : units) - 1;
  if (helpers > 0) {
    bool free = false;
    if (claimed.compare_exchange_strong(free, true, std::memory_order_acq_rel)) {
      if (!pool) pool = new Pool;
      pool->run(units, static_cast<int>(helpers), work, context);
      claimed.store(false, std::memory_order_release);
      return;
    }
  }
  for (int64_t unit = 0; unit < units; unit++) work(context, unit);
}

}  // namespace fewbit

extern "C" void fewbit_set_threads(int32_t threads) { fewbit::thread_limit.store(threads < 0 ? 0 : threads); }
