# SPDX-License-Identifier: Apache-2.0
"""`python -m pytest bench/test_speed.py`: each row beside eager torch, checked equal first.

`python -m bench speed` takes the same cases turn by turn and writes the ratios.
"""

import pytest

from bench.speed import CASES, THREADS, measure, threads


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.mark.parametrize("n", THREADS)
@pytest.mark.parametrize("which", ["ours", "eager"])
def test_time(case, which, n, benchmark):
    ours, eager = case.make()
    benchmark.group = f"{case.name}, {n} threads"
    benchmark.extra_info["bytes"] = case.bytes
    with threads(n):
        benchmark(ours if which == "ours" else eager)


@pytest.mark.parametrize("n", THREADS)
def test_ratio(case, n):
    row = measure(case, n)
    assert row.ratio >= case.target, f"{row.ratio:.2f} times eager's speed, wanted {case.target}"
