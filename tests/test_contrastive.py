# SPDX-License-Identifier: Apache-2.0
"""The loop on image-text pairs: every method, exact resume, an honest bill, shared references."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from activesel.ledger import Ledger
from activesel.loop import contrastive, icon_render, icons, pairs_reference, training
from activesel.loop.contrastive import PairsTrainer, pairs_of, run
from activesel.loop.icon_packages import CLEAN, LOGO, NOISY, Icon
from activesel.loop.pairs_config import RECIPES, PairsConfig
from activesel.loop.pairs_cost import pair_flops, train_flops
from activesel.loop.pairs_reference import reference
from activesel.loop.sweep import sweep
from activesel.models import contrastive_loss
from activesel.operands import Pairs

TIMES = ("seconds", "cpu_seconds", "environment", "reference", "curve", "reference_scoring_seconds")
KEEP, UPDATES = 8, 7
FAMILIES = {"noto": 4, "lucide": 2, "fluent-emoji-high-contrast": 5, "iconoir": 3, "cib": 4}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Rendered icons that nobody drew, where the loop looks for the "tiny" subset."""
    folder, made = tmp_path_factory.mktemp("icons"), []
    for row in range(540):
        name = list(FAMILIES)[row % 5]
        tier = {"cib": LOGO, "iconoir": NOISY}.get(name, CLEAN)
        words = f"{'abcdefghi'[row % 9]} {'klmnopqrst'[row // 9 % 10]} {'uvwxyz'[row // 90]}"
        tags = ["one", "two"] if tier == CLEAN else []
        made.append(
            Icon(name, f"n{row}", tier, name != "cib" and row % 2 == 0, words, tags, words, "")
        )
    images = torch.randint(
        256, (len(made), 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    path = folder / "tiny.safetensors"
    icon_render._write(path, icon_render.Rendered(images, made), icons.SUBSETS["tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTIVESEL_ICONS", str(folder))
        pairs_reference._icons.cache_clear()
        yield
    pairs_reference._icons.cache_clear()


def config(method="jest", **settings):
    shared = {"keep": KEEP, "rho": 3, "chunks": 4, "updates": UPDATES, "reference_updates": 3}
    small = {"learner": "nano", "scorer": "mu", "patch": 16, "scorer_patch": 16, "coarse": 32}
    rest = {"subset": "tiny", "warmup": 2, "evaluations": 3, "compare_every": 3}
    return PairsConfig(method, **{**shared, **small, **rest, **settings})


def same(a, b):
    """Equal to the bit, tensors within dicts and lists included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def train(settings, out, **options):
    """The record of a run, and everything its trainer knew at the end."""
    last = {}

    def keep(trainer):
        last.clear()
        last.update(trainer.state_dict())

    record = run(settings, out, on_update=keep, **options)
    del last["clock"]
    return {name: value for name, value in record.items() if name not in TIMES}, last, record


class Stop(Exception):
    pass


def stop_after(updates):
    def on_update(trainer):
        if trainer.step == updates:
            raise Stop

    return on_update


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_trains_resumes_to_the_bit_and_records(method, tmp_path):
    settings = config(method)
    straight, state, record = train(settings, tmp_path / "straight")
    folder = tmp_path / "straight" / settings.name
    assert sum(record["kept"].values()) == UPDATES * KEEP
    assert [point["update"] for point in record["curve"]] == [2, 5, 7]
    assert record["curve"][-1]["flops_total"] == record["ledger"]["total"]
    for way in ("image_to_text", "text_to_image"):
        assert 0 <= record["recall"][way]["1"] <= record["recall"][way]["10"] <= 1
    assert json.loads((folder / "run.json").read_text()) == record
    assert PairsConfig(**json.loads((folder / "run.json").read_text())["config"]) == settings
    left = sorted(file.name for file in folder.iterdir())
    assert left == ["kept.safetensors", "run.csv", "run.json"]
    counts = load_file(folder / "kept.safetensors")
    assert counts["kept"].sum() == UPDATES * KEEP
    assert counts["drawn"].sum() == UPDATES * settings.super_batch
    assert (counts["kept"] <= counts["drawn"]).all() and len(counts["ids"].unique()) == len(
        counts["kept"]
    )

    with pytest.raises(Stop):
        run(settings, tmp_path / "cut", checkpoint_every=3, on_update=stop_after(5))
    assert not (tmp_path / "cut" / settings.name / "run.json").exists()
    again, resumed, _ = train(settings, tmp_path / "cut", checkpoint_every=3)
    assert same(resumed, state) and same(again, straight)


def test_a_resumed_run_starts_from_its_checkpoint(tmp_path):
    with pytest.raises(Stop):
        run(config("uniform"), tmp_path, checkpoint_every=3, on_update=stop_after(5))
    steps = []
    run(config("uniform"), tmp_path, on_update=lambda trainer: steps.append(trainer.step))
    assert steps == [4, 5, 6, 7]


def test_jest_pays_for_everything_and_for_the_reference_once_if_cached(tmp_path):
    settings = config()
    record = run(settings, tmp_path)
    drawn, scorer = UPDATES * settings.super_batch, pair_flops("mu", 16)
    pool, width = sum(record["pool"].values()), 32
    expected = Ledger(
        learner=UPDATES * KEEP * 3 * (pair_flops("nano", 16) + 2 * KEEP * width),
        scoring_online=drawn * scorer,
        scoring_reference=drawn * scorer,
        online_training=UPDATES * KEEP * 3 * (scorer + 2 * KEEP * width),
        reference_training=3 * KEEP * 3 * (scorer + 2 * KEEP * width),
        selection=drawn * (2 * 2 * width + 2 * 2 * (2 * width + 10) * KEEP + 40 * 4),
    )
    assert record["ledger"] == pytest.approx({**asdict(expected), "total": expected.total})
    cached = replace(expected, scoring_reference=pool * scorer)
    assert record["ledger_cached"] == pytest.approx({**asdict(cached), "total": cached.total})
    seconds = record["reference_scoring_seconds"]
    assert seconds["fresh"] == pytest.approx(seconds["cached"] * drawn / pool)


def test_uniform_pays_for_its_learner_alone(tmp_path):
    bill = {
        name: value for name, value in run(config("uniform"), tmp_path)["ledger"].items() if value
    }
    total = UPDATES * train_flops("nano", 16, KEEP)
    assert bill == {"learner": total, "total": total}


def test_embeddings_wider_and_patches_finer_cost_more():
    assert pair_flops("micro", 8) > pair_flops("micro", 16) > pair_flops("nano", 16) > 0
    # linear layers of one block of width 32 on 4 patches: 12 * 32^2 multiply-adds a patch
    mu = 2 * 4 * 12 * 32**2
    assert 1 < pair_flops("mu", 16) / mu < 8


def test_flexi_scores_with_the_learner_and_trains_it_half_and_half(tmp_path):
    settings = config("flexi-jest")
    split, out = pairs_of(settings), tmp_path
    said, _ = reference(settings.reference, out, split)
    trainer, other = (PairsTrainer(settings, split, said) for _ in range(2))
    assert list(trainer.models) == ["learner"]
    _, (images, tokens, index) = trainer.choose()
    trainer.learn((images, tokens, index))
    learner = other.learner
    fine = learner.forward_pairs(images[0::2], tokens[0::2])
    coarse = learner.at(32).forward_pairs(images[1::2], tokens[1::2])
    both = Pairs(
        torch.cat([fine.image, coarse.image]),
        torch.cat([fine.text, coarse.text]),
        fine.scale,
        fine.bias,
    )
    training.descend(other.optimizers["learner"], contrastive_loss(both, "sigmoid"))
    assert same(trainer.learner.state_dict(), learner.state_dict())
    assert trainer.online.image.patch.weight is trainer.learner.image.patch.weight
    per, fine, coarse = trainer.per_update, pair_flops("nano", 16), pair_flops("nano", 32)
    assert per.scoring_online == settings.super_batch * coarse and per.online_training == 0
    assert per.learner == pytest.approx(3 * KEEP * ((fine + coarse) / 2 + 2 * KEEP * 32))


def test_bootstrapping_joins_the_best_aligned_rows_and_pays_for_finding_them(tmp_path):
    second = config("jest++").reference
    first = second.reference
    assert first == config("jest").reference and first.reference is None
    split = pairs_of(second)
    _, entry = reference(second, tmp_path, split)
    said, before = reference(first, tmp_path, split)
    pairs = said.lookup(split.pool.ids)
    wanted = min(2 * len(split.clean), len(split.pool))
    best = (pairs.image * pairs.text).sum(1).argsort(descending=True)[:wanted]
    assert entry["joined"] == split.pool.rows(best).tiers
    assert entry["rows"] == len(split.clean) + wanted and before["rows"] == len(split.clean)
    own = second.updates * train_flops("mu", 16, KEEP)
    rank = len(split.pool) * pair_flops("mu", 16)
    assert entry["flops"] == pytest.approx(before["flops"] + rank + own)
    assert entry["seconds"] > before["seconds"]


def test_a_policy_is_used_again_where_its_reference_was_not_trained(tmp_path):
    settings = config("jest-emoji")
    split = pairs_of(settings)
    record = run(settings, tmp_path)
    _, entry = reference(settings.reference, tmp_path, split)
    assert entry["rows"] == int(split.clean.emoji.sum()) < len(split.clean)
    counts = load_file(tmp_path / settings.name / "kept.safetensors")
    others = split.pool.rows(~split.pool.emoji)
    assert torch.equal(counts["ids"], others.ids) and record["pool"] == others.tiers
    plain = config(rows="ui")
    assert run(plain, tmp_path)["pool"] == others.tiers
    assert plain.reference == config().reference


def test_references_are_shared_and_only_read_again(tmp_path):
    run(config(), tmp_path)
    folder = tmp_path / config().reference.name
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(config("easy"), tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert config("activeclip").reference.loss == "softmax" and config().reference.loss == "sigmoid"


def test_a_reference_of_other_data_is_refused(tmp_path):
    settings = config()
    reference(settings.reference, tmp_path)
    other = pairs_of(replace(settings, seed=5))
    with pytest.raises(ValueError, match=r"index\.json.*data"):
        run(settings, tmp_path, other)
    assert not (tmp_path / settings.name).exists()


def test_joint_and_independent_picks_are_compared_on_the_same_scores(tmp_path):
    joint, single = (run(config(m, temperature=0.0), tmp_path) for m in ("jest", "independent"))
    one, two = (r["batch_learnability"]["compared"] for r in (joint, single))
    assert len(one) == len(two) == 3
    assert one[0] == pytest.approx(two[0]), "equal models, equal super-batch"
    assert one[1] != two[1]
    means = joint["batch_learnability"]
    assert means["joint"] == pytest.approx(sum(pair[0] for pair in one) / 3)
    last = config("activesiglip")
    assert run(last, tmp_path)["batch_learnability"] is None


def test_one_chunk_is_independent_selection(tmp_path):
    _, a, _ = train(config(chunks=1), tmp_path)
    _, b, _ = train(config("independent"), tmp_path)
    assert same(a["learner"], b["learner"]) and torch.equal(
        a["counts"]["kept"], b["counts"]["kept"]
    )


def test_the_learner_may_score_itself(tmp_path):
    settings = config(online="learner")
    record = run(settings, tmp_path)
    assert record["ledger"]["online_training"] == 0
    assert record["ledger"]["scoring_online"] == UPDATES * settings.super_batch * pair_flops(
        "nano", 16
    )
    assert config("easy", online="learner") == config("easy"), "which has no online scorer"


def test_another_seed_is_another_run_and_a_state_of_another_config_is_refused(tmp_path):
    split = pairs_of(config())
    first, second = (PairsTrainer(config("uniform", seed=s), split, None) for s in (0, 1))
    assert not same(first.learner.state_dict(), second.learner.state_dict())
    with pytest.raises(ValueError, match=r"state must be of PairsConfig\(method='uniform'"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "best"}, "method must be one of uniform, hard, .* got 'best'"),
        ({"rho": 0}, "rho must be at least 1, got 0"),
        ({"chunks": 9}, "chunks must be at most keep=8, got 9"),
        ({"loss": "hinge"}, "loss must be sigmoid or softmax, got 'hinge'"),
        ({"online": "other"}, "online must be recipe or learner, got 'other'"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"subset": "half"}, "subset must be full or demo or tiny, got 'half'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_settings_a_method_does_not_have_make_no_other_run():
    assert config("uniform", rho=5, temperature=0.5) == config("uniform")
    assert config("activeclip", loss="sigmoid").loss == "softmax"
    assert config("jest-emoji").rows == "ui"


def test_a_sweep_trains_references_first_and_goes_on(tmp_path, monkeypatch):
    configs = [config(method, updates=2) for method in ("jest++", "uniform")]
    done, seen = {}, []
    for result in sweep(configs, tmp_path, workers=1, on_progress=seen.append):
        done[result["config"]["method"]] = result
    assert set(done) == {"jest++", "uniform"} and seen[-1] <= 4
    names = {path.name.split("-s0")[0] for path in tmp_path.iterdir()}
    assert {"reference-clean", "reference-++"} <= names
    assert done["uniform"] == run(configs[1], tmp_path)
    monkeypatch.setenv("ACTIVESEL_ICONS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", "")
    again = {r["config"]["method"]: r for r in sweep(configs, tmp_path, workers=1)}
    assert again == done, "finished runs need no data"
    with pytest.raises(FileNotFoundError, match="npm"):
        next(sweep([config(seed=1)], tmp_path, workers=1))


def test_the_command_line_trains_and_writes(tmp_path):
    options = ["--method", "jest", "--updates", "2", "--reference-updates", "2", "--keep", "8"]
    options += ["--chunks", "4", "--subset", "tiny", "--learner", "nano", "--out", str(tmp_path)]
    command = [sys.executable, "-m", contrastive.__name__, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("jest-*")
    assert {"run.json", "run.csv", "kept.safetensors"} == {file.name for file in folder.iterdir()}
    assert "R@10" in done.stdout and "clean" in done.stdout
