# SPDX-License-Identifier: Apache-2.0
"""From scores to keys inside a kernel: Philox bits, Gumbel noise, temperature, flags.

The twin of `spec.gumbel` and `spec.key`, one rounded operation at a time; kernels that call it are
launched with ``enable_fp_fusion=False``, so that equal scores give equal keys, bit for bit.
"""

import triton
import triton.language as tl

from activesel import spec

NONFINITE_SCORE = tl.constexpr(spec.NONFINITE_SCORE)
BAD_TARGET = tl.constexpr(spec.BAD_TARGET)
BAD_TEMPERATURE = tl.constexpr(spec.BAD_TEMPERATURE)
FLOAT_MAX = tl.constexpr(spec.FLOAT_MAX)
NEAR_ONE = tl.constexpr(spec.NEAR_ONE)
SQRT_HALF_BITS = tl.constexpr(spec.SQRT_HALF_BITS)
LOG2E = tl.constexpr(1.4426950408889634)
LN2_HI, LN2_LO = tl.constexpr(spec.LN2_HI), tl.constexpr(spec.LN2_LO)
Q0, Q1, Q2, Q3, Q4, Q5, Q6, Q7 = (tl.constexpr(c) for c in spec.LOG_Q)


@triton.jit
def log1p(y):  # 0 <= y <= 1, also where 1 + y rounds to 1
    u = 1.0 + y
    return tl.log(u) + (y - (u - 1.0))


@triton.jit
def log_of(f, k):  # log(2^k (1 + f))
    q = f * Q7 + Q6
    q = q * f + Q5
    q = q * f + Q4
    q = q * f + Q3
    q = q * f + Q2
    q = q * f + Q1
    q = q * f + Q0
    r = f * f
    y = q * f * r
    y = y - 0.5 * r
    y = y + k * LN2_LO
    y = f + y
    return y + k * LN2_HI


@triton.jit
def split(x):  # x = 2^k (1 + f)
    bits = x.to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    m = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True)
    return m - 1.0, (bits >> 23).to(tl.float32)


@triton.jit
def gumbel(word):  # uint32 -> -log(-log1p(-u)), u = (word + 1/2) / 2^32
    near = word < NEAR_ONE
    u = (word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    f, k = split(((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0))
    e = 0.0 - log_of(tl.where(near, -u, f), tl.where(near, 0.0, k))
    f, k = split(e)
    return 0.0 - log_of(f, k)


@triton.jit
def noise(row, seed_ptr, step_ptr, chunk):  # row: int64, global
    step = tl.load(step_ptr).to(tl.uint32)
    block = row >> 2
    zero = (row * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed_ptr),
        block.to(tl.uint32),
        (block >> 32).to(tl.uint32),
        zero + step,
        zero + chunk,
    )
    word = (row & 3).to(tl.int32)
    return gumbel(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))


@triton.jit
def of_score(
    score,  # [R] float32
    row,  # [R] int64, global
    seed_ptr,
    step_ptr,
    temperature_ptr,
    chunk,
):
    """Keys, and whether the temperature is unusable, a vector of equal values."""
    finite = tl.abs(score) <= FLOAT_MAX
    # A vector, since the interpreter mixes up booleans of scalars and vectors.
    t = tl.zeros(score.shape, tl.float32) + tl.load(temperature_ptr)
    inverse = tl.div_rn(1.0, t)
    unusable = (inverse > FLOAT_MAX) & (t != 0.0)
    unusable = unusable | (t < 0.0) | (t != t)
    g = noise(row, seed_ptr, step_ptr, chunk)
    scaled = tl.where(finite, score, 0.0) * inverse
    scaled = tl.where(scaled < -FLOAT_MAX, -FLOAT_MAX, scaled)
    scaled = tl.where(scaled > FLOAT_MAX, FLOAT_MAX, scaled)
    key = tl.where(finite, scaled + g, score)
    key = tl.where((t > FLOAT_MAX) & (score == score), g, key)
    return tl.where(unusable | (t == 0.0), score, key), unusable


@triton.jit
def write(
    score,  # [R] float32
    bad,  # [R] int1: the row has a target out of range
    row,  # [R] int64
    live,  # [R] int1
    scores_ptr,
    keys_ptr,  # None: scores only
    seed_ptr,
    step_ptr,
    temperature_ptr,
    offset,
):
    """Store scores and keys, return flags.

    A bad target makes its row NaN, and a temperature is the same for all rows. So the flags of any
    two calls are contained one in the other, and the largest is all of them or-ed.
    """
    tl.store(scores_ptr + row, score, mask=live)
    finite = tl.abs(score) <= FLOAT_MAX
    wrong = tl.where(finite, 0, NONFINITE_SCORE) | tl.where(bad, BAD_TARGET, 0)
    flags = tl.max(tl.where(live, wrong, 0), 0)
    if keys_ptr is not None:
        key, unusable = of_score(score, row + offset, seed_ptr, step_ptr, temperature_ptr, 0)
        tl.store(keys_ptr + row, key, mask=live)
        flags = flags | tl.max(tl.where(unusable, BAD_TEMPERATURE, 0), 0)
    return flags
