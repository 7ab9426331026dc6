// Work in parallel, on torch's threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace fc {

// Calls f(0) to f(tasks - 1), each once, on at most `threads` threads. A thread begins with a share of its own, the
// same in every call with as many tasks and threads, so that it finds in its cache what it wrote before. Then it helps
// the others, since tasks differ in length and cores in speed.
template <class F>
void for_each_task(int64_t tasks, const F& f, int64_t threads = at::get_num_threads()) {
  const int64_t workers = std::min<int64_t>({tasks, threads, at::get_num_threads()});
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(workers);
  for (int64_t i = 0; i < workers; ++i) {
    shares[i].next = i * tasks / workers;
    shares[i].end = (i + 1) * tasks / workers;
  }
  at::parallel_for(0, workers, 1, [&](int64_t own, int64_t) {
    for (int64_t i = 0; i < workers; ++i) {
      Share& share = shares[(own + i) % workers];
      if (share.next >= share.end) continue;  // reading first does not take the cache line from other threads
      for (int64_t task = share.next++; task < share.end; task = share.next++) f(task);
    }
  });
}

}  // namespace fc
