# SPDX-License-Identifier: Apache-2.0
"""`python -m bench gpu --out DIR`: build, doctor, tests, sanitizer, timings, one JSON file.

Every step runs in a process of its own, under a time limit, whatever became of the one before. The
file is written whole after every step and every timed case, so that a run cut short leaves what it
had. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from activesel.loop import records
from bench.gpu import report, worker
from bench.gpu.timing import Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
STEPS = ("build", "doctor", "tests", "memcheck", "racecheck", "timings")
LIMITS = {"build": 150.0, "doctor": 60.0, "tests": 150.0, "memcheck": 75.0, "racecheck": 75.0}
MINUTES = 7.8
TAIL = 4000  # characters of a step's output that are kept


@dataclass
class Step:
    """A step's outcome: passed, failed or skipped, and why."""

    name: str
    outcome: str
    detail: str
    seconds: float = 0.0
    output: str = ""  # its end


@dataclass
class Run:
    """What has been found so far, and the file that says so."""

    path: Path
    rehearse: bool
    content: Row
    stop: float  # time.monotonic() at which everything has to be over

    def left(self) -> float:
        return self.stop - time.monotonic()

    def write(self) -> None:
        report.rate_rows(self.content)
        records.write_json(self.path, self.content)

    def add(self, step: Step) -> None:
        self.content["steps"].append(asdict(step))
        self.write()
        print(f"{step.name:10} {step.outcome:8} {step.seconds:6.1f} s  {step.detail}", flush=True)
        if step.outcome == "failed" and step.output:
            print(step.output, flush=True)


def machine(commit: str) -> Row:
    """Everything a timing depends on."""
    found: Row = records.environment() | {"cuda": torch.version.cuda, "commit": commit or _commit()}
    for name in ("triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "driver": (_said(query) or "unknown").splitlines()[0],
        }
    return found


def _said(command: Sequence[str]) -> str:
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    commit = _said([*git, "rev-parse", "HEAD"])
    return commit + (" and changes" if _said([*git, "status", "--porcelain"]) else "") or "unknown"


# ------------------------------------------------------------------------------------------- steps


def limited(
    command: Sequence[str],
    limit: float,  # seconds
    env: dict[str, str] | None = None,
) -> tuple[int | None, str]:  # exit code, None if it ran out of time; output
    """Run a command and everything it starts, and end all of it at the limit."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return code, log.read().decode(errors="replace")


def step(
    run: Run,
    name: str,
    command: Sequence[str],
    env: dict[str, str] | None = None,
    wanted: str = "",  # pattern that the output of a passing step must have
) -> Step:
    start, limit = time.monotonic(), min(LIMITS[name], run.left())
    code, output = limited(command, limit, env)
    seconds, end = time.monotonic() - start, output[-TAIL:]
    if code is None:
        return Step(name, "failed", f"stopped after {limit:.0f} s", seconds, end)
    if code:
        return Step(name, "failed", f"exit code {code}", seconds, end)
    if wanted and not re.search(wanted, output):
        return Step(name, "failed", f"output must match {wanted!r}", seconds, end)
    last = output.strip().splitlines()[-1:] or [""]
    return Step(name, "passed", last[0][:200], seconds, end)


def build(run: Run) -> Step:
    """The compiled module, for this device's architecture alone; a rehearsal builds elsewhere."""
    command = [sys.executable, "setup.py", "build_ext"]
    if run.rehearse:
        with tempfile.TemporaryDirectory() as folder:
            where = ["--build-lib", folder, "--build-temp", folder]
            return step(run, "build", command + where, {"ACTIVESEL_CUDA": "off"})
    major, minor = torch.cuda.get_device_capability(0)
    env = {"ACTIVESEL_CUDA": "on", "CUDAARCHS": f"{major}{minor}-real"}
    return step(run, "build", [*command, "--inplace"], env)


def tests(run: Run) -> Step:
    """Files with tests for a GPU only: others need packages that a GPU machine may lack."""
    marked = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"pytest\.mark\.gpu\b", path.read_text())
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", *marked]
    command += ["-W", "default"]  # other versions of torch and triton warn of other things
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # compiling takes most of the time
    return step(run, "tests", command, wanted=r"\d+ skipped" if run.rehearse else r"\d+ passed")


def sanitizer(run: Run, name: str) -> Step:
    """Small inputs through every kernel, under one of compute-sanitizer's tools if it is there."""
    script = [sys.executable, "-m", "bench.gpu.smoke"]
    if run.rehearse:
        return step(run, name, script)
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if not tool:
        return Step(name, "skipped", "compute-sanitizer is not installed")
    options = ["--report-api-errors", "no"] if name == "memcheck" else []  # torch makes some
    done = step(
        run, name, [tool, "--tool", name, "--error-exitcode", "3", *options, *script],
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else every small tensor lies in one big block
    )  # fmt: skip
    if done.outcome == "failed" and "Device not supported" in done.output:
        return Step(name, "skipped", "compute-sanitizer does not support this device")
    return done


def timings(run: Run, match: str) -> Step:
    start = time.monotonic()
    outcomes = {"passed": 0, "failed": 0}
    names = [name for name in worker.cases() if re.search(match, name)]
    for row in worker.rows(names, run.rehearse, run.left):
        run.content["rows"].append(row)
        run.write()
        failed = "error" in row or row.get("failed")
        outcomes["failed" if failed else "passed"] += 1
        print(report.line(row, run.rehearse), flush=True)
    detail = f"{outcomes['passed']} cases measured, {outcomes['failed']} failed"
    failed = outcomes["failed"] or not outcomes["passed"]
    return Step("timings", "failed" if failed else "passed", detail, time.monotonic() - start)


# ----------------------------------------------------------------------------------------- command


def command(
    out: Path,
    rehearse: bool = False,
    steps: Sequence[str] = STEPS,
    match: str = "",
    minutes: float = MINUTES,
    commit: str = "",
) -> int:
    """Run the steps and write `<out>/<gpu>-<date>.json`; 0 if nothing failed, else 1."""
    out = out.resolve()
    if rehearse and (out == RESULTS or RESULTS in out.parents):
        raise ValueError(f"out must be outside {RESULTS} for a rehearsal, got {out}")
    if not rehearse and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device; --rehearse runs every step without one")
    if rehearse:  # inherited by every step
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    found = machine(commit)
    today = datetime.date.today().isoformat()
    content: Row = {
        "schema": 1, "rehearsal": rehearse, "date": today, "machine": found,
        "complete": False, "steps": [], "rows": [],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    run = Run(_free(out, found, today), rehearse, content, time.monotonic() + 60 * minutes)
    run.write()
    for name in STEPS:
        if name in steps:
            run.add(_step(run, name, match))
    content["complete"] = True
    run.write()
    print(report.table(content))
    print(f"written to {run.path}")
    return int(any(s["outcome"] == "failed" for s in content["steps"]))


def _step(run: Run, name: str, match: str) -> Step:
    """A step that cannot even start is a failed step."""
    if run.left() <= 0:
        return Step(name, "failed", "no time left")
    try:
        if name == "build":
            return build(run)
        if name == "doctor":
            return step(run, name, [sys.executable, "-m", "activesel", "doctor"])
        if name == "tests":
            return tests(run)
        return timings(run, match) if name == "timings" else sanitizer(run, name)
    except Exception as error:
        return Step(name, "failed", f"{type(error).__name__}: {error}")


def _free(out: Path, found: Row, today: str) -> Path:
    """A name that no earlier run has taken."""
    gpu = (found.get("gpu") or "rehearsal").lower().removeprefix("nvidia ")  # a rehearsal sees none
    stem = "-".join([*re.findall(r"[a-z0-9]+", gpu), today])
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    return next(p for name in names if not (p := out / f"{name}.json").exists())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument(
        "--match", default="", metavar="PATTERN", help="time only cases that this finds"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--commit", default="", help="where git does not know")
    arguments: dict[str, Any] = vars(parser.parse_args(argv))
    try:
        code = command(**arguments)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    sys.exit(code)
