# SPDX-License-Identifier: Apache-2.0
"""The papers' numbers measured here: figures, verdicts and wording from made-up run records."""

import csv
import doctest
import io
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activesel.ledger import Ledger
from activesel.loop import records
from activesel.loop.icons import TIERS
from bench import common, study
from bench.equivalence import Beta
from bench.replicate import ablation, command, figures, online, ratios, scaling

SCALE = "full"
FORWARD = {"micro": 400, "nano": 60, "mu": 30, "pico": 10, "femto": 3, "mini": 1000}
SEEDS = study.SEEDS[SCALE]


def made(config, accuracy, wrong=0.05):
    """The record of a run, as if it had come out so."""
    kept = config.keep * config.updates
    recipe, learner, scorer = config.recipe, FORWARD[config.learner], FORWARD[config.scorer]
    selects, own = config.method != "uniform", recipe.online == "scorer"
    if config.online == "learner":
        own = False
    ledger = Ledger(
        learner=3 * kept * learner,
        scoring_online=config.rho * kept * (scorer if own else learner)
        if selects and config.method != "easy"
        else 0,
        scoring_reference=config.rho * kept * scorer if selects else 0,
        online_training=3 * kept * scorer if own else 0,
        reference_training=3 * 4800 * config.keep * scorer if config.reference else 0,
    )
    reference = {"seconds": 20.0, "cpu_seconds": 18.0}
    return {
        "name": config.name, "config": asdict(config), "accuracy": accuracy,
        "worst_class": accuracy - 0.2, "base_rate": 0.1, "kept": kept,
        "kept_mislabelled": round(wrong * kept), "reference": reference if selects else None,
        "ledger": {**asdict(ledger), "total": ledger.total},
        "seconds": 0.04 * config.updates, "cpu_seconds": 0.04 * config.updates,
    }  # fmt: skip


def series(method, accuracies, percent=67, **settings):
    configs = figures.over_seeds(SCALE, method, percent, **settings)
    return [made(c, a) for c, a in zip(configs, accuracies, strict=False)]


def uniform(levels=None):
    levels = levels or {50: 0.84, 67: 0.85, 80: 0.855, 100: 0.86, 133: 0.865}
    jitter = (-0.002, 0.0, 0.002)
    return [
        run for p, level in levels.items() for run in series("uniform", [level + j for j in jitter],
                                                              percent=p)
    ]  # fmt: skip


def test_queue_shares_uniform_and_leaves_whole_seeds_behind():
    configs = ablation.configs(SCALE)
    assert len(set(configs)) == len(configs) == 3 * (5 + 4)
    assert {c.method for c in configs[:6]} == {"uniform"}
    middle = [c.seed for c in configs if c.method != "uniform"]
    assert middle == sorted(middle)
    rho = next(c for c in configs if c.method == "rho")
    assert (rho.rho, rho.temperature, rho.updates) == (5, 0.0, 1608)
    shared = set(configs) & set(scaling.configs(SCALE)) & set(online.configs(SCALE))
    assert {c.method for c in shared} == {"uniform", "classact"}
    for scale in ("smoke", "gpu"):
        for part in (ablation, scaling, online, ratios):
            assert all(c.seed in study.SEEDS[scale] for c in part.configs(scale))


def test_ablation_charges_everything_and_pairs_seeds():
    runs = uniform() + series("classact", [0.858, 0.86, 0.862]) + series("rho", [0.7] * 3, rho=5)
    content = ablation.content(runs, [], SCALE)
    rows = {row["label"]: row for row in content["rows"]}
    ours = rows["ClassAct"]
    assert ours["beta"]["value"] == pytest.approx(0.67)
    assert ours["learner_speedup"]["value"] == pytest.approx(0.33)
    assert ours["gain"]["mean"] == pytest.approx(0.01)
    assert ours["gain"]["std"] == pytest.approx(0, abs=1e-9), "seed by seed"
    assert ours["f_ratio"] == pytest.approx(0.06)
    # an update: learner 3,000, both scorers twice, training the online one; then the reference
    update, reference = 3000 + 2 * 2 * 60 + 180, 3 * 4800 * 60
    cost = (1608 * update + reference) / (2400 * 3000)
    assert ours["compute_speedup"]["value"] == pytest.approx(1 - cost)
    published = (1608 * (update - 180) + reference) / (2400 * 3000)
    assert ours["compute_speedup_published"]["value"] == pytest.approx(1 - published)
    assert ours["compute_positive"] == (cost < 1)
    worse = rows["RHO"]
    assert worse["beta"]["value"] is None
    assert worse["learner_speedup"]["text"].startswith("< -34 %")
    assert worse["compute_positive"] is False, "known although beta is not"
    assert worse["over_classact"]["mean"] == pytest.approx(-0.16)
    assert "compute_speedup" not in rows["uniform, 100 %"]
    text = ablation.text(content)
    assert "RHO is below ClassAct (-16.00" in text and "-79 %" in text and "+33 %" in text
    assert text.count("ClassAct-HO") == 0, "not run, so not in the table"


def test_unfinished_is_said():
    runs = uniform() + series("classact", [0.86, 0.86])  # two of three seeds
    missing = [c.name for c in ablation.configs(SCALE)][-3:]
    content = {**ablation.content(runs, [], SCALE), "missing": missing}
    assert "ClassAct (2 of 3 seeds)" in ablation.text(content)
    assert "Unfinished: 3 runs are missing" in ablation.text(content)
    bare = ablation.content(series("classact", [0.86] * 3), [], SCALE)
    assert "beta" not in bare["rows"][0] and bare["rows"][0]["gain"] is None
    assert "ClassAct" in ablation.text(bare)


def shrinking(slopes, jitter=(0.0, 0.0, 0.0)):
    """Both methods losing accuracy by `slopes` points per factor of 10."""
    runs = uniform()
    for method, slope in slopes.items():
        for scorer in scaling.SCORERS[SCALE]:
            lost = slope * (3 - len(str(FORWARD[scorer])))
            level = 0.87 - lost / 100
            signs = jitter if method == "easy" else [0.0] * 3
            accuracies = [level + j * (scorer == "femto") for j in signs]
            runs += series(method, accuracies, scorer=scorer)
    return runs


@pytest.mark.parametrize(
    "ours, easy, jitter, verdict",
    [
        (0.2, 1.0, (0.0, 0.001, -0.001), "holds"),
        (1.0, 0.2, (0.0, 0.001, -0.001), "the opposite"),
        (0.5, 0.6, (0.02, 0.0, -0.02), "not shown"),
    ],
)
def test_verdict_follows_the_interval(ours, easy, jitter, verdict):
    content = scaling.content(shrinking({"classact": ours, "easy": easy}, jitter), [], SCALE)
    assert content["verdict"] == content["headline"]["verdict"] == verdict
    said = {"holds": "holds here", "the opposite": "the opposite does", "not shown": "not shown**"}
    assert said[verdict] in scaling.text(content)
    drops = content["drops"]
    assert drops["easy"]["mean"] - drops["classact"]["mean"] == pytest.approx(
        drops["difference"]["mean"]
    )
    ratio = {r["scorer"]: r["f_ratio"] for r in content["rows"] if r["method"] == "easy"}
    assert ratio == pytest.approx({s: FORWARD[s] / 1000 for s in scaling.SCORERS[SCALE]})


def test_a_missing_scorer_or_seed_gives_no_verdict():
    runs = shrinking({"classact": 0.2, "easy": 1.0})
    few = [r for r in runs if (r["config"]["method"], r["config"]["scorer"]) != ("easy", "femto")]
    content = scaling.content(few, [], SCALE)
    assert content["verdict"] == "not measured" and "not measured yet" in scaling.text(content)
    assert scaling.pictures(content, None) == []
    one = [r for r in runs if r["config"]["seed"] == 0]
    assert scaling.content(one, [], SCALE)["verdict"] == "not shown", "no interval, no claim"


@given(
    slopes=st.tuples(*[st.floats(-0.05, 0.05)] * 2),
    steps=st.lists(st.floats(0.1, 2), min_size=2, max_size=4),
)
def test_slopes_are_those_planted(slopes, steps):
    ratios, cells = [0.5], {}
    for step in steps:
        ratios.append(ratios[-1] / 10**step)
    scorers = [str(i) for i in range(len(ratios))]
    for method, slope in zip(scaling.METHODS, slopes, strict=True):
        for scorer, (i, ratio) in zip(scorers, enumerate(ratios), strict=True):
            level = 0.9 - slope * sum(steps[:i])
            cells[method, scorer] = ratio, {seed: level + 0.01 * seed for seed in range(3)}
    found = scaling.compare(cells, scorers)
    for method, slope in zip(scaling.METHODS, slopes, strict=True):
        assert found["slopes"][method]["mean"] == pytest.approx(slope, abs=1e-9)
    assert found["drops"]["easy"]["mean"] == pytest.approx(slopes[1] * sum(steps), abs=1e-9)
    swap = {"classact": "easy", "easy": "classact"}
    mirror = scaling.compare({(swap[m], s): v for (m, s), v in cells.items()}, scorers)
    assert mirror["slopes"]["difference"]["mean"] == pytest.approx(
        -found["slopes"]["difference"]["mean"], abs=1e-9
    )


def test_gap_closed_is_a_share_of_a_gap_that_is_there():
    def content(learner):
        base = series("classact", [0.86, 0.862, 0.864], online_smoothing=0.0)
        runs = uniform() + base + series("classact", learner, online="learner")
        return online.content(
            runs + series("classact", [0.865, 0.867, 0.869], distil=0.5), [], SCALE
        )

    found = content([0.8701, 0.872, 0.8739])
    rows = {row["label"]: row for row in found["rows"]}
    assert found["gap_shown"] and rows["smoothed, distilled by half"][
        "gap_closed"
    ] == pytest.approx(0.5)
    assert rows[online.LEARNER]["gap_closed"] == pytest.approx(1)
    assert rows[online.BASELINE]["gap_closed"] is rows[online.BASELINE]["extra_flops"] is None
    # scoring with the learner for the small scorer: 2 * (1000 - 60) a row kept, 180 less to train
    extra = 0.67 * (2 * 940 - 180) / 3000
    assert rows[online.LEARNER]["extra_flops"] == pytest.approx(extra)
    assert found["above_plain"] == [online.LEARNER, "smoothed, distilled by half"]
    assert "whole interval: smoothed, distilled by half" in online.text(found)
    none = content([0.88, 0.862, 0.85])
    assert not none["gap_shown"] and "no gap is shown" in online.text(none)
    assert all(row.get("gap_closed") is None for row in none["rows"])


def test_variants_that_change_nothing_are_left_out():
    assert "smoothed, scorers micro" in online.variants("full")
    assert "smoothed, scorers micro" not in online.variants("gpu"), "its scorers are micro already"
    assert online.content([], [], "gpu")["left_out"] == [
        "smoothed, scorers micro left out: changes nothing"
    ]  # fmt: skip
    assert set(online.variants("smoke")) == set(online.SMOKE)
    for scale in ("full", "gpu"):
        every = [c for configs in online.variants(scale).values() for c in configs]
        assert len(set(every)) == len(every)


def pair_run(config, r10, clean=0.4):
    chosen = config.method == "jest"
    kept = {"clean": clean, "noisy": 0.7 - clean, "logo": 0.3}
    ledger = Ledger(
        learner=30 * config.updates,
        scoring_online=chosen * config.rho * config.updates,
        scoring_reference=chosen * config.rho * config.updates,
        reference_training=chosen * 900,
    )
    ledger = {**asdict(ledger), "total": ledger.total}
    ways = ("image_to_text", "text_to_image")
    return json.loads(json.dumps({
        "name": config.name, "config": asdict(config),
        "recall": {"r10": r10, **{way: {"1": r10 / 5, "10": r10} for way in ways}},
        "pool": {"clean": 20_000, "noisy": 50_000, "logo": 30_000},
        "kept": {tier: round(1e6 * share) for tier, share in kept.items()},
        "batch_learnability": None,
        "reference": {"recall": {"r10": 0.1}, "seconds": 20.0} if chosen else None,
        "reference_scoring_seconds": {"fresh": 7.0, "cached": 5.0},
        "ledger": ledger, "ledger_cached": {**ledger, "scoring_reference": 9.0},
        "seconds": 100.0,
        "curve": [{"update": 1, **{f"kept_{tier}": 10 for tier in TIERS}}],
    }))  # fmt: skip


def pair_runs(levels, scale=SCALE):
    """By (rho, percent); uniform's R@10 is 0.10."""
    runs = [pair_run(study.pairs(scale, "uniform", 100, s), 0.1) for s in SEEDS]
    return runs + [
        pair_run(study.pairs(scale, "jest", percent, s, rho=rho), r10 + 0.001 * s)
        for (rho, percent), r10 in levels.items()
        for s in SEEDS
    ]


def test_ratios_beside_the_published_convention():
    levels = {(2, 100): 0.11, (5, 100): 0.12, (10, 100): 0.13, (5, 67): 0.10, (5, 50): 0.05}
    content = ratios.content(pair_runs(levels), [], SCALE)
    rows = {(r["rho"], r["updates"]): r for r in content["rows"] if r["method"] == "jest"}
    assert [rows[rho, 600]["flops_per_iteration"] for rho in (2, 5, 10)] == pytest.approx(
        [1 + 2 * rho / 30 for rho in (2, 5, 10)]
    )
    assert rows[10, 600]["flops_per_iteration_cached"] == pytest.approx(1 + 10 / 30)
    assert [f"{rows[rho, 600]['flops_per_iteration_published']:.2f}" for rho in (2, 5, 10)] == [
        "1.33", "2.33", "4.00",
    ]  # fmt: skip
    usual = rows[5, 600]
    assert usual["at"] == pytest.approx(0.67) and usual["budgets"] == pytest.approx([0.5, 0.67, 1])
    total = 402 * (30 + 10) + 900
    assert usual["compute_speedup"] == pytest.approx(1 - total / (600 * 30))
    assert usual["published_compute_speedup"] == pytest.approx(1 - 7 / 9)
    assert rows[2, 600]["learner_speedup"] == 0, "no smaller budget was tried"
    assert rows[10, 600]["passes"] == pytest.approx(10 * 128 * 600 / 100_000)
    text = ratios.text(content)
    assert "Mean R@10 rises with every ratio" in text and "67 % of updates (tried: 50" in text
    assert "at rho 10 the pool is passed over 7.7 times" in text
    other = ratios.content(pair_runs({(2, 100): 0.12, (5, 100): 0.09}), [], SCALE)
    assert "does **not** rise" in ratios.text(other) and "not (tried: 100 %)" in ratios.text(other)
    alone = ratios.content(pair_runs({(2, 100): 0.12})[3:], [], SCALE)
    assert alone["rows"][0]["flops_per_iteration"] is None and "JEST" in ratios.text(alone)


@given(
    value=st.floats(0.05, 2), down=st.floats(0, 0.04), up=st.floats(0, 1), cost=st.floats(0.1, 5)
)
def test_a_speedup_mirrors_beta(value, down, up, cost):
    low, high = value - down, value + up
    text = f"{value:.2f} ({low:.2f} to {high:.2f})"
    found = figures.saved(Beta(value, low, high, text), cost)
    assert found["low"] <= found["value"] <= found["high"]
    assert found["value"] == pytest.approx(1 - cost * value)
    assert found["clamped"] == [found["value"], found["low"], found["high"]]
    assert figures.positive(found) == (found["value"] > 0)
    bound = figures.saved(Beta(None, None, None, "< 0.50"), cost)
    assert bound["text"].startswith("> ") and bound["clamped"] == [1 - cost * 0.5]
    assert figures.positive(bound) is (True if cost * 0.5 <= 1 else None)


def test_unknown_parts_list_the_known():
    with pytest.raises(ValueError, match=r"published, .*rho.*, online, got 'nothing'"):
        command.command(("nothing",))


@pytest.mark.parametrize("name", command.PARTS)
def test_parts_have_the_same_interface(name):
    module = command.part(name)
    assert name == module.NAME and module.TITLE
    for scale in ("smoke", "full", "gpu"):
        configs = module.configs(scale)
        assert len(set(configs)) == len(configs) and (configs or name == "published")
    assert callable(module.content) and callable(module.pictures) and callable(module.text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    levels = {
        (rho, 100): 0.11 + 0.001 * rho for rho in ratios.RATIOS[SCALE]
    } | {(5, p): 0.10 for p in ratios.SHORTER[SCALE]}  # fmt: skip
    runs = shrinking({"classact": 0.2, "easy": 1.0}, (0, 0.001, -0.001)) + pair_runs(levels)
    for method, settings in ablation.METHODS.items():
        runs += series(method, [0.86, 0.861, 0.8625], **settings)
    for configs in online.variants(SCALE).values():
        runs += [made(c, 0.86 + 0.001 * c.seed) for c in configs]
    for run in runs:
        path = common.runs(SCALE) / run["name"]
        path.mkdir(parents=True, exist_ok=True)
        records.write_json(path / "run.json", run)
    return tmp_path


def test_command_writes_everything_and_ends_with_the_result(folder, capsys):
    parts = ("ablation", "scaling", "ratios", "online")
    command.command(parts, SCALE, aggregate_only=True, out=folder / "here" / "r")
    printed = capsys.readouterr().out
    last = printed.rstrip().splitlines()[-1]
    assert last.startswith("--result ")
    result = json.loads(last.removeprefix("--result "))
    assert result["scaling"]["verdict"] == "holds" and result["online"]["missing"] == 0
    assert "unfinished" not in printed.lower() and "![" not in printed
    for part in parts:
        content = common.read(folder / "here" / f"r-{part}.json")
        assert content["scale"] == SCALE and content["missing"] == []
        table = list(csv.DictReader(io.StringIO((folder / f"here/r-{part}.csv").read_text())))
        assert len(table) == len(content["rows"])
        assert not any(value.startswith(("{", "[")) for row in table for value in row.values())
        for suffix in ("svg", "png"):
            assert (folder / "here" / f"r-{part}.{suffix}").stat().st_size > 1000
        assert f"(../bench/results/cpu/replicate-{part}.svg)" in command.part(part).text(content)


def test_command_says_what_is_missing(folder, capsys):
    for config in figures.over_seeds(SCALE, "easy", scorer="femto"):
        (common.runs(SCALE) / config.name / "run.json").unlink()
    command.command(("scaling",), SCALE, minutes=0, out=folder / "r")
    assert "unfinished: 3 of 45 runs are missing" in capsys.readouterr().out
    content = common.read(folder / "r-scaling.json")
    assert len(content["missing"]) == 3 and content["verdict"] == "not measured"


def test_command_without_any_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.command(("ablation", "ratios"), "smoke", aggregate_only=True)
    printed = capsys.readouterr().out
    assert printed.count("runs are missing") == 2 and '--result {"scale": "smoke"}' in printed
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize("module", [figures, ratios])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
