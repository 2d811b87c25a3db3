# SPDX-License-Identifier: Apache-2.0
"""The same fp32 scores give the same keys, rows, threshold and flags everywhere, bit for bit."""

import math

import pytest
import torch
from conftest import BACKENDS, MODULES
from hypothesis import given, settings
from hypothesis import strategies as st

from activesel import spec

INF, NAN = math.inf, math.nan
SPECIAL = [INF, -INF, NAN, 0.0, -0.0, 3e38, -3e38, 1e-45, 1.0]
scores_of = st.lists(
    st.one_of(st.floats(width=32), st.sampled_from(SPECIAL), st.floats(-3, 3, width=32)),
    max_size=130,
)
temperatures = st.one_of(
    st.sampled_from([0.0, 1.0, INF, 1e-38, 1e38, NAN, -1.0, 1e-40, 0.1]),
    st.floats(0, 10, width=32),
)


def run(backend, scores, k, seed, step, temperature, offset):
    return MODULES[backend].select(
        [scores], [], None, k, torch.tensor([seed]), torch.tensor([step]),
        torch.tensor([temperature]), offset, "softmax", 0.0, -100,
    )  # fmt: skip


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if x.is_floating_point():
            assert torch.equal(x.isnan(), y.isnan())
            x, y = (
                x.nan_to_num(nan=0.0, posinf=INF, neginf=-INF),
                y.nan_to_num(nan=0.0, posinf=INF, neginf=-INF),
            )
            x, y = x.view(torch.int32), y.view(torch.int32)
        assert torch.equal(x, y)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="only one backend here")
@given(
    values=scores_of,
    data=st.data(),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    temperature=temperatures,
    offset=st.integers(0, 2**40),
)
@settings(max_examples=500, deadline=None)
def test_backends_agree_bit_for_bit(values, data, seed, step, temperature, offset):
    scores = torch.tensor(values, dtype=torch.float32)
    k = data.draw(st.integers(0, len(values)))
    arguments = (scores, k, seed, step, temperature, offset)
    results = [run(backend, *arguments) for backend in BACKENDS]
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 255, 4096, 100_003])
@pytest.mark.parametrize("temperature", [0.0, 0.37, INF])
def test_backends_agree_at_any_size(rows, temperature):
    scores = torch.randn(rows)
    scores[:: max(1, rows // 7)] = NAN
    scores[1 :: max(1, rows // 5)] = INF
    results = [run(b, scores, rows // 3, -5, 77, temperature, 3) for b in BACKENDS]
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_threads_change_nothing(host_backend, with_threads):
    scores = torch.randn(300_001)
    results = [
        with_threads(n, lambda: run(host_backend, scores, 77_777, 1, 2, 0.5, 1)) for n in (1, 2, 3)
    ]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_instruction_sets_change_nothing(every_isa):
    scores = torch.randn(10_007)
    results = every_isa(lambda: run("native", scores, 1000, 1, 2, 0.5, 1))
    for result in results.values():
        assert_same_bits(run("torch", scores, 1000, 1, 2, 0.5, 1), result)


def test_every_word_class_of_the_noise_agrees(every_isa):
    """Millions of rows reach every branch of both logarithms."""
    seed, step = torch.tensor([9]), torch.tensor([4])
    truth = spec.noise(1 << 21, seed, step, 3)
    for noise in every_isa(lambda: MODULES["native"].noise(1 << 21, seed, step, 3)).values():
        assert torch.equal(truth.view(torch.int32), noise.view(torch.int32))
