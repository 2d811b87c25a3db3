# SPDX-License-Identifier: Apache-2.0
"""Figures from runs on pairs: pairing, baselines, speedups, claims, wording, pictures."""

import doctest
import io
import json
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from activesel.ledger import Ledger
from activesel.loop import contrastive, pairs_reference, records
from activesel.loop.icons import LENGTH, IconPairs, IconSplit
from activesel.loop.pairs_config import PairsConfig
from bench import aggregate, demo_pairs, pairs, pairs_table, pairs_text

POOL = {"clean": 200, "noisy": 500, "logo": 300}
WAYS = ("image_to_text", "text_to_image")


def made(config, r10, clean=0.2, gain=0.0, extra=0.0):
    """The record of a run, as if it had come out so; FLOPs are one per update and `extra`."""
    chosen, updates = config.method != "uniform", config.updates
    counts = {"clean": clean, "noisy": 0.7 - clean, "logo": 0.3}
    reference = {
        "config": {"part": "clean"}, "rows": 50, "recall": {"r10": 0.1}, "flops": 9.0,
        "seconds": 20.0, "cpu_seconds": 18.0, "pool_seconds": 5.0, "joined": None,
    }  # fmt: skip
    ledger = Ledger(learner=updates, scoring_reference=extra)
    return json.loads(json.dumps({
        "schema": 1,
        "name": config.name,
        "config": asdict(config),
        "environment": {"cpu": "any"},
        "recall": {"r10": r10, **{way: {"1": r10 / 5, "10": r10} for way in WAYS}},
        "pool": POOL,
        "kept": {tier: round(1000 * share * updates) for tier, share in counts.items()},
        "batch_learnability": {
            "mean": 1.0, "joint": 1.0 + gain, "independent": 1.0, "every": 50,
            "compared": [[1.0 + gain, 1.0]] * 4,
        } if chosen else None,
        "reference": reference if config.reference else None,
        "reference_scoring_seconds": {"fresh": 7.0, "cached": 5.0} if config.reference else None,
        "ledger": {**asdict(ledger), "total": ledger.total},
        "ledger_cached": {**asdict(ledger), "scoring_reference": extra / 10,
                          "total": updates + extra / 10},
        "seconds": 100.0,
        "cpu_seconds": 90.0,
        "curve": [
            {"update": n * updates // 4, "r10": r10 * n / 4, "flops_total": ledger.total * n / 4,
             "flops_scoring_reference": extra * n / 4,
             **{f"kept_{tier}": round(250 * share * updates * n) for tier, share in counts.items()}}
            for n in (1, 2, 3, 4)
        ],
    }))  # fmt: skip


def series(method, recalls, made_as=None, **settings):
    return [
        made(pairs.usual(method, seed=seed, **settings), r10, **(made_as or {}))
        for seed, r10 in enumerate(recalls)
    ]


UNIFORM = series("uniform", [0.10, 0.11, 0.12])


def table(*groups):
    return pairs_table.table([run for group in groups for run in group], [], pairs.usual())


def find(content, label, updates=pairs.UPDATES):
    return next(c for c in content["cells"] if (c["label"], c["updates"]) == (label, updates))


def test_gains_are_taken_seed_by_seed():
    content = table(UNIFORM, series("jest", [0.12, 0.13, 0.14], {"clean": 0.5}))
    row = find(content, "JEST")
    assert row["r10_gain"]["mean"] == pytest.approx(0.02)
    assert row["r10_gain"]["std"] == pytest.approx(0, abs=1e-9)
    assert row["r10"]["std"] == pytest.approx(0.01)
    assert row["clean_ratio"]["mean"] == pytest.approx(2.5)
    assert row["kept_over_time"]["clean"] == [0.5] * 4
    assert row["seconds"] == {"fresh": 127.0, "cached": 125.0}, "reference and its scoring counted"
    claims = content["targets"]
    assert claims["JEST: R@10 above uniform's"] == {"mean": True, "interval": True}
    assert claims["JEST: clean share at least twice uniform's"]["interval"]


@pytest.mark.parametrize(
    "recalls, clean, above, twice",
    [([0.09, 0.12, 0.15], 0.39, (True, False), False), ([0.10, 0.10, 0.10], 0.41, (False,) * 2, 1)],
)
def test_claims_fail_where_figures_do(recalls, clean, above, twice):
    claims = table(UNIFORM, series("easy", recalls, {"clean": clean}))["targets"]
    assert tuple(claims["easy: R@10 above uniform's"].values()) == above
    assert claims["easy: clean share at least twice uniform's"]["mean"] == bool(twice)


def test_every_loss_and_pool_has_its_own_uniform():
    softmax = series("uniform", [0.2, 0.2, 0.2], loss="softmax")
    no_emoji = series("uniform", [0.3, 0.3, 0.3], rows="ui")
    content = table(
        UNIFORM,
        softmax,
        no_emoji,
        series("activeclip", [0.21, 0.21, 0.21]),
        series("jest-emoji", [0.29, 0.29, 0.29]),
        series("jest", [0.1] * 3, chunks=64),
    )
    assert find(content, "ActiveCLIP")["r10_gain"]["mean"] == pytest.approx(0.01)
    assert find(content, "JEST (emoji reference)")["r10_gain"]["mean"] == pytest.approx(-0.01)
    assert find(content, "JEST (chunks 64)")["r10_gain"]["mean"] == pytest.approx(-0.01)
    alone = table(UNIFORM, series("activeclip", [0.3]))
    assert find(alone, "ActiveCLIP")["r10_gain"] is None
    assert not any("ActiveCLIP" in claim for claim in alone["targets"])


def test_a_speedup_needs_a_budget_that_reaches_uniform():
    u = pairs.UPDATES
    content = table(
        UNIFORM,
        series("jest", [0.12] * 3, {"extra": u}),
        series("jest", [0.11] * 3, {"extra": 0.6 * u}, updates=u // 2),  # just reaches 0.11
        series("jest++", [0.10] * 3, updates=u // 2),
        series("jest++", [0.10] * 3),
    )
    entry, other = content["speedups"]
    assert entry["label"] == "JEST" and entry["at"] == 0.5 and entry["learner_speedup"] == 0.5
    assert entry["compute_speedup"] == pytest.approx(-0.1), "50 % and 60 % for the reference"
    assert entry["compute_speedup_cached"] == pytest.approx(0.44)
    assert other["at"] is None and other["compute_speedup"] is None
    claims = content["targets"]
    assert claims["JEST: learner speedup"]["mean"]
    assert not claims["JEST: compute speedup, all counted"]["mean"]
    assert claims["JEST: compute speedup, reference cached"]["mean"]
    assert not claims["JEST++: learner speedup"]["mean"]


def test_joint_is_held_against_independent_of_the_same_settings():
    content = table(
        UNIFORM,
        series("jest", [0.11, 0.12, 0.13], {"gain": 0.5, "clean": 0.4}),
        series("independent", [0.12, 0.13, 0.14], {"gain": 0.5, "clean": 0.3}),
        series("jest", [0.2] * 3, loss="softmax"),  # nothing to compare it with
        series("jest", [0.14] * 3, {"gain": -0.1}, chunks=64),
    )
    first, many = content["joint"]
    assert first["r10_gain"]["mean"] == pytest.approx(-0.01)
    assert first["clean_gain"]["mean"] == pytest.approx(0.1)
    assert first["batch_learnability"]["gain"]["mean"] == pytest.approx(0.5)
    assert first["batch_learnability"]["joint_above"] == 1
    assert many["chunks"] == 64 and many["batch_learnability"]["joint_above"] == 0
    claims = content["targets"]
    assert claims["JEST against independent: learnability of the batch above"]["mean"]
    assert not claims["JEST against independent: R@10 above"]["mean"]
    assert not claims["JEST (chunks 64) against independent: learnability of the batch above"][
        "mean"
    ]


def test_coarse_patches_are_counted_beside_the_published_figures():
    entry = pairs_table.flexi(asdict(pairs.usual()))
    assert entry["patches"] == [8, 16] and 0.4 < entry["scoring_saved"] < 0.75
    assert entry["training_share"] == pytest.approx(1 - entry["scoring_saved"] / 2, abs=0.02)


def test_nothing_is_compared_without_uniform():
    with pytest.raises(ValueError, match=f"uniform with {pairs.UPDATES} updates, got 3 others"):
        table(series("jest", [0.1] * 3))


def test_the_queue_holds_everything_once_whole_seeds_first():
    configs = pairs.queue()
    assert len({config.name for config in configs}) == len(configs)
    assert all(sum(c.seed == s for c in configs) == len(configs) / 3 for s in pairs.SEEDS)
    full = [c for c in configs if c.updates == pairs.UPDATES and c.rows == "all"]
    nine = {"uniform", "hard", "easy", "activeclip", "activesiglip", "jest", "jest-easy",
            "flexi-jest", "jest++"}  # fmt: skip
    first = configs[: len(nine) + 2]
    assert {c.method for c in first} == nine | {"independent"} and {c.seed for c in first} == {0}
    for config in configs:
        same = [c for c in full if c.method == "uniform" and c.loss == config.loss]
        assert config.rows == "ui" or same, f"{config.method} has no uniform to be held against"
    for method in ("jest", "jest++"):
        budgets = {c.updates for c in configs if c.method == method}
        assert len(budgets) == 1 + len(pairs.PERCENTS)
    assert {(c.method, c.rows) for c in configs} >= {("jest-emoji", "ui"), ("uniform", "ui")}


def test_a_part_of_the_table_says_what_is_missing_and_is_drawn(tmp_path):
    configs = pairs.queue()
    for config in configs[:11]:
        (tmp_path / config.name).mkdir()
        r10 = 0.1 + 0.01 * (config.method == "jest")
        records.write_json(tmp_path / config.name / "run.json", made(config, r10))
    runs, missing = pairs.load(tmp_path, configs)
    assert [run["name"] for run in runs] == [c.name for c in configs[:11]]
    assert missing == configs[11:]
    content = pairs_table.table(runs, missing, pairs.usual())
    aggregate.write(tmp_path / "table.json", content)
    assert json.loads((tmp_path / "table.json").read_text()) == content
    text = pairs_text.image_text(content)
    assert f"**Unfinished: {len(missing)} of {len(configs)} runs are missing.**" in text
    files = pairs.pictures(content, tmp_path / "pairs")
    assert len(files) == 6 and all(file.stat().st_size > 5_000 for file in files)


def test_the_readme_tells_both_sides():
    u = pairs.UPDATES
    content = table(
        UNIFORM,
        series("jest", [0.13, 0.14, 0.15], {"gain": 0.5, "clean": 0.4, "extra": u}),
        series("jest", [0.12] * 3, {"clean": 0.4, "extra": u / 2}, updates=round(0.67 * u)),
        series("independent", [0.14, 0.15, 0.16], {"gain": 0.5, "clean": 0.4}),
        series("jest++", [0.09] * 3),
    )
    text = pairs_text.image_text(content)
    assert "| uniform | 11.0 ± 2.5 | 20.0 ± 0.0 | 100 % / 100 % | - | - |" in text
    assert "| JEST, 67 % of updates | 12.0 ± 0.0 | 40.0 ± 0.0 | 117 % / 72 % | +33 % |" in text
    assert "-17 % / +28 %" in text
    assert "R@10 is 1.0 points (± 0.0) below" in text and "higher in every one" in text
    assert "Unfinished" not in text


@pytest.mark.parametrize(
    "recalls, says, not_says",
    [
        ([0.14, 0.15, 0.16], "4.0 points above uniform's", "chance"),
        ([0.05, 0.06, 0.07], "5.0 points below uniform's", "chance"),
        ([0.08, 0.12, 0.16], "3 seeds the difference may be chance", "One seed"),
        ([0.14], "One seed says little", "chance"),
    ],
)
def test_the_demo_prints_all_and_its_verdict_is_honest(recalls, says, not_says):
    content = table(UNIFORM[: len(recalls)], series("jest", recalls, {"clean": 0.5, "extra": 500}))
    text = demo_pairs.verdict(content)
    assert says in text and not_says not in text
    assert "JEST kept 2.5 times as many clean pairs as uniform" in text
    share = 100 + 100 * 500 / pairs.UPDATES
    assert f"for {share:.0f} % of the FLOPs" in text
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(demo_pairs.table(content))
    printed = console.export_text()
    assert all(line in printed for line in demo_pairs.LINES.values())
    assert "1,000 icon-text pairs: 20 % clean, 50 % noisy, 30 % logo" in " ".join(printed.split())
    assert f"{share:.1f}" in printed and ("50.00 ± 0.00" in printed) is bool(recalls[1:])


def icon_split(rows=64):
    g = torch.Generator().manual_seed(0)

    def some(first, count):
        return IconPairs(
            images=torch.randint(0, 256, (count, 1, 32, 32), generator=g, dtype=torch.uint8),
            tokens=torch.randint(1, 12, (count, LENGTH), generator=g),
            tier=torch.arange(count, dtype=torch.uint8) % 3,
            captions=[f"icon {n}" for n in range(count)],
            ids=torch.arange(first, first + count),
            sets=["any"] * count,
            emoji=torch.arange(count) % 2 == 0,
        )

    return IconSplit(some(0, rows), some(1000, 32), some(2000, 16), ["w"] * 10)


def test_real_records_become_figures_and_a_contact_sheet(tmp_path, monkeypatch):
    split = icon_split()
    monkeypatch.setattr(pairs_reference, "_icons", lambda *args: split)
    small = {"learner": "nano", "keep": 8, "rho": 2, "chunks": 2, "reference_updates": 2,
             "updates": 12, "evaluations": 3, "compare_every": 4}  # fmt: skip
    usual = PairsConfig(**small)
    methods = ("uniform", "jest", "independent", "activesiglip")
    runs = [contrastive.run(PairsConfig(**small | {"method": m}), tmp_path) for m in methods]
    content = json.loads(json.dumps(pairs_table.table(runs, [], usual)))
    assert content["pool"] == {"clean": 22, "noisy": 21, "logo": 21}
    for row in content["cells"]:
        assert sum(entry["mean"] for entry in row["kept"].values()) == pytest.approx(1)
        assert len(row["kept_over_time"]["clean"]) == 3
    assert content["joint"][0]["batch_learnability"]["batches"] == 3
    flops = find(content, "JEST", 12)["flops_share"]
    assert flops["total"] > flops["learner"] == pytest.approx(1)
    assert pairs_text.image_text(content).count("\n| ") == 4
    monkeypatch.setattr(pairs, "CURVES", ("uniform", "jest"))
    assert len(pairs.pictures(content, tmp_path / "any")) == 6
    assert pairs.contact_sheet(tmp_path, usual, tmp_path / "kept", count=10, least=1)
    assert not pairs.contact_sheet(tmp_path, usual, tmp_path / "kept", count=10, least=100)
    assert not pairs.contact_sheet(tmp_path / "none", usual, tmp_path / "kept")


@pytest.mark.parametrize("module", [pairs_table, demo_pairs])
def test_examples_run(module):
    assert doctest.testmod(module).failed == 0
