#include "parallel.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstddef>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace irlvla {
namespace {

constexpr int kMostWorkers = 1023;

// How long a thread looks before it sleeps. Waking a sleeper costs tens of microseconds, and scoring calls come in
// bursts with a few microseconds of Python between them.
constexpr std::chrono::microseconds kSpin{50};

thread_local bool inside_a_job = false;

template <class Condition>
void spin_until(Condition met) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (met()) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    std::this_thread::yield();  // with more threads than cores, the one we wait for may need this one
  } while (std::chrono::steady_clock::now() < end);
}

struct Job {
  void (*const body)(void*, int64_t);
  void* const context;
  const int64_t tasks;
  alignas(64) std::atomic<int64_t> next{0};

  std::mutex mutex{};
  int64_t failed_task = INT64_MAX;
  std::exception_ptr error{};

  void work() {
    inside_a_job = true;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        body(context, task);
      } catch (...) {
        // Every task below this one has begun already, so the lowest that throws does not depend on timing.
        const std::lock_guard lock(mutex);
        if (task < failed_task) {
          failed_task = task;
          error = std::current_exception();
        }
        next.store(tasks, std::memory_order_relaxed);
      }
    }
    inside_a_job = false;
  }
};

// Pools are never destroyed and their threads never joined: at exit they sleep, hold nothing and end with the process.
class Pool {
 public:
  // False if another thread is using the pool.
  bool run(Job& job, int helpers) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    hire(helpers);
    bool all;
    int sleepers;
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      seats_ = std::min(helpers, workers_);
      round_.fetch_add(1, std::memory_order_release);
      all = seats_ >= asleep_;
      sleepers = std::min(seats_, asleep_);
    }
    if (all) {
      if (sleepers > 0) wake_.notify_all();
    } else {
      for (int i = 0; i < sleepers; ++i) wake_.notify_one();
    }
    job.work();
    {
      const std::lock_guard lock(mutex_);
      seats_ = 0;  // who comes late stays out: the job lives on our stack
    }
    const auto finished = [this] { return working_.load(std::memory_order_acquire) == 0; };
    spin_until(finished);
    {
      std::unique_lock lock(mutex_);
      done_.wait(lock, finished);
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  void hire(int wanted) {
    try {
      for (; workers_ < std::min(wanted, kMostWorkers); ++workers_) {
        std::thread([this, round = round_.load(std::memory_order_relaxed)] { serve(round); }).detach();
      }
    } catch (const std::exception&) {  // no more threads to be had: do with those there are
    }
  }

  void serve(uint64_t seen) {
    const auto called = [&] { return round_.load(std::memory_order_acquire) != seen; };
    for (;;) {
      spin_until(called);
      std::unique_lock lock(mutex_);
      ++asleep_;
      wake_.wait(lock, called);
      --asleep_;
      seen = round_.load(std::memory_order_relaxed);
      if (seats_ == 0) continue;
      --seats_;
      Job& job = *job_;
      working_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job.work();
      lock.lock();
      if (working_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  std::atomic<bool> busy_{false};  // whoever sets it runs a job and may hire
  int workers_ = 0;
  std::mutex mutex_;                // for writing all that follows
  std::atomic<uint64_t> round_{0};  // jobs so far
  std::atomic<int> working_{0};     // workers inside the job
  int asleep_ = 0;
  int seats_ = 0;  // workers that may still join the job
  Job* job_ = nullptr;
  std::condition_variable wake_;
  std::condition_variable done_;
};

std::atomic<Pool*> current{nullptr};

// In a forked child the pool's threads are gone and its locks are as the fork found them: leave it and start afresh.
// No lock is taken to make a pool, so there is none that a fork could leave held.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found == nullptr) {
    auto* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

// CPUs granted by the quota of the cgroup in one folder (v2, else v1), rounded up; INT_MAX without one.
int quota_of(const std::string& folder) {
  std::string quota;
  double period = 0;
  if (!(std::ifstream(folder + "/cpu.max") >> quota >> period)) {
    std::ifstream(folder + "/cpu.cfs_quota_us") >> quota;
    std::ifstream(folder + "/cpu.cfs_period_us") >> period;
  }
  const double granted = std::atof(quota.c_str());  // "max" and "-1" mean no limit
  return granted > 0 && period > 0 ? static_cast<int>(std::min(1e9, std::ceil(granted / period))) : INT_MAX;
}

// The least quota along the path from this process's cgroups, listed in the file `self`, up to the root at `mount`.
int cgroup_quota(const std::string& mount, const std::string& self) {
  int least = INT_MAX;
  std::ifstream file(self);
  for (std::string line; std::getline(file, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    for (const std::string& root : {mount + (v2 ? "" : "/" + controllers), mount + (v2 ? "/unified" : "/cpu")}) {
      // A container may see its group's path on the host but mounted as the root: try every prefix, missing or not.
      for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
        least = std::min(least, quota_of(root + path));
        if (path.find('/') == std::string::npos) break;
      }
    }
  }
  return least;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  if (threads > 1 && tasks > 1 && !inside_a_job) {
    Job job{body, context, tasks};
    const int64_t helpers = std::min<int64_t>(threads, tasks) - 1;
    if (pool().run(job, static_cast<int>(helpers))) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

int available_threads() {
  static std::atomic<int> quota{0};  // files are slow to ask, and quotas rarely change
  int least = quota.load(std::memory_order_relaxed);
  if (least == 0) quota = least = cgroup_quota("/sys/fs/cgroup", "/proc/self/cgroup");
  int cpus = 0;
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#endif
  if (cpus == 0) cpus = static_cast<int>(std::thread::hardware_concurrency());  // it reads files
  return std::max(1, std::min(least, cpus));
}

char* thread_memory(int64_t bytes) {
  static thread_local std::vector<double> memory;
  if (memory.size() * sizeof(double) < static_cast<std::size_t>(bytes)) memory.resize(bytes / sizeof(double) + 1);
  return reinterpret_cast<char*>(memory.data());
}

}  // namespace irlvla
