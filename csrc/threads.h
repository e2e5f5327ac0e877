// A loop over threads started for this call alone: nothing outlives it, so it is safe after fork() in a data worker.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace mmfast {

// Calls work(begin, end) over [0, count) on at most `threads` threads, each with `grain` items at least. work must not
// throw: check the input before.
template <class Work>
void parallel_for(int64_t count, int64_t grain, int threads, const Work& work) {
  const int64_t parts = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, std::max(threads, 1));
  const auto bound = [&](int64_t part) { return count / parts * part + std::min(part, count % parts); };
  std::vector<std::thread> started;
  started.reserve(parts - 1);
  int64_t part = 1;
  try {
    for (; part < parts; ++part) started.emplace_back(work, bound(part), bound(part + 1));
  } catch (const std::system_error&) {
    // No more threads to be had: the rest runs on this one.
  }
  work(bound(0), bound(1));
  if (part < parts) work(bound(part), count);
  for (std::thread& thread : started) thread.join();
}

}  // namespace mmfast
