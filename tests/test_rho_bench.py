# SPDX-License-Identifier: Apache-2.0
"""RHO-LOSS's protocol replicated: figures, claims and gaps from made-up run records."""

from dataclasses import asdict, replace

import pytest
from test_cifar import write_folder

from activesel.ledger import Ledger
from bench import common
from bench.replicate import figures, rho, rho_text

FORWARD = 1000.0
LEVELS = {50: 0.80, 100: 0.82, 200: 0.84, 400: 0.86}
SPREAD = (-0.001, 0.0, 0.001)


def made(config, accuracy, wrong=0.1):
    """The record of a run, as if it had come out so: half of the accuracy after half the time."""
    scores, kept = config.method != "uniform", config.updates * config.keep
    ledger = Ledger(
        learner=3 * kept * FORWARD,
        scoring_online=config.updates * config.super_batch * FORWARD if scores else 0.0,
        reference_training=7e7 if config.method == "rho" else 0.0,
        scoring_reference=3e7 if config.method == "rho" else 0.0,
    )
    point = {"update": config.updates, "accuracy": accuracy, "flops_total": ledger.total}
    point |= {"kept": kept, "kept_mislabelled": wrong * kept}
    spent = {"seconds": 10.0 + 30 * scores, "cpu_seconds": 8.0 + 24 * scores}
    return {
        "name": config.name, "config": asdict(config), "accuracy": accuracy, "rows": 30_000,
        "worst_class": accuracy - 0.3, "base_rate": config.noise, "kept": kept,
        "kept_mislabelled": round(wrong * kept), **spent,
        "reference": {"seconds": 5.0, "cpu_seconds": 4.0} if config.method == "rho" else None,
        "ledger": {**asdict(ledger), "total": ledger.total},
        "curve": [{name: value / 2 for name, value in point.items()}, point],
    }  # fmt: skip


def records(gain=0.03, scale="full", data="fashion-mnist", level=LEVELS):
    """All runs of a scale: RHO `gain` above uniform, train-loss below it by as much."""
    found, base = [], rho.usual(scale, data).updates
    for config in rho.configs(scale, data):
        better = {"uniform": 0.0, "rho": gain, "train-loss": -gain}[config.method]
        accuracy = level[round(100 * config.updates / base)] + better + SPREAD[config.seed]
        wrong = {"uniform": 0.1, "rho": 0.02, "train-loss": 0.3}[config.method]
        found.append(made(config, accuracy, wrong))
    return found


def rows(content):
    return {row["label"]: row for row in content["rows"]}


def test_a_scale_has_every_method_seed_and_budget_once():
    configs = rho.configs("full")
    assert len(configs) == len({c.name for c in configs}) == 9 + 9 + 9
    decayed = [c for c in configs if c.schedule == "decayed"]
    assert {c.method for c in configs[:3]} == set(rho_text.METHODS)
    assert {(c.updates, c.seed) for c in decayed if c.method == "uniform"} == {
        (1200 * p // 100, s) for p in (50, 100, 200, 400) for s in (0, 1, 2)
    }
    published = [c for c in configs if c.schedule == "constant"]
    assert all(c.selection_mode == "train" for c in published if c.method != "uniform")
    assert {(c.super_batch, c.keep, c.lr, c.noise) for c in configs} == {(320, 32, 1e-3, 0.1)}
    assert all(c.width == c.reference_width == 64 for c in rho.configs("gpu") if c.method == "rho")


def test_speedups_are_over_what_uniform_needs_for_the_same():
    found = rows(rho.content(records(), [], "full"))
    row = found["RHO"]  # 85 %: between uniform's 200 % and 400 %, half-way in log updates
    beta = 100 / (200 * 2**0.5)
    assert row["beta"]["value"] == pytest.approx(beta)
    assert row["learner_speedup"]["value"] == pytest.approx(1 - beta)
    flops, learner = row["flops"], 3 * 32 * 1200 * FORWARD
    assert flops["total"] == learner + 320 * 1200 * FORWARD + 1e8
    assert row["compute_speedup"]["value"] == pytest.approx(1 - beta * flops["total"] / learner)
    free = row["compute_speedup_amortised"]["value"]
    assert free == pytest.approx(1 - beta * (1 + 320 / 96)) and not row["compute_positive"]
    assert row["cpu_speedup"]["value"] == pytest.approx(1 - beta * (32 + 4) / 8)
    assert row["gain"]["mean"] == pytest.approx(0.03)
    assert row["wrong_kept"]["mean"] == pytest.approx(0.02, abs=1e-4)
    worse = found["train-loss"]
    assert worse["beta"]["value"] is None and worse["beta"]["text"].startswith("> 2.00")
    assert not worse["compute_positive"] and figures.sign(worse["gain"]) == -1


def test_as_published_counts_until_the_curve_reaches_uniform():
    found = rows(rho.content(records(gain=0.85), [], "full"))
    reached = found["RHO, as published"]["reached"]  # after half the updates: 83.5 % > 82 %
    total = found["RHO, as published"]["flops"]["total"]
    assert reached["share_of_updates"] == 0.5
    assert reached["flops_share"] == pytest.approx(total / 2 / (3 * 32 * 1200 * FORWARD))
    never = found["train-loss, as published"]["reached"]
    assert never == {"share_of_updates": None, "flops_share": None}


def test_unfinished_work_is_shown_as_far_as_it_goes(tmp_path):
    everything = records()
    part = [run for run in everything if run["config"]["seed"] == 0]
    part = [run for run in part if run["config"]["method"] != "train-loss"]
    content = rho.content(part, [], "full")
    assert "RHO (1 of 3 seeds)" in rho.text(content) and "train-loss" not in rows(content)
    assert rows(content)["RHO"]["accuracy"]["low"] is None
    alone = rho.content([run for run in part if run["config"]["method"] == "rho"], [], "full")
    assert "beta" not in rows(alone)["RHO"]
    for number, some in enumerate((content, alone)):
        assert all(p.stat().st_size for p in rho.pictures(some, tmp_path / str(number)))
    assert rho.text(rho.content([], everything, "full")) == "No run is finished."


def test_files_and_text_hold_the_figures(tmp_path):
    content = {"schema": common.SCHEMA, **rho.content(records(), [], "full")}
    files = common.write(tmp_path / "x", content, [figures.flat(row) for row in content["rows"]])
    read = common.read(files[0])
    text = rho.text(read)
    assert "published, other data" in text and "| CIFAR-10 | 85.09 ± 0.52 | 88.86 ± 0.22 |" in text
    gain = figures.points(rows(read)["RHO"]["gain"])
    assert gain.startswith("+3.0") and f"RHO is above uniform with as many updates ({gain}" in text
    assert "train-loss is below uniform" in text and "against the published figures" not in text
    assert "| RHO | 1,200 | 85.0 ± 0.2 | 55.0 ± 0.2 | 2.0 ± 0.0 |" in text
    pictures = rho.pictures(read, tmp_path / "x")
    assert {path.suffix for path in pictures} == {".svg", ".png"}


@pytest.mark.parametrize(
    "level, words", [(0.8526, "+0.17 points, within ± 0.52"), (0.80, "-5.09 points, beyond ± 0.52")]
)
def test_on_cifar_a_gap_to_the_published_figures_is_said(level, words, tmp_path):
    write_folder(tmp_path, "cifar-10", rows=1)
    found = records(data=str(tmp_path), level=dict.fromkeys(LEVELS, level))
    content = rho.content(found, [], "full", data=str(tmp_path))
    assert content["data"] == content["config"]["data"] == "cifar-10"
    text = rho.text(content)
    assert f"uniform, as published {words}" in text and "published, other data" not in text
    assert "ResNet-18 8 wide" in text
    clean = [run["config"]["noise"] for run in found if run["config"]["schedule"] == "constant"]
    assert set(clean) == {0.0}, "what is published has no wrong labels added"
    assert replace(rho.usual("full"), data=str(tmp_path)) != rho.usual("full", str(tmp_path))
