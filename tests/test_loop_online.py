# SPDX-License-Identifier: Apache-2.0
"""What scores in the online scorer's place, what it learns from, and what that costs."""

import pytest
import torch
import torch.nn.functional as F
from on_gpu import NEEDS_GPU
from test_loop import Stop, config, same, stop_after, train
from test_loop import split as split  # a fixture

from activesel.loop.classify import Trainer, run

KNOBS = [
    {"online": "learner"},
    {"online_rows": "drawn"},
    {"online_average": 0.5},
    {"distil": 0.7},
    {"online_average": 0.9, "distil": 1.0, "online_smoothing": 0.0},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_interrupted_and_resumed_is_straight_to_the_bit(knobs, tmp_path, split):
    settings = config(**knobs)
    record, state, _ = train(settings, tmp_path / "straight", split)
    with pytest.raises(Stop):
        run(settings, tmp_path / "cut", split, checkpoint_every=3, on_update=stop_after(5))
    again, resumed, _ = train(settings, tmp_path / "cut", split, checkpoint_every=3)
    assert same(resumed, state) and same(again, record)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_each_changes_what_is_kept(knobs, tmp_path, split):
    """From equal weights: the first batch is alike, later ones are not."""
    _, plain, _ = train(config(updates=12, online_lr=0.05), tmp_path, split)
    _, other, _ = train(config(updates=12, online_lr=0.05, **knobs), tmp_path, split)
    assert not same(plain["counts"]["kept"], other["counts"]["kept"])


def test_only_what_a_method_uses_makes_another_run():
    assert config("easy", online_rows="drawn") == config("easy")
    assert config("rho", online="learner", distil=0.5) == config("rho")
    assert config(online="learner", online_average=0.5) == config(online="learner")
    assert config(online="learner").recipe.online == "learner"
    assert config("hard", online="learner").recipe.online == "learner"
    assert len({config(**knobs).name for knobs in [{}, *KNOBS]}) == 1 + len(KNOBS)


def test_the_bill_follows(split):
    def price(**knobs):
        return Trainer(config("hard", learner="micro", **knobs), split, None).per_update

    plain, drawn, learner = price(), price(online_rows="drawn"), price(online="learner")
    assert drawn.online_training == 2 * plain.online_training > 0
    assert learner.online_training == 0
    assert learner.scoring_online == 2 * learner.learner / 3
    assert price(online_average=0.9, distil=0.5) == plain, "neither takes a product more"


def test_the_average_scores_and_the_weights_learn(split):
    trainer = Trainer(config("hard", online_average=0.5), split, None)
    weights = [p.detach().clone() for p in trainer.models["online"].parameters()]
    trainer.update()
    now = list(trainer.models["online"].parameters())
    assert not same(weights, [p.detach() for p in now])
    for mean, before, after in zip(trainer.average.parameters(), weights, now, strict=True):
        torch.testing.assert_close(mean.detach(), 0.5 * before + 0.5 * after.detach())
    with torch.no_grad():
        for p in trainer.average.parameters():
            p.fill_(torch.nan)
    batch, _ = trainer.choose()
    assert trainer.selector.last.scores.isnan().all(), "the average scored"
    assert trainer.selector.online is trainer.models["online"] and len(batch[0]) == 32


def test_distilled_targets_are_the_learners(split, monkeypatch):
    trainer = Trainer(config("hard", distil=1.0), split, None)
    given = []
    monkeypatch.setattr(trainer.selector, "update", given.append)
    _, kept = trainer.choose()
    expected = F.softmax(trainer.learner(kept[0]).detach(), dim=1)
    trainer.learn(kept)
    assert torch.equal(given[0][0], kept[0])
    torch.testing.assert_close(given[0][1], expected)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"online": "teacher"}, "online must be recipe or learner, got 'teacher'"),
        ({"online_rows": "all"}, "online_rows must be kept or drawn, got 'all'"),
        ({"online_average": 1.0}, r"online_average must be in \[0, 0.99999\], got 1.0"),
        ({"distil": -0.1}, r"distil must be in \[0, 1.0\], got -0.1"),
        ({"distil": 0.5, "online_rows": "drawn"}, "distil must be 0 unless online_rows is kept"),
    ],
)
def test_settings_that_make_no_sense_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        config(**knobs)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("knobs", [{}, *KNOBS], ids=str)
def test_on_a_gpu_too(knobs, tmp_path, split):
    """Weights and scores live there; the record has the same form."""
    _, _, here = train(config(**knobs), tmp_path / "cpu", split)
    _, _, there = train(config(**knobs), tmp_path / "gpu", split, device="cuda")
    assert there.keys() == here.keys() and there["environment"]["gpu"]
    assert there["kept"] == here["kept"] and there["ledger"] == here["ledger"]
