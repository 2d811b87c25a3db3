// SPDX-License-Identifier: Apache-2.0
// The whole native API: raw pointers, sizes and strides (in elements), no torch and no Python.
// The caller keeps the memory alive, has checked the shapes, and owns every output.
#pragma once
#include <cstdint>

namespace activesel {

enum class Dtype : int64_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i64 = 4 };
enum class Kind : int64_t { absent = 0, losses = 1, logits = 2 };
enum Flag : int { kNonfiniteScore = 1, kTooFewRows = 2, kBadTarget = 4, kBadTemperature = 8 };

struct Operand {     // one side of the comparison
  Kind kind;         // losses [B] | logits [B, T, C]
  const void* data;  // f32, bf16, f16; losses also f64
  Dtype dtype;
  int64_t classes;          // C
  int64_t row, token, cls;  // strides; any, 0 included
};

struct Targets {
  const void* data;  // [B, T] i64 | [B, T, C] f32, bf16, f16
  Dtype dtype;
  int64_t row, token, cls;
};

struct Loss {
  bool sigmoid;     // else softmax
  float smoothing;  // [0, 1]
  int64_t ignore_index;
};

struct Noise {
  uint64_t seed;
  uint32_t step, chunk;
  int64_t offset;  // global position of row 0
};

// Each returns an OR of `Flag`s; `threads` is an upper bound and never changes a result.

// scores[b] = online[b] - reference[b], each the mean loss over the tokens of a row that count.
int score_cpu(const Operand& online, const Operand& reference, const Targets& targets, Loss loss,
              int64_t rows, int64_t tokens, float* scores, int threads);

// score_cpu, then keys = scores / T + noise, then topk_cpu.
int select_cpu(const Operand& online, const Operand& reference, const Targets& targets, Loss loss,
               int64_t rows, int64_t tokens, Noise noise, float temperature, int64_t k,
               float* scores, float* keys, int64_t* indices, float* threshold, int threads);

void noise_cpu(Noise noise, int64_t rows, float* out, int threads);

// The k first rows by (higher key, lower row), ascending; the largest key left out.
int topk_cpu(const float* keys, int64_t rows, int64_t k, int64_t* indices, float* threshold,
             int threads);

struct Matrix {  // [B, D] f32, bf16, f16
  const void* data;
  Dtype dtype;
  int64_t row, col;  // strides
};

struct PairSide {    // embeddings by one model
  Matrix matrix[2];  // image, text
  int64_t width;     // D; 0: absent
  float scale, bias;
};

struct JointJob {
  PairSide side[2];          // online, reference
  bool softmax;              // else sigmoid
  int64_t count;             // rows whose state this is
  const int64_t *rows, *at;  // [count]: which they are, nullptr for 0, 1, ..; place in chunk or -1
  int64_t chosen;
  const int64_t* chunk;  // [chosen] rows
  float* state;          // [1 | 4, count], see `pair_add` in activesel/spec_joint.py
  int64_t stride;
};

// What the rows of a chunk add to every row's state.
void joint_cpu(const JointJob& job, int threads);

// The instruction set in use ("avx512", "avx2", "baseline"), and a way for tests to lower it.
const char* isa();
bool set_isa(const char* name);  // false: unknown, or this machine lacks it

#ifdef ACTIVESEL_CUDA
// The CUDA this was built with, and the newest that the driver takes (0: no driver), as 1000 major
// + 10 minor. Neither starts a context.
int cuda_version();
int cuda_driver_version();
// Devices the driver offers; -1 and a reason when it cannot say.
int cuda_device_count(const char** reason);
// nullptr when this binary holds code that `device` can run, else why not. Starts a context.
const char* cuda_probe(int device);

// Both run on `stream` of `device`, read and write device memory only, and return nullptr or why
// not. The workspace may hold anything; k is in [0, rows].
int64_t topk_cuda_workspace(int64_t rows);  // bytes, 8-byte aligned

// topk_cpu; *flags also gets the OR of `partial`, the words that whoever made the keys left.
const char* topk_cuda(const float* keys, int64_t rows, int64_t k, const int32_t* partial,
                      int64_t partials, int64_t* indices, float* threshold, int32_t* flags,
                      void* workspace, int device, void* stream);

// select_cpu for losses; seed, step and temperature are read on the device.
const char* select_cuda(const Operand& online, const Operand& reference, const int64_t* seed,
                        const int64_t* step, const float* temperature, int64_t offset, int64_t rows,
                        int64_t k, float* scores, float* keys, int64_t* indices, float* threshold,
                        int32_t* flags, void* workspace, int device, void* stream);
#endif

}  // namespace activesel
