// A team of threads for the time of one call.
#pragma once

namespace mla {

// Runs work(context, i) for every i in 0..count-1, on a team of `threads`, of which the system may give fewer. Returns
// when all are done. Uses the OpenMP team of the process if there is one (torch brings it), so that its waiting
// threads and ours never compete for the same cores; plain threads otherwise. `threads` should be the same from call to
// call, also where there is less to do: GCC's OpenMP ends and starts threads when a team is of another size.
void run_team(int threads, int count, void (*work)(void* context, int index), void* context);

template <class Work> void team(int threads, int count, Work&& work) {
  run_team(
      threads, count, [](void* context, int index) { (*static_cast<Work*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

} // namespace mla
