// Threads that survive fork: one small pool per process, made on first use. No OpenMP: libgomp hangs a forked child.
//
// This header is compiled once per instruction set, so it takes nothing from the standard library that emits code:
// the linker would keep one copy of it for all, perhaps the one that an old CPU cannot run.
#pragma once

#include <cstdint>
#include <type_traits>

namespace irlvla {

// Calls body(context, task) for every task in [0, tasks), on up to `threads` threads; the caller is one of them.
//
//  * Tasks are handed out one at a time and in order. How work is cut never depends on the number of threads, so
//    neither do results.
//  * threads <= 1, nested calls, and calls made while another thread has the pool all run inline.
//  * Throwing: the caller gets the exception of the lowest task that threw, as from a plain loop; tasks not yet begun
//    are dropped.
//  * A forked child starts a pool of its own, whatever its parent's was doing. A body itself must not fork.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// The same for anything callable with a task.
template <class F>
void parallel_for(int64_t tasks, int threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_for(
      tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// CPUs that this process may use: the least of the machine's, the affinity mask and the cgroup quota (rounded up).
int available_threads();

/// Working memory of this thread, for doubles too; it stays until the thread asks for more.
char* thread_memory(int64_t bytes);

}  // namespace irlvla
