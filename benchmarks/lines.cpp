// Reads given lines of memory and nothing else, on the threads that torch computes with: what a gather of the pixels in
// them cannot do without. Compiled by host_kernels.py, with csrc's headers.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "team.h"

// base: a multiple of 64. line: [count], from there on. The sum keeps the reading from being dropped.
extern "C" uint64_t read_lines(const char* base, const int32_t* line, int64_t count, int threads) {
  constexpr int64_t kBytes = 64, kAhead = 256, kGrain = 4096;
  std::atomic<uint64_t> total{0};
  mmfast::share_range(count, kGrain, threads, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      __builtin_prefetch(base + kBytes * line[std::min(i + kAhead, end - 1)], 0, 3);
      sum += *reinterpret_cast<const uint64_t*>(base + kBytes * line[i]);
    }
    total += sum;
  });
  return total;
}
