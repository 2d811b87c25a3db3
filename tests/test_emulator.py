# SPDX-License-Identifier: Apache-2.0
"""What the emulator can see: bugs planted in csrc/topk_cuda.cu, and the bindings around it."""

import faulthandler
import importlib.util
import os
import subprocess
import sysconfig
from multiprocessing import get_context

import pytest
import torch
from emulator import CSRC, CXX, FLAGS, NEEDS, Emulator, emulate
from test_topk_cuda import KEYS, SMALL, assert_same, run

from activesel import _native, spec

pytestmark = [
    pytest.mark.skipif(CXX is None, reason=NEEDS),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
BARRIER = "__syncthreads();"


def sources():
    return {path.name: path.read_text() for path in CSRC.glob("*")}


def barriers():
    """File and number of each barrier in it, but for those that order blocks, not threads."""
    for name, text in sorted(sources().items()):
        before = [part.rstrip() for part in text.split(BARRIER)[:-1]]
        yield from ((name, i) for i, p in enumerate(before) if not p.endswith("__threadfence();"))


def planted(folder, name, text):
    """An emulator built from the sources with one file changed."""
    csrc = folder / "csrc"
    csrc.mkdir()
    for other, content in sources().items():
        (csrc / other).write_text(text if other == name else content)
    return Emulator(folder, csrc)


def try_everything(module):
    faulthandler.disable()  # how a broken kernel dies is of no interest
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    patch = pytest.MonkeyPatch()
    emulate(patch, module)
    torch.manual_seed(0)
    partial = torch.zeros(3000, dtype=torch.int32)
    partial[1000] = 9
    for rows in (300, 1500, 9000, SMALL + 1, 600_000):
        for keys in ("normal", "one leading digit", "two values"):
            module.shuffle(rows)
            x = KEYS[keys](rows)
            *ours, flags = _native.topk_cuda(x, rows // 3, partial)
            assert_same(ours, spec.topk(x, rows // 3)[:2])
            assert flags == 9
    run([KEYS["infinities"](9000)], [], 1000, 1, 2, 1.0, 1)


def caught(module):
    """In a process of its own: a broken kernel may write anywhere, or never end."""
    process = get_context("fork").Process(target=try_everything, args=(module,))
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    process.join()
    return code != 0


def without(name, index):
    parts = sources()[name].split(BARRIER)
    return BARRIER.join(parts[: index + 1]) + ";" + BARRIER.join(parts[index + 1 :])


@pytest.mark.parametrize("name, index", [
    pytest.param(*b, marks=[] if b == ("topk_cuda.cu", 2) else pytest.mark.slow) for b in barriers()
])  # fmt: skip
def test_every_barrier_is_missed(tmp_path, name, index):
    assert caught(planted(tmp_path, name, without(name, index)))


def test_no_bug_is_seen_where_none_is(tmp_path):
    assert not caught(Emulator(tmp_path))


def test_a_barrier_that_some_never_reach_is_told(tmp_path, monkeypatch):
    some = "if (threadIdx.x < 1000) __syncthreads();"
    module = planted(tmp_path, "topk_cuda.cu", sources()["topk_cuda.cu"].replace(BARRIER, some))
    emulate(monkeypatch, module)
    said = r"block 0: \d+ of 1024 threads wait for the others, \d+ at a barrier"
    with pytest.raises(RuntimeError, match=said):
        _native.topk_cuda(torch.randn(50), 5)


@pytest.mark.slow
def test_the_bindings_pass_every_argument_on(tmp_path, monkeypatch):
    """The whole module, with the emulator for a GPU."""
    pybind11 = pytest.importorskip("pybind11")
    command = [
        CXX, *FLAGS, "-O1", f"-I{CSRC}", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden", "-Wno-psabi",
        "-DACTIVESEL_CUDA", "-DACTIVESEL_ISA=baseline", '-DACTIVESEL_VERSION="0"',
        '-DACTIVESEL_CUDA_ARCHITECTURES="emulated"',
        *(CSRC / name for name in ("bindings.cpp", "select_cpu.cpp", "kernels_cpu.cpp")),
        *("-x", "c++", CSRC / "topk_cuda.cu", CSRC / "device_cuda.cu"),
        *("-o", tmp_path / "_C.so"),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    found = importlib.util.spec_from_file_location("_C", tmp_path / "_C.so")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    emulate(monkeypatch, module)
    assert _native.cuda_reason() == "" and "offers 1" in _native.cuda_reason(1)

    keys, partial = torch.randn(3000), torch.tensor([spec.BAD_TARGET, 0], dtype=torch.int32)
    indices, threshold, flags = _native.topk_cuda(keys, 700, partial)
    assert_same((indices, threshold), spec.topk(keys, 700)[:2])
    assert flags == spec.BAD_TARGET
    run([keys.half()[::2]], [torch.rand(1500)], 700, 5, 6, 0.7, 8)
    run([], [keys], 2, -5, 6, 0.0, 1)
    with pytest.raises(RuntimeError, match="topk of 9 rows, k = 2, on cuda:4: invalid device"):
        module.topk_cuda(0, 9, 2, 0, 0, 0, 0, 0, 0, 4, 0)
    with pytest.raises(RuntimeError, match="select of 9 rows, k = 2, on cuda:4: invalid device"):
        module.select_cuda((), (), 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 0, 0, 4, 0)
