// Runs the .cu files of this folder on CPU threads, unchanged: a g++ sees CUDA's words as below.
//
//   CUDA                         here
//   one thread of a block        one std::thread; the threads of a launch walk through its blocks,
//                                all through the same block at the same time
//   __shared__ T x[n]            static T x[n]: one copy that all threads see
//   __syncthreads()              a std::barrier for the block
//   votes, shuffles, maxima      write a slot, wait for the warp's barrier, read the others' slots
//   atomics                      std::atomic_ref, relaxed as on the GPU: they order nothing else
//   kernel<<<...>>>(arguments)   LAUNCH(kernel, ...)(arguments), which returns when all is done
//
// So a debugger steps through a kernel, and ThreadSanitizer finds a missing __syncthreads().
// What this cannot show: speed, a GPU's memory limits, and its freedom to reorder memory accesses.
#pragma once
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulate {
// Two sets of slots, used in turn: a lane may fill one while a slow lane still reads the other.
struct Warp {
  std::barrier<> barrier{32};
  uint64_t slots[2][32] = {};
};
inline std::mutex one_launch_at_a_time;  // a kernel's shared memory exists once
inline std::barrier<>* block_barrier;
inline std::deque<Warp>* warps;
inline std::vector<std::max_align_t>* dynamic_shared;
inline thread_local int turn;
}  // namespace emulate

inline dim3 gridDim, blockDim;
inline thread_local dim3 threadIdx, blockIdx;

inline void __syncthreads() { emulate::block_barrier->arrive_and_wait(); }
inline void __syncwarp() { (*emulate::warps)[threadIdx.x / 32].barrier.arrive_and_wait(); }

namespace emulate {
// Every lane of the warp gives a value and gets the slots of all.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
  if (mask != 0xffffffffu) {
    std::fprintf(stderr, "emulate.h: a vote or shuffle of part of a warp (mask %x)\n", mask);
    std::abort();
  }
  Warp& warp = (*warps)[threadIdx.x / 32];
  uint64_t* slots = warp.slots[turn ^= 1];
  std::memcpy(&slots[threadIdx.x % 32], &value, sizeof value);
  warp.barrier.arrive_and_wait();
  return slots;
}

template <typename T>
T read(const uint64_t* slots, int lane, T otherwise) {
  if (lane >= 0 && lane < 32) std::memcpy(&otherwise, &slots[lane], sizeof(T));
  return otherwise;
}

// All threads of a block run `body` for one block of the grid after the other.
template <typename Body>
void run(dim3 grid, dim3 block, size_t shared_bytes, Body body) {
  std::scoped_lock lock(one_launch_at_a_time);
  if (block.x % 32 || block.y != 1 || block.z != 1) std::abort();
  // Not the block's barrier: threads that leave a kernel early must not count at __syncthreads().
  std::barrier<> in_block(block.x), between_blocks(block.x);
  std::deque<Warp> all_warps(block.x / 32);
  std::vector<std::max_align_t> memory(shared_bytes / sizeof(std::max_align_t) + 1);
  block_barrier = &in_block, warps = &all_warps, dynamic_shared = &memory;
  gridDim = grid, blockDim = block;
  std::vector<std::thread> team;
  for (unsigned t = 0; t < block.x; ++t)
    team.emplace_back([&, t] {
      threadIdx = dim3(t, 0, 0), turn = 0;
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, z);
            body();
            between_blocks.arrive_and_wait();
          }
    });
  for (std::thread& thread : team) thread.join();
}
}  // namespace emulate

#define LAUNCH(kernel, grid, block, shared_bytes, stream)                   \
  [&](auto... arguments) {                                                  \
    emulate::run(grid, block, shared_bytes, [&] { kernel(arguments...); }); \
  }
#define DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(emulate::dynamic_shared->data())

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulate::read(emulate::exchange(mask, value), threadIdx.x % 32 ^ lanes, value);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  return emulate::read(emulate::exchange(mask, value), threadIdx.x % 32 + lanes, value);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* slots = emulate::exchange(mask, uint64_t(vote));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(slots[lane]) << lane;
  return votes;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* slots = emulate::exchange(mask, uint64_t(value));
  return unsigned(*std::max_element(slots, slots + 32));
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T, typename U>
T atomicOr(T* address, U value) {
  return std::atomic_ref(*address).fetch_or(value, std::memory_order_relaxed);
}
template <typename T>
T atomicMax(T* address, T value) {
  std::atomic_ref target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (old < value && !target.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

using std::max;
using std::min;
inline int __ffs(unsigned bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline int __ffsll(unsigned long long bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
