// SPDX-License-Identifier: Apache-2.0
// Gumbel noise and keys. Every operation is one rounded fp32 operation, in the order of spec.py, so
// that all backends agree bit for bit; compile with contraction off.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>

#include "philox.h"

namespace activesel {

ACTIVESEL_FN float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

ACTIVESEL_FN uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

constexpr uint32_t kSqrtHalf = 0x3F3504F3;  // bits of sqrt(1/2)
constexpr uint32_t kNearOne = 0x4AFB0CCC;   // below it 1 - u >= sqrt(1/2)

// log(2^k (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)]
ACTIVESEL_FN float log_of(float f, float k) {
  float q = -0.076344929635524749755859f;
  q = q * f + 0.127615749835968017578125f;
  q = q * f + -0.131601825356483459472656f;
  q = q * f + 0.142017588019371032714844f;
  q = q * f + -0.166233569383621215820312f;
  q = q * f + 0.200012266635894775390625f;
  q = q * f + -0.250008195638656616210938f;
  q = q * f + 0.333333313465118408203125f;
  const float r = f * f;
  float y = q * f * r;
  y = y - 0.5f * r;
  y = y + k * 1.428606765330187e-06f;  // ln 2 in two parts: k times the upper one is exact
  y = f + y;
  return y + k * 0.693145751953125f;
}

struct Split {  // x = 2^k (1 + f)
  float f, k;
};

ACTIVESEL_FN Split split(float x) {
  const uint32_t bits = as_bits(x) - kSqrtHalf;
  return {as_float((bits & 0x7FFFFF) + kSqrtHalf) - 1.0f, float(int32_t(bits) >> 23)};
}

// -log(-log1p(-u)), u = (word + 1/2) / 2^32; 1 - u comes from ~word, so neither tail is cut.
ACTIVESEL_FN float gumbel(uint32_t word) {
  const bool near_one = word < kNearOne;
  const float u = (float(word) + 0.5f) * 0x1p-32f;
  const Split far = split((float(~word) + 0.5f) * 0x1p-32f);
  const float exponential = 0.0f - log_of(near_one ? -u : far.f, near_one ? 0.0f : far.k);
  const Split e = split(exponential);
  return 0.0f - log_of(e.f, e.k);
}

// How scores become keys at one temperature.
struct Temper {
  float inverse;
  bool scores_only;  // T = 0, or a temperature that cannot be used
  bool noise_only;   // T = inf
  bool bad;
};

ACTIVESEL_FN Temper temper(float temperature) {
  const float inverse = 1.0f / temperature;
  const bool zero = temperature == 0.0f;
  const bool bad = !(temperature >= 0.0f) || (inverse > FLT_MAX && !zero);
  return {inverse, bad || zero, temperature > FLT_MAX, bad};
}

ACTIVESEL_FN float make_key(float score, float noise, Temper t) {
  const uint32_t magnitude = as_bits(score) & 0x7FFFFFFF;
  const bool finite = magnitude < 0x7F800000;
  float scaled = (finite ? score : 0.0f) * t.inverse;
  scaled = scaled < -FLT_MAX ? -FLT_MAX : scaled;
  scaled = scaled > FLT_MAX ? FLT_MAX : scaled;
  const float key = finite ? scaled + noise : score;
  const bool nan = magnitude > 0x7F800000;
  return t.scores_only ? score : (t.noise_only && !nan ? noise : key);
}

// Unsigned integer in the order of the keys: NaN is 0, below -inf; both zeros are the same.
ACTIVESEL_FN uint32_t order(float key) {
  const uint32_t bits = as_bits(key + 0.0f);  // -0 + 0 is +0
  const uint32_t ordered = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000);
  return key == key ? ordered : 0;
}

// The key of an `order`; NaN comes back as -inf, zeros as +0.
ACTIVESEL_FN float unorder(uint32_t o) {
  const uint32_t bits = o >> 31 ? o ^ 0x80000000 : ~o;
  return o == 0 ? as_float(0xFF800000) : as_float(bits);
}

}  // namespace activesel
