# SPDX-License-Identifier: Apache-2.0
"""`Selector` with scorers that compare images with texts, and with cached references."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import activesel
from activesel import Pairs, Selector
from activesel.losses import contrastive_loss

ROWS, KEEP = 48, 12


class Dual(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Embedding(20, 8)
        self.drop = nn.Dropout(0.5)  # shows whether scoring is in evaluation mode
        self.log_scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward_pairs(self, images, texts):
        z, t = self.drop(self.image(images)), self.text(texts).mean(1)
        return Pairs(F.normalize(z, dim=1), F.normalize(t, dim=1), self.log_scale.exp(), self.bias)


def batch():
    return torch.randn(ROWS, 6), torch.randint(20, (ROWS, 3)), torch.arange(ROWS) + 100


@torch.no_grad()
def embed(model, rows):
    model = copy.deepcopy(model).eval()
    return model.forward_pairs(rows[0], rows[1])


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("method", ["learnability", "hard", "easy"])
@pytest.mark.parametrize("chunks", [None, 1, 4])
def test_selects_as_the_functions_do(loss, method, chunks):
    online, reference, rows = Dual(), Dual(), batch()
    sel = Selector(
        online,
        reference,
        keep=KEEP,
        method=method,
        loss=loss,
        chunks=chunks,
        seed=3,
        temperature=0.5,
    )
    kept = sel(rows)
    sides = dict(online=embed(online, rows), reference=embed(reference, rows))
    if method != "learnability":
        sides.pop("reference" if method == "hard" else "online")
    how = dict(k=KEEP, temperature=0.5, seed=3, step=0)
    if chunks is None:
        picked = activesel.select(**sides, loss="dot", **how)
        assert sel.last.batch_score is None
    else:
        picked = activesel.joint_select(**sides, loss=loss, chunks=chunks, **how)
        assert torch.equal(sel.last.batch_score, picked.batch_score)
        assert torch.equal(sel.metrics()["activesel/batch_score"], picked.batch_score)
    assert torch.equal(sel.last.indices, picked.indices)
    assert torch.equal(kept[2], rows[2][picked.indices])
    assert online.training and sel.metrics()["activesel/examples_scored"] == ROWS


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_update_descends_the_contrastive_loss_of_the_rows_kept(loss):
    online, reference = Dual().eval(), Dual()
    expected = copy.deepcopy(online)
    sel = Selector(
        online, reference, keep=KEEP, loss=loss, chunks=4,
        optimizer=torch.optim.SGD(online.parameters(), 0.1),
    )  # fmt: skip
    kept = sel(batch())
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    contrastive_loss(expected.forward_pairs(*kept[:2]), loss).backward()
    optimizer.step()
    sel.update(kept)
    for a, b in zip(online.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(online.image.weight, Dual().image.weight)


def test_pairs_default_to_the_sigmoid_loss_and_classes_to_softmax():
    assert Selector(Dual(), Dual(), keep=2).loss == "sigmoid"
    assert Selector(nn.Linear(2, 2), nn.Linear(2, 2), keep=2).loss == "softmax"
    assert Selector(keep=2, method="uniform").loss == "softmax"


def test_inputs_may_be_anywhere_in_the_batch():
    online, reference, (images, texts, ids) = Dual(), Dual(), batch()
    plain = Selector(online, reference, keep=KEEP, chunks=3)
    nested = Selector(
        online, reference, keep=KEEP, chunks=3, id_key="id",
        inputs=lambda b: (b["pixels"], b["words"]["tokens"]),
    )  # fmt: skip
    want = plain((images, texts, ids))
    got = nested({"id": ids, "pixels": images, "words": {"tokens": texts}})
    assert torch.equal(got["pixels"], want[0]) and torch.equal(got["words"]["tokens"], want[1])
    assert torch.equal(nested.kept_ids, want[2]) and "id" not in got


def test_a_reference_beside_learns_from_the_super_batch():
    online, reference = Dual(), Dual().eval()
    expected, rows = copy.deepcopy(reference), batch()
    sel = Selector(
        online, reference, keep=KEEP, chunks=4, train_reference=True,
        reference_optimizer=torch.optim.SGD(reference.parameters(), 0.1),
    )  # fmt: skip
    sel.update(sel(rows))
    contrastive_loss(expected.forward_pairs(*rows[:2])).backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    assert torch.equal(reference.image.weight, expected.image.weight)


# ------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("key", [2, "id"])
@pytest.mark.parametrize("chunks", [None, 4])
def test_a_cache_of_embeddings_stands_for_the_reference(tmp_path, key, chunks):
    online, reference, rows = Dual(), Dual(), batch()
    cache = activesel.write_cache(tmp_path / "cache", reference, [rows], kind="embeddings")
    how = dict(keep=KEEP, chunks=chunks, seed=1)
    fresh, cached = Selector(online, reference, **how), Selector(online, cache, id_key=key, **how)
    want = fresh(rows)
    if key == "id":
        cached.inputs = lambda b: (b["x"], b["y"])
        got = cached({"x": rows[0], "y": rows[1], "id": rows[2]})
    else:
        got = cached(rows)
        assert len(got) == 2
    assert torch.equal(cached.kept_ids, want[2])
    assert torch.equal(cached.last.scores, fresh.last.scores)


def test_rows_the_cache_lacks_are_computed_or_refused(tmp_path):
    online, reference, rows = Dual(), Dual(), batch()
    known = tuple(x[: ROWS // 2] for x in rows)
    activesel.write_cache(tmp_path / "cache", reference, [known], kind="embeddings")
    fresh = Selector(online, reference, keep=KEEP, chunks=4)
    fresh(rows)
    cache = activesel.ReferenceCache(tmp_path / "cache", model=reference, miss="compute")
    sel = Selector(online, cache, keep=KEEP, chunks=4, id_key=2)
    sel(rows)
    torch.testing.assert_close(sel.last.scores, fresh.last.scores)
    strict = Selector(online, activesel.ReferenceCache(tmp_path / "cache"), keep=KEEP, id_key=2)
    with pytest.raises(ValueError, match=f"{ROWS - ROWS // 2}"):
        strict(rows)
    assert strict.step == 0  # the call that failed did not count


def test_a_cache_of_losses_stands_for_the_reference(tmp_path):
    online, reference = nn.Linear(6, 3), nn.Linear(6, 3)
    rows = (torch.randn(ROWS, 6), torch.randint(3, (ROWS,)), torch.arange(ROWS))
    cache = activesel.write_cache(tmp_path / "cache", reference, [rows])
    fresh = Selector(online, reference, keep=KEEP)
    cached = Selector(online, cache, keep=KEEP, id_key=2)
    assert torch.equal(fresh(rows)[2], (cached(rows), cached.kept_ids)[1])
    easy = Selector(reference=cache, keep=KEEP, method="easy", id_key=2)
    easy(rows)
    losses = activesel.score(online=activesel.Forward(reference, rows[0]), targets=rows[1])
    assert torch.equal(easy.last.scores, -losses)
    with pytest.raises(ValueError, match="loss must be the reference cache's, 'softmax'"):
        Selector(online, cache, keep=KEEP, id_key=2, loss="sigmoid")


# --------------------------------------------------------------------------------------- bad input


def test_bad_input(tmp_path):
    class Cache:
        kind, loss, miss = "embeddings", None, "error"

        def lookup(self, ids, compute=None):
            raise AssertionError

    linear = nn.Linear(6, 3)
    for arguments, message in (
        (dict(online=Dual(), reference=linear), "both have forward_pairs"),
        (dict(online=linear, reference=linear, chunks=2), "chunks must be None unless"),
        (dict(online=Dual(), reference=Dual(), chunks=13), r"chunks must be in \[1, keep=12\]"),
        (dict(online=Dual(), reference=Dual(), chunks=0), "chunks must be in"),
        (dict(online=Dual(), reference=Dual(), label_smoothing=0.1), "classes only"),
        (dict(online=Dual(), reference=Dual(), loss="dot"), "loss must be"),
        (dict(online=Dual(), reference=Cache()), "id_key must be given"),
        (dict(online=Cache(), reference=Dual()), "a cache cannot be trained"),
        (
            dict(online=Dual(), reference=Cache(), id_key=2, train_reference=True,
                 reference_optimizer=object()),
            "a cache cannot be trained",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Selector(keep=KEEP, **arguments)
    sel = Selector(Dual(), Dual(), keep=KEEP, id_key=5)
    with pytest.raises(ValueError, match="batch must be a tuple with id_key 5"):
        sel(batch())
