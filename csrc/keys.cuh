// SPDX-License-Identifier: Apache-2.0
// Losses -> scores -> keys.
#pragma once
#include "block.cuh"
#include "launch.h"

namespace activesel::gpu {

struct Source {  // of keys; `keys` holds them already unless they are to be made
  Operand online, reference;
  const int64_t *seed, *step;
  const float* temperature;
  int64_t offset;
  float *scores, *keys;
};

struct Half {
  uint16_t bits;
};
struct Brain {  // bfloat16
  uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(double x) { return float(x); }
__device__ inline float widen(Brain x) { return as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(Half x) {
  const uint32_t magnitude = x.bits & 0x7FFF, sign = uint32_t(x.bits & 0x8000) << 16;
  const float finite = as_float(magnitude << 13) * 0x1p112f;  // exact, subnormals too
  return as_float(sign | (magnitude < 0x7C00 ? as_bits(finite) : 0x7F800000 | magnitude << 13));
}

template <class T>
__device__ void read(const Operand& x, int64_t row, int begin, int end, float (&out)[4]) {
  const T* at = static_cast<const T*>(x.data) + (row + begin) * x.row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < begin || i >= end) continue;
    out[i] = widen(*at);
    at += x.row;
  }
}

// Losses of the rows row + begin .. row + end - 1; 0 where there are none.
__device__ inline void losses(const Operand& x, int64_t row, int begin, int end, float (&out)[4]) {
  out[0] = out[1] = out[2] = out[3] = 0.0f;
  if (x.kind == Kind::absent) return;
  switch (x.dtype) {
    case Dtype::bf16:
      return read<Brain>(x, row, begin, end, out);
    case Dtype::f16:
      return read<Half>(x, row, begin, end, out);
    case Dtype::f64:
      return read<double>(x, row, begin, end, out);
    default:
      return read<float>(x, row, begin, end, out);
  }
}

// Makes this block's scores and keys and returns the thread's flags. Four rows share a Philox
// block.
__device__ inline uint32_t make_keys(const Source& s, const Rows& r) {
  const uint64_t seed = uint64_t(*s.seed);
  const uint32_t step = uint32_t(*s.step);
  const Temper t = temper(*s.temperature);
  uint32_t flags = t.bad ? kBadTemperature : 0;
  int64_t group = ((s.offset + r.first()) >> 2) + threadIdx.x;
  for (; 4 * group - s.offset < r.last(); group += kThreads) {
    const int64_t row = 4 * group - s.offset;
    const int begin = row < r.first() ? int(r.first() - row) : 0;
    const int end = row + 4 > r.last() ? int(r.last() - row) : 4;
    float x[4], reference[4];
    losses(s.online, row, begin, end, x);
    losses(s.reference, row, begin, end, reference);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < begin || i >= end) continue;
      s.scores[row + i] = x[i] -= reference[i];
      if ((as_bits(x[i]) & 0x7FFFFFFF) >= 0x7F800000) flags |= kNonfiniteScore;
    }
    const Words words = row_words(uint64_t(group), step, 0, seed);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (begin <= i && i < end) s.keys[row + i] = make_key(x[i], gumbel(words.w[i]), t);
  }
  return flags;
}

}  // namespace activesel::gpu
