// SPDX-License-Identifier: Apache-2.0
// Sixteen fp32 lanes as however many registers the instruction set needs, so that sums are taken in
// the same order everywhere: with `fused` one operation, losses agree to the bit between machines.
// All of it has internal linkage: each instruction set has its own copy.
#pragma once
#include <cstdint>
#include <cstring>

#include "gumbel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace activesel {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16, kParts = kLanes / kWidth;

typedef float FloatPart __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntPart __attribute__((vector_size(4 * kWidth)));

struct Ints {
  IntPart p[kParts];
};
struct Floats {
  FloatPart p[kParts];
};

#define ACTIVESEL_MEMBER inline __attribute__((always_inline))
#define ACTIVESEL_EACH(result, name, parameters, expression)                         \
  ACTIVESEL_FN result name parameters {                                              \
    result out;                                                                      \
    _Pragma("GCC unroll 16") for (int i = 0; i < kParts; ++i) out.p[i] = expression; \
    return out;                                                                      \
  }

ACTIVESEL_EACH(Floats, all, (float x), x - FloatPart{})
ACTIVESEL_EACH(Floats, operator+, (Floats a, Floats b), a.p[i] + b.p[i])
ACTIVESEL_EACH(Floats, operator-, (Floats a, Floats b), a.p[i] - b.p[i])
ACTIVESEL_EACH(Floats, operator*, (Floats a, Floats b), a.p[i] * b.p[i])
ACTIVESEL_EACH(Floats, select, (Ints c, Floats a, Floats b), c.p[i] ? a.p[i] : b.p[i])
ACTIVESEL_EACH(Floats, absolute, (Floats a), FloatPart(IntPart(a.p[i]) & 0x7FFFFFFF))

ACTIVESEL_FN FloatPart larger(FloatPart a, FloatPart b) {  // b where either is NaN
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);  // compilers do not always see it in a ternary
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
ACTIVESEL_EACH(Floats, larger, (Floats a, Floats b), larger(a.p[i], b.p[i]))

// a * b + c, rounded once where the machine can: every x86 with AVX2, every aarch64.
ACTIVESEL_FN FloatPart fused(FloatPart a, FloatPart b, FloatPart c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}
ACTIVESEL_EACH(Floats, fused, (Floats a, Floats b, Floats c), fused(a.p[i], b.p[i], c.p[i]))

ACTIVESEL_FN FloatPart floor_of(FloatPart t) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(t, 0x09);
#elif defined(__AVX2__)
  return _mm256_floor_ps(t);
#else
  const FloatPart shifter = 12582912.0f - FloatPart{};  // 1.5 * 2^23: adding it rounds
  const FloatPart nearest = (t + shifter) - shifter;
  return nearest > t ? nearest - 1.0f : nearest;
#endif
}
ACTIVESEL_EACH(Floats, floor_of, (Floats t), floor_of(t.p[i]))

// 2^n of an integer n in [-127, 0], from the low bits of a sum; +0 at -127.
ACTIVESEL_EACH(Floats, power_of_two, (Floats n),
               FloatPart(IntPart(n.p[i] + (12582912.0f + 127.0f)) << 23))

ACTIVESEL_FN Floats load(const float* x) {  // any alignment
  Floats out;
  for (int i = 0; i < kParts; ++i) memcpy(&out.p[i], x + i * kWidth, sizeof out.p[i]);
  return out;
}

// The last sixteen of n values; of fewer, the last lanes hold them and the others are 0.
ACTIVESEL_FN Floats load_end(const float* x, int64_t n) {
  if (n >= kLanes) return load(x + n - kLanes);
  float lane[kLanes] = {};
  memcpy(lane + kLanes - n, x, size_t(n) * sizeof *x);
  return load(lane);
}

// Masks for whole vectors, and for the last one of a row.
struct All {
  ACTIVESEL_MEMBER Floats mask(Floats a, float) const { return a; }
};
struct Last {
  Ints valid;
  ACTIVESEL_MEMBER explicit Last(int n) {  // the n last lanes
    static const int32_t table[2 * kLanes] = {0,  0,  0,  0,  0,  0,  0,  0,  0,  0,  0,
                                              0,  0,  0,  0,  0,  -1, -1, -1, -1, -1, -1,
                                              -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    for (int i = 0; i < kParts; ++i) memcpy(&valid.p[i], table + n + i * kWidth, sizeof valid.p[i]);
  }
  ACTIVESEL_MEMBER Floats mask(Floats a, float fill) const { return select(valid, a, all(fill)); }
};

// Sums and maxima over the lanes.
ACTIVESEL_FN double total(Floats a) {
  float lane[kLanes];
  memcpy(lane, &a, sizeof a);
  double sum[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) sum[i] = double(lane[i]) + double(lane[i + kLanes / 2]);
  for (int half = kLanes / 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

ACTIVESEL_FN float largest(Floats a) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad q[kLanes / 4];
  memcpy(q, &a, sizeof a);
  const Quad low = q[0] > q[1] ? q[0] : q[1], high = q[2] > q[3] ? q[2] : q[3];
  const Quad top = low > high ? low : high;
  const float even = top[0] > top[2] ? top[0] : top[2], odd = top[1] > top[3] ? top[1] : top[3];
  return even > odd ? even : odd;
}

// exp(z) for z <= 0; exactly 1 at 0, and 0 where it would be subnormal; NaN stays. Error: 1.6 ulp
// of the polynomial, and half an ulp of z, which is |z| / 2 ulp of the result.
ACTIVESEL_FN Floats exp_of(Floats z) {
  const Floats t = z * all(1.44269504f);
#if defined(__AVX512F__)
  const Floats r = t - floor_of(t);
#else
  const Floats bounded = larger(all(-127.0f), t), n = floor_of(bounded), r = bounded - n;
#endif
  const Floats r2 = r * r;  // 2^r on [0, 1), fitted by us; paired terms make a short chain
  const Floats p0 = fused(r, all(0.6931512951850891f), all(1.0f));
  const Floats p2 = fused(r, all(0.05579991266131401f), all(0.24016444385051727f));
  const Floats p4 = fused(r, all(0.0018671300495043397f), all(0.009017030708491802f));
  const Floats p = fused(r2, fused(r2, p4, p2), p0);
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(t.p[0], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {{_mm512_maskz_scalef_ps(normal, p.p[0], t.p[0])}};
#else
  return p * power_of_two(n);
#endif
}

// log(1 + x) of x >= 0, lane by lane; the second term is what 1 + x lost to rounding.
ACTIVESEL_FN Floats log1p_each(Floats a) {
  float lane[kLanes];
  memcpy(lane, &a, sizeof a);
  for (int i = 0; i < kLanes; ++i) {
    const float x = lane[i], u = 1.0f + x;
    const Split s = split(u);
    lane[i] = log_of(s.f, s.k) + (x - (u - 1.0f)) / u;
  }
  return load(lane);
}

}  // namespace
}  // namespace activesel
