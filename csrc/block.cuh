// SPDX-License-Identifier: Apache-2.0
// What a block of threads does together: sums, searches, its rows read and written.
#pragma once
#include <cuda_runtime.h>

#include "gumbel.h"

// Named, since nvcc puts a hash of the source's path into the names of what is anonymous or static,
// and the same sources would not give the same bytes elsewhere.
namespace activesel::gpu {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kItems = 8, kTile = kItems * kThreads;  // rows a thread, rows a block, at a time
constexpr int kDigit = 11, kBins = 1 << kDigit;  // two bins a thread, the highest digit in bin 0
constexpr unsigned kLanes = 0xFFFFFFFF;
static_assert(kBins == 2 * kThreads);

__device__ inline unsigned lane() { return threadIdx.x % 32; }
__device__ inline unsigned warp() { return threadIdx.x / 32; }

__device__ inline uint32_t warp_scan(uint32_t x) {  // sum of the lanes up to this one
  for (unsigned d = 1; d < 32; d *= 2) {
    const uint32_t other = __shfl_up_sync(kLanes, x, d);
    x += lane() >= d ? other : 0;
  }
  return x;
}

struct Scan {
  uint32_t before, total;  // sums over the threads before this one, and over the block
};

__device__ inline Scan block_scan(uint32_t x) {
  __shared__ uint32_t sums[kWarps];
  const uint32_t here = warp_scan(x);
  __syncthreads();  // an earlier call's sums have been read
  if (lane() == 31) sums[warp()] = here;
  __syncthreads();
  const uint32_t warps = warp_scan(sums[lane()]);
  const uint32_t before = __shfl_sync(kLanes, warps, (warp() + 31) % 32);
  return {(warp() ? before : 0) + here - x, __shfl_sync(kLanes, warps, 31)};
}

struct Place {
  uint32_t bin, before, here;
};

// The bin where `rank` falls, counted from bin 0; a rank beyond them all falls in the last bin.
__device__ inline Place find(const uint32_t* bins, uint32_t rank) {
  __shared__ Place place;
  const uint32_t t = threadIdx.x, a = bins[2 * t], b = bins[2 * t + 1];
  const uint32_t before = block_scan(a + b).before, middle = before + a;
  if (before <= rank && rank < middle) place = {2 * t, before, a};
  if (middle <= rank && (rank < middle + b || t == kThreads - 1)) place = {2 * t + 1, middle, b};
  __syncthreads();
  return place;
}

__device__ inline void clear(uint32_t* bins) {
  bins[threadIdx.x] = bins[threadIdx.x + kThreads] = 0;
  __syncthreads();
}

__device__ inline uint32_t block_or(uint32_t flags) {
  __shared__ uint32_t all;
  if (threadIdx.x == 0) all = 0;
  __syncthreads();
  if (flags) atomicOr(&all, flags);
  __syncthreads();
  return all;
}

struct Rows {  // what is asked for, and how rows are shared among blocks
  int64_t rows, k, span;
  __device__ int64_t first() const { return blockIdx.x * span; }
  __device__ int64_t last() const { return first() + span < rows ? first() + span : rows; }
};

struct Result {
  int64_t* indices;
  float* threshold;
  int32_t* flags;
};

// Calls use(row, order of its key) for this block's rows.
template <class Use>
__device__ void each_order(const float* keys, const Rows& r, const Use& use) {
  for (int64_t row = r.first() + threadIdx.x; row < r.last(); row += 4 * kThreads) {
    float key[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)  // four reads under way before the first is needed
      key[i] = row + i * kThreads < r.last() ? keys[row + i * kThreads] : 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (row + i * kThreads < r.last()) use(row + i * kThreads, order(key[i]));
  }
}

// Writes the block's rows that `where` puts above the bar (1), and the first `wanted` of those at
// it (2), in order; `above` and `ties` count the rows of either kind in the blocks before.
template <class Where>
__device__ void write(const float* keys, const Rows& r, const Result& out, uint32_t above,
                      uint32_t ties, uint32_t wanted, const Where& where) {
  __shared__ uint32_t counts[kTile / 32];  // of 32 rows each: ties in the upper half of the word
  const uint32_t earlier = (1u << lane()) - 1;
  for (int64_t tile = r.first(); tile < r.last(); tile += kTile) {
    float key[kItems];
    uint32_t over[kItems], at[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t row = tile + i * kThreads + threadIdx.x;
      key[i] = row < r.last() ? keys[row] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t row = tile + i * kThreads + threadIdx.x;
      const int place = row < r.last() ? where(row, order(key[i])) : 0;
      over[i] = __ballot_sync(kLanes, place == 1);
      at[i] = __ballot_sync(kLanes, place == 2);
      if (lane() == 0) counts[i * kWarps + warp()] = __popc(over[i]) | __popc(at[i]) << 16;
    }
    __syncthreads();
    const Scan scan = block_scan(threadIdx.x < kTile / 32 ? counts[threadIdx.x] : 0);
    if (threadIdx.x < kTile / 32) counts[threadIdx.x] = scan.before;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t row = tile + i * kThreads + threadIdx.x;
      const uint32_t count = counts[i * kWarps + warp()];
      const uint32_t tie = ties + (count >> 16) + __popc(at[i] & earlier);
      const bool is_tie = at[i] >> lane() & 1;
      if ((over[i] >> lane() & 1) || (is_tie && tie < wanted))
        out.indices[above + (count & 0xFFFF) + __popc(over[i] & earlier) +
                    (tie < wanted ? tie : wanted)] = row;
      if (is_tie && tie == wanted) *out.threshold = key[i] == key[i] ? key[i] : unorder(0);
    }
    above += scan.total & 0xFFFF;
    ties += scan.total >> 16;
    __syncwarp();  // a warp reads only its own counts, and now writes the next tile's
  }
}

}  // namespace activesel::gpu
