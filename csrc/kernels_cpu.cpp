// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, ACTIVESEL_ISA naming the namespace.
#include "kernels_cpu.h"

#include "joint_cpu.h"
#include "row_loss_cpu.h"

namespace activesel {
namespace {

constexpr int64_t kRows = 1024;  // rows that are in the cache at once

// Losses of rows [begin, begin + n) of one side; what is not given is computed.
template <Weights kWeights>
const float* side_losses(const ScoreJob& job, const Operand& side, int64_t begin, int64_t n,
                         float* buffer, bool& bad) {
  if (side.kind == Kind::losses)
    return fetch(side.data, side.dtype, begin * side.row, side.row, n, buffer);
  for (int64_t i = 0; i < n; ++i)
    buffer[i] = row_loss<kWeights>(side, job.targets, job.loss, job.tokens, begin + i, bad);
  return buffer;
}

template <Weights kWeights>
int score_rows(const ScoreJob& job, int64_t begin, int64_t end, float* out) {
  // Few rows at a time, so that both sides' logits of a row are read close together.
  const bool given = job.online.kind != Kind::logits && job.reference.kind != Kind::logits;
  const int64_t rows = given ? kRows : 1;
  float a[kRows], b[kRows];
  bool bad = false;
  uint32_t largest = 0;
  for (int64_t i = begin; i < end; i += rows) {
    const int64_t n = end - i < rows ? end - i : rows;
    const float *online = a, *reference = b;
    if (job.online.kind != Kind::absent)
      online = side_losses<kWeights>(job, job.online, i, n, a, bad);
    if (job.reference.kind != Kind::absent)
      reference = side_losses<kWeights>(job, job.reference, i, n, b, bad);
    if (job.reference.kind == Kind::absent)
      for (int64_t j = 0; j < n; ++j) out[i + j] = online[j];
    else if (job.online.kind == Kind::absent)
      for (int64_t j = 0; j < n; ++j) out[i + j] = 0.0f - reference[j];
    else
      for (int64_t j = 0; j < n; ++j) out[i + j] = online[j] - reference[j];
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t magnitude = as_bits(out[i + j]) & 0x7FFFFFFF;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return (bad ? kBadTarget : 0) | (largest >= 0x7F800000 ? kNonfiniteScore : 0);
}

int scores(const ScoreJob& job, int64_t begin, int64_t end, float* out) {
  if (job.targets.data != nullptr && job.targets.dtype != Dtype::i64)
    return score_rows<Weights::soft>(job, begin, end, out);
  if (job.loss.smoothing != 0) return score_rows<Weights::uniform>(job, begin, end, out);
  return score_rows<Weights::none>(job, begin, end, out);
}

// Noise of global rows [first, first + n), n <= kRows.
void noise_block(Noise noise, int64_t first, int64_t n, float* out) {
  uint32_t word[kRows + 8];
  const uint64_t block = uint64_t(first) >> 2;
  const int skip = int(first & 3), blocks = int((skip + n + 3) >> 2);
  for (int i = 0; i < blocks; ++i) {
    const Words words = row_words(block + uint64_t(i), noise.step, noise.chunk, noise.seed);
    for (int j = 0; j < 4; ++j) word[4 * i + j] = words.w[j];
  }
  for (int64_t i = 0; i < n; ++i) out[i] = gumbel(word[skip + i]);
}

void noise_rows(Noise noise, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; i += kRows)
    noise_block(noise, noise.offset + i, end - i < kRows ? end - i : kRows, out + i);
}

int keys(const float* scores, Noise noise, float temperature, int64_t begin, int64_t end,
         float* keys) {
  const Temper t = temper(temperature);
  float g[kRows];
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t n = end - i < kRows ? end - i : kRows;
    noise_block(noise, noise.offset + i, n, g);
    for (int64_t j = 0; j < n; ++j) keys[i + j] = make_key(scores[i + j], g[j], t);
  }
  return t.bad ? kBadTemperature : 0;
}

constexpr int kTables = 4;  // neighbours often share a digit; four tables keep them from waiting

void count(const float* keys, int64_t begin, int64_t end, uint32_t mask, uint32_t prefix, int shift,
           int bits, int64_t* counts) {
  uint32_t o[kRows], table[kTables][1 << kMaxDigit];
  const uint32_t digits = 1u << bits;
  for (auto& t : table) memset(t, 0, digits * sizeof *t);
  for (int64_t i = begin; i < end; i += kRows) {
    int64_t n = end - i < kRows ? end - i : kRows;
    for (int64_t j = 0; j < n; ++j) o[j] = order(keys[i + j]);
    if (mask != 0) {
      int64_t kept = 0;
      for (int64_t j = 0; j < n; ++j) {
        const uint32_t value = o[j];
        o[kept] = value;
        kept += (value & mask) == prefix;
      }
      n = kept;
    }
    _Pragma("GCC unroll 4") for (int64_t j = 0; j < n;
                                 ++j)++ table[j % kTables][o[j] >> shift & (digits - 1)];
  }
  for (uint32_t d = 0; d < digits; ++d)
    counts[d] = int64_t{table[0][d]} + table[1][d] + table[2][d] + table[3][d];
}

uint32_t emit(const float* keys, int64_t begin, int64_t end, uint32_t bar, int64_t ties,
              int64_t* rows) {
  uint32_t o[kRows], left_out = 0;
  int64_t chosen[kRows + 1];
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t n = end - i < kRows ? end - i : kRows;
    int32_t equal = 0;
    for (int64_t j = 0; j < n; ++j) o[j] = order(keys[i + j]);
    for (int64_t j = 0; j < n; ++j) equal += o[j] == bar;
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t under = o[j] & (uint32_t(o[j] < bar) * 0xFFFFFFFF);
      left_out = under > left_out ? under : left_out;
    }
    if (equal > ties) left_out = bar;
    int64_t found = 0;
    if (equal <= ties || ties == 0) {  // all of them, or none
      const uint32_t lowest = equal <= ties ? bar : bar + 1;
      if (equal <= ties) ties -= equal;
      for (int64_t j = 0; j < n; ++j) {
        chosen[found] = i + j;
        found += o[j] >= lowest;  // no branch: it would be mispredicted k / B of the time
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        const bool tie = (o[j] == bar) & (ties > 0);
        chosen[found] = i + j;
        found += (o[j] > bar) | tie;
        ties -= tie;
      }
    }
    memcpy(rows, chosen, size_t(found) * sizeof *rows);
    rows += found;
  }
  return left_out;
}

}  // namespace

namespace ACTIVESEL_ISA {
extern const Kernels kernels;
const Kernels kernels = {scores,   keys,  noise_rows, count,     emit,
                         kColumns, kTile, joint_pack, joint_rows};
}  // namespace ACTIVESEL_ISA

}  // namespace activesel
