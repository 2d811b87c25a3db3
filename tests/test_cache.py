# SPDX-License-Identifier: Apache-2.0
"""The reference cache: what comes back is what was scored, and nothing of anything else."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from activesel import Forward, Pairs, Selector, joint_select, score
from activesel.cache import ReferenceCache, write_cache
from activesel.cache_files import fingerprint, row_id

ROWS, SHARD, BATCH = 23, 8, 4
X, Y = torch.randn(ROWS, 5), torch.randint(3, (ROWS,))
IDS = torch.tensor([row_id(f"row {i}") for i in range(ROWS)])


class Encoder(nn.Module):
    """Two linear towers; counts the rows it is given."""

    def __init__(self, width=6, scale=10.0):
        super().__init__()
        self.image, self.text = nn.Linear(5, width), nn.Linear(5, width)
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.seen = 0

    def forward_pairs(self, images, texts):
        self.seen += len(images)
        z, t = self.image(images), self.text(texts)
        one = nn.functional.normalize
        return Pairs(one(z, dim=1), one(t, dim=1), self.scale, -2.0)


class Linear(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


def net(kind):
    torch.manual_seed(1)
    return Linear() if kind == "loss" else Encoder()


def batches(kind, ids=True, rows=ROWS, stop=None, x=X, y=Y, size=BATCH):
    """Dict batches of `size` rows; raises before row `stop`, as a loader that fails would."""
    names = ("inputs", "targets") if kind == "loss" else ("images", "texts")
    y = y if kind == "loss" else x.flip(1)
    for at in range(0, rows, size):
        if stop is not None and at >= stop:
            raise KeyboardInterrupt
        here = slice(at, min(at + size, rows))
        yield dict(zip(names, (x[here], y[here]), strict=True)) | ({"id": IDS[here]} if ids else {})


def write(folder, kind="loss", model=None, data=None, **how):
    how = {"kind": kind, "batch": BATCH, "shard_rows": SHARD} | how
    data = batches(kind) if data is None else data
    return write_cache(folder, model or net(kind), data, **how)


def same(a, b):
    if isinstance(a, Pairs):
        return all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
        )
    return torch.equal(a, b)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["loss", "embeddings"])
def kind(request):
    return request.param


# -------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("keyed", [True, False])
def test_losses_are_those_of_score_bit_for_bit(tmp_path, keyed):
    model = net("loss")
    cache = write(tmp_path, "loss", model, batches("loss", keyed))
    order = torch.randperm(ROWS)
    direct = torch.cat(
        [
            score(online=Forward(model, x), targets=y)
            for x, y in zip(X.split(4), Y.split(4), strict=True)
        ]
    )
    assert torch.equal(cache.lookup(IDS[order] if keyed else order), direct[order])
    assert len(cache) == ROWS and cache.kind == "loss" and cache.loss == "softmax"
    assert len(list(tmp_path.glob("shard-*"))) == 3


def test_sigmoid_losses(tmp_path):
    model, y = net("loss"), nn.functional.one_hot(Y, 3).float()
    cache = write(tmp_path, model=model, data=[(X, y)], loss="sigmoid", batch=ROWS, shard_rows=ROWS)
    direct = score(online=Forward(model, X), targets=y, loss="sigmoid")
    assert torch.equal(cache.lookup(list(range(ROWS))), direct)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_the_models(tmp_path, dtype):
    model = net("embeddings")
    cache = write(tmp_path, "embeddings", model, dtype=dtype)
    order = torch.randperm(ROWS)
    direct = [model.forward_pairs(x, x.flip(1)) for x in X.split(4)]
    image, text = (torch.cat(z).detach()[order] for z in list(zip(*direct, strict=True))[:2])
    found = cache.lookup(IDS[order])
    stored = dtype or torch.float32
    assert torch.equal(found.image, image.to(stored)) and torch.equal(found.text, text.to(stored))
    assert found.scale.item() == 10.0 and found.bias.item() == -2.0


def test_pairs_can_be_strided(tmp_path, host_backend):
    found = write(tmp_path, "embeddings").lookup(IDS)
    whole = Pairs(found.image.contiguous(), found.text.contiguous(), 10.0, -2.0)
    how = {"k": 6, "chunks": 3, "seed": 0, "backend": host_backend}
    a, b = (joint_select(reference=pairs, **how) for pairs in (found, whole))
    assert torch.equal(a.indices, b.indices) and torch.equal(a.scores, b.scores)


@given(data=st.data())
@settings(max_examples=10)
def test_batches_and_shards_do_not_matter(tmp_path_factory, data):
    size, shard, batch = (data.draw(st.integers(1, ROWS + 2)) for _ in range(3))
    folder = tmp_path_factory.mktemp("cache") / "new"
    cache = write(folder, data=batches("loss", size=size), shard_rows=shard, batch=batch)
    direct = score(online=Forward(net("loss"), X), targets=Y)
    torch.testing.assert_close(cache.lookup(IDS), direct)
    assert cache.data == fingerprint({"inputs": X, "targets": Y, "id": IDS})
    assert len(list(folder.glob("shard-*"))) == -(-ROWS // shard)


def test_names_and_arrays_are_ids(tmp_path):
    names = [f"row {i}" for i in range(ROWS)]
    data = [(X.numpy(), Y.numpy(), names)]
    cache = write(tmp_path, data=data)
    expected = cache.lookup(IDS)
    for ids in (names, tuple(names), np.array(names), IDS.numpy(), IDS.tolist()):
        assert torch.equal(cache.lookup(ids), expected)
    assert cache.lookup([]).shape == (0,)
    assert cache.data == fingerprint({"inputs": X, "targets": Y, "id": IDS})


def test_extreme_ids(tmp_path):
    ids = torch.tensor([-(1 << 63), -1, 0, (1 << 63) - 1])
    cache = write(tmp_path, data=[(X[:4], Y[:4], ids.flip(0))])
    expected = score(online=Forward(net("loss"), X[:4]), targets=Y[:4])
    torch.testing.assert_close(cache.lookup(ids), expected.flip(0))


def test_the_model_is_left_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).train()
    before = torch.get_rng_state()
    cache = write(tmp_path, model=model)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(cache.lookup(IDS), score(online=model[0](X), targets=Y))


def test_many_rows_are_found_at_once(tmp_path):
    """65,536 of a million, in several files: a look-up must not cost more than a scorer would."""
    ids = torch.randint(-(1 << 63), (1 << 63) - 1, (1_000_000,)).unique()
    ids = ids[torch.randperm(len(ids))]
    x = torch.stack([torch.arange(len(ids)) % 7.0, torch.zeros(len(ids))], 1)
    y = torch.zeros(len(ids)).long()
    write(tmp_path, model=nn.Identity(), data=[(x, y, ids)], batch=1 << 20, shard_rows=1 << 18)
    cache, rows = ReferenceCache(tmp_path), torch.randint(len(ids), (65_536,))
    asked, seconds = ids[rows], []
    for _ in range(5):
        start = time.process_time()
        found = cache.lookup(asked)
        seconds.append(time.process_time() - start)
    torch.testing.assert_close(found, score(online=x[rows], targets=y[rows]))
    assert min(seconds) < 0.2


def test_selector_takes_a_cache_in_place_of_the_reference(tmp_path):
    online, cache = nn.Linear(5, 3), write(tmp_path)
    rows = torch.arange(3, 19)
    picks = []
    for reference in (cache, net("loss")):
        selector = Selector(online, reference, keep=5, temperature=0.0, id_key=2)
        picks.append((selector((X[rows], Y[rows], IDS[rows])), selector.kept_ids))
    assert torch.equal(picks[0][1], picks[1][1])
    assert torch.equal(picks[0][0][0], picks[1][0][0])


# ------------------------------------------------------------------------------------ interruption


@pytest.mark.parametrize("stop", range(0, ROWS + 1, BATCH))
def test_going_on_after_an_interruption(tmp_path, kind, stop):
    write(tmp_path / "whole", kind)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", kind, data=batches(kind, stop=stop))
    done = sorted(path.name for path in (tmp_path / "cut").glob("*"))
    assert done == [f"shard-{i:05d}.safetensors" for i in range(stop // SHARD)]
    model = net(kind)
    write(tmp_path / "cut", kind, model)
    assert model.seen == ROWS - stop // SHARD * SHARD  # no row is scored twice
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


@pytest.mark.parametrize("at", range(5))
def test_killed_while_writing(tmp_path, monkeypatch, at):
    """Between the temporary file and its name: three shards, ids, index."""
    write(tmp_path / "whole")
    moved, replace = [], __import__("os").replace

    def move(source, target):
        if len(moved) == at:
            raise OSError("no space left")
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", move)
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "cut")
    folder = tmp_path / "cut"
    assert sorted(folder.glob("*")) == sorted(moved), "no partial files"
    with pytest.raises(FileNotFoundError, match="finished cache"):
        ReferenceCache(folder)
    folder.mkdir(exist_ok=True)
    (folder / ".shard-00001.safetensors.7.partial").write_bytes(b"what a killed process leaves")
    write(folder)
    assert content(folder) == content(tmp_path / "whole")


def test_repeating_changes_nothing_and_scores_nothing(tmp_path, kind):
    write(tmp_path, kind)
    before, model = content(tmp_path), net(kind)
    write(tmp_path, kind, model)
    assert content(tmp_path) == before and model.seen == 0


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change, said",
    [
        (dict(model=Linear()), "model"),
        (dict(preprocessing="resize 224"), "preprocessing"),
        (dict(loss="sigmoid"), "loss"),
        (dict(shard_rows=16), "shard_rows"),
        (dict(data=[(X + 1, Y, IDS)]), "data"),
        (dict(data=[(X, (Y + 1) % 3, IDS)]), "data"),
        (dict(data=[(X, Y, IDS.flip(0))]), "data"),
        (dict(data=[(X, Y)]), "data"),
        (dict(data=[(X[:12], Y[:12], IDS[:12])]), "rows"),
        (dict(data=[(X[:16], Y[:16], IDS[:16])]), "less than"),
    ],
)
def test_another_cache_is_never_gone_on_with(tmp_path, finished, change, said):
    if finished:
        write(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, data=batches("loss", stop=20))
    if not finished and said == "less than":
        change = dict(data=[(X[:8], Y[:8], IDS[:8])])
    before = content(tmp_path)
    with pytest.raises(ValueError, match=said):
        write(tmp_path, **change)
    assert content(tmp_path) == before
    cache = write(tmp_path, overwrite=True, **change)
    assert len(cache) == len(change.get("data", [(X,)])[0][0])
    assert len(list(tmp_path.glob("shard-*"))) == -(-len(cache) // change.get("shard_rows", SHARD))


def test_a_data_set_may_say_what_it_is(tmp_path):
    class Data(list):
        fingerprint = "emoji 15.1"

    cache = write(tmp_path, data=Data([(X, Y, IDS)]))
    assert cache.data == "emoji 15.1"
    data = Data([(X, Y, IDS)])
    data.fingerprint = "emoji 16"
    with pytest.raises(ValueError, match=r"data must be 'emoji 16', got 'emoji 15.1'"):
        write(tmp_path, data=data)
    data.fingerprint = 16
    with pytest.raises(TypeError, match="fingerprint must be a str, got int"):
        write(tmp_path, data=data)


# ------------------------------------------------------------------------------------ fingerprints


def test_fingerprints_tell_everything_apart():
    x = torch.arange(4.0)
    different = [
        x, x.double(), x.long(), x.int(), x.view(2, 2), x[:3], x + 1, x.flip(0), x.bfloat16(),
        x.half(), torch.tensor(0.0), torch.zeros(1), torch.zeros(0), {"y": x}, {"x": x, "y": x},
    ]  # fmt: skip
    prints = [fingerprint(value) for value in different]
    assert len(set(prints)) == len(prints)
    assert fingerprint(x[::2]) == fingerprint(x[::2].contiguous()) == fingerprint(x[::2].numpy())
    assert fingerprint({"a": x, "b": x + 1}) == fingerprint({"b": x + 1, "a": x})


def test_fingerprints_and_ids_are_the_same_everywhere():
    """They are stored: a change of either would orphan every cache."""
    assert fingerprint(torch.arange(3)) == "2628c5332ae711483ad33a783125c794"
    assert row_id("") == -0x4B4D868BA85F591C  # b2sum -l 64: e4a6a0577479b2b4
    assert [row_id(key) for key in ("a", "é")] == [3405396810240292928, 3394012004367669963]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_looking_does_not_wait(tmp_path, kind):
    host = write(tmp_path, kind)
    cache = ReferenceCache(tmp_path, device="cuda")
    ids = torch.cat([IDS[:4], torch.tensor([7])])
    on_gpu = ids.cuda()
    cache.lookup(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = cache.lookup(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, host.lookup(IDS[:4]), strict=True):
        assert torch.equal(a[:4].cpu(), b)
    first = found if kind == "loss" else found.image
    assert first[4].isnan().all() and not first[:4].isnan().any()
    with pytest.raises(ValueError, match="got 1 that are not"):
        cache.lookup(ids)
