// SPDX-License-Identifier: Apache-2.0
// Loss of one row of logits. A row is walked in blocks that stay in the first-level cache: find the
// block's maximum, then sum the exponentials, so memory is read once however long the row is.
#pragma once
#include "launch.h"
#include "simd.h"

namespace activesel {
namespace {

constexpr int64_t kBlock = 4096;  // 16 KiB of fp32

ACTIVESEL_FN float from_bf16(uint16_t h) { return as_float(uint32_t{h} << 16); }

ACTIVESEL_FN float from_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFF;
  uint32_t bits = as_bits(as_float(magnitude << 13) * 0x1p112f);  // exact, subnormals included
  bits = magnitude >= 0x7C00 ? magnitude << 13 | 0x7F800000 : bits;
  return as_float(bits | uint32_t(h & 0x8000) << 16);
}

template <class T, class Convert>
static void gather(const void* data, int64_t first, int64_t stride, int64_t n, float* out,
                   Convert convert) {
  const T* x = static_cast<const T*>(data) + first;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(x[i * stride]);
  }
}

// n values as contiguous fp32: in place where they already are, else copied to `buffer`.
static const float* fetch(const void* data, Dtype dtype, int64_t first, int64_t stride, int64_t n,
                          float* buffer) {
  switch (dtype) {
    case Dtype::f32:
      if (stride == 1) return static_cast<const float*>(data) + first;
      gather<float>(data, first, stride, n, buffer, [](float x) { return x; });
      break;
    case Dtype::bf16:
      gather<uint16_t>(data, first, stride, n, buffer, [](uint16_t x) { return from_bf16(x); });
      break;
    case Dtype::f16:
      gather<uint16_t>(data, first, stride, n, buffer, [](uint16_t x) { return from_f16(x); });
      break;
    default:
      gather<double>(data, first, stride, n, buffer, [](double x) { return float(x); });
  }
  return buffer;
}

// The weights y' of the linear term: none, eps / C everywhere, or (1 - eps) y + eps / C.
enum class Weights { none, uniform, soft };

struct Sums {
  float top = -FLT_MAX;  // largest logit so far; not -inf, so that -inf - top is no NaN
  double sum = 0;        // softmax: sum of exp(x - top)
  double linear = 0;     // softmax: sum of y' (x - top); sigmoid: of max(x, 0) - y' x
  double weight = 0;     // sum of y'
  double logs = 0;       // sigmoid: sum of log1p(exp(-|x|))
};

static float block_max(const float* x, int64_t n) {
  Floats top[4] = {all(-FLT_MAX), all(-FLT_MAX), all(-FLT_MAX), all(-FLT_MAX)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) top[j] = larger(load(x + i + j * kLanes), top[j]);
  for (; i + kLanes <= n; i += kLanes) top[0] = larger(load(x + i), top[0]);
  if (i < n && n >= kLanes)
    top[1] = larger(load_end(x, n), top[1]);  // some of them twice
  else if (i < n)
    top[1] = larger(Last(int(n)).mask(load_end(x, n), -FLT_MAX), top[1]);
  return largest(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

// y' = keep * y + spread
struct Smoothing {
  float keep, spread;
  template <Weights kWeights>
  ACTIVESEL_MEMBER Floats weights(Floats y) const {
    return kWeights == Weights::soft ? y * all(keep) + all(spread) : all(spread);
  }
};

// Calls step(x, y, valid) for sixteen logits at a time; `valid` masks what the last call must not
// count twice. y is read only if there are soft targets.
template <Weights kWeights, class Step>
static void for_lanes(const float* x, const float* y, int64_t n, Step step) {
  constexpr bool soft = kWeights == Weights::soft;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(x + n + i);  // what comes after this block, while there is time
    step(load(x + i), soft ? load(y + i) : Floats{}, All{});
  }
  if (i == n) return;
  const Last last(int(n - i));
  step(last.mask(load_end(x, n), -INFINITY), soft ? load_end(y, n) : Floats{}, last);
}

template <Weights kWeights>
static void softmax_block(const float* x, const float* y, int64_t n, Smoothing smooth, Sums& sums) {
  const float top = block_max(x, n);
  if (top > sums.top) {
    const double rise = double(sums.top) - double(top);
    if (sums.sum != 0) sums.sum *= exp(rise);
    if (kWeights != Weights::none) sums.linear += rise * sums.weight;
    sums.top = top;
  }
  const Floats shift = all(sums.top), zero = all(0.0f);
  Floats sum = zero, linear = zero, targets = zero;
  for_lanes<kWeights>(x, y, n, [&](Floats v, Floats t, auto valid) {
    const Floats z = v - shift;
    sum = sum + exp_of(z);
    if (kWeights == Weights::none) return;
    linear = linear + valid.mask(smooth.weights<kWeights>(t) * z, 0.0f);
    if (kWeights == Weights::soft) targets = targets + valid.mask(t, 0.0f);
  });
  sums.sum += total(sum);
  sums.linear += total(linear);
  sums.weight += double(smooth.keep) * total(targets) + double(smooth.spread) * double(n);
}

// The lanes multiply up 1 + exp(-|x|) and take one logarithm for the whole block: `product` is that
// product less one, so small terms keep their digits. A block is short enough not to overflow.
constexpr int64_t kShortBlock = 1024;  // also keeps fp32 sums of like terms short

template <Weights kWeights>
static void sigmoid_block(const float* x, const float* y, int64_t n, Smoothing smooth, Sums& sums) {
  const Floats zero = all(0.0f), one = all(1.0f);
  Floats product = zero, linear = zero;
  for_lanes<kWeights>(x, y, n, [&](Floats v, Floats t, auto valid) {
    const Floats e = exp_of(zero - absolute(v));
    product = product + e * (one + product);
    Floats term = larger(v, zero);
    if (kWeights != Weights::none) term = term - smooth.weights<kWeights>(t) * v;
    linear = linear + valid.mask(term, 0.0f);
  });
  sums.logs += total(log1p_each(product));
  sums.linear += total(linear);
}

struct Token {
  double loss;
  bool counts, bad;
};

template <Weights kWeights>
static Token token_loss(const Operand& side, const Targets& targets, Loss loss, int64_t row,
                        int64_t token) {
  constexpr bool soft = kWeights == Weights::soft;
  const int64_t start = row * side.row + token * side.token;
  int64_t label = row * targets.row + token * targets.token;
  if (!soft) {
    const int64_t at = static_cast<const int64_t*>(targets.data)[label];
    if (at == loss.ignore_index) return {0, false, false};
    if (at < 0 || at >= side.classes) return {NAN, true, true};
    label = start + at * side.cls;
  }
  const Smoothing smooth = {1.0f - loss.smoothing, loss.smoothing / float(side.classes)};
  const int64_t block = loss.sigmoid || kWeights != Weights::none ? kShortBlock : kBlock;
  float logits[kBlock], weights[soft ? kBlock : 1];
  Sums sums;
  for (int64_t c = 0; c < side.classes; c += block) {
    const int64_t n = side.classes - c < block ? side.classes - c : block;
    const float* x = fetch(side.data, side.dtype, start + c * side.cls, side.cls, n, logits);
    const float* y = nullptr;
    if (soft)
      y = fetch(targets.data, targets.dtype, label + c * targets.cls, targets.cls, n, weights);
    if (loss.sigmoid)
      sigmoid_block<kWeights>(x, y, n, smooth, sums);
    else
      softmax_block<kWeights>(x, y, n, smooth, sums);
  }
  const double keep = smooth.keep;
  const double at = soft ? 0 : *fetch(side.data, side.dtype, label, 1, 1, logits);
  if (loss.sigmoid) return {sums.logs + sums.linear - (soft ? 0 : keep * at), true, false};
  if (!(sums.sum > 0) || sums.top > FLT_MAX) return {NAN, true, false};
  const double log_sum = log(sums.sum);
  if (soft) return {log_sum * sums.weight - sums.linear, true, false};
  return {log_sum - keep * (at - double(sums.top)) - sums.linear, true, false};
}

// Mean over the tokens that count; NaN where none does.
template <Weights kWeights>
static float row_loss(const Operand& side, const Targets& targets, Loss loss, int64_t tokens,
                      int64_t row, bool& bad) {
  double sum = 0;
  int64_t count = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const Token token = token_loss<kWeights>(side, targets, loss, row, t);
    sum += token.loss;
    count += token.counts;
    bad |= token.bad;
  }
  return float(sum / double(count));
}

}  // namespace
}  // namespace activesel
