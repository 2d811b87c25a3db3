# SPDX-License-Identifier: Apache-2.0
"""Figures from runs: statistics against arithmetic, beta, claims, and honest wording."""

import doctest
import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from activesel.loop import records
from activesel.loop.config import Config
from bench import aggregate, classify, demo, readme

ZERO = dict.fromkeys(
    ("scoring_online", "scoring_reference", "online_training", "reference_training", "selection"),
    0.0,
)


def made(config, accuracy, wrong=10, extra=0.0):
    """The record of a run, as if it had come out so; FLOPs are one per update and `extra`."""
    ledger = {"learner": float(config.updates), **ZERO, "reference_training": extra}
    curve = [
        {name: float(n) for name in aggregate.CURVE} | {"kept": 100 * n, "accuracy": accuracy}
        for n in (1, 2, 3)
    ]
    return {
        "schema": 1,
        "name": config.name,
        "config": asdict(config),
        "environment": {"cpu": "any"},
        "accuracy": accuracy,
        "worst_class": accuracy - 0.2,
        "by_class": [accuracy] * 10,
        "base_rate": 0.1,
        "kept": 100 * config.updates,
        "kept_mislabelled": wrong * config.updates,
        "ledger": {**ledger, "total": config.updates + extra},
        "seconds": 10.0,
        "cpu_seconds": 9.0,
        "reference": None if config.reference is None else {
            "config": asdict(config.reference),
            "accuracy": 0.8, "seconds": 2.0, "cpu_seconds": 2.0,
        },
        "curve": curve,
    }  # fmt: skip


SETTING = {"rho": 2, "temperature": 0.25}
SETTINGS = {"uniform": {}, "classact": SETTING}


def series(method, updates, accuracies, **made_settings):
    setting = SETTING if method == "classact" else {}
    return [
        made(Config(method, updates=updates, seed=seed, **setting), accuracy, **made_settings)
        for seed, accuracy in enumerate(accuracies)
    ]


UNIFORM = series("uniform", 100, [0.84, 0.85, 0.86])


def test_spread_is_the_t_interval():
    entry = aggregate.spread([1.0, 2.0, 3.0])
    assert entry["mean"] == 2 and entry["std"] == 1
    assert entry["high"] - entry["mean"] == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert aggregate.spread([0.5]) == {"mean": 0.5, "std": None, "low": None, "high": None}


def test_share_of_wrong_labels_is_pooled_with_a_wilson_interval():
    cell = aggregate.cell(series("classact", 100, [0.8, 0.8], wrong=5))
    wrong = cell["mislabelled"]
    assert (wrong["kept"], wrong["kept_mislabelled"], wrong["share"]) == (20_000, 1_000, 0.05)
    centre, half = (0.05 + 1.9207 / 20_000) / (1 + 3.8415 / 20_000), 0.00302
    assert wrong["wilson"] == pytest.approx([centre - half, centre + half], abs=2e-5)
    assert cell["seconds"] == 12, "the reference's time is part of it"


def table(*groups):
    return aggregate.table([run for group in groups for run in group], [], 100, SETTINGS)


def test_beta_is_the_smallest_budget_that_reaches_uniform_on_the_mean():
    content = table(
        UNIFORM,
        series("classact", 50, [0.83, 0.84, 0.85]),
        series("classact", 75, [0.80, 0.85, 0.90], extra=5.0),  # just reaches 0.85
        series("classact", 90, [0.86, 0.86, 0.86]),
    )
    entry = content["beta"]["classact"]
    assert entry["beta"] == 0.75 and entry["learner_speedup"] == 0.25
    assert entry["compute_speedup"] == pytest.approx(0.2), "75 and 5 of 100"
    assert entry["compute_positive"]
    assert content["targets"]["classact_learner_speedup_at_least_25_percent"] is True
    assert content["targets"]["classact_compute_positive"] is True
    assert content["beta"]["uniform"]["beta"] == 1.0


def test_beta_is_open_where_nothing_reaches_and_the_best_is_told():
    content = table(
        UNIFORM,
        series("classact", 80, [0.84, 0.84, 0.84], extra=40.0),
        series("classact", 90, [0.83, 0.83, 0.83]),
    )
    entry = content["beta"]["classact"]
    assert entry["beta"] is None and entry["beta_text"] == "> 0.90"
    assert entry["at"] == 0.8 and entry["flops_share_there"] == pytest.approx(1.2)
    assert entry["learner_speedup"] is None and entry["compute_positive"] is None
    assert content["targets"]["classact_learner_speedup_at_least_25_percent"] is False
    assert "does **not** reach" in readme.classification(content)


def test_a_budget_with_seeds_missing_decides_nothing():
    content = table(UNIFORM, series("classact", 50, [0.99]), series("classact", 75, [0.85] * 3))
    assert content["beta"]["classact"]["beta"] == 0.75


def test_the_gain_is_taken_seed_by_seed():
    content = table(UNIFORM, series("classact", 75, [0.85, 0.86, 0.87]))
    gain = next(c for c in content["cells"] if c["method"] == "classact")["accuracy_gain"]
    assert gain["mean"] == pytest.approx(0.01) and gain["std"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("wrong, holds", [(9, True), (10, False), (11, False)])
def test_claim_about_wrong_labels_needs_the_whole_interval(wrong, holds):
    content = table(UNIFORM, series("classact", 75, [0.8] * 3, wrong=wrong))
    assert content["targets"]["classact_keeps_fewer_mislabelled_than_base_rate"] is holds
    assert content["targets"]["easy_keeps_under_half_of_base_rate"] is None


def test_seeds_that_disagree_do_not_support_the_claim():
    runs = series("classact", 75, [0.8] * 3)
    for run, wrong in zip(runs, (200, 700, 1_000), strict=True):  # 9 % on average, of 7,500 each
        run["kept_mislabelled"] = wrong
    content = table(UNIFORM, runs)
    cell = next(c for c in content["cells"] if c["method"] == "classact")
    assert cell["mislabelled"]["wilson"][1] < 0.1 < cell["mislabelled"]["seeds"]["high"]
    assert content["targets"]["classact_keeps_fewer_mislabelled_than_base_rate"] is False


def test_nothing_is_compared_without_uniform():
    with pytest.raises(ValueError, match="runs must hold uniform with 100 updates"):
        table(series("classact", 75, [0.8] * 3))


def store(folder, run, name=None):
    (folder / (name or run["name"])).mkdir(parents=True)
    records.write_json(folder / (name or run["name"]) / "run.json", run)


def test_runs_are_known_by_what_they_recorded(tmp_path):
    wanted = [Config("uniform"), *(Config(seed=seed) for seed in range(3))]
    uniform, first = made(wanted[0], 0.9), made(wanted[1], 0.8)
    uniform["config"] |= {"since_removed": 1, "online_lr": 0.5}  # uniform has no online scorer
    store(tmp_path, uniform, "under-any-name")
    store(tmp_path, first)
    store(tmp_path, made(replace(wanted[2], online_lr=0.5), 0.1), "other-setting")
    stale, old = made(wanted[2], 0.1), made(wanted[3], 0.1)
    stale["reference"]["config"]["updates"] += 1
    del old["config"]["online_lr"]  # from before there was such a field: who knows what it did
    store(tmp_path, stale, "other-reference")
    store(tmp_path, old)
    runs, missing = aggregate.load(tmp_path, wanted)
    assert [run["accuracy"] for run in runs] == [0.9, 0.8] and missing == wanted[2:]
    store(tmp_path, first, "copy")
    with pytest.raises(ValueError, match="must hold one run of classact"):
        aggregate.load(tmp_path, wanted)


def test_a_part_of_the_table_says_what_is_missing(tmp_path):
    configs = classify.queue()
    for config in configs[:6]:
        store(tmp_path, made(config, 0.8))
    runs, missing = aggregate.load(tmp_path, configs)
    content = aggregate.table(runs, missing, classify.UPDATES, classify.SETTINGS)
    assert content["finished"] == 6 and len(content["missing"]) == len(configs) - 6
    text = readme.classification(content)
    assert f"**Unfinished: {len(configs) - 6} of {len(configs)} runs are missing.**" in text
    aggregate.write(tmp_path / "table.json", content)
    assert json.loads((tmp_path / "table.json").read_text()) == content
    assert len(classify.pictures(content, tmp_path / "table")) == 4


def test_the_queue_holds_everything_once():
    configs = classify.queue()
    names = [config.name for config in configs]
    assert len(names) == len(set(names))
    at = {
        (c.method, c.rho, c.temperature)
        for c in configs
        if c.updates == round(classify.UPDATES * classify.PERCENT / 100)
    }
    assert {("classact", rho, t) for rho in (2, 5) for t in (1.0, 0.25, 0.0)} <= at
    assert {m for m, _, _ in at} == {
        "uniform", "hard", "easy", "classact", "classact-ho", "classact-online", "rho",
    }  # fmt: skip
    for method, setting in classify.SETTINGS.items():
        budgets = {
            c.updates
            for c in configs
            if c.method == method and all(getattr(c, k) == v for k, v in setting.items())
        }
        assert {round(classify.UPDATES * p / 100) for p in classify.GRID} <= budgets
    assert all(sum(c.seed == s for c in configs) == len(configs) / 3 for s in classify.SEEDS)


@pytest.mark.parametrize(
    "accuracies, says, not_says",
    [
        ([0.86, 0.87, 0.88], "reached uniform's accuracy (+2.00 points)", "not reach"),
        ([0.81, 0.82, 0.83], "did not reach uniform's accuracy (-3.00 points)", "chance"),
        ([0.80, 0.85, 0.90], "may be chance", "not reach"),
    ],
)
def test_the_verdict_is_honest(accuracies, says, not_says):
    before = aggregate.cell(UNIFORM)
    after = aggregate.cell(series("classact", 75, accuracies, wrong=7, extra=35.0))
    gain = aggregate.against(after, before)
    text = demo.verdict(after, before, gain)
    assert says in text and not_says not in text
    assert "10.0 % more FLOPs, every line counted" in text
    assert "7.0 % of the rows it kept had wrong labels; base rate 10.0 %" in text
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(demo.table(before, after, gain))
    printed = console.export_text()
    assert all(line in printed for line in demo.LINES.values())
    assert "│   total" in printed and "110.00" in printed
    assert printed.count("not reached") == (3 if "not reach" in text else 0)


@pytest.mark.parametrize("module", [aggregate, demo])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
