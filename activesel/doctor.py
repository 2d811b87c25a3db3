# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel doctor`: which backend takes what here, why, and whether it is right."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from activesel import __version__, _native, _triton, driver, ops
from activesel.selftest import check

STAGES = {
    "scorer": "images -> rows, at once",
    "head": "heads -> scores, keys",
    "logits": "logits -> scores, keys",
    "scores": "losses -> scores",
    "losses": "losses -> keys -> rows",
    "topk": "keys -> rows",
    "joint": "pairs -> rows, jointly",
}
VARIABLES = r"(ACTIVESEL|TRITON|CUDA)_|(NVIDIA_VISIBLE_DEVICES|LD_LIBRARY_PATH|CC)$"


@dataclass
class Trial:
    """One backend at one stage."""

    outcome: str  # "right", "wrong", "cannot" or "untried"
    why: str = ""  # what is wrong, or why it cannot
    seconds: float | None = None  # of the self-test, compilation included


@dataclass
class Stage:
    auto: str | None  # the backend that backend="auto" takes; None: it raises
    why: str
    backends: dict[str, Trial]


@dataclass
class Device:
    device: str
    facts: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)


@dataclass
class Examination:
    """What `--json` prints; keys are only ever added."""

    host: str
    platform: str
    versions: dict[str, str]
    module: dict[str, Any]
    driver: dict[str, str]
    tools: dict[str, Any]
    environment: dict[str, str]
    devices: list[Device] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)  # what, instead
    faults: list[str] = field(default_factory=list)
    healthy: bool = False
    schema: int = 1


def versions() -> dict[str, str]:
    found = {"activesel": __version__, "Python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for name in ("activesel", "triton", "numpy"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        if name != "activesel" or version.startswith(f"{__version__}+"):  # 0.1.0+cu13
            found[name] = version
    return found | {"torch_cuda": torch.version.cuda or "none"}


def module() -> dict[str, str]:
    found = {"state": _native.reason(), "cuda_kernels": _native.cuda_reason() or "ready"}
    if _native.available():
        found["file"] = (it := _native._module()).__file__
        if it.cuda:
            found["cuda"] = driver.dotted(it.cuda_version)
            found["architectures"] = it.cuda_architectures
    return found


def tools() -> dict[str, Any]:
    nvccs = os.environ.get("CUDACXX") or "nvcc", f"{os.environ.get('CUDA_HOME')}/bin/nvcc"
    nvcc = next(filter(None, map(shutil.which, (*nvccs, "/usr/local/cuda/bin/nvcc"))), None)
    found: dict[str, Any] = {"c_compiler": _triton.compiler(), "nvcc": nvcc}
    if not _triton.absent():
        import triton

        folder = Path(triton.knobs.cache.dir)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        found |= {"triton_cache": str(folder), "triton_cache_writable": writable}
    return found


def driver_found() -> dict[str, str]:
    newest = driver.newest_cuda()
    found = {"cuda": driver.dotted(newest)} if newest else {}
    with contextlib.suppress(OSError, IndexError):
        said = Path("/proc/driver/nvidia/version").read_text()
        found["version"] = re.findall(r"\d+(?:\.\d+)+", said)[0]
    return found


def devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # else NVML counts alone
    yield from (torch.device("cuda", i) for i in range(count))


def facts(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": platform.machine(), "threads": torch.get_num_threads()}
    it = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    gib = {"memory_gib": round(total / 2**30, 1), "free_gib": round(free / 2**30, 1)}
    found = {"name": it.name, "capability": f"{it.major}.{it.minor}", **gib}
    return found | {"uuid": str(getattr(it, "uuid", ""))}


def plan(device: torch.device) -> dict[str, Stage]:
    """Which backend would take each stage, and why not the others; nothing is run."""
    stages = {}
    for stage in STAGES:
        auto: str | None = None
        try:
            auto, why = ops.choose("auto", device, stage)
        except (RuntimeError, ValueError) as error:  # the environment asks for what cannot be
            why = str(error)
        reasons = {name: ops.why_not(name, stage, device) for name in ops.BACKENDS[1:]}
        trials = {name: Trial("cannot" if no else "untried", no) for name, no in reasons.items()}
        stages[stage] = Stage(auto, why, trials)
    return stages


def try_out(found: Device) -> Iterator[str]:
    """Runs what the plan says can run, fills in how it went, and yields what is wrong."""
    for stage, planned in found.stages.items():
        for name, trial in planned.backends.items():
            if trial.outcome == "cannot":
                continue
            start = time.perf_counter()
            try:
                trial.why = check(name, stage, torch.device(found.device))
            except Exception as error:  # one backend's crash must not hide the others
                trial.why = f"{type(error).__name__}: {error}"
            trial.seconds = round(time.perf_counter() - start, 3)
            trial.outcome = "wrong" if trial.why else "right"
            if trial.why:
                yield f"{found.device}: {STAGES[stage]} by {name}: {trial.why}"


def missing(found: Examination) -> dict[str, str]:
    """What is not here, with its remedy; and what takes its place."""
    newest, out = driver.newest_cuda(), {}
    gpus = [device for device in found.devices[1:] if device.stages]
    if why := _native.cuda_reason():
        bare = why == _native.NO_CUDA and not found.tools["nvcc"]
        out[why + " (no nvcc is found here)" * bare] = "triton on GPUs"
    if not _native.available():
        out[_native.reason()] = "torch on the CPU, triton on GPUs"
    if not newest:
        out[driver.NONE] = "the CPU"
    elif not (built := torch.version.cuda):
        out["torch is built without CUDA: install one built with the driver's"] = "the CPU"
    elif why := driver.too_old(newest, built, "torch"):
        out[why] = "the CPU"
    elif not gpus:
        out["torch finds no GPU: ask the scheduler for one, see CUDA_VISIBLE_DEVICES"] = "the CPU"
    if why := _triton.absent() or _triton.no_launcher():
        out[why] = "torch on GPUs"
    for gpu in gpus:
        for name, stage in ("cuda", gpu.stages["topk"]), ("triton", gpu.stages["head"]):
            if (why := stage.backends[name].why) and not any(said.startswith(why) for said in out):
                out[why] = f"{stage.auto or 'nothing'} on GPUs"
    if not found.tools.get("triton_cache_writable", True):
        why = f"{found.tools['triton_cache']} cannot be written: set TRITON_CACHE_DIR"
        out[why] = "nothing, Triton's kernels fail on GPUs"
    return out


def unmet(backend: str, found: Examination) -> Iterator[str]:
    """Why `backend` does not run where it is required, besides what is wrong anyway."""
    there = found.devices[:1] if backend == "native" else found.devices[1:]
    if not there:
        yield f"--require {backend}: torch finds no GPU"
    for device in there:
        for stage in ops.KERNELS[backend]:
            if device.stages and (trial := device.stages[stage].backends[backend]).why:
                yield f"--require {backend}: {trial.why}, on {device.device}"


def examine(require: Sequence[str] = (), run: bool = True) -> Examination:
    """Everything; with `run` false no kernel is tried."""
    set_here = {k: v for k, v in sorted(os.environ.items()) if re.match(VARIABLES, k)}
    where = platform.node(), platform.platform()
    found = Examination(*where, versions(), module(), driver_found(), tools(), set_here)
    for device in devices():
        it = Device(str(device))
        found.devices.append(it)
        try:
            it.facts, it.stages = facts(device), plan(device)
        except RuntimeError as error:
            found.faults.append(f"{device} cannot be used: {error}")
        found.faults += dict.fromkeys(s.why for s in it.stages.values() if s.auto is None)
    found.missing = [{"what": k, "instead": v} for k, v in missing(found).items()]
    for backend in require:
        found.faults += dict.fromkeys(unmet(backend, found))
    for it in found.devices if run else ():
        found.faults += try_out(it)
    found.healthy = not found.faults
    return found


def _line(of: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in of.items())


def _print_device(found: Device) -> None:
    print(f"\n{found.device}, {_line(found.facts)}: every backend against the specification")
    print(f"{'':26}{'auto takes':12}" + "".join(f"{name:14}" for name in ops.BACKENDS[1:]))
    reasons: dict[str, None] = {}
    for stage, it in found.stages.items():
        if it.auto:
            reasons[f"auto takes {it.auto}: {it.why}"] = None
        cells = []
        for name, trial in it.backends.items():
            if trial.outcome == "cannot":
                reasons[f"{name}: {trial.why}"] = None
                cells.append("-")
            else:
                said = trial.outcome.replace("wrong", "WRONG")
                cells.append(said if trial.seconds is None else f"{said} {trial.seconds:.2f} s")
        print(f"  {STAGES[stage]:24}{it.auto or '-':12}" + "".join(f"{c:14}" for c in cells))
    print(*(f"  {line}" for line in reasons), sep="\n")


def _print(found: Examination) -> None:
    print(f"{found.host}: {found.platform}\n{_line(found.versions)}")
    for name in ("module", "driver", "tools", "environment"):
        said = [f"{key}: {value}" for key, value in getattr(found, name).items()]
        print(f"{name}:", *(said or ["none"]), sep="\n  ")
    for device in found.devices:
        _print_device(device)
    print(
        "\nForward is one launch, pixels to rows, where the scorer has parts (activesel.models.ViT)"
        "\nof a size that is faster so; it joins the head stage where it has forward_features and"
        "\nan nn.Linear head; the output of any other is taken as logits, rounded as it comes.\n"
    )
    for it in found.missing:
        print(f"missing: {it['what']} (used instead: {it['instead']})")
    for fault in found.faults:
        print(f"WRONG: {fault}")
    verdict = "all that can run here is right" if found.healthy else "not healthy, see WRONG above"
    print(f"{found.host}: {verdict}")


def report(as_json: bool = False, require: Sequence[str] = ()) -> bool:
    """Print everything; whether all that can run here is right and all that is required runs."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = examine(require)
    if as_json:
        print(json.dumps(asdict(found)))  # on one line, so that nodes' lines can be told apart
    else:
        _print(found)
    return found.healthy
