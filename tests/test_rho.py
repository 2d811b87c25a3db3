# SPDX-License-Identifier: Apache-2.0
"""RHO-LOSS's protocol on real images and on CIFAR's files: halves, choices, resume, the bill."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_cifar import write_folder
from test_loop import TIMES, Stop, same, stop_after

from activesel.ledger import forward_flops
from activesel.loop import rho
from activesel.loop.rho_config import CHOICES, METHODS, IrreducibleConfig, RhoConfig
from activesel.loop.sweep import sweep

SMALL = {
    **{"updates": 5, "super_batch": 40, "keep": 8, "width": 2, "evaluations": 2, "quick": 50},
    **{"reference_updates": 6, "reference_keep": 16, "reference_checks": 3, "reference_width": 2},
}


@pytest.fixture(scope="module")
def halves():
    """Real rows, a few hundred of either half."""
    whole = rho.split("fashion-mnist", 0.1, 0)

    def some(part):
        return type(part)(part.images[:160], part.labels[:160], part.mislabelled[:160])

    return replace(
        whole, train=some(whole.train), holdout=some(whole.holdout), test=some(whole.test)
    )


def config(method="rho", **settings):
    return RhoConfig(method, **{**SMALL, **settings})


def trained(settings, out, halves, **options):
    """The record, the trainer's last state, and the trainer."""
    last = {}
    result = rho.run(settings, out, halves, on_update=lambda t: last.update(t=t), **options)
    state = last["t"].state_dict()
    del state["clock"]
    return {name: value for name, value in result.items() if name not in TIMES}, state, last["t"]


def test_halves_are_the_even_and_the_odd_rows_with_noise_of_their_own():
    clean, noisy = (rho.split("fashion-mnist", noise, 3) for noise in (0.0, 0.1))
    assert len(noisy.train) == len(noisy.holdout) == 30_000 and len(noisy.test) == 10_000
    whole = rho._images("fashion-mnist")
    assert torch.equal(noisy.train.images[7], whole.images[14])
    assert torch.equal(clean.holdout.labels, whole.labels[1::2])
    for name in ("train", "holdout"):
        part, true = getattr(noisy, name), getattr(clean, name)
        assert part.mislabelled.sum() == 3_000
        assert torch.equal(part.labels != true.labels, part.mislabelled)
    assert not torch.equal(noisy.train.mislabelled, noisy.holdout.mislabelled)
    assert not noisy.test.mislabelled.any()
    pixels = noisy.train.images.double() / 255
    assert noisy.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-5)
    assert noisy.std[0] == pytest.approx(float(pixels.std()), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", CHOICES["selection_mode"])
def test_interrupted_and_resumed_is_straight_to_the_bit(method, mode, tmp_path, halves):
    settings = config(method, selection_mode=mode)
    record, state, _ = trained(settings, tmp_path / "straight", halves)
    with pytest.raises(Stop):
        rho.run(settings, tmp_path / "cut", halves, checkpoint_every=2, on_update=stop_after(3))
    again, final, trainer = trained(settings, tmp_path / "cut", halves, checkpoint_every=2)
    assert trainer.step == 5 and same(final, state) and same(again, record)
    left = {file.name for file in (tmp_path / "cut" / settings.name).iterdir()}
    assert left == {"run.json", "run.csv", "kept.safetensors"}


@pytest.mark.parametrize("method", ["train-loss", "rho"])
def test_the_rows_kept_are_those_that_score_highest(method, tmp_path, halves):
    settings = config(method)
    losses = rho.reference(settings.reference, tmp_path, halves)[0] if method == "rho" else None
    trainer = rho.Trainer(settings, halves, losses)
    trainer.update()  # else all running statistics are as they began
    before = {name: x.clone() for name, x in trainer.learner.state_dict().items()}
    index, (images, labels, kept) = trainer.choose()
    assert same(before, trainer.learner.state_dict()) and trainer.learner.training
    trainer.learner.eval()
    with torch.no_grad():
        logits = trainer.learner(halves.train.images[index])
    score = F.cross_entropy(logits, halves.train.labels[index], reduction="none")
    if losses is not None:
        score -= losses.lookup(index)
    best = index[score.topk(settings.keep).indices]
    assert set(kept.tolist()) == set(best.tolist())
    assert torch.equal(images, halves.train.images[kept])
    assert torch.equal(labels, halves.train.labels[kept])


def test_scoring_in_training_mode_sees_the_super_batch_and_moves_the_averages(halves):
    settings = config("train-loss", selection_mode="train")
    trainer = rho.Trainer(settings, halves)
    shadow = rho.build(settings.width, halves, 0)
    shadow.load_state_dict(trainer.learner.state_dict())
    index, (_, _, kept) = trainer.choose()
    with torch.no_grad():
        logits = shadow(halves.train.images[index])  # in training mode, as built
    score = F.cross_entropy(logits, halves.train.labels[index], reduction="none")
    assert set(kept.tolist()) == set(index[score.topk(settings.keep).indices].tolist())
    assert same(shadow.state_dict(), trainer.learner.state_dict()), "running averages have moved"
    assert not any(p.grad is not None for p in trainer.learner.parameters())


def test_uniform_keeps_some_of_every_super_batch_and_scores_nothing(halves):
    trainer = rho.Trainer(config("uniform"), halves)
    index, (_, _, kept) = trainer.choose()
    assert len(index) == 40 and len(set(kept.tolist())) == 8
    assert set(kept.tolist()) < set(index.tolist())
    assert trainer.per_update.total == trainer.per_update.learner


def test_learning_rate_falls_to_zero_or_stays(halves):
    rates = {}
    for schedule in CHOICES["schedule"]:
        trainer = rho.Trainer(config("uniform", schedule=schedule), halves)
        rates[schedule] = []
        while trainer.step < 5:
            trainer.update()
            rates[schedule].append(trainer.optimizers["learner"].param_groups[0]["lr"])
    assert rates["constant"] == [1e-3] * 5
    expected = [5e-4 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert rates["decayed"] == pytest.approx(expected)


def test_every_cost_is_charged(tmp_path, halves):
    settings = config(updates=4)
    _, _, trainer = trained(settings, tmp_path, halves)
    forward = forward_flops(trainer.learner, (1, 28, 28))
    lines = trainer.ledger
    assert lines.learner == 4 * 8 * 3 * forward and lines.scoring_online == 4 * 40 * forward
    assert lines.scoring_reference == 160 * forward, "the table, once"
    assert lines.reference_training == (6 * 16 * 3 + 3 * 160) * forward, "checkpoints are scored"
    assert 0 < lines.selection < 0.01 * lines.total


def test_irreducible_losses_are_those_of_the_best_checkpoint(tmp_path, halves):
    """Held-out labels of which none holds on the training half: learning them does harm."""
    wrong = replace(halves.holdout, labels=(halves.holdout.labels + 1) % 10)
    rows = replace(halves, holdout=wrong)
    settings = IrreducibleConfig(updates=40, keep=32, width=2, lr=0.01, checks=4)
    cache, entry = rho.reference(settings, tmp_path, rows)
    assert len(entry["losses"]) == 4 and len(cache) == len(halves.train)
    assert min(entry["losses"]) < entry["losses"][-1], "the last checkpoint is not the best"
    mean = float(cache.lookup(torch.arange(160)).mean())
    assert mean == pytest.approx(min(entry["losses"]), rel=1e-4)
    again, read = rho.reference(settings, tmp_path, rows)
    assert read == entry and torch.equal(again.lookup([3, 5]), cache.lookup([3, 5]))
    other = rho.reference(replace(settings, augment=True), tmp_path, rows)[1]
    assert other["losses"] != entry["losses"]


def test_augmented_images_are_shifted_and_mirrored_ones():
    image = torch.zeros(1, 1, 12, 12, dtype=torch.uint8)
    image[0, 0, 4, 5] = 200
    out = rho.augmented(image.repeat(400, 1, 1, 1), seed=1)
    assert out.dtype == torch.uint8 and (out.sum(dim=(1, 2, 3)) == 200).all()
    _, _, rows, columns = out.nonzero().unbind(1)
    assert set(rows.tolist()) == set(range(0, 9)), "4 - 4 to 4 + 4"
    assert set(columns.tolist()) == set(range(1, 11)), "of 5 and its mirror image 6"
    assert torch.equal(out, rho.augmented(image.repeat(400, 1, 1, 1), seed=1))


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100"])
def test_a_cifar_folder_runs_end_to_end(name, tmp_path):
    write_folder(tmp_path / name, name, rows={"cifar-10": 40, "cifar-100": 100}[name])
    settings = {**SMALL, "updates": 2, "data": str(tmp_path / name), "reference_augment": True}
    configs = [RhoConfig(method, **settings) for method in ("uniform", "rho")]
    if name == "cifar-10":
        results = list(sweep(configs, tmp_path / "runs", workers=1))
    else:
        results = [rho.run(config, tmp_path / "runs") for config in configs]
    assert {run["config"]["method"] for run in results} == {"uniform", "rho"}
    for run in results:
        assert len(run["by_class"]) == {"cifar-10": 10, "cifar-100": 100}[name]
        assert run["rows"] == {"cifar-10": 100, "cifar-100": 50}[name] and run["kept"] == 16


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "hard"}, "method must be one of uniform, train-loss, rho, got 'hard'"),
        ({"data": "cifar-11"}, "data must be \"fashion-mnist\", or a folder .* got 'cifar-11'"),
        ({"keep": 41}, "super_batch must be at least keep=41, got 40"),
        ({"schedule": "linear"}, "schedule must be one of decayed, constant, got 'linear'"),
        ({"selection_mode": "test"}, "selection_mode must be one of eval, train, got 'test'"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"reference_checks": 0}, "reference_checks must be at least 1, got 0"),
        ({"noise": 1.5}, r"noise must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**{"method": "rho", **settings})


def test_what_a_method_does_not_use_makes_no_other_run():
    assert config("uniform", selection_mode="train") == config("uniform")
    assert config("train-loss", reference_updates=9) == config("train-loss")
    assert config("rho", reference_updates=9) != config("rho")
    assert config("rho", schedule="constant").reference == config("rho").reference
