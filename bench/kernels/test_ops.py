# SPDX-License-Identifier: Apache-2.0
"""`python -m pytest bench/kernels`: all results are checked first, and nothing is timed if one is
wrong; then each operator and its baseline twin are timed, one after the other.

Times that are to be compared closely need turns: `python -m bench peers` takes them.
"""

import statistics
from functools import lru_cache

import pytest
import torch

from bench import common
from bench.kernels import cases
from bench.kernels.place import place

SECONDS = 0.2  # of events, on a GPU


@pytest.fixture(scope="session", autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@lru_cache
def at(scale):
    return place(scale, SECONDS)


@lru_cache
def ceilings(scale):
    return at(scale).ceilings()


@lru_cache(maxsize=1)  # inputs of one case at a time
def made(case, scale):
    """Both variants, once their results have been found right."""
    done = case.make(at(scale))
    said = {v: v.check(v.call(0)) for v in (done.ours, done.twin)}
    return done, said


def pytest_generate_tests(metafunc):
    scale = metafunc.config.getoption("scale")
    metafunc.parametrize("scale", [scale], ids=[scale])
    fit, left_out = common.fitting(
        cases.cases(scale), cases.Case.need, at(scale).free() if scale == "gpu" else None
    )
    for line in left_out:
        print(line)
    if "who" in metafunc.fixturenames:
        pairs = [(case, who) for case in fit for who in ("ours", "twin")]
        metafunc.parametrize("case, who", pairs, ids=lambda x: str(x).replace(" ", ""))
    else:
        metafunc.parametrize("case", fit, ids=lambda x: str(x).replace(" ", ""))


def test_right(case, scale):
    made(case, scale)


def test_time(case, who, scale, benchmark):
    done, said = made(case, scale)
    variant, where = getattr(done, who), at(scale)
    benchmark.group = str(case)
    info = benchmark.extra_info
    info |= {
        "op": case.op,
        "shape": case.shape,
        "who": who,
        "variant": variant.name,
        "checked": said[variant],
        "bytes": done.work.bytes,
        "flops": done.work.flops,
        "formula": done.work.formula,
        "device": where.name,
        "threads": torch.get_num_threads(),
        "backends": where.backends(),
        "ceilings": ceilings(scale),
    }
    if where.cpu:
        benchmark(variant.call, 0)
        seconds = benchmark.stats.stats.median if benchmark.stats else None
    else:
        benchmark.pedantic(_synchronised, (variant,), rounds=20, warmup_rounds=3)
        sample = where.clock.prepare(variant, max(1, len(done.copies))).sample
        seconds = info["device_seconds"] = statistics.median(sample() for _ in range(20))
    if seconds:
        floor, binds = done.work.floor(ceilings(scale))
        info["gb_per_s"] = done.work.bytes / seconds / 1e9
        info["gflop_per_s"] = done.work.flops / seconds / 1e9
        info["roofline"], info["binds"] = floor / seconds, binds


def _synchronised(variant):
    variant.call(0)
    torch.cuda.synchronize()
