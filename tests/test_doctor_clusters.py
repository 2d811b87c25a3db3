# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on clusters: drivers, GPUs, compilers, folders.

Simulated as far down as can be: a driver is a small library that the real CUDA runtime asks;
GPUs are torch's word.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_doctor import run

from activesel import _native, _triton, doctor, driver, ops

GPU = torch.device("cuda", 0)
HAS_CUDA = _native.available() and _native._module().cuda
NEEDS_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="activesel._C is without CUDA")
NEEDS_CC = pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc to build a driver with")
NO_IMAGE = "no kernel image is available for execution on the device"


@pytest.fixture
def fresh():
    """Nothing remembered of this machine, and nothing of the simulated one afterwards."""
    caches = _triton.reason, _triton.say_once, driver.refusal
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Module:
    """A compiled module of which one thing may be wrong."""

    __name__, __file__, cuda_version, cuda_architectures = "_C", "_C.so", 13000, "80-real 90"

    def __init__(self, cuda=True, takes=13000, count=1, probe=""):
        self.cuda, self.takes, self.count, self.probe = cuda, takes, count, probe

    def cuda_driver_version(self):
        return self.takes

    def cuda_device_count(self):
        return self.count

    def cuda_probe(self, device):
        if self.probe:
            raise RuntimeError(self.probe)


@pytest.fixture
def cluster(monkeypatch, tmp_path, fresh):
    """Makes a machine with GPUs, a driver, a compiler, a module and Triton."""
    pytest.importorskip("triton")

    def make(module=None, capability=(9, 0), takes=13000, gpus=1, torch_cuda="13.0"):
        properties = SimpleNamespace(name="GPU", major=capability[0], minor=capability[1], uuid="u")
        fakes = {
            "is_available": lambda: gpus > 0,
            "device_count": lambda: gpus or 1,  # NVML counts those that cannot be used
            "get_device_capability": lambda device: capability,
            "get_device_properties": lambda device: properties,
            "mem_get_info": lambda device: (2**30, 2**31),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.version, "hip", None)
        loaded = Module(takes=takes) if module is None else module
        state = (loaded, "loaded") if loaded else (None, "activesel._C cannot be loaded")
        monkeypatch.setattr(_native, "_load", lambda: state)
        monkeypatch.setattr(driver, "newest_cuda", lambda: takes)
        monkeypatch.delenv("ACTIVESEL_BACKEND", raising=False)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("CPATH", str(tmp_path))  # where Python.h may be
        (tmp_path / "gcc").touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return make


def plan(*require):
    """What the doctor finds, no kernel being run; what is missing with what stands in."""
    found = doctor.examine(require, run=False)
    gpu = {k: v.auto for k, v in found.devices[-1].stages.items() if found.devices[1:]}
    return found, {it["what"]: it["instead"] for it in found.missing}, gpu


def instead(missing, part):
    (found,) = (instead for what, instead in missing.items() if part in what)
    return found


def test_a_healthy_gpu(cluster, capsys):
    cluster()
    found, missing, auto = plan("cuda", "triton", "native")
    assert found.healthy and not missing
    assert {k for k, name in auto.items() if name == "cuda"} == {"losses", "topk"}
    assert {k for k, name in auto.items() if name == "triton"} == set(ops.STAGES) - {
        "losses", "topk",
    }  # fmt: skip
    assert found.devices[1].facts == {
        "name": "GPU", "capability": "9.0", "memory_gib": 2.0, "free_gib": 1.0, "uuid": "u",
    }  # fmt: skip
    doctor._print(found)
    assert "cuda:0, name GPU, capability 9.0, memory_gib 2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (dict(takes=12040), "the driver takes CUDA 12.4, _C was built with CUDA 13.0:"
         " install driver 580 or newer"),
        (dict(module=Module(probe=NO_IMAGE), capability=(12, 1)), "_C has no code for"
         " compute capability 12.1, only for 80-real 90: reinstall with it in CUDAARCHS"),
        (dict(module=Module(probe="system not yet initialized")),
         "CUDA cannot run here: system not yet initialized"),
        (dict(module=Module(count=0)), "device 0 is not there: the driver offers 0"),
    ],
    ids=["driver", "architecture", "other", "hidden"],
)  # fmt: skip
def test_cuda_kernels_that_cannot_run(cluster, caplog, machine, said):
    """Triton's stand in, one line of the log says why, and who asks for CUDA gets it raised."""
    cluster(**machine, torch_cuda="12.8")
    found, missing, auto = plan("cuda")
    assert set(auto.values()) == {"triton"} and instead(missing, said) == "triton on GPUs"
    assert any(f.startswith("--require cuda: " + said) for f in found.faults) and len(missing) == 1
    assert plan("triton")[0].healthy and said in found.devices[1].stages["topk"].why
    _triton.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="activesel"):
        caplog.clear()
        for stage in ops.STAGES * 2:
            assert ops.choose("auto", GPU, stage)[0] == "triton"
    assert len(caplog.records) == 1 and said in caplog.text
    with pytest.raises(RuntimeError, match=r'backend="cuda" cannot run: ') as error:
        ops.choose("cuda", GPU, "topk")
    assert said in str(error.value)


@pytest.mark.parametrize("module", [Module(cuda=False), False], ids=["without CUDA", "absent"])
def test_to_have_no_cuda_kernels_is_no_fault(cluster, caplog, monkeypatch, module):
    cluster(module)
    monkeypatch.setattr(shutil, "which", lambda name: name if "nvcc" not in name else None)
    with caplog.at_level(logging.WARNING, logger="activesel"):
        found, missing, auto = plan()
    assert set(auto.values()) == {"triton"} and found.healthy and not caplog.records
    said = "built without CUDA" if module else "cannot be loaded"
    assert "triton on GPUs" in instead(missing, said) and len(missing) == 1
    assert not module or "no nvcc is found here" in next(iter(missing))
    assert plan("cuda")[0].faults and bool(plan("native")[0].faults) == (not module)


def test_a_gpu_that_is_too_old(cluster, caplog):
    cluster(capability=(7, 0))
    with caplog.at_level(logging.WARNING, logger="activesel"):
        _, missing, auto = plan()
    assert auto == {s: "cuda" if s in ops.KERNELS["cuda"] else "torch" for s in ops.STAGES}
    assert instead(missing, "need compute capability 8.0, this device has 7.0") == "torch on GPUs"
    assert "is left to torch" in caplog.text
    (fault,) = plan("triton")[0].faults
    assert fault.startswith("--require triton: Triton kernels need compute capability 8.0")


def test_one_gpu_of_two_is_broken(cluster, monkeypatch):
    def properties(device):
        if device.index == 0:
            raise RuntimeError("uncorrectable ECC error")
        return SimpleNamespace(name="GPU", major=9, minor=0)

    cluster(Module(count=2), gpus=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    found, missing, auto = plan("cuda")
    assert found.faults == ["cuda:0 cannot be used: uncorrectable ECC error"] and not missing
    assert auto["topk"] == "cuda" and list(doctor.try_out(found.devices[1])) == []


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (dict(takes=0), "no NVIDIA driver here"),
        (dict(torch_cuda=None), "torch is built without CUDA"),
        (dict(takes=12020, module=Module(cuda=False)), "the driver takes CUDA 12.2, torch was built"
         " with CUDA 13.0: install driver 580 or newer, or torch for CUDA 12"),
        (dict(), "torch finds no GPU: ask the scheduler for one"),
    ],
)  # fmt: skip
def test_no_gpu(cluster, machine, said):
    cluster(gpus=0, **machine)
    found, missing, _ = plan()
    assert instead(missing, said) == "the CPU" and found.healthy
    assert plan("cuda")[0].faults == ["--require cuda: torch finds no GPU"]


def test_compilers(cluster, monkeypatch, tmp_path):
    cluster()
    monkeypatch.delenv("CPATH")
    monkeypatch.setattr(_triton.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert "Python.h: install Python's headers" in _triton.no_launcher()
    (tmp_path / "Python.h").touch()
    assert not _triton.no_launcher()
    for cc, path in (("", str(tmp_path)), ("icc", str(tmp_path)), (None, "nowhere")):
        _triton.reason.cache_clear()
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CC", raising=False) if cc is None else monkeypatch.setenv("CC", cc)
        found, missing, auto = plan("triton")
        assert auto["head"] == "torch" and auto["topk"] == "cuda" and not found.healthy
        said = "Triton finds no C compiler for its launchers: install one or set CC"
        assert missing == {said: "torch on GPUs"} and found.tools["c_compiler"] is None


def test_no_triton(cluster, monkeypatch):
    cluster()
    monkeypatch.setitem(sys.modules, "triton", None)
    found, missing, auto = plan()
    assert instead(missing, "Triton cannot be imported: install triton") == "torch on GPUs"
    assert auto["head"] == "torch" and "triton_cache" not in found.tools and len(missing) == 1


def test_a_cache_that_cannot_be_written(cluster, monkeypatch, tmp_path):
    cluster()
    (tmp_path / "file").touch(mode=0o755)
    folder = tmp_path / "file" / "cache"  # not even root can make it
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    said = f"{folder} cannot be written: set TRITON_CACHE_DIR"
    assert plan()[1] == {said: "nothing, Triton's kernels fail on GPUs"}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert not plan()[1] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("takes", "built", "old"), [(12040, "13.0", 1), (12040, "12.8", 0), (13020, "12.1", 0)]
)
def test_a_driver_takes_every_minor_version(takes, built, old):
    assert bool(driver.too_old(takes, built, "it")) == old


def library(folder, version):
    """A driver that tells its version and can do nothing else; or none at all."""
    if not version:
        (folder / "libcuda.so.1").write_text("no library")
        return
    source = f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}"
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "libcuda.so.1"]
    subprocess.run(command, input=source, text=True, check=True)


ASK = """
import torch
from activesel import ops
torch.cuda.get_device_capability = lambda device: (9, 0)
print(ops.choose("auto", torch.device("cuda", 0), "topk")[0])
try:
    ops.choose("cuda", torch.device("cuda", 0), "topk")
except RuntimeError as error:
    print(error)
"""


@NEEDS_CUDA
@NEEDS_CC
def test_a_driver_older_than_the_module(tmp_path):
    built = _native._module().cuda_version
    library(tmp_path, (built // 1000 - 1) * 1000 + 40)
    path = {"LD_LIBRARY_PATH": str(tmp_path), "CC": "gcc", "CPATH": str(tmp_path)}
    done = run("--require", "cuda", **path)
    taken = f"{built // 1000 - 1}.4"
    said = f"the driver takes CUDA {taken}, activesel._C was built with CUDA {driver.dotted(built)}"
    assert done.returncode == 1, done.stdout
    assert f"cuda: {taken}" in done.stdout and f"cuda_kernels: {said}" in done.stdout
    assert f"missing: {said}: install driver " in done.stdout
    assert "(used instead: triton on GPUs)" in done.stdout
    assert "WRONG: --require cuda: torch finds no GPU" in done.stdout
    if _triton.absent():
        return
    command = [sys.executable, "-c", ASK]
    asked = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
    assert asked.stdout.startswith(f'triton\nbackend="cuda" cannot run: {said}'), asked.stderr
    assert asked.stderr.count(f"Triton's kernels stand in for CUDA's: {said}") == 1


def test_no_driver_at_all(tmp_path):
    library(tmp_path, 0)
    found = json.loads(run("--json", LD_LIBRARY_PATH=str(tmp_path)).stdout)
    missing = {it["what"]: it["instead"] for it in found["missing"]}
    assert instead(missing, "no NVIDIA driver here: install one") == "the CPU"
    assert "cuda" not in found["driver"] and len(found["devices"]) == 1 and found["healthy"]
    said = found["module"]["cuda_kernels"]
    assert said == (driver.NONE if HAS_CUDA else _native.cuda_reason())
