# SPDX-License-Identifier: Apache-2.0
"""What every test gets: one thread, a seed, the backends at hand, and poisoned allocations."""

import os
import sys

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from activesel import _native, _triton, spec

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

with torch.device("meta"):  # torch lists its constructors once, and must not list a poisoned one
    torch.empty(0)

CPU = torch.device("cpu")
MODULES = {"torch": spec, "native": _native, "triton": _triton}
BACKENDS = ["torch"]
if _native.available():
    BACKENDS.append("native")
if not _triton.reason(CPU):
    BACKENDS.append("triton")
ISAS = ["avx512", "avx2", "baseline"]


def pytest_configure(config):
    """Numpy 2.3 warns of what 2.4 refuses: loops in Triton 3.5's interpreter, a try in plots."""
    for module in ("triton.runtime.interpreter", "matplotlib.cbook"):
        said = f"ignore:Conversion of an array with ndim:DeprecationWarning:{module}"
        config.addinivalue_line("filterwarnings", said)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=[b for b in BACKENDS if b != "triton"])
def host_backend(request):
    """Those made for the CPU: for tests of threads, of time, and of many draws or large sizes.

    Interpreted Triton kernels are slow and single-threaded; that their keys and rows are the
    specification's, bit for bit, is shown on fewer and smaller inputs.
    """
    return request.param


@pytest.fixture
def host_module(host_backend):
    return MODULES[host_backend]


@pytest.fixture
def module(backend):
    """The backend's module: `score` and `select` with the signatures of `spec`."""
    return MODULES[backend]


@pytest.fixture(autouse=True)
def calm():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def poisoned(allocate):
    """Memory that activesel allocates without filling starts as NaN (or the smallest integer)."""

    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("activesel") and type(out) is torch.Tensor and not out.is_meta:
            out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def every_isa():
    """Calls a function once per instruction set that the compiled module can use here."""
    if not _native.available():
        pytest.skip(_native.reason())
    native = _native._module()
    best = native.isa()

    def run(function):
        results = {}
        for name in ISAS:
            try:
                native.set_isa(name)
            except ValueError:  # this machine lacks it
                continue
            results[name] = function()
        assert results, "at least the baseline must run"
        return results

    yield run
    native.set_isa(best)


@pytest.fixture
def with_threads():
    def run(threads, function):
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(1)

    return run


def pytest_terminal_summary(terminalreporter):
    """A green run without a GPU must not be taken for one with it."""
    skipped = terminalreporter.stats.get("skipped", [])
    skipped = [r for r in skipped if "gpu" in getattr(r, "keywords", ())]  # whole files have none
    for reason in sorted({r.longrepr[2].removeprefix("Skipped: ") for r in skipped}):
        count = sum(r.longrepr[2].endswith(reason) for r in skipped)
        terminalreporter.write_line(f"{count} GPU tests skipped: {reason}")
