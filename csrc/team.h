// The threads that torch computes with, for a routine called between two of torch's own.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "threads.h"

namespace mmfast {

// Calls work() on up to `threads` threads at once; work must share out what there is to do, and must not throw.
//
// torch's OpenMP workers spin for milliseconds after each of torch's loops, and where all cores are in use a new thread
// waits as long for its turn. So those workers themselves are called, if there are any: torch loads its OpenMP library
// for all to see, and the entry has one name in GNU's, LLVM's and Intel's. As with torch's own loops, a child of fork()
// can call this only with one thread, which is what torch's data workers have.
template <class Work>
void on_team(int threads, const Work& work) {
  if (threads <= 1) return work();
  using Entry = void (*)(void (*)(void*), void*, unsigned, unsigned);
  const auto entry = reinterpret_cast<Entry>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (entry != nullptr) {
    entry([](void* given) { (*static_cast<const Work*>(given))(); }, const_cast<Work*>(&work), threads, 0);
  } else {
    parallel_for(threads, 1, threads, [&](int64_t, int64_t) { work(); });
  }
}

// Calls work(begin, end) over [0, count) on a team, in pieces of `grain` items at least. work must not throw.
template <class Work>
void share_range(int64_t count, int64_t grain, int threads, const Work& work) {
  constexpr int64_t kPiecesAThread = 4;
  const int64_t most = std::max<int64_t>(count / std::max<int64_t>(grain, 1), 1);
  const int64_t team = std::min<int64_t>(most, std::max(threads, 1));
  const int64_t pieces = team == 1 ? 1 : std::min(most, kPiecesAThread * team);
  const auto bound = [&](int64_t piece) { return count / pieces * piece + std::min(piece, count % pieces); };
  std::atomic<int64_t> next{0};
  on_team(static_cast<int>(team), [&] {
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) work(bound(piece), bound(piece + 1));
  });
}

}  // namespace mmfast
