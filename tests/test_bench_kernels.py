# SPDX-License-Identifier: Apache-2.0
"""The suite of operators: complete, checked before it is timed, silent on red."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import activesel
from activesel import ops
from bench import common, kernels
from bench.kernels import builders, cases, table
from bench.kernels.place import Place, place

TINY = {
    "logits -> rows": (40, 30, 9),
    "logits -> losses": (40, 30, "sigmoid"),
    "losses -> scores": (40,),
    "losses -> rows": (40, 9),
    "head -> rows": (40, 30, 8, 9),
    "pairs -> rows": (40, 8, 9),
    "images -> rows": (8, "femto", 2),
    "sample": (40, 9),
    "noise": (40_000,),
    "keys -> rows": (40, 9),
    "joint": (200, 40, 16, "softmax"),
    "take": (40, 8, 9),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def at():
    return Place("cpu", 0.0)


def test_every_stage_and_every_public_operator_has_a_case():
    assert set(ops.STAGES) <= {op.stage for op in cases.OPS.values()}
    functions = {op.function for op in cases.OPS.values()}
    assert {"select", "score", "sample", "joint_select", "take"} <= functions
    for scale, sizes in cases.SIZES.items():
        assert set(sizes) == set(cases.OPS) == set(TINY), scale
        ids = [str(case) for case in cases.cases(scale)]
        assert len(set(ids)) == len(ids)
        assert all(case.need() > 0 for case in cases.cases(scale))


def wrong(out):
    """The same with one number off; draws and noise with all of them."""
    if isinstance(out, activesel.Selection):
        return replace(out, scores=out.scores + 1e-2 * (torch.arange(len(out.scores)) == 0))
    if isinstance(out, dict):
        return out | {"x": wrong(out["x"])}
    if isinstance(out, (tuple, list)):
        return [wrong(out[0]), *out[1:]]
    if out.is_floating_point():
        return out + 1e-1
    return out.index_fill(0, torch.tensor([0]), int(out[1]))  # a row twice


@pytest.mark.parametrize("who", ["ours", "twin"])
@pytest.mark.parametrize("op", TINY)
def test_right_results_pass_and_wrong_ones_do_not(op, who, at):
    made = cases.Case(op, TINY[op]).make(at)
    variant = getattr(made, who)
    out = variant.call(0)
    assert variant.check(out)
    with pytest.raises(AssertionError):
        variant.check(wrong(out))
    assert made.work.bytes > 0 and made.ours.ours and not made.twin.ours


def test_work_counts_what_cannot_be_avoided(at):
    made = cases.Case("head -> rows", (40, 30, 8, 9)).make(at)
    assert made.work.flops == 2 * 2 * 40 * 30 * 8
    assert made.work.bytes == 4 * 2 * 8 * (40 + 30) + 8 * 40 + 8 * 40 + 8 * 9
    x = builders.Inputs([torch.ones(40, 16)] * 2, [torch.ones(40, 16)] * 2)
    assert builders.joint_work(x, 8, 2).flops == 2 * 16 * 4 * (4 * 40 + 4 * 8)


def test_ceilings_are_rates(at, monkeypatch):
    monkeypatch.setattr("bench.kernels.place.PROBE", 1 << 20)
    monkeypatch.setattr("bench.kernels.place.SIDE", 128)
    found = at.ceilings()
    assert set(found) == {"bytes", "flops"}
    assert all(1e7 < rate < 1e15 for rate in found.values())


def test_scales_that_are_not_there():
    with pytest.raises(ValueError, match="scale must be one of smoke, full, gpu, got 'huge'"):
        place("huge", 1.0)
    with pytest.raises(ValueError, match="scale must be one of smoke, full, gpu, got 'huge'"):
        kernels.command("huge")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        kernels.command(threads=0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            place("gpu", 1.0)


def entry(who, median, **more):
    info = {
        "op": "sample", "shape": "B 40, k 9", "who": who, "variant": who, "bytes": 100, "flops": 0,
        "gb_per_s": 1.0, "gflop_per_s": 0.0, "roofline": 0.5, "binds": "bytes", "checked": "yes",
        "formula": "", "device": "any", "threads": 2, "backends": {"losses": "native"},
        "ceilings": {"bytes": 1e9, "flops": 1e9}, **more,
    }  # fmt: skip
    stats = {"median": median, "q1": median, "q3": median, "rounds": 5}
    return {"extra_info": info, "stats": stats}


def test_rows_from_a_report(tmp_path):
    report = {"benchmarks": [entry("ours", 2e-6), entry("twin", 1e-6)]}
    content = table.from_report(report, "smoke") | {"left_out": ["joint left out: too large"]}
    ours, twin = content["rows"]
    assert (ours["times_faster"], twin["times_faster"]) == (0.5, 1.0)
    assert (ours["seconds"], ours["threads"], content["device"]) == (2e-6, 2, "any")
    text = kernels.text(content)
    assert "| sample | B 40, k 9 | 2.0 | 1.0 | 0.50 |" in text
    assert "Slower than torch: sample, B 40, k 9 (0.50)." in text
    assert "joint left out: too large." in text
    assert table.headline(content)["slower_than_twin"] == 1
    common.write(tmp_path / "out", content, content["rows"])
    assert common.read(tmp_path / "out.json")["rows"] == content["rows"]


def test_device_times_count_where_there_are_some():
    report = {"benchmarks": [entry("ours", 1.0, device_seconds=2e-6), entry("twin", 4e-6)]}
    assert table.from_report(report, "gpu")["rows"][0]["times_faster"] == pytest.approx(2.0)


def test_a_report_without_a_twin_is_refused():
    with pytest.raises(ValueError, match="must be timed with its twin, got ours"):
        table.from_report({"benchmarks": [entry("ours", 1.0)]}, "smoke")
    with pytest.raises(ValueError, match="must hold times"):
        table.from_report({"benchmarks": []}, "smoke")


def test_nothing_is_written_on_red(tmp_path, monkeypatch):
    def red(scale, threads, found, more):
        found.write_text(json.dumps({"benchmarks": [entry("ours", 1.0), entry("twin", 1.0)]}))
        return 1, "1 failed"

    monkeypatch.setattr(table, "_suite", red)
    with pytest.raises(SystemExit, match="nothing is written"):
        kernels.command(out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


BROKEN = """
import activesel
right = activesel.sample
def wrong(*args, **kwargs):
    picked = right(*args, **kwargs)
    picked.keys[0] += 1
    return picked
activesel.sample = wrong
"""


@pytest.mark.slow
def test_a_wrong_kernel_stops_the_suite_before_it_times(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        kernels.command(threads=1, pytest="-p broken -k sample", out=tmp_path / "out")
    assert stopped.value.code and not list(tmp_path.glob("out*"))
    said = capsys.readouterr().out
    assert "keys must be those of the specification" in said and "test_time" not in said


@pytest.mark.slow
def test_the_suite_runs_and_is_written(tmp_path, capsys):
    kernels.command(threads=1, pytest="-k sample", out=tmp_path / "out")
    content = common.read(tmp_path / "out.json")
    assert [row["who"] for row in content["rows"]] == ["ours", "twin"]
    assert content["threads"] == 1 and content["ceilings"]["bytes"] > 0
    for row in content["rows"]:
        assert row["seconds"] > 0 and row["gb_per_s"] > 0 and row["roofline"] > 0
    header = (tmp_path / "out.csv").read_text().splitlines()[0]
    assert header.startswith("op,shape,who,variant,seconds,") and "roofline" in header
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last.removeprefix("--result "))["cases"] == 1


def test_the_suite_is_where_pytest_looks():
    assert Path(table.SUITE, "test_ops.py").is_file()
