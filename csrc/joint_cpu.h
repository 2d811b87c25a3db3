// SPDX-License-Identifier: Apache-2.0
// What rows just chosen add to every row's score: similarities a block at a time, summed while they
// are in the cache. Candidates lie in the lanes, so that no sum is ever taken across them.
#pragma once
#include "kernels_cpu.h"
#include "row_loss_cpu.h"

namespace activesel {
namespace {

// The similarities of kTile candidates with kColumns chosen rows fill the registers, and a few are
// left for the operands.
#if defined(__AVX512F__)
constexpr int kVectors = 3, kColumns = 8;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kVectors = 1, kColumns = 6;
#else
constexpr int kVectors = 1, kColumns = 3;
#endif
constexpr int kTile = kVectors * kLanes;
constexpr int kSpan = 120;   // columns summed at once; 2^120 is still finite, see `add_sigmoid`
constexpr int kDepth = 256;  // numbers of an embedding converted at once
static_assert(kSpan % kColumns == 0, "or a span's last column would be in the next");

typedef float Quad __attribute__((vector_size(16)));

#if defined(__clang__)
#define ACTIVESEL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t QuadIndex __attribute__((vector_size(16)));
#define ACTIVESEL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadIndex{__VA_ARGS__})
#endif

// out[p * stride + i] = x[i][p], i < 4
ACTIVESEL_FN void transpose(const float* const* x, int64_t n, float* out, int64_t stride) {
  int64_t p = 0;
  for (; p + 4 <= n; p += 4) {
    Quad q[4];
    for (int i = 0; i < 4; ++i) memcpy(&q[i], x[i] + p, sizeof q[i]);
    const Quad a = ACTIVESEL_SHUFFLE(q[0], q[1], 0, 4, 1, 5);
    const Quad b = ACTIVESEL_SHUFFLE(q[2], q[3], 0, 4, 1, 5);
    const Quad c = ACTIVESEL_SHUFFLE(q[0], q[1], 2, 6, 3, 7);
    const Quad d = ACTIVESEL_SHUFFLE(q[2], q[3], 2, 6, 3, 7);
    const Quad columns[4] = {
        ACTIVESEL_SHUFFLE(a, b, 0, 1, 4, 5), ACTIVESEL_SHUFFLE(a, b, 2, 3, 6, 7),
        ACTIVESEL_SHUFFLE(c, d, 0, 1, 4, 5), ACTIVESEL_SHUFFLE(c, d, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) memcpy(out + (p + i) * stride, &columns[i], sizeof columns[i]);
  }
  for (; p < n; ++p)
    for (int i = 0; i < 4; ++i) out[p * stride + i] = x[i][p];
}

// Rows at(0), .. at(n - 1) of a matrix as [width][kTile], zeros after the n-th.
template <class At>
static void pack(const Matrix& m, int64_t width, int64_t n, float* out, At at) {
  float buffer[4][kDepth];
  const float zeros[kDepth] = {};
  for (int64_t i = 0; i < kTile; i += 4)
    for (int64_t p = 0; p < width; p += kDepth) {
      const int64_t depth = width - p < kDepth ? width - p : kDepth;
      const float* x[4];
      for (int j = 0; j < 4; ++j)
        x[j] = i + j < n
                   ? fetch(m.data, m.dtype, at(i + j) * m.row + p * m.col, m.col, depth, buffer[j])
                   : zeros;
      transpose(x, depth, out + p * kTile + i, kTile);
    }
}

// x[column][lane] = scale * (row in lane . column) + bias
static void multiply(const float* rows, const float* columns, int64_t width, float scale,
                     float bias, float* x) {
  Floats sum[kColumns][kVectors] = {};
  for (int64_t p = 0; p < width; ++p) {
    Floats row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(rows + p * kTile + v * kLanes);
    _Pragma("GCC unroll 8") for (int c = 0; c < kColumns; ++c) {
      const Floats column = all(columns[p * kColumns + c]);
      _Pragma("GCC unroll 3") for (int v = 0; v < kVectors; ++v) sum[c][v] =
          fused(column, row[v], sum[c][v]);
    }
  }
  for (int c = 0; c < kColumns; ++c)
    for (int v = 0; v < kVectors; ++v) {
      const Floats y = fused(sum[c][v], all(scale), all(bias));
      memcpy(x + c * kTile + v * kLanes, &y, sizeof y);
    }
}

// total += sign * sum over n columns of softplus(x): as in `sigmoid_block`, one logarithm.
static void add_sigmoid(const float* x, int64_t n, double sign, double* total) {
  const Floats zero = all(0.0f), one = all(1.0f);
  Floats product[kVectors] = {}, linear[kVectors] = {};
  for (int64_t c = 0; c < n; ++c)
    for (int v = 0; v < kVectors; ++v) {
      const Floats y = load(x + c * kTile + v * kLanes);
      const Floats e = exp_of(zero - absolute(y));
      product[v] = fused(e, one + product[v], product[v]);
      linear[v] = linear[v] + larger(y, zero);
    }
  float lane[2][kTile];
  for (int v = 0; v < kVectors; ++v) {
    const Floats logs = log1p_each(product[v]);
    memcpy(lane[0] + v * kLanes, &logs, sizeof logs);
    memcpy(lane[1] + v * kLanes, &linear[v], sizeof linear[v]);
  }
  for (int i = 0; i < kTile; ++i) total[i] += sign * (double(lane[0][i]) + double(lane[1][i]));
}

// Running log-sum-exp: top + log(sum).
static void add_softmax(const float* x, int64_t n, float* top, float* sum) {
  for (int v = 0; v < kVectors; ++v) {
    const float* at = x + v * kLanes;
    const Floats before = load(top + v * kLanes);
    Floats now = before;
    for (int64_t c = 0; c < n; ++c) now = larger(load(at + c * kTile), now);
    Floats s = load(sum + v * kLanes) * exp_of(before - now);
    for (int64_t c = 0; c < n; ++c) s = s + exp_of(load(at + c * kTile) - now);
    memcpy(top + v * kLanes, &now, sizeof now);
    memcpy(sum + v * kLanes, &s, sizeof s);
  }
}

// Rows chunk[0], .. chunk[count - 1] as [count / kColumns][width][kColumns].
static void joint_pack(const Matrix& m, int64_t width, const int64_t* chunk, int64_t count,
                       float* out) {
  float buffer[kDepth];
  for (int64_t c = 0; c < count; ++c)
    for (int64_t p = 0; p < width; p += kDepth) {
      const int64_t depth = width - p < kDepth ? width - p : kDepth;
      const float* x = fetch(m.data, m.dtype, chunk[c] * m.row + p * m.col, m.col, depth, buffer);
      float* at = out + (c / kColumns * width + p) * kColumns + c % kColumns;
      for (int64_t q = 0; q < depth; ++q) at[q * kColumns] = x[q];
    }
}

// Brings a row of a matrix to the cache while there is other work.
static void prefetch(const Matrix& m, int64_t width, int64_t row) {
  const int64_t size = m.dtype == Dtype::f32 ? 4 : 2;
  const char* data = static_cast<const char*>(m.data) + row * m.row * size;
  for (int64_t i = 0; m.col == 1 && i < width * size; i += 64) __builtin_prefetch(data + i, 0, 2);
}

static void joint_tile(const JointJob& job, const float* const* packed, int64_t begin, int64_t end,
                       float* rows) {
  float x[kSpan * kTile], top[kTile] = {}, sum[kTile] = {};
  double total[kTile] = {};
  const int first = job.side[0].width ? 0 : 2, last = job.side[1].width ? 4 : 2;
  const auto row = [&](int64_t i) { return job.rows ? job.rows[begin + i] : begin + i; };
  const int64_t n = end - begin < kTile ? end - begin : kTile;
  const int64_t* at = job.at + begin;
  for (int way = first; way < last; ++way) {
    const PairSide& side = job.side[way / 2];
    float* state = job.state + (job.softmax ? way * job.stride : 0) + begin;
    for (int64_t i = 0; job.softmax && i < n; ++i) {
      const bool none = state[i] == -INFINITY;
      top[i] = none ? -FLT_MAX : state[i];
      sum[i] = none ? 0.0f : 1.0f;
    }
    const int next = way + 1 < last ? way + 1 : first;  // its rows are fetched meanwhile
    const int64_t shift = way + 1 < last ? 0 : kTile;
    int64_t ahead = shift;
    pack(side.matrix[way % 2], side.width, n, rows, row);
    for (int64_t c = 0; c < job.chosen; c += kSpan) {
      const int64_t columns = job.chosen - c < kSpan ? job.chosen - c : kSpan;
      for (int64_t j = 0; j < columns; j += kColumns) {
        multiply(rows, packed[way] + (c + j) * side.width, side.width, side.scale, side.bias,
                 x + j * kTile);
        const int64_t until = shift + kTile * (c + j + kColumns) / job.chosen;
        for (; ahead < until && ahead < shift + kTile && begin + ahead < end; ++ahead)
          prefetch(job.side[next / 2].matrix[next % 2], job.side[next / 2].width, row(ahead));
      }
      for (int64_t i = 0; i < n; ++i)  // a row adds nothing to itself
        if (at[i] >= c && at[i] < c + columns) x[(at[i] - c) * kTile + i] = -INFINITY;
      if (job.softmax)
        add_softmax(x, columns, top, sum);
      else
        add_sigmoid(x, columns, way < 2 ? 1 : -1, total);
    }
    for (int64_t i = 0; job.softmax && i < n; ++i) state[i] = top[i] + logf(sum[i]);
  }
  for (int64_t i = 0; !job.softmax && i < n; ++i) job.state[begin + i] += float(total[i]);
}

static void joint_rows(const JointJob& job, const float* const* packed, int64_t begin, int64_t end,
                       float* scratch) {
  for (int64_t i = begin; i < end; i += kTile) joint_tile(job, packed, i, end, scratch);
}

}  // namespace
}  // namespace activesel
