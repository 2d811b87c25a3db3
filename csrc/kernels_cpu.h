// SPDX-License-Identifier: Apache-2.0
// What each instruction set provides: work on a range of rows, no threads, no allocation.
#pragma once
#include "launch.h"

namespace activesel {

struct ScoreJob {
  Operand online, reference;
  Targets targets;
  Loss loss;
  int64_t tokens;
};

constexpr int kMaxDigit = 11;  // bits

struct Kernels {
  // Both write rows [begin, end) and return flags.
  int (*scores)(const ScoreJob& job, int64_t begin, int64_t end, float* out);
  int (*keys)(const float* scores, Noise noise, float temperature, int64_t begin, int64_t end,
              float* keys);
  void (*noise)(Noise noise, int64_t begin, int64_t end, float* out);
  // counts[d] = keys whose order is `prefix` under `mask` and has the digit d, `bits` wide, at
  // shift.
  void (*count)(const float* keys, int64_t begin, int64_t end, uint32_t mask, uint32_t prefix,
                int shift, int bits, int64_t* counts);
  // Writes the rows above `bar` and the first `ties` at it; returns the largest order left out.
  uint32_t (*emit)(const float* keys, int64_t begin, int64_t end, uint32_t bar, int64_t ties,
                   int64_t* rows);
  int joint_columns, joint_rows;  // a tile of similarities
  // Rows of a chunk as [chosen / joint_columns][width][joint_columns] fp32.
  void (*joint_pack)(const Matrix& m, int64_t width, const int64_t* chunk, int64_t chosen,
                     float* out);
  // Rows [begin, end) of a job's state; `packed` are its up to four chunks, `scratch` has the
  // larger width times joint_rows.
  void (*joint)(const JointJob& job, const float* const* packed, int64_t begin, int64_t end,
                float* scratch);
};

// Defined once per instruction set, by compiling the same sources into different namespaces.
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace activesel
