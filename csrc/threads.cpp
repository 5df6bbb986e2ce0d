#include "threads.h"

#include <atomic>
#include <dlfcn.h>
#include <exception>
#include <thread>
#include <vector>

namespace mla {
namespace {

struct Job {
  void (*work)(void*, int);
  void* context;
  int count;
  std::atomic<int> next{0};
};

// A team may be smaller than what was asked for: each member takes indices until none is left.
void member(void* argument) {
  Job& job = *static_cast<Job*>(argument);
  for (int i = job.next++; i < job.count; i = job.next++) job.work(job.context, i);
}

// The entry point that GCC's and LLVM's OpenMP runtimes share. Looked up rather than linked: linking would load
// a second runtime, with a second team that spins beside torch's.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

} // namespace

void run_team(int threads, int count, void (*work)(void*, int), void* context) {
  if (count == 1) return work(context, 0);
  Job job{work, context, count};
  if (Parallel parallel = openmp()) {
    parallel(member, &job, static_cast<unsigned>(threads > count ? threads : count), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(count) - 1);
  try {
    for (int i = 1; i < count; ++i) others.emplace_back(member, &job);
  } catch (const std::exception&) {
    // The system gives no more threads, or has no memory for them: those that run take all the work.
  }
  member(&job);
  for (std::thread& other : others) other.join();
}

} // namespace mla
