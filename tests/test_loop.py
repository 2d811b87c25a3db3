# SPDX-License-Identifier: Apache-2.0
"""The reference loop on real images: every method, exact resume, and an honest bill."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from activesel.ledger import Ledger
from activesel.loop import data, plots, records
from activesel.loop.classify import Trainer, reference, run
from activesel.loop.config import RECIPES, Config, ReferenceConfig
from activesel.loop.sweep import sweep

# Two FLOPs per multiply-add of a `nano` (width 32, depth 2) on 16 patches of 49 pixels.
NANO = 2 * (16 * 49 * 32 + 2 * (12 * 16 * 32**2 + 2 * 16**2 * 32) + 32 * 10)
TIMES = ("seconds", "cpu_seconds", "environment", "reference", "curve")


@pytest.fixture(scope="module")
def split():
    """A few hundred real rows, ten percent of them mislabelled."""
    whole = data.fashion_mnist(noise=0.1, seed=0)

    def some(part, rows):
        return data.Labelled(part.images[:rows], part.labels[:rows], part.mislabelled[:rows])

    return data.Split(some(whole.train, 320), some(whole.holdout, 160), some(whole.test, 200))


def config(method="classact", **settings):
    shared = {"keep": 16, "learner": "nano", "warmup": 2, "evaluations": 3, "quick": 50}
    return Config(method, **{"updates": 7, "reference_updates": 5, **shared, **settings})


class Stop(Exception):
    pass


def stop_after(updates):
    def on_update(trainer):
        if trainer.step == updates:
            raise Stop

    return on_update


def train(settings, out, split, **options):
    """The record of a run, and everything its trainer knew at the end."""
    last = {}
    result = run(settings, out, split, on_update=lambda t: last.update(t.state_dict()), **options)
    del last["clock"]
    return {name: value for name, value in result.items() if name not in TIMES}, last, result


def same(a, b):
    """Equal to the bit, tensors within dicts and lists included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_trains_and_records(method, tmp_path, split):
    settings = config(method)
    _, _, result = train(settings, tmp_path, split)
    assert 0 < result["accuracy"] <= 1 and result["worst_class"] == min(result["by_class"])
    assert result["kept"] == 7 * 16 and 0 <= result["kept_mislabelled"] <= result["kept"]
    assert [point["update"] for point in result["curve"]] == [2, 5, 7]
    totals = [point["flops_total"] for point in result["curve"]]
    assert totals == sorted(totals) and totals[-1] == result["ledger"]["total"]
    assert json.loads((tmp_path / settings.name / "run.json").read_text()) == result
    lines = (tmp_path / settings.name / "run.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("update,accuracy,worst_class")
    left = sorted(file.name for file in (tmp_path / settings.name).iterdir())
    assert left == ["kept.safetensors", "run.csv", "run.json"], (
        "neither checkpoint nor half-written file"
    )


@pytest.mark.parametrize("method", RECIPES)
def test_interrupted_and_resumed_is_straight_to_the_bit(method, tmp_path, split):
    settings = config(method)
    record, state, _ = train(settings, tmp_path / "straight", split)
    with pytest.raises(Stop):
        run(settings, tmp_path / "cut", split, checkpoint_every=3, on_update=stop_after(5))
    assert not (tmp_path / "cut" / settings.name / "run.json").exists()
    seen = []
    again = run(
        settings,
        tmp_path / "cut",
        split,
        checkpoint_every=3,
        on_update=lambda t: seen.append((t.step, t.state_dict())),
    )
    assert [step for step, _ in seen] == [4, 5, 6, 7], "from the checkpoint, not from the start"
    final = seen[-1][1]
    del final["clock"]
    assert same(final, state)
    assert same({name: again[name] for name in record}, record)


def test_another_seed_is_another_run(tmp_path, split):
    first, second = (train(config(seed=seed), tmp_path, split)[1] for seed in (0, 1))
    assert not same(first["learner"], second["learner"])


def test_finished_runs_and_references_are_only_read(tmp_path, split):
    settings = config()
    first = run(settings, tmp_path, split)

    def fail(_):
        raise AssertionError("a finished run must not train")

    assert run(settings, tmp_path, split, on_update=fail) == first
    weights = tmp_path / settings.reference.name / "model.safetensors"
    written = weights.stat().st_mtime_ns
    run(config(temperature=0.0), tmp_path, split)
    assert weights.stat().st_mtime_ns == written, "two runs share one reference"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "halved", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name(content, tmp_path, split):
    settings = config("uniform")
    with pytest.raises(Stop):
        run(settings, tmp_path, split, checkpoint_every=2, on_update=stop_after(3))
    checkpoint = tmp_path / settings.name / "checkpoint.pt"
    if content == "truncated":
        content = checkpoint.read_bytes()[:-200]
    if content == "halved":  # torch raises something else at this length
        content = checkpoint.read_bytes()[:5000]
    if content == "foreign":
        torch.save({"weights": torch.zeros(2)}, checkpoint)
    else:
        checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt must be a"):
        run(settings, tmp_path, split)
    assert not (tmp_path / settings.name / "run.json").exists()


def test_a_checkpoint_of_another_config_is_refused(split):
    state = Trainer(config("uniform"), split, None).state_dict()
    with pytest.raises(ValueError, match=r"state must be of Config\(method='hard'"):
        Trainer(config("hard"), split, None).load_state_dict(state)


def test_a_damaged_record_is_refused_by_name(tmp_path, split):
    folder = tmp_path / config().name
    folder.mkdir()
    for content in ("{", "[1]"):
        (folder / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json must hold a JSON object, got"):
            run(config(), tmp_path, split)


def test_uniform_trains_on_every_row_and_scores_none(tmp_path, split):
    rows = len(split.train)
    _, _, result = train(config("uniform", updates=rows // 16), tmp_path, split)
    assert result["kept"] == rows, "one epoch"
    assert result["kept_mislabelled"] == split.train.mislabelled.sum() > 0
    bill = {name: value for name, value in result["ledger"].items() if value}
    assert bill == {"learner": rows * 3 * NANO, "total": rows * 3 * NANO}


def test_classact_pays_for_both_scorers_and_the_whole_reference(tmp_path, split):
    ledger = run(config(), tmp_path, split)["ledger"]
    kept, drawn = 7 * 16, 7 * 32
    expected = Ledger(
        learner=kept * 3 * NANO,
        scoring_online=drawn * NANO,
        scoring_reference=drawn * NANO,
        online_training=kept * 3 * NANO,
        reference_training=5 * 16 * 3 * NANO,
        selection=drawn * (4 * 10 * 2 + 40),
    )
    assert ledger["total"] == expected.total
    assert all(ledger[name] == getattr(expected, name) for name in vars(expected))


def test_the_reference_is_charged_before_the_first_update(split):
    trainer = Trainer(config(), split, _scorer(split), reference_flops=123.0)
    assert trainer.ledger == Ledger(reference_training=123.0)


def _scorer(split):
    return Trainer(config("uniform"), split, None).learner


def test_a_reference_beside_trains_on_whole_super_batches(tmp_path, split):
    ledger = run(config("classact-online", rho=3), tmp_path, split)["ledger"]
    assert ledger["reference_training"] == 7 * 48 * 3 * NANO
    assert ledger["online_training"] == 7 * 16 * 3 * NANO


def test_rho_scores_with_the_learner_and_a_held_out_reference(tmp_path, split):
    settings = config("rho", rho=5, temperature=0.7, learner="micro")
    assert settings.temperature == 0 and settings.reference.part == "holdout"
    result = run(settings, tmp_path, split)
    assert result["ledger"]["online_training"] == 0
    assert result["ledger"]["scoring_online"] * 3 == result["ledger"]["learner"] * 5
    other = replace(settings.reference, part="train")
    model, _ = reference(settings.reference, tmp_path, split)
    assert not same(model.state_dict(), reference(other, tmp_path, split)[0].state_dict())


def test_the_reference_starts_alike_whatever_torch_was_doing(tmp_path, split):
    settings = ReferenceConfig(updates=2, keep=8)
    state = torch.random.get_rng_state()
    first, _ = reference(settings, tmp_path / "a", split)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert same(first.state_dict(), reference(settings, tmp_path / "b", split)[0].state_dict())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "best"}, "method must be one of uniform, hard, .* got 'best'"),
        ({"rho": 0}, "rho must be at least 1, got 0"),
        ({"updates": 0}, "updates must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_records_are_whole_or_absent(tmp_path):
    path = tmp_path / "run.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert records.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_curves_are_drawn_from_records(tmp_path, split):
    groups = {
        m: [run(config(m, seed=s), tmp_path, split) for s in (0, 1)] for m in ("hard", "easy")
    }
    files = plots.curves(groups, tmp_path / "curves", target=0.5)
    assert [file.suffix for file in files] == [".svg", ".png"]
    assert files[1].read_bytes().startswith(b"\x89PNG") and b"<svg" in files[0].read_bytes()
    before = files[0].read_bytes()
    assert plots.curves(groups, tmp_path / "curves", target=0.5)[0].read_bytes() == before
    with pytest.raises(ValueError, match="groups must hold at least one run each"):
        plots.curves({"none": []}, tmp_path / "empty")


ENDLESS = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from activesel.loop.config import Config
from activesel.loop.sweep import sweep
config = Config(method="uniform", updates=10**8, keep=1, learner="nano")
list(sweep([config], Path(sys.argv[1]), workers=1))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_workers_stop_with_the_sweep(signum, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not os.listdir(tmp_path):  # until the worker trains
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(parent.pid, signum)  # the parent alone
        parent.communicate(timeout=60)  # ends only when nobody holds its output any more
        assert parent.returncode != 0
    finally:
        with suppress(ProcessLookupError):  # whoever is left
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def test_sweep_refuses_no_workers(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        next(sweep([], tmp_path, workers=0))


def test_the_command_line_trains_and_writes(tmp_path):
    """On the real data: one small ClassAct run, with record, table and curves."""
    options = "--method classact --updates 4 --reference-updates 4 --evaluations 2 --quick 100"
    command = [sys.executable, "-m", "activesel.loop.classify", *options.split()]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("classact-*")
    files = {"run.json", "run.csv", "curves.svg", "curves.png"}
    assert files <= {file.name for file in folder.iterdir()}
    assert "accuracy" in done.stdout
