# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark without a GPU: rehearsals, failing steps, cases that die or stall."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the benchmark times Triton kernels")

from bench.gpu import command, worker

ROOT = Path(__file__).parent.parent


def bench(*arguments):
    return [sys.executable, "-m", "bench.gpu", *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def result(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


# --------------------------------------------------------------------------------------- rehearsal


STEPS = ["doctor", "tests", "memcheck", "timings"]
FEW = (
    "^ceilings$|4,096, (C 1,000, [Df]|k)|1 side|sigmoid|(sses|heads) to rows|agreement.*1,000"
    "|alone.*64|joint.* 8,192|rows: width (32|192.* 196)|scorers: width 64"
)


def rehearse(folder, *arguments):
    done = subprocess.run(
        bench("--rehearse", "--out", folder, *arguments),
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    return done, result(folder)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A case of every kind, and every step but the build and a second go at the same script."""
    folder = tmp_path_factory.mktemp("rehearsal")
    return rehearse(folder, "--commit", "abc", "--match", FEW, "--steps", *STEPS)


def check_rows(content):
    for row in content["rows"]:
        assert "error" not in row and "failed" not in row, row
        for entry in row.get("variants", []):
            assert "error" not in entry, entry
            assert entry["checked"] and entry["seconds"]["p20"] <= entry["seconds"]["p80"]
            assert entry["percent_of_roofline"] >= 0
        for found in row.get("agreement", {}).values():
            assert 0 <= found["overlap"] <= 1 and found["error_rms"] < 0.5  # of e4m3 0.1
    return {row["case"].partition(":")[0] for row in content["rows"]}


def test_every_step_passes(rehearsal):
    done, content = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    assert [s["name"] for s in content["steps"]] == STEPS
    assert {s["outcome"] for s in content["steps"]} == {"passed"}
    assert content["complete"] and content["machine"]["commit"] == "abc"


def test_a_case_of_every_kind_is_checked_and_timed(rehearsal):
    stages = {name.partition(":")[0] for name in worker.cases()} - {"ceilings again"}
    assert check_rows(rehearsal[1]) == stages


@pytest.mark.slow
def test_all_cases_and_the_build(tmp_path):
    """And the compiled module in the tree is left alone."""
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "activesel").glob("_C*")}
    done, content = rehearse(tmp_path, "--steps", "build", "timings")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["case"] for row in content["rows"]] == list(worker.cases())
    check_rows(content)
    assert {p: p.stat().st_mtime_ns for p in (ROOT / "activesel").glob("_C*")} == before


def test_a_rehearsal_reports_no_times(rehearsal):
    done, content = rehearsal
    assert content["rehearsal"] is True
    assert "a rehearsal: nothing was measured" in done.stdout
    assert " ms" not in done.stdout and " us" not in done.stdout and "roofline" not in done.stdout


def test_a_killed_run_leaves_what_it_had(tmp_path):
    process = subprocess.Popen(
        bench("--rehearse", "--out", tmp_path, "--steps", "timings", "--match", FEW),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment(),
    )  # fmt: skip
    stop = time.monotonic() + 60
    while time.monotonic() < stop:
        if list(tmp_path.glob("*.json")) and len(result(tmp_path)["rows"]) >= 2:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    content = result(tmp_path)
    assert len(content["rows"]) >= 2 and content["complete"] is False
    assert content["rows"][0]["case"] == "ceilings"


def test_a_rehearsal_stays_out_of_the_results(capsys):
    for folder in (command.RESULTS, command.RESULTS / "deeper", ROOT / "tests/../bench/results"):
        with pytest.raises(ValueError, match="out must be outside"):
            command.command(folder, rehearse=True)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--rehearse", "--out", str(command.RESULTS)])
    assert stopped.value.code == 2 and "out must be outside" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_to_do(tmp_path):
    with pytest.raises(RuntimeError, match="no CUDA device; --rehearse"):
        command.command(tmp_path)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- failing steps


@pytest.fixture
def rehearsing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as the command itself does, but undone
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_failing_step_hides_no_other(tmp_path, monkeypatch, rehearsing, capsys):
    monkeypatch.setitem(command.LIMITS, "memcheck", 0.0)
    code = command.command(tmp_path, rehearse=True, steps=["memcheck", "racecheck"])
    steps = {s["name"]: s for s in result(tmp_path)["steps"]}
    assert code == 1
    assert steps["memcheck"]["outcome"] == "failed"
    assert steps["memcheck"]["detail"] == "stopped after 0 s"
    assert steps["racecheck"]["outcome"] == "passed"
    assert "selections on cpu equal the specification" in steps["racecheck"]["detail"]


@pytest.mark.parametrize(
    "script, wanted, detail",
    [
        ("raise SystemExit(7)", "", "exit code 7"),
        ("print('quite other')", "passed", "must match 'passed'"),
    ],
)
def test_what_fails_a_step(tmp_path, script, wanted, detail):
    run = command.Run(tmp_path / "x.json", True, {"steps": [], "rows": []}, time.monotonic() + 60)
    step = command.step(run, "doctor", [sys.executable, "-c", script], wanted=wanted)
    assert step.outcome == "failed" and detail in step.detail
    assert run.left() < 60


def test_a_step_that_cannot_start_is_a_failed_step(tmp_path, monkeypatch, rehearsing, capsys):
    monkeypatch.setattr(command.sys, "executable", str(tmp_path / "no python here"))
    assert command.command(tmp_path, rehearse=True, steps=["doctor"]) == 1
    (step,) = result(tmp_path)["steps"]
    assert "FileNotFoundError" in step["detail"]
    assert command.command(tmp_path / "more", rehearse=True, steps=["doctor"], minutes=0) == 1
    assert result(tmp_path / "more")["steps"][0]["detail"] == "no time left"


def test_the_limit_ends_grandchildren_too():
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'],"
        " stdin=subprocess.PIPE); print(p.pid, flush=True); p.wait()"
    )
    found, output = command.limited([sys.executable, "-c", code], 3.0)
    assert found is None
    status = Path(f"/proc/{int(output)}/stat")
    time.sleep(0.2)
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_results_are_never_overwritten(tmp_path):
    gpu = {"gpu": "NVIDIA H200 NVL"}
    for name in ("h200-nvl-2026-01-02", "h200-nvl-2026-01-02-2", "h200-nvl-2026-01-02-3"):
        path = command._free(tmp_path, gpu, "2026-01-02")
        assert path.name == f"{name}.json"
        path.touch()


# ------------------------------------------------------------------------------------ the worker


def fine(bench):
    return {"rehearsed": bench.rehearse}


def raising(bench):
    raise LookupError("as planned")


def dying(bench):
    os._exit(3)


def stalling(bench):
    time.sleep(600)


CASES = {"fine": fine, "raising": raising, "dying": dying, "stalling": stalling, "last": fine}


def test_no_case_takes_the_others_with_it(monkeypatch):
    monkeypatch.setattr(worker, "CASE_LIMIT", 3.0)
    rows = {row.pop("case"): row for row in worker.rows(list(CASES), True, lambda: 99.0, __name__)}
    assert list(rows) == list(CASES)
    assert rows["fine"] == rows["last"] == {"rehearsed": True}
    assert rows["raising"]["error"] == "LookupError: as planned"
    assert (
        "def raising" in rows["raising"]["traceback"] or "raising" in rows["raising"]["traceback"]
    )
    assert rows["dying"]["error"] == "the process died"
    assert rows["stalling"]["error"] == "stopped after 3 s"


def test_cases_without_time_say_so():
    assert list(worker.rows(["fine"], True, lambda: 0.0, __name__)) == [
        {"case": "fine", "error": "not reached: no time left"}
    ]


def test_a_process_that_cannot_start_is_not_tried_again():
    rows = list(worker.rows(["fine", "last"], True, lambda: 99.0, "no.such.module"))
    assert [row["error"] for row in rows] == ["at the start, the process died"] * 2
