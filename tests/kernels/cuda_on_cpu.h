// Runs a CUDA block on the CPU, one thread per CUDA thread; shuffles, votes and barriers are emulated. Include it
// before the source of the kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

// Set by the mutation tests: see test_contrastive_tiles.py.
inline int mutation = 0;

namespace emulation {

constexpr int kMostThreads = 1024;
inline thread_local int this_thread;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline float float_slots[kMostThreads];
inline int int_slots[kMostThreads];

inline void sync_block() { block_barrier->arrive_and_wait(); }
inline void sync_warp() { warp_barriers[this_thread / 32]->arrive_and_wait(); }

// Calls body(thread) on every thread of a block.
template <class Body>
void run_block(int count, Body body) {
  block_barrier = std::make_unique<std::barrier<>>(count);
  warp_barriers.clear();
  for (int first = 0; first < count; first += 32) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> threads;
  for (int t = 0; t < count; ++t) {
    threads.emplace_back([&body, t] {
      this_thread = t;
      body(t);
      // A thread that has left must not hold up the others.
      warp_barriers[t / 32]->arrive_and_drop();
      block_barrier->arrive_and_drop();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace emulation

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using namespace emulation;
  float_slots[this_thread] = value;
  sync_warp();
  const float result = float_slots[this_thread ^ mask];
  sync_warp();
  return result;
}

inline int __any_sync(unsigned, bool value) {
  using namespace emulation;
  int_slots[this_thread] = value;
  sync_warp();
  const int first = this_thread / 32 * 32;
  const int result = *std::max_element(int_slots + first, int_slots + first + 32);
  sync_warp();
  return result;
}
