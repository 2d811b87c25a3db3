# SPDX-License-Identifier: Apache-2.0
"""The frontier: speedups against arithmetic, bounds said as bounds, pictures, honest wording."""

import csv
import doctest
import json
import math
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activesel.loop import records
from bench import common, equivalence, pairs, pareto, study
from bench.pareto import clock, paper, plots, points, words

FULL = points.full("full")
FORWARD = {"mini": 1000.0, "micro": 400.0, "midi": 4000.0, "nano": 60.0, "pico": 10.0}
TARGET = 2400


def made(config, metric):
    """The record of a run, as if it had come out so, priced as the loops price it."""
    small, large = FORWARD[config.scorer], FORWARD[config.learner]
    recipe, rows = config.recipe, config.updates * config.keep
    drawn, online = config.rho * rows, recipe.online == "scorer"
    ledger = {
        "learner": 3 * rows * large,
        "scoring_online": drawn * small * online,
        "scoring_reference": drawn * small * bool(recipe.reference),
        "online_training": 3 * rows * small * online,
        "reference_training": 3 * 4800 * config.keep * small * bool(recipe.reference),
        "selection": 0.0,
    }
    found = (
        {"recall": {"r10": metric}, "reference_scoring_seconds": None}
        if config.loop == "contrastive"
        else {"accuracy": metric}
    )
    return {
        "schema": 1,
        "name": config.name,
        "config": json.loads(json.dumps(asdict(config))),
        "environment": {"cpu": "any"},
        "ledger": {**ledger, "total": sum(ledger.values())},
        "seconds": 2.0 * config.updates,
        "cpu_seconds": 1.0 * config.updates,
        "reference": {"seconds": 600.0, "cpu_seconds": 300.0} if recipe.reference else None,
        **found,
    }


def uniform(percents={50: 0.84, 100: 0.86, 200: 0.88}, seeds=(0, 1), **settings):  # noqa: B006
    return [
        made(study.classify("full", "uniform", percent, seed, **settings), metric + 0.001 * seed)
        for percent, metric in percents.items()
        for seed in seeds
    ]


def runs(method, metrics, percent=67, **settings):
    return [
        made(study.classify("full", method, percent, seed, **settings), metric)
        for seed, metric in enumerate(metrics)
    ]


def one(found, method):
    rows, left_out = points.points(found, FULL)
    assert not left_out
    (row,) = [row for row in rows if row["method"] == method]
    return row


def test_every_cost_of_reaching_the_target_is_charged():
    row = one(uniform() + runs("classact", [0.8605, 0.8605], scorer="nano"), "classact")
    beta, r = 1608 / TARGET, 0.06  # reached uniform's metric at full budget, with 67 % of it
    assert row["beta"]["value"] == pytest.approx(beta)
    assert row["f_ratio"] == pytest.approx(r)
    assert row["learner_speedup"]["value"] == pytest.approx(1 - beta)
    update = (3 + 2 * 2 * r + 3 * r) / 3  # learner, both scorers on both rows, online training
    once = 4800 / TARGET * r
    assert row["compute_speedup"]["value"] == pytest.approx(1 - beta * update - once)
    assert row["compute_speedup_shared"]["value"] == pytest.approx(1 - beta * update)
    published = (beta * (3 + 4 * r) + 3 * r) / 3
    assert row["compute_speedup_published"]["value"] == pytest.approx(1 - published)
    assert row["beta_max"] == pytest.approx((1 - once) / update)
    assert row["beta_max_shared"] == pytest.approx(1 / update)
    assert row["compute_positive"] is True
    assert row["system_seconds"] is None and row["system_speedup"] is None, "no clock"
    assert row["recorded_cpu_seconds"] == 1608 + 300
    assert row["recorded_seconds"] == 2 * 1608 + 600


RATES = {"step": {"mini": 9.0, "nano": 0.5, "micro": 7.0}, "forward": {"nano": 0.2, "micro": 2.0}}


def rated(configs, selection=0.01):
    """A clock with made-up seconds per row, by kind and model; 1 where none is given."""
    rows = []
    for part in clock.needed(configs):
        seconds = RATES.get(part.kind, {}).get(part.model, 1.0)
        row = {**asdict(part), "seconds": selection if part.kind == "selection" else seconds}
        step = {"forward": seconds / 3, "share": 0.4, "share_step": 0.3}
        rows.append({**row, **step} if part.kind == "step" else row)
    machine = {"cpu": "slide rule", "torch": "0.1", "gpu": None}
    content = {"rows": rows, "machine": machine, "device": "cpu", "command": "any"}
    return clock.Clock(json.loads(json.dumps(content)), configs)


def test_easy_has_one_scorer_and_trains_none():
    row = one(uniform() + runs("easy", [0.86, 0.861], scorer="nano"), "easy")
    beta, r = row["beta"]["value"], 0.06
    assert row["compute_speedup_shared"]["value"] == pytest.approx(1 - beta * (3 + 2 * r) / 3)


def test_what_beta_max_says_of_gains_agrees_with_the_speedups():
    for metric in (0.8405, 0.8505, 0.8605):
        row = one(uniform() + runs("classact", [metric] * 2, scorer="nano"), "classact")
        assert (row["beta"]["value"] < row["beta_max"]) == row["compute_positive"]
        gain = 1 - row["beta_max"] - (1 - row["beta"]["value"])
        assert math.copysign(1, -gain) == math.copysign(1, row["compute_speedup"]["value"])


@pytest.mark.parametrize(
    ("metrics", "learner", "positive"),
    [
        ([0.9, 0.9], "> 66 %", True),  # beyond 200 %: beta < 0.34
        ([0.8, 0.8], "< -34 %", False),
        ([0.86, 0.89], "59 % (< -34 to > 66)", True),  # U(0.875) = 2400 * 2^0.725
    ],
)
def test_beyond_uniforms_budgets_only_a_bound_is_said(metrics, learner, positive):
    row = one(uniform() + runs("classact", metrics, scorer="pico"), "classact")
    assert row["learner_speedup"]["text"] == learner
    assert row["compute_positive"] is positive
    assert (row["compute_speedup"]["value"] is None) == (learner[0] in "<>")


def test_a_bound_that_settles_nothing_is_not_an_answer():
    grid = uniform({100: 0.86})
    row = one(grid + runs("classact", [0.87, 0.87], percent=100, scorer="nano"), "classact")
    assert row["beta"]["text"] == "< 1.00" and row["compute_positive"] is None
    row = one(grid + runs("classact", [0.85, 0.85], percent=50, scorer="nano"), "classact")
    assert row["beta"]["text"] == "> 0.50" and row["compute_positive"] is None


def test_one_seed_has_no_interval():
    row = one(uniform(seeds=(0,)) + runs("classact", [0.86], scorer="nano"), "classact")
    assert row["learner_speedup"]["text"] == "33 %"
    assert row["compute_speedup"]["low"] is None and row["metric"]["low"] is None


def test_learners_are_held_against_uniform_of_their_own_size():
    found = uniform() + uniform({100: 0.7}, learner="midi")
    found += runs("classact", [0.69, 0.69], learner="midi", scorer="pico")
    row = one(found, "classact")
    assert row["beta"]["text"] == "> 0.67"
    rows, left_out = points.points(found + runs("easy", [0.8], learner="micro"), FULL)
    assert {row["learner"] for row in rows} == {"mini", "midi"}
    assert left_out == [
        "easy on learner micro left out: uniform's 2400 updates of that learner are missing"
    ]


def test_full_queue_is_that_of_the_study():
    configs = points.queue("full")
    assert len(set(c.name for c in configs)) == len(configs)
    images = [c for c in configs if c.loop == "classify"]
    grid = Counter((c.method, c.learner, c.scorer, c.rho, c.updates) for c in images)
    assert set(grid.values()) == {3} and {c.temperature for c in images} == {0.5, 1.0}
    for updates in (1200, 1608, 1920, 2400, 3192):
        assert grid["uniform", "mini", "nano", 1, updates] == 3
    for scorer in ("femto", "pico", "mu", "nano", "micro"):
        for method in ("classact", "easy"):
            assert grid[method, "mini", scorer, 2, 1608] == 3
    for rho in (4, 8):
        assert grid["classact", "mini", "pico", rho, 1608] == 3
    for learner in ("micro", "nano"):
        assert grid["uniform", learner, "nano", 1, 2400] == 3
        assert grid["uniform", learner, "nano", 1, 1608] == 3
        assert grid["classact", learner, "pico", 2, 1608] == 3
    table = {c.name for c in pairs.queue()}
    ratios = {c.rho for c in configs if c.loop == "contrastive" and c.name not in table}
    assert ratios == {2, 10}, "all others are the table's runs"


@pytest.mark.parametrize("scale", ["smoke", "full", "gpu"])
def test_a_stop_half_way_leaves_whole_seeds_behind(scale):
    seeds = [config.seed for config in points.queue(scale)]
    assert seeds == sorted(seeds) and set(seeds) == set(study.SEEDS[scale])


def test_published_ablation_and_its_second_column():
    rows = {row["label"]: row for row in paper.points() if row["learner"] == "B"}
    printed = {
        name: round(100 * rows[name]["compute_speedup_published"]["value"])
        for name in ("RHO", "ClassAct-HO", "ClassAct", "ClassAct-Online")
    }
    assert printed == {"RHO": -79, "ClassAct-HO": 3, "ClassAct": 3, "ClassAct-Online": 2}
    charged = 100 * rows["ClassAct"]["compute_speedup"]["value"]
    assert charged == pytest.approx(-2.8, abs=0.3) and not rows["ClassAct"]["compute_positive"]


def test_published_points_say_where_they_come_from():
    rows = paper.points()
    assert all(row["source"] == "published" and "arXiv" in row["paper"] for row in rows)
    assert all("from a review" in row["where"] for row in rows), "none was read in the paper"
    (bound,) = [row for row in rows if row["beta"]["value"] is None]
    assert bound["learner_speedup"]["text"] == "< 10 %" and bound["compute_positive"] is None
    jest = {row["rho"]: row for row in rows if row["label"] == "JEST"}
    for rho, beta in ((2, 2 / 3), (5, 1 / 3), (10, 0.67 / 3)):
        printed = 1 - beta * (3 + rho - 1) / 3  # scores of the reference free, a forward reused
        assert jest[rho]["compute_speedup_published"]["value"] == pytest.approx(printed)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0, 100)), min_size=1, max_size=12))
def test_no_point_lies_below_the_hull(corners):
    front = plots.hull(corners)
    assert set(front) <= set(corners)
    for x, y in corners:
        for (x0, y0), (x1, y1) in pairwise(front):
            if x0 < x < x1:
                level = y0 + (y1 - y0) * math.log(x / x0) / math.log(x1 / x0)
                assert y >= level - 1e-6 * (1 + abs(level))


def test_break_even_lines_pass_where_the_points_break_even():
    found = uniform()
    for scorer in ("pico", "nano"):
        found += runs("classact", [0.86, 0.861], scorer=scorer)
    rows = [row for row in points.points(found, FULL)[0] if row["method"] == "classact"]
    for row in rows:
        shared, paid = plots.break_even(rows, row["f_ratio"])
        assert shared == pytest.approx(1 - row["beta_max_shared"])
        assert paid == pytest.approx(1 - row["beta_max"])


def test_of_several_budgets_the_one_that_says_most_is_drawn():
    row = {"method": "jest", "learner": "a", "scorer": "b", "rho": 5}

    def entry(updates, metric):
        b = equivalence.beta(updates, [metric], {100: [0.5]})
        return {**row, "beta": {**asdict(b), "least": updates / 100, "most": updates / 100}}

    (best,) = plots.tightest([entry(100, 0.9), entry(67, 0.6), entry(50, 0.4)])
    assert best["beta"]["text"] == "< 0.67"
    (best,) = plots.tightest([entry(50, 0.4), entry(67, 0.45)])
    assert best["beta"]["text"] == "> 0.67"


def some(scale="full"):
    """Records for most of a queue: metrics grow with updates and scorers."""
    found, missing = [], []
    for config in points.queue(scale):
        if config.scorer not in FORWARD or config.learner not in FORWARD:
            missing.append(config)
            continue
        gain = 0.02 * math.log2(config.updates / (2400 if config.loop == "classify" else 600))
        extra = 0.0 if config.method == "uniform" else 0.01 + 0.0001 * FORWARD[config.scorer]
        found.append(made(config, 0.8 + gain + extra + 0.001 * config.seed))
    return found, missing


def test_files_pictures_and_words(tmp_path):
    found, missing = some()
    rates = rated(points.queue("full"))
    content = json.loads(json.dumps(pareto.content(found, missing, "full", rates)))
    assert content["missing"] == [c.name for c in missing] and content["left_out"] == []
    files = pareto.pictures(content, tmp_path / "pareto")
    names = {file.stem.removeprefix("pareto-") for file in files}
    said = pareto.text(content)
    assert names == set(words.PICTURES)
    for name in names:
        assert f"](../bench/results/cpu/pareto-{name}.svg)" in said
        width = ElementTree.parse(tmp_path / f"pareto-{name}.svg").getroot().get("width")
        assert float(width.removesuffix("pt")) <= 360, "ten-point letters stay legible on a phone"
    assert "one reference system (slide rule, one thread, torch 0.1)" in said
    assert "mini 40% (30%)" in said and "by the convention for FLOPs it is 33 %" in said
    assert "Measured here" in said and "second-hand" in said
    assert f"{len(missing)} runs are missing" in said
    flat = pareto.flat(content["points"][-1])
    assert not [name for name, value in flat.items() if isinstance(value, dict | list)]
    assert {"beta", "beta_low", "metric", "learner_speedup", "seeds"} <= set(flat)


def test_nothing_measured_is_said(tmp_path):
    content = pareto.content([], points.queue("smoke"), "smoke")
    assert content["points"] == [] and "no run is finished" in content["left_out"][0]
    names = [file.name for file in pareto.pictures(content, tmp_path / "p")]
    assert names and all(name.startswith("p-paper-") for name in names)
    assert "Measured" not in pareto.text(content)


def test_command_writes_what_there_is_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found, queue = some("smoke")[0], points.queue("smoke")
    for run in found:
        folder = common.runs("smoke") / run["name"]
        folder.mkdir(parents=True)
        records.write_json(folder / "run.json", run)
    given = common.write(tmp_path / "any", common.header() | rated(queue).content, [])[0]
    pareto.command("smoke", aggregate_only=True, out=tmp_path / "here" / "pareto", clock=given)
    assert not (tmp_path / "here" / "pareto-clock.json").exists(), "another's was given"
    said = capsys.readouterr().out.splitlines()
    last = json.loads(said[-1].removeprefix("--result "))
    content = common.read(tmp_path / "here" / "pareto.json")
    assert content["finished"] == len(found) and content["scale"] == "smoke"
    assert last == content["headline"] and last["missing"] == len(queue) - len(found)
    left = f"unfinished: {len(queue) - len(found)} of {len(queue)} runs are missing"
    assert (left in said) == (len(found) < len(queue))
    with (tmp_path / "here" / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["source"] for row in rows) == {
        "measured": len(content["points"]), "published": len(content["published"]),
    }  # fmt: skip


@pytest.mark.parametrize("module", [clock, equivalence, paper, plots, points])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_no_point_is_cut_off(tmp_path, monkeypatch):
    found = uniform() + runs("classact", [0.86, 0.861], scorer="nano")
    found += runs("easy", [0.8, 0.8], scorer="nano")  # far below the other panel's
    rows = points.points(found, FULL)[0]
    seen = []
    monkeypatch.setattr(plots, "save", lambda figure, path: seen.extend(figure.axes) or [])
    panels = {m: [r for r in rows if r["method"] == m] for m in ("classact", "easy")}
    plots.speedups(panels, tmp_path / "p", "title")
    for panel, those in zip(seen, panels.values(), strict=True):
        low, high = panel.get_ylim()
        assert all(low < 100 * plots.drawn(r["learner_speedup"])[0] < high for r in those)
