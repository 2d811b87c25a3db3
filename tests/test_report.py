# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel report`: what the page says, that it is whole in itself, what is refused."""

import doctest
import functools
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import hypothesis.strategies as st
import pytest
import reports
import torch
from hypothesis import given
from reports import Page, make, method, record, uniform, whole_in_itself
from safetensors.torch import save_file
from scipy import stats

from activesel import __main__
from activesel.loop import data, records
from activesel.loop.config import Config
from activesel.loop.pairs_config import PairsConfig
from activesel.loop.report import figures, parts, report, results, runs, sheets, tables
from activesel.loop.rho_config import RhoConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def put(tmp_path):
    return functools.partial(reports.put, tmp_path)


def grouped(paths):
    return runs.groups([(path, runs.check(records.read_json(path), path)) for path in paths])


def test_a_method_and_its_baseline(put, tmp_path, capsys):
    paths = [put(r) for s in range(3) for r in (uniform(s), method(s, metric=0.87 + 0.001 * s))]
    out = tmp_path / "page.html"
    assert __main__.main(["report", *map(str, paths), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 6 runs in 2 groups\n"
    page = Page(out)
    whole_in_itself(page)
    assert page.all("title") and "ClassAct against uniform sampling: Fashion-MNIST" in page.text
    assert "Compute speedup of 17\xa0%." in page.text
    said = "(87.1\xa0% against 86.0\xa0%, +1.1 points, beyond chance: 95\xa0% interval +0.9 to +1.3"
    assert said in page.text
    assert "33\xa0% fewer updates" in page.text and "took 31\xa0% fewer seconds" in page.text
    for heading in ("Ledger", "Quality", "Configuration", "Contact sheet", "Ankle boot"):
        assert heading in page.text
    assert "66.0\xa0% (worst)" in page.text and "4.0\xa0%" in page.text
    assert "no contact sheet: no kept.safetensors beside" in page.text
    assert "--method classact --updates 1608 --seed 2" in page.text
    first = out.read_bytes()
    report(paths[::-1], out)
    assert out.read_bytes() == first, "the same runs give the same page"


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        ([method(metric=0.87)], [], "No baseline given"),
        ([method(metric=0.85)], [uniform()], "No speedup shown. ClassAct does not reach"),
        ([method(metric=0.87)], [uniform()], "Compute speedup of 17\xa0%, going by the mean."),
        ([method(flops=7e12)], [uniform()], "Learner speedup of 33\xa0%, no compute speedup"),
        ([method(updates=2400, flops=9e12)], [uniform()], "No speedup at this budget"),
        ([method()], [uniform(s) for s in (1, 2)], "no interval, with fewer than two seeds"),
        (
            [method(s, metric=0.86 + x) for s, x in enumerate((-0.01, 0.02))],
            [uniform(s) for s in (0, 1)],
            "+0.5 points, within chance: 95\xa0% interval -18.6 to +19.6; 2 seeds",
        ),
        (
            [method(updates=u, metric=m) for u, m in ((1200, 0.85), (1608, 0.861), (2000, 0.87))],
            [uniform()],
            "with 33\xa0% fewer updates, the smallest of 3 budgets that suffices",
        ),
        ([method()], [uniform(environment={"cores": 64})], "(on another machine)"),
        ([], [uniform()], "No baseline given. uniform: test accuracy 86.0\xa0%"),
        ([], [uniform(), uniform(updates=1200)], "Baseline. uniform, updates 2,400"),
        (
            [record(Config("classact", learner="micro"), 0.9)],
            [uniform()],
            "No baseline given. ClassAct",
        ),
    ],
)
def test_verdict(put, ours, theirs, said):
    assert said in ". ".join(sum(tables.verdicts(grouped(put(r) for r in ours + theirs)), ()))


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_intervals_are_student_s(values):
    low, high = runs.interval(values)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        Config("rho", online_smoothing=0.1, seed=3),
        PairsConfig("jest", subset="full", mix=(0.5, 0.25, 0.25), seed=1),
    ],
)
def test_command_gives_the_configuration_again(config):
    import tyro

    python, m, module, *options = shlex.split(runs.command(json.loads(json.dumps(asdict(config)))))
    assert (python, m, module) == ("python", "-m", f"activesel.loop.{config.loop}")
    assert tyro.cli(type(config), args=options) == config


def test_pairs(put, tmp_path):
    compared = {"batch_learnability": {"joint": 1.5, "independent": 0.25}}
    cached = {"ledger_cached": {"learner": 1e12, "total": 2e12}}
    asked = {"reference_scoring_seconds": {"fresh": 20.0, "cached": 4.0}}
    found = [
        record(PairsConfig("uniform", subset="tiny"), 0.045),
        record(PairsConfig("jest", subset="tiny"), 0.057, **compared, **cached, **asked),
    ]
    page = make([put(r) for r in found], tmp_path)
    assert "JEST against uniform sampling: icons and their captions" in page.text
    assert "R@10 (5.7\xa0% against 4.5\xa0%, +1.2 points" in page.text
    assert "took 50\xa0% more seconds" in page.text, "with the reference trained, and asked afresh"
    assert "JEST: tiers of the pairs kept" in page.text and "reference scored once" in page.text
    assert "image to text, R@10" in page.text and "0.25" in page.text


def test_rho_loop(put, tmp_path):
    page = make([put(record(RhoConfig(m, seed=0))) for m in ("uniform", "rho")], tmp_path)
    assert "RHO against uniform sampling" in page.text
    assert "python -m bench replicate rho" in page.text and "Ankle boot" in page.text


def test_whatever_a_record_says_is_text(put, tmp_path):
    evil = method(environment={"cpu": "</td><script>alert(1)</script>"})
    evil["config"]["method"] = "<img src=//x onerror=alert(1)> $x_{$ & _"
    page = make([put(evil, "evil"), put(uniform())], tmp_path)
    assert "<script>alert(1)</script>" in page.text and "$x_{$ & _" in page.text


@pytest.fixture
def clothes(monkeypatch):
    """60 rows in place of Fashion-MNIST, every tenth label wrong."""
    labels = torch.arange(60) % 10
    wrong = torch.arange(60) % 10 == 6

    def load(noise=0.0, seed=0):
        images = torch.full((60, 1, 28, 28), 99, dtype=torch.uint8)
        some = wrong & bool(noise)
        rows = data.Labelled(images, torch.where(some, 0, labels), some)
        return data.Split(rows, rows, rows)

    monkeypatch.setattr(data, "fashion_mnist", load)
    monkeypatch.setenv("ACTIVESEL_DATA", "set")


def counted(path, rows=60, **more):
    kept = torch.arange(rows, dtype=torch.int32)
    counts = {"ids": torch.arange(rows), "kept": kept, "drawn": torch.full_like(kept, 60), **more}
    save_file({name: value for name, value in counts.items() if value is not None},
              path.with_name("kept.safetensors"))  # fmt: skip


def test_contact_sheet(put, tmp_path, clothes):
    path = put(method())
    counted(path)
    page = make([path], tmp_path)
    assert "ClassAct, kept most often: 21 rightly labelled, 3 wrongly labelled" in page.text
    assert "59 of 60" in page.text and "0 of 60" in page.text and "30 of 60" not in page.text
    assert "T-shirt/top, truly Shirt" in page.text and "of the 60 rows drawn 5 times" in page.text
    tiles = [image for image in page.all("img") if "class" in image]
    assert len(tiles) == 2 * sheets.COUNT
    assert sum(tile["class"] == "bad" for tile in tiles) == 3 + 2
    assert all(re.match("data:image/png;base64,iVBOR", tile["src"]) for tile in tiles)


@pytest.mark.parametrize(
    "counts, said",
    [
        ({"ids": torch.arange(1, 61)}, "counted are not those of the data on this machine"),
        ({"drawn": None}, "must hold ids, kept and drawn, got ['ids', 'kept']"),
        ({"drawn": torch.zeros(60, dtype=torch.int32)}, "48 rows must be drawn 1 times or more"),
    ],
)
def test_no_contact_sheet_without_counts_that_fit(put, clothes, counts, said):
    path = put(method())
    counted(path, **counts)
    assert said in sheets.sheets(*grouped([path]))[1]
    path.with_name("kept.safetensors").write_bytes(b"not tensors")
    assert "no contact sheet: " in sheets.sheets(*grouped([path]))[1]


def test_data_are_not_fetched(put, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.delenv("ACTIVESEL_DATA", raising=False)
    monkeypatch.delenv("ACTIVESEL_ICONS", raising=False)
    for content, said in (
        (method(), "Fashion-MNIST is not on this machine"),
        (record(PairsConfig("jest", subset="tiny")), "the icons are not on this machine"),
        (record(RhoConfig("rho")), "Fashion-MNIST is not on this machine"),
    ):
        path = put(content)
        counted(path)
        assert said in sheets.sheets(*grouped([path]))[1]
    assert not (tmp_path / "none").exists()


def test_result_files(tmp_path):
    rows = [{"case": i, "gain": {"mean": 0.5, "low": 0.25, "high": 0.75}, "same": 7, "list": [1]}
            for i in range(50)]  # fmt: skip
    content = {
        "schema": results.SCHEMA, "version": "0.1", "command": "python -m bench pareto",
        "machine": {"cpu": "one"}, "missing": ["a", "b"], "left_out": ["B: 9 GB <needed>"],
        "rows": rows, "beta": {"a": {"x": 1, "y": None}, "b": {"x": True, "y": 2.5e-9}},
    }  # fmt: skip
    file = tmp_path / "pareto.json"
    records.write_json(file, content)
    records.write_json(tmp_path / "pareto-gpu.json", content)
    for name in ("pareto.svg", "pareto-hull.svg", "pareto-gpu.svg", "paretos.svg"):
        (tmp_path / name).write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>1</script>")
    (tmp_path / "pareto-hull.png").write_bytes(b"the same again")
    page = make([file], tmp_path)
    assert "Unfinished: 2 runs are missing." in page.text and "B: 9 GB <needed>" in page.text
    assert "python -m bench pareto" in page.text and "2.5\xd710⁻⁹" in page.text
    assert (
        "0.5 ± 0.25" in page.text and "The same in all rows: gain 0.5 ± 0.25; same 7" in page.text
    )
    assert [image["alt"] for image in page.all("img")] == ["pareto.svg.", "pareto-hull.svg."]
    assert len(page.all("details")) == 1, "long tables are folded"


@pytest.mark.parametrize("file", sorted((ROOT / "bench/results").rglob("*.json")), ids=str)
def test_committed_results(file, tmp_path):
    content = json.loads(file.read_text())
    if content.get("schema") != results.SCHEMA:
        pytest.skip("of another schema")
    assert "About this file" in make([file], tmp_path).text


def test_schema_is_the_bench_s():
    from bench import common

    assert results.SCHEMA == common.SCHEMA


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), 0
)
FRAME = """<iframe id="w{0}" style="border:0;width:{0}px;height:800px"></iframe>"""
SCRIPT = """<script>const page = PAGE, widths = WIDTHS, found = {}; let left = widths.length;
for (const width of widths) { const frame = document.getElementById("w" + width);
  frame.onload = () => { const d = frame.contentDocument;
    const broken = [...d.images].filter(i => !(i.complete && i.naturalWidth)).length;
    found[width] = [d.documentElement.scrollWidth, d.body.scrollHeight, broken];
    if (!--left) document.getElementById("found").textContent = JSON.stringify(found); };
  frame.srcdoc = page; }</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium on PATH")
def test_in_a_browser(put, tmp_path, clothes):
    """Nothing scrolls sideways, all pictures show, nothing is asked for, nothing is complained of.

    The page's own policy forbids every request: one tried would be a complaint.
    """
    paths = [put(r) for s in range(2) for r in (uniform(s), method(s), method(s, 1200))]
    counted(paths[1])
    make([*paths, *sorted((ROOT / "bench/results").glob("pairs-cpu.json"))], tmp_path)
    widths = (320, 360, 768, 1280)
    source = json.dumps((tmp_path / "report.html").read_text(encoding="utf-8"))
    script = SCRIPT.replace("WIDTHS", str(list(widths))).replace("PAGE", source)
    shown = tmp_path / "frames.html"
    frames = "".join(map(FRAME.format, widths))
    shown.write_text(f'<!doctype html><meta charset="utf-8">{frames}<p id="found"></p>{script}',
                     encoding="utf-8")  # fmt: skip
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=20000"]  # fmt: skip
    done = subprocess.run(
        [*command, "--dump-dom", shown.as_uri()], capture_output=True, text=True, timeout=300
    )
    found = re.search(r'<p id="found">(.*?)</p>', done.stdout)
    assert found and found[1], done.stderr[-2000:]
    for width, (scroll, height, broken) in json.loads(found[1]).items():
        assert scroll <= int(width) and height > 1000 and broken == 0, found[1]
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    pdf = tmp_path / "page.pdf"
    printed = [*command, f"--print-to-pdf={pdf}", (tmp_path / "report.html").as_uri()]
    subprocess.run(printed, capture_output=True, timeout=300, check=True)
    assert pdf.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("module", [parts, runs, results, figures, sheets])
def test_examples_run(module):
    assert doctest.testmod(module).failed == 0
