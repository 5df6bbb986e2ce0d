// A team of threads for the time of one call.
#pragma once

namespace mla {

// Runs work(context, i) for every i in 0..count-1, on `count` threads where the system gives them. Returns when
// all are done. Uses the OpenMP team of the process if there is one (torch brings it), so that its waiting
// threads and ours never compete for the same cores; plain threads otherwise.
void run_team(int count, void (*work)(void* context, int index), void* context);

template <class Work> void team(int count, Work&& work) {
  run_team(
      count, [](void* context, int index) { (*static_cast<Work*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

} // namespace mla
