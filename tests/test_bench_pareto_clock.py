# SPDX-License-Identifier: Apache-2.0
"""The reference system: rows times seconds per row, timed in turn, kept for its machine."""

from dataclasses import asdict

import pytest
import torch
from test_bench_pareto import FULL, rated, runs, uniform

from activesel.loop import pairs_cost, records
from bench import common, pareto, study
from bench.pareto import clock, plots, points


def test_system_seconds_are_rows_times_seconds_per_row_of_every_line():
    found = uniform() + runs("classact", [0.8605, 0.8605], scorer="nano")
    settings = [study.classify("full", m, scorer="nano") for m in ("uniform", "classact")]
    rows, _ = points.points(found, FULL, rated(settings))
    (row,) = [row for row in rows if row["method"] == "classact"]
    update = 64 * 9.0 + 128 * (0.2 + 0.2) + 64 * 0.5 + 128 * 0.01
    once, whole = 4800 * 64 * 0.5, 2400 * 64 * 9.0
    assert row["system_seconds"] == pytest.approx(1608 * update + once)
    assert row["system_once_seconds"] == row["system_reference_training_seconds"] == once
    assert row["system_speedup"]["value"] == pytest.approx(1 - (1608 * update + once) / whole)
    assert row["system_f_ratio"] == pytest.approx(0.2 / 3)
    plain = next(r for r in rows if r["method"] == "uniform" and r["updates"] == 2400)
    assert plain["system_seconds"] == plain["system_learner_seconds"] == pytest.approx(whole)
    assert plain["system_f_ratio"] is None


def test_how_busy_the_runs_machine_was_changes_no_speedup():
    found, quiet = [uniform() + runs("classact", [0.8605] * 2, scorer="nano") for _ in range(2)]
    for run in found:
        run["cpu_seconds"] *= 1 + run["config"]["updates"] % 7
    settings = [study.classify("full", m, scorer="nano") for m in ("uniform", "classact")]
    both = [points.points(f, FULL, rated(settings))[0] for f in (found, quiet)]
    for busy, idle in zip(*both, strict=True):
        recorded = "recorded_cpu_seconds"
        assert busy | {recorded: 0} == idle | {recorded: 0}
    assert [r["recorded_cpu_seconds"] for r in both[0]] != [
        r["recorded_cpu_seconds"] for r in both[1]
    ]


def test_what_trains_on_whole_super_batches_is_charged_for_them():
    each, once = clock.rows(study.classify("full", "classact-online", online_rows="drawn"))
    kept = 2400 * 64
    assert asdict(each) == {
        "learner": kept, "scoring_online": 2 * kept, "scoring_reference": 2 * kept,
        "online_training": 2 * kept, "reference_training": 2 * kept, "selection": 2 * kept,
    }  # fmt: skip
    assert once.total == 0
    each, _ = clock.rows(study.classify("full", "rho"))
    assert each.scoring_online == 2 * kept and each.online_training == 0
    parts = clock.parts(study.classify("full", "rho"))
    assert parts["online"].model == parts["learner"].model == "mini"


@pytest.mark.parametrize("method", ["uniform", "hard", "easy", "jest", "jest-easy"])
def test_rows_of_pairs_are_those_whose_flops_the_loop_charges(method):
    config = study.pairs("full", method, 50, rho=2)
    each, once = clock.rows(config)
    flops = pairs_cost.price(config, config.recipe.online == "scorer") * config.updates
    scored = pairs_cost.pair_flops(config.scorer, config.scorer_patch)
    assert each.scoring_online * scored == pytest.approx(flops.scoring_online)
    assert each.scoring_reference * scored == pytest.approx(flops.scoring_reference)
    learnt = pairs_cost.train_flops(config.learner, config.patch, config.keep) / config.keep
    assert each.learner * learnt == pytest.approx(flops.learner)
    trained = pairs_cost.train_flops(config.scorer, config.scorer_patch, config.keep) / config.keep
    assert each.online_training * trained == pytest.approx(flops.online_training)
    assert (each.selection > 0) == (flops.selection > 0)
    assert once.total == (config.reference_updates * config.keep if config.reference else 0)


def test_a_reference_of_the_best_rows_is_charged_for_finding_them():
    config = study.pairs("full", "jest++")
    _, once = clock.rows(config, pool=1000)
    assert once.scoring_reference == 1000
    assert once.reference_training == 2 * config.reference_updates * config.keep
    with pytest.raises(ValueError, match="one patch, got 'flexi-jest'"):
        clock.parts(study.pairs("full", "flexi-jest"))


def test_parts_take_turns_and_add_up(monkeypatch):
    configs = [
        study.classify("smoke", "classact", scorer="pico", learner="nano"),
        study.pairs("smoke", "jest", learner="nano", keep=16),
    ]
    those, order, make = clock.needed(configs), [], clock._run

    def logged(part, config, device):
        run = make(part, config, device)
        return lambda lap: (order.append(part), run(lap))

    monkeypatch.setattr(clock, "_run", logged)
    threads = torch.get_num_threads()
    rows = clock.measure(those, rounds=2)
    assert torch.get_num_threads() == threads
    assert order == 3 * list(those) and len(rows) == len(those) == 7
    for row in rows:
        assert 0 < row["p20"] <= row["seconds"] <= row["p80"] and row["rounds"] == 2
        if row["kind"] == "step":
            parts = row["forward"] + row["backward"] + row["optimizer"]
            assert parts == pytest.approx(row["seconds"], rel=1e-6), "a median of two is a mean"
            assert 0 < row["share_step"] < row["share"] < 1
    assert len(clock.measure(those, rounds=50, limit=0.0)) == len(those)
    assert len(order) == (3 + 4) * len(those), "three rounds at least"


def test_a_clock_is_kept_for_its_machine_and_models_alone(tmp_path, monkeypatch):
    taken = []

    def fake(those, rounds, device, limit):
        taken.append(list(those))
        return [{**asdict(part), "seconds": float(len(taken))} for part in those]

    monkeypatch.setattr(clock, "measure", fake)
    path, file = tmp_path / "p-clock", tmp_path / "p-clock.json"
    few = [study.classify("full", "easy")]
    many = [*few, study.classify("full", "classact", rho=8)]
    for configs, count in ((many, 1), (few, 1), (many, 1)):
        clock.measured(path, configs, "full")
        assert len(taken) == count
    records.write_json(file, records.read_json(file) | {"schema": 0})
    clock.measured(path, few, "full")
    clock.measured(path, many, "full")
    assert len(taken) == 3, "another schema, then models that were missing"
    content = records.read_json(file)
    content["machine"]["cpu"] = "another"
    records.write_json(file, content)
    elsewhere = clock.Clock(common.read(file), many)
    assert {row["seconds"] for row in elsewhere.content["rows"]} == {3.0}
    clock.measured(path, many, "full")
    assert len(taken) == 4 and common.read(file)["machine"]["cpu"] != "another"
    with pytest.raises(ValueError, match="a file of this command, got no 'rows'"):
        clock.Clock(common.header())
    with pytest.raises(ValueError, match="clock must hold all that"):
        clock.Clock(common.read(file), [study.classify("full", "classact", scorer="pico")])


def test_without_a_clock_seconds_are_unknown_and_not_drawn(tmp_path, monkeypatch):
    found = uniform() + runs("classact", [0.86, 0.86], scorer="nano")
    content = pareto.content(found, [], "full")
    assert "| unknown |" in pareto.text(content) and "reference system" not in pareto.text(content)
    panels = []
    monkeypatch.setattr(plots, "save", lambda figure, path: panels.append(len(figure.axes)) or [])
    for rates in (None, rated([study.classify("full", m) for m in ("uniform", "classact")])):
        rows = points.points(found, FULL, rates)[0]
        plots.metrics(rows, tmp_path / "p", "title", "accuracy")
    assert panels == [1, 2]
