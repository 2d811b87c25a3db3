# SPDX-License-Identifier: Apache-2.0
"""Keys to rows in CUDA C++, run without a GPU: a C++ compiler and tests/emulator build the very
sources that nvcc builds, and every answer must be the specification's, bit for bit."""

import math
import re
import shutil
import subprocess

import pytest
import torch
from emulator import CSRC, CXX, NEEDS, Emulator, emulate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activesel import _native, spec

INF, NAN = math.inf, math.nan
SMALL = 262_144  # rows up to which two launches do


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    if CXX is None:
        pytest.skip(NEEDS)
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def device(built, monkeypatch):
    emulate(monkeypatch, built)
    built.launches()
    return built


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.is_floating_point():  # which NaN it is does not matter
            a, b = (torch.where(x.isnan(), NAN, x).view(torch.int32) for x in (a, b))
        assert torch.equal(a, b)


def check(keys, k):
    assert_same(_native.topk_cuda(keys, k), spec.topk(keys, k))


def lattice(rows, values):
    return torch.tensor(values)[torch.randint(len(values), (rows,))]


KEYS = {
    "normal": torch.randn,
    "equal": torch.zeros,
    "two values": lambda rows: lattice(rows, [1.0, 2.0]),
    "nan": lambda rows: torch.full((rows,), NAN),
    "few finite": lambda rows: lattice(rows, [NAN] * 30 + [1.0, -INF]),
    "infinities": lambda rows: lattice(rows, [INF, -INF, NAN, 3e38, -3e38]),
    "zeros": lambda rows: lattice(rows, [0.0, -0.0]),
    "denormals": lambda rows: torch.randint(-(1 << 22), 1 << 22, (rows,)).float() * 2.0**-149,
    "one leading digit": lambda rows: 1 + torch.rand(rows) / 5,
    "last bits": lambda rows: (0x3F800000 + torch.randint(8, (rows,))).int().view(torch.float32),
    "rising": lambda rows: torch.arange(rows).float(),
    "falling": lambda rows: -torch.arange(rows).float(),
    "any bits": lambda rows: torch.randint(-(2**31), 2**31, (rows,)).int().view(torch.float32),
}


@pytest.mark.parametrize("rows", range(13))
def test_every_k_of_a_few_rows(device, rows):
    for name in ("normal", "zeros", "infinities"):
        for k in range(rows + 1):
            check(KEYS[name](rows), k)


@pytest.mark.slow
def test_every_k_up_to_70_rows(device):
    for rows in range(1, 71):
        for k in range(rows + 1):
            check(KEYS["normal"](rows), k)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rows", [1023, 8193, 40_000])
def test_no_keys_are_too_hard(device, rows, keys):
    x = KEYS[keys](rows)
    for k in (rows // 5, rows - 1):
        check(x, k)
    assert device.launches() == 4


@pytest.mark.slow
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rows", [SMALL, 300_007])
def test_no_keys_are_too_hard_when_there_are_many(device, rows, keys):
    x = KEYS[keys](rows)
    for k in (1, rows // 5, rows - 1):
        check(x, k)


@pytest.mark.parametrize("rows", [255, 256, 257, 1024, 1025, 8191, 8192, 32_767, 32_769, SMALL])
def test_sizes_where_the_shares_change(device, rows):
    x = torch.randn(rows)
    for k in (0, rows // 3, rows):
        check(x, k)
    assert device.launches() == 6


@pytest.mark.parametrize("keys", ["normal", "two values", "infinities", "zeros"])
def test_more_rows_take_six_launches(device, keys):
    x = KEYS[keys](SMALL + 1)
    check(x, 52_429)
    assert device.launches() == 6
    if keys == "infinities":
        for k in (0, SMALL, SMALL + 1):
            check(x, k)


@pytest.mark.slow
def test_every_share_is_full(device):
    check((torch.randn(2_200_003) * 100).round(), 700_001)


@given(
    values=st.lists(
        st.one_of(st.floats(width=32), st.sampled_from([INF, -INF, NAN, 0.0, -0.0, 1.0])),
        max_size=300,
    ),
    data=st.data(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_keys(device, values, data, seed):
    device.shuffle(seed)
    check(torch.tensor(values), data.draw(st.integers(0, len(values))))


@pytest.mark.parametrize("rows", [9_000, SMALL + 1])
def test_threads_may_run_in_any_order(device, rows):
    x = torch.randn(rows).round(decimals=2)
    expected = spec.topk(x, rows // 4)
    for seed in range(5 if rows < SMALL else 2):
        device.shuffle(seed)
        assert_same(_native.topk_cuda(x, rows // 4), expected)


@pytest.mark.parametrize("rows", [0, 700, SMALL + 1])
@pytest.mark.parametrize("words", [0, 1, 5_000])
def test_flags_found_before_are_kept(device, rows, words):
    keys = torch.zeros(rows)
    keys[1:] = NAN
    partial = torch.zeros(words, dtype=torch.int32)
    partial[-1:] = spec.NONFINITE_SCORE
    partial[words // 2 :: 5_000] |= spec.BAD_TARGET
    *_, flags = _native.topk_cuda(keys, rows // 2, partial)
    found = (spec.NONFINITE_SCORE | spec.BAD_TARGET) if words else 0
    assert flags == found | (spec.TOO_FEW_ROWS if rows else 0)


# ---------------------------------------------------------------------------- keys made from losses


def run(online, reference, k, seed, step, temperature, offset):
    state = torch.tensor([seed]), torch.tensor([step]), torch.tensor([temperature])
    ours = _native.select_cuda(online, reference, k, *state, offset)
    expected = spec.select(online, reference, None, k, *state, offset, "softmax", 0.0, -100)
    assert_same(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sides", ["online", "reference", "both"])
def test_losses_of_any_dtype_and_stride(device, dtype, sides):
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    x = every.roll(77)[::13].to(dtype)  # subnormals, infinities and NaN of half precision too
    y = torch.randn(2 * len(x) + 1)[1::2]
    online, reference = ([x], [y.to(torch.bfloat16)]) if sides == "both" else ([x], [])
    if sides == "reference":
        online, reference = [], [y[:1].to(dtype).expand(len(x))]
    run(online, reference, len(x) // 3, 5, 6, 0.3, 0)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**34 + 3, 2**40 + 2])
@pytest.mark.parametrize("rows", [0, 1, 5, 1030, 40_001])
def test_noise_follows_the_global_row(device, rows, offset):
    run([torch.randn(rows)], [torch.randn(rows)], rows // 3, -7, 2**32 - 1, 0.7, offset)


@pytest.mark.parametrize("temperature", [0.0, INF, 1e-38, 1e-40, -1.0, NAN, 1e38, 0.5])
def test_any_temperature(device, temperature):
    x = KEYS["any bits"](300)
    x[:40] = KEYS["infinities"](40)
    x[40:80] = KEYS["zeros"](40)
    for k in (0, 100, 299):
        run([x], [], k, 1, 2, temperature, 3)
        run([x], [torch.zeros(300)], k, 1, 2, temperature, 3)


def test_keys_are_made_in_the_large_path_too(device):
    x = torch.randn(SMALL + 5)
    x[::1000] = NAN
    run([x], [torch.randn(SMALL + 5).half()], 50_000, 3, 4, 0.5, 2**33 + 1)
    assert device.launches() == 6


# ---------------------------------------------------------------------------------------- the guard


def test_the_guard_says_what_is_wrong(device):
    keys = torch.zeros(4)
    state = torch.tensor([1]), torch.tensor([1]), torch.tensor([1.0])
    for k in (-1, 5):
        with pytest.raises(ValueError, match=rf"k must be in \[0, 4\], got {k}"):
            _native.topk_cuda(keys, k)
    with pytest.raises(ValueError, match=r"keys must be \[B\], got \[2, 2\]"):
        _native.topk_cuda(keys.view(2, 2), 1)
    with pytest.raises(TypeError, match=r"keys must be torch\.float32, got torch\.float16"):
        _native.topk_cuda(keys.half(), 1)
    with pytest.raises(TypeError, match=r"partial must be torch\.int32, got torch\.int64"):
        _native.topk_cuda(keys, 1, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="need CPU tensors, got one on meta"):
        _native.topk_cuda(keys, 1, torch.zeros(1, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match=r"one length, got \[3\]"):
        _native.select_cuda([keys], [torch.zeros(3)], 1, *state, 0)
    with pytest.raises(TypeError, match=r"losses must be floating, got torch\.int64"):
        _native.select_cuda([keys.long()], [], 1, *state, 0)
    with pytest.raises(TypeError, match=r"seed must be torch\.int64, got torch\.int32"):
        _native.select_cuda([keys], [], 1, state[0].int(), *state[1:], 0)
    with pytest.raises(TypeError, match=r"temperature must be torch\.float32"):
        _native.select_cuda([keys], [], 1, *state[:2], state[2].double(), 0)
    lazy = torch.complex(keys, torch.arange(4.0)).conj().imag  # a view with its sign pending
    assert _native.topk_cuda(lazy, 2)[0].tolist() == [0, 1]
    assert _native.topk_cuda(torch.randn(4, 4)[:, 1], 0)[0].tolist() == []


def test_only_cuda_tensors_are_taken():
    with pytest.raises(RuntimeError, match="need CUDA tensors, got one on cpu"):
        _native.topk_cuda(torch.zeros(3), 1)
    with pytest.raises(RuntimeError, match="need CUDA tensors, got one on cpu"):
        _native.select_cuda([torch.zeros(3)], [], 1, *torch.ones(3).split(1), 0)


def test_a_build_without_cuda_is_told(monkeypatch):
    emulate(monkeypatch, type("Module", (), {"cuda": False}))
    with pytest.raises(RuntimeError, match="built without CUDA: reinstall with nvcc"):
        _native.topk_cuda(torch.zeros(3), 1)


def test_a_call_that_cannot_run_says_why_and_leaves_the_device(device):
    end = (0, 0, 0, 0)  # outputs and workspace
    with pytest.raises(RuntimeError, match=r"more than 2\^31 - 1 rows"):
        device.topk_cuda(0, 2**31, 1, 0, 0, *end, 0, 0)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        device.topk_cuda(0, 0, 0, 0, 0, *end, 3, 0)
    assert device.call("current_device") == 0


# ---------------------------------------------------------------------------------------- compilers


def archs():
    if not shutil.which("nvcc"):
        return []
    listed = subprocess.check_output(["nvcc", "--list-gpu-arch"], text=True).split()
    return [a for a in ("80", "90", "100") if f"compute_{a}" in listed]


@pytest.mark.slow
@pytest.mark.skipif(not archs(), reason="no nvcc")
@pytest.mark.parametrize("arch", archs())
def test_kernels_keep_to_registers_and_static_memory(tmp_path, arch):
    command = ["nvcc", "-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{arch}", "-Xptxas", "-v",
               "-cubin", CSRC / "topk_cuda.cu", "-o", tmp_path / "k.cubin"]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = re.findall(r"Compiling entry function .*?(?=Compiling entry|\Z)", said, re.DOTALL)
    assert len(kernels) == said.count("Compiling entry") == 9
    for kernel in kernels:
        numbers = {k: int(n) for n, k in re.findall(
            r"(\d+) (bytes stack|bytes spill stores|bytes spill loads|registers|bytes smem)", kernel
        )}  # fmt: skip
        assert numbers["bytes stack"] == 0, kernel
        assert numbers["bytes spill stores"] == numbers["bytes spill loads"] == 0, kernel
        assert numbers["registers"] <= 64, kernel  # of 65,536, for 1,024 threads
        assert numbers["bytes smem"] <= 48 << 10, kernel
