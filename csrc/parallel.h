// Work in parallel, on torch's threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace fc {

// Calls f(0) to f(tasks - 1), each once, on whichever thread is free: tasks differ in length, and so do cores in speed.
template <class F>
void for_each_task(int64_t tasks, const F& f) {
  const int64_t workers = std::min<int64_t>(tasks, at::get_num_threads());
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

}  // namespace fc
