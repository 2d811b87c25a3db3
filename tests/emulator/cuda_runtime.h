// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that csrc/*.cu uses, on the CPU: with this folder ahead on the include path a
// C++ compiler builds the very files that nvcc builds.
//
// Each thread of a block is a fiber. It runs until a barrier or a warp-wide operation, and who goes
// on next is drawn at random: in half of the blocks any thread that can, in the others one of the
// warp that comes first in a random order, so that warps get far ahead of each other. Blocks run
// one after another, in random order. So code that lacks a barrier reads what is not there yet,
// sooner or later; a barrier that not every thread reaches ends the launch with an error. What it
// cannot show: races between threads that never wait, caches, and blocks that run at the same time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time; the next one finds what this one left

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorLaunchFailure };
using cudaStream_t = struct Stream*;
inline dim3 gridDim, blockDim, blockIdx;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {

constexpr size_t kStack = (32 << 10) + 5 * 64;  // tops in different sets of the cache

struct Fiber {
  dim3 thread;
  jmp_buf where;
  int rank = 0;  // of its warp in this block's order
  bool started = false, done = false;
};

struct Meeting {  // a barrier, or a warp; two sets of slots, as one may run an operation ahead
  std::vector<Fiber*> waiting;
  uint64_t slot[2][32];
  unsigned turn = 0;
};

inline std::mt19937 dice;
inline int launches = 0, devices = 1, device = 0;
inline std::string failure;
inline const std::function<void()>* kernel;
inline Fiber* current;
inline std::vector<Fiber*> ready[32];  // by rank of the warp
inline uint32_t ranks;                 // that have someone ready
inline Meeting barrier, warps[32];
inline jmp_buf scheduler;
inline std::unique_ptr<char[]> stacks;

inline void body() {
  (*kernel)();
  current->done = true;
  _longjmp(scheduler, 1);
}

inline void resume(Fiber* fiber, char* stack) {
  current = fiber;
  if (_setjmp(scheduler)) return;
  if (fiber->started) _longjmp(fiber->where, 1);
  fiber->started = true;
  ucontext_t context;  // only to get onto the stack; from there on jumps cost no system call
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, body, 0);
  setcontext(&context);
}

inline void wake(Fiber* fiber) {
  ready[fiber->rank].push_back(fiber);
  ranks |= 1u << fiber->rank;
}

inline Fiber* draw(bool by_rank) {
  const int turn = by_rank ? 0 : int(dice() % 32);
  const uint32_t turned = ranks >> turn | uint64_t(ranks) << (32 - turn);
  const int rank = (__builtin_ctz(turned) + turn) % 32;
  std::vector<Fiber*>& warp = ready[rank];
  std::swap(warp[dice() % warp.size()], warp.back());
  Fiber* fiber = warp.back();
  warp.pop_back();
  if (warp.empty()) ranks &= ~(1u << rank);
  return fiber;
}

inline void meet(Meeting& meeting, size_t count) {  // waits until `count` threads have come
  meeting.waiting.push_back(current);
  if (meeting.waiting.size() == count) {
    for (Fiber* fiber : meeting.waiting) wake(fiber);
    meeting.waiting.clear();
    ++meeting.turn;
  }
  if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

template <class T>  // everyone's value, to read until the warp meets again
const uint64_t* exchange(T value) {
  Meeting& meeting = warps[current->thread.x / 32];
  uint64_t* slots = meeting.slot[meeting.turn % 2];
  std::memcpy(&slots[current->thread.x % 32], &value, sizeof(T));
  meet(meeting, blockDim.x < 32 ? blockDim.x : 32);
  return slots;
}

inline cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& call) {
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  kernel = &call;
  ++launches;
  failure.clear();
  if (!stacks) stacks = std::make_unique<char[]>(1024 * kStack);
  std::vector<unsigned> blocks(gridDim.x);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), dice);
  for (const unsigned b : blocks) {
    blockIdx = dim3(b, 0, 0);
    std::vector<Fiber> fibers(blockDim.x);
    std::vector<int> order(32);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), dice);
    for (std::vector<Fiber*>& warp : ready) warp.clear();
    for (unsigned t = 0; t < blockDim.x; ++t) {
      fibers[t].thread = dim3(t, 0, 0);
      fibers[t].rank = order[t / 32];
      wake(&fibers[t]);
    }
    barrier = {};
    for (Meeting& warp : warps) warp = {};
    for (const bool by_rank = dice() % 2; ranks != 0;) {
      Fiber* next = draw(by_rank);
      resume(next, &stacks[size_t(next - fibers.data()) * kStack]);
    }
    size_t left = 0;
    for (const Fiber& fiber : fibers) left += !fiber.done;
    if (left == 0) continue;
    failure = "block " + std::to_string(b) + ": " + std::to_string(left) + " of " +
              std::to_string(blockDim.x) + " threads wait for the others, " +
              std::to_string(barrier.waiting.size()) + " at a barrier";
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)

inline void __syncthreads() { emulator::meet(emulator::barrier, blockDim.x); }
inline void __syncwarp() { emulator::exchange(0); }
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  T out;
  std::memcpy(&out, &emulator::exchange(value)[lane % 32], sizeof(T));
  return out;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = int(threadIdx.x % 32), from = lane - int(by);
  return __shfl_sync(mask, value, from < 0 ? lane : from);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* all = emulator::exchange(uint64_t(predicate != 0));
  unsigned out = 0;
  for (unsigned i = 0; i < 32 && i < blockDim.x; ++i) out |= unsigned(all[i]) << i;
  return out;
}

template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}
template <class T>
T atomicOr(T* at, T value) {
  return std::exchange(*at, *at | value);
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}

#define CUDART_VERSION 13000
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulator::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::devices) return cudaErrorInvalidDevice;
  return emulator::device = device, cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  return *count = emulator::devices, cudaSuccess;
}
struct cudaFuncAttributes {};
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, T*) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::failure.c_str() : "invalid device ordinal";
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  ++emulator::launches;
  std::memset(at, value, bytes);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::run(*config, [&] { kernel(Parameters(arguments)...); });
}
