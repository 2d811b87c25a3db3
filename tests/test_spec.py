# SPDX-License-Identifier: Apache-2.0
"""The specification itself: Philox known answers, the logarithm's accuracy, the order, the keys."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activesel import spec

INF, NAN = math.inf, math.nan
SPECIAL = [INF, -INF, NAN, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, 1e-38]
floats = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.sampled_from([0.5, 2.0]))


def words(r):
    return torch.as_tensor(r, dtype=torch.int64)


# ---------------------------------------------------------------------------------------- Philox

KNOWN = [  # counter, key, output: published with Random123
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    out = spec.philox([words([c]) for c in counter], [words([k]) for k in key])
    assert " ".join(f"{int(w):08x}" for w in out) == expected


def philox_in_python(counter, key):
    """Salmon et al.'s loop with Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


word = st.integers(0, 2**32 - 1)


@given(st.tuples(word, word, word, word), st.tuples(word, word))
@settings(max_examples=200, deadline=None)
def test_philox_of_any_words(counter, key):
    out = spec.philox([words([c]) for c in counter], [words([k]) for k in key])
    assert [int(w) for w in out] == philox_in_python(counter, key)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 2**34 - 2, 2**34 + 3, 2**40 + 1])
def test_noise_counter_layout(module, offset):
    """Counter words are (row >> 2 low, row >> 2 high, step, chunk); row & 3 picks the output."""
    seed, step, chunk = 0xFEDCBA9876543210 - (1 << 64), 0xFFFFFFFE, 5
    got = module.noise(9, words([seed]), words([step]), offset, chunk)
    for i in range(9):
        row = offset + i
        counter = (row >> 2 & 0xFFFFFFFF, row >> 34, step, chunk)
        r = philox_in_python(counter, (0x76543210, 0xFEDCBA98))[row & 3]
        assert got[i] == spec.gumbel(words([r]))


# ---------------------------------------------------------------------------------------- Gumbel


def exact_gumbel(r):  # [N] int64 -> float64, from the same u = (r + 1/2) / 2^32
    u = (r.numpy().astype(np.float64) + 0.5) * 2.0**-32  # exact
    return torch.from_numpy(-np.log(-np.log1p(-u)))


def edges():
    """Words around every branch of the two logarithms, and both ends."""
    near = [0, 2**32 - 1, spec.NEAR_ONE, 2**24, 2**25, 2**31]
    for power in range(33):  # 1 - u crosses 2^-p sqrt(1/2); e crosses 2^p sqrt(1/2)
        near.append(2**32 - round(2.0 ** (32 - power) * math.sqrt(0.5)))
        for sign in (-1, 1):
            near.append(round(-math.expm1(-(2.0 ** (sign * power)) * math.sqrt(0.5)) * 2.0**32))
    spread = torch.arange(-2000, 2001)
    return torch.cat([n + spread for n in near]).clamp(0, 2**32 - 1).unique()


def batches():
    yield edges()
    yield torch.arange(1 << 20)
    yield 2**32 - 1 - torch.arange(1 << 20)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        yield torch.randint(2**32, (1 << 20,), generator=generator)
    yield torch.arange(0, 2**32, 4099)


def test_gumbel_is_within_a_few_ulps_and_finite():
    for r in batches():
        ours, truth = spec.gumbel(r), exact_gumbel(r)
        assert ours.isfinite().all()
        assert ours.min() >= -3.14 and ours.max() <= 22.88
        # Relative to the larger of |g| and 1: near g = 0 the last logarithm's argument is rounded.
        error = (ours.double() - truth).abs() / truth.abs().clamp_min(1.0)
        assert error.max() < 4 * 2.0**-23


def test_gumbel_falls_as_the_word_rises():
    for r in batches():
        g = spec.gumbel(r.sort().values)
        assert (g[1:] - g[:-1]).max() <= 3 * 2.0**-23 * g.abs().max()
    coarse = spec.gumbel(torch.arange(0, 2**32, 2**13))
    assert (coarse[1:] < coarse[:-1]).all()


def test_gumbel_ends():
    ends = spec.gumbel(words([0, 2**32 - 1]))
    assert torch.allclose(ends.double(), exact_gumbel(words([0, 2**32 - 1])), rtol=1e-6)
    assert 22.87 < ends[0] < 22.88 and -3.13 < ends[1] < -3.129


# ----------------------------------------------------------------------------------- order, top-k


def python_order(keys):
    """Rows by Python's sort: NaN last, higher first, lower row first; -0.0 == 0.0 as in Python."""
    return sorted(
        range(len(keys)),
        key=lambda i: (math.isnan(keys[i]), 0.0 if math.isnan(keys[i]) else -keys[i], i),
    )


@given(st.lists(floats, max_size=40), st.data())
@settings(max_examples=300, deadline=None)
def test_order_and_topk_against_python(values, data):
    from conftest import BACKENDS, MODULES

    keys = torch.tensor(values, dtype=torch.float32)
    expected = python_order(keys.tolist())
    assert spec.order(keys).argsort(descending=True).tolist() == expected
    k = data.draw(st.integers(0, len(values)))
    eligible = sum(not math.isnan(v) for v in values)
    threshold = -INF if k >= len(values) else keys[expected[k]].item()
    for backend in BACKENDS:
        indices, got, flags = MODULES[backend].topk(keys, k)
        assert indices.dtype == torch.int64 and indices.tolist() == sorted(expected[:k])
        assert got.item() == (-INF if math.isnan(threshold) else threshold)
        assert got.shape == flags.shape == () and flags.dtype == torch.int32
        assert int(flags) == (spec.TOO_FEW_ROWS if eligible < k else 0)


@pytest.mark.parametrize("rows", [1, 2, 1000, 70_000])
@pytest.mark.parametrize("kind", ["equal", "rising", "falling", "two values", "nan", "random"])
def test_topk_of_hard_inputs(module, rows, kind):
    keys = {
        "equal": lambda: torch.full((rows,), 1.5),
        "rising": lambda: torch.arange(rows).float(),
        "falling": lambda: -torch.arange(rows).float(),
        "two values": lambda: (torch.arange(rows) % 2).float(),
        "nan": lambda: torch.full((rows,), NAN),
        "random": lambda: torch.randn(rows),
    }[kind]()
    expected = python_order(keys.tolist())
    for k in {0, 1, rows // 3, rows - 1, rows}:
        indices, threshold, _ = module.topk(keys, k)
        assert indices.tolist() == sorted(expected[:k])
        if k < rows and kind != "nan":
            assert threshold == keys[expected[k]]


# ------------------------------------------------------------------------------------------- keys


def key(scores, temperature, noise=None):
    scores = torch.tensor(scores)
    noise = torch.zeros_like(scores) if noise is None else torch.tensor(noise)
    keys, flags = spec.key(scores, noise, torch.tensor([temperature]))
    return keys.tolist(), int(flags)


def test_key_is_score_over_temperature_plus_noise():
    assert key([1.0, -3.0], 0.5, [0.25, 0.5]) == ([2.25, -5.5], 0)


def test_key_at_temperature_zero_is_the_score():
    assert key([1.0, INF, -INF, 2.0**127, -0.0], 0.0, [5.0] * 5) == (
        [1.0, INF, -INF, 2.0**127, -0.0],
        0,
    )


def test_key_at_infinite_temperature_is_the_noise():
    keys, flags = key([1.0, INF, -INF, NAN], INF, [5.0, 6.0, 7.0, 8.0])
    assert keys[:3] == [5.0, 6.0, 7.0] and math.isnan(keys[3]) and flags == 0


def test_key_keeps_infinities_and_nan_apart_from_huge_scores():
    keys, flags = key([3e38, INF, -3e38, -INF, NAN], 1e-30)
    assert keys[:4] == [spec.FLOAT_MAX, INF, -spec.FLOAT_MAX, -INF] and math.isnan(keys[4])
    assert flags == 0


@pytest.mark.parametrize("temperature", [-1.0, NAN, 1e-39, -INF, -1e-45])
def test_unusable_temperature_counts_as_zero_and_is_flagged(temperature):
    assert key([1.0, 2.0], temperature, [9.0, 0.0]) == ([1.0, 2.0], spec.BAD_TEMPERATURE)


def test_negative_zero_temperature_is_zero():
    assert key([1.0, 2.0], -0.0, [9.0, 0.0]) == ([1.0, 2.0], 0)
