# SPDX-License-Identifier: Apache-2.0
"""What a reference cache refuses: other fingerprints, damaged files, bad input, missing rows."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cache import IDS, ROWS, Encoder, X, Y, batches, content, kind, net, same, write
from torch import nn

from activesel import Pairs
from activesel.cache import ReferenceCache
from activesel.cache_files import fingerprint

__all__ = ["kind"]  # a fixture


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("what", ["data", "model", "preprocessing"])
def test_fingerprints_must_be_the_stored_ones(tmp_path, what):
    write(tmp_path, preprocessing="none")
    right = {
        "data": fingerprint({"inputs": X, "targets": Y, "id": IDS}),
        "model": fingerprint(net("loss")),
        "preprocessing": "none",
    }
    ReferenceCache(tmp_path, **right)
    with pytest.raises(ValueError, match=f"{what} must be 'another', got '{right[what]}'"):
        ReferenceCache(tmp_path, **right | {what: "another"})


def test_a_model_trained_further_is_another(tmp_path):
    model = net("loss")
    write(tmp_path, model=model)
    ReferenceCache(tmp_path, model=model)
    model.bias.data[0] += 1e-7 + model.bias.data[0].abs() * 1e-6
    with pytest.raises(ValueError, match="model must be"):
        ReferenceCache(tmp_path, model=model)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "ids.safetensors"])
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped", "foreign", "plain"])
def test_damaged_files_refuse(tmp_path, name, how):
    write(tmp_path / "other", data=[(X + 1, Y, IDS)])
    folder = tmp_path / "cache"
    write(folder)
    path, error = folder / name, ValueError
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
        error = FileNotFoundError
    elif how == "foreign":
        shutil.copy(tmp_path / "other" / name, path)
    elif how == "plain":
        save_file(load_file(path), path)
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        path.write_bytes({"truncated": whole[:-3], "empty": b"", "flipped": flipped}[how])
    with pytest.raises(error, match=name):
        ReferenceCache(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "\x00"])
def test_damaged_index_refuses(tmp_path, text):
    write(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json must be the index of a cache"):
        ReferenceCache(tmp_path)


def test_other_format_refuses(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(ValueError, match="format must be 1, got 2"):
        ReferenceCache(tmp_path)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_something_else_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"must be empty or hold a cache, got thesis\.tex"):
        write(tmp_path, overwrite=overwrite)
    assert content(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    "data, how, error, message",
    [
        ([], {}, ValueError, "data must have rows, got 0"),
        ([(X, Y, IDS[[0] * ROWS])], {}, ValueError, "ids must all be different, got 7 again"),
        ([(X, Y, IDS % 20)], {}, ValueError, "ids must all be different"),
        ([(X, Y[:-1])], {}, ValueError, "same length"),
        ([(X, Y), (X, Y, IDS)], {}, ValueError, "ids in all batches or none"),
        ([(X, Y, IDS.float())], {}, TypeError, "ids must be signed integers"),
        ([(X, Y, IDS[:, None])], {}, ValueError, r"ids must be \[B\]"),
        ([{"inputs": X}], {}, ValueError, "with .'inputs', 'targets', 'id'., got dict"),
        ([X], {}, ValueError, "got Tensor"),
        ([(X, Y, IDS, IDS)], {}, ValueError, "got tuple"),
        ([(X.tolist(), Y)], {}, TypeError, "inputs must be a Tensor or an array, got list"),
        ([(X[:9], Y[:9]), (X[:, :4], Y)], {}, ValueError, "inputs must be alike in all batches"),
        ([(X, Y)], {"kind": "logits"}, ValueError, 'kind must be "loss" or "embeddings"'),
        ([(X, Y)], {"loss": "hinge"}, ValueError, "loss must be"),
        ([(X, Y)], {"kind": "embeddings"}, TypeError, "must have forward_pairs, got Linear"),
        ([(X, Y)], {"dtype": torch.float16}, TypeError, "dtype must be a float, for embeddings"),
        ([(X, Y)], {"batch": 0}, ValueError, "must be >= 1, got 0 and 8"),
        ([(X, Y)], {"shard_rows": -1}, ValueError, "must be >= 1, got 4 and -1"),
    ],
)
def test_bad_input(tmp_path, data, how, error, message):
    model = net("loss")
    with pytest.raises(error, match=message):
        write(tmp_path / "cache", model=model, data=data, **how)
    assert not [p for p in tmp_path.rglob("*") if p.name in ("index.json", "ids.safetensors")]
    assert not list(tmp_path.rglob("*.partial"))


def test_embeddings_must_be_normalised_and_of_one_scale(tmp_path):
    model = Encoder()
    model.forward_pairs = lambda x, y: Pairs(x, y, 1.0)
    with pytest.raises(ValueError, match=r"reference\.image must have rows of length 1"):
        write(tmp_path / "a", "embeddings", model)
    one = nn.functional.normalize(torch.ones(4, 2), dim=1)
    scales = iter(range(1, 100))
    model.forward_pairs = lambda x, y: Pairs(one[: len(x)], one[: len(x)], float(next(scales)))
    with pytest.raises(ValueError, match=r"scale must be 1\.0 in all batches, got 2\.0"):
        write(tmp_path / "b", "embeddings", model)
    assert not list(tmp_path.rglob("*"))


# ------------------------------------------------------------------------------------ missing rows


@pytest.mark.parametrize("keyed", [True, False])
def test_missing_ids_refuse(tmp_path, keyed):
    cache = write(tmp_path, data=batches("loss", keyed))
    ids = torch.cat([IDS if keyed else torch.arange(ROWS), torch.tensor([-5, 1 << 40, 23, -5])])
    with pytest.raises(ValueError, match=r"got 3 that are not, the first -5, 1099511627776, 23$"):
        cache.lookup(ids)
    with pytest.raises(ValueError, match="got 3"):  # the policy decides, not the argument
        cache.lookup(ids, lambda at: torch.zeros(len(at)))
    patient = ReferenceCache(tmp_path, miss="compute")
    with pytest.raises(ValueError, match="nothing to compute them with"):
        patient.lookup(ids)
    assert patient.scoring(X, Y) is None


def test_missing_rows_are_computed_once(tmp_path, kind):
    whole = write(tmp_path / "whole", kind)
    write(tmp_path / "part", kind, data=batches(kind, rows=14))
    model = net(kind)
    cache = ReferenceCache(tmp_path / "part", model=model, miss="compute")
    y = Y if kind == "loss" else X.flip(1)
    before = content(tmp_path / "part")
    rows, expected = torch.tensor([20, 3, 20, 15, 0, 15]), [20, 15]
    for again in ([], [16]):
        asked = torch.cat([rows, torch.tensor(again, dtype=torch.int64)])
        found = cache.lookup(IDS[asked], cache.scoring(X[asked], y[asked]))
        for a, b in zip(found, whole.lookup(IDS[asked]), strict=True):
            torch.testing.assert_close(a, b)
        expected += again
        assert model.seen == len(set(expected))
    assert same(cache.lookup(IDS[[20, 1]]), cache.lookup(IDS[[20, 1]], lambda at: 1 / 0))
    assert content(tmp_path / "part") == before


def test_computed_rows_must_fit(tmp_path):
    write(tmp_path / "l")
    write(tmp_path / "e", "embeddings")
    losses, pairs = (ReferenceCache(tmp_path / f, miss="compute") for f in "le")
    z = torch.eye(6)[:1]
    for cache, said, error, message in [
        (losses, torch.zeros(2), ValueError, "must have 1 rows, got 2"),
        (losses, Pairs(z, z, 10.0, -2.0), TypeError, "must be loss, got Pairs"),
        (pairs, torch.zeros(1), TypeError, "must be embeddings, got Tensor"),
        (pairs, Pairs(z, z, 9.0, -2.0), ValueError, r"scale must be 10\.0 in all"),
        (pairs, Pairs(z, z, 10.0, 0.0), ValueError, r"bias must be -2\.0 in all"),
        (pairs, Pairs(z[:, :5], z[:, :5], 10.0, -2.0), ValueError, "must be 6 wide, got 5"),
    ]:
        with pytest.raises(error, match=message):
            cache.lookup([7], lambda at, said=said: said)
        with pytest.raises(ValueError, match="got 1 that are not"):
            cache.lookup([7])  # nothing of it is remembered


@pytest.mark.parametrize(
    "ids, error, message",
    [
        (torch.rand(3), TypeError, "ids must be signed integers or strings, got torch.float32"),
        (torch.zeros(3, dtype=torch.bool), TypeError, "got torch.bool"),
        (np.zeros(3, np.uint64), TypeError, "got torch.uint64"),
        (torch.zeros(3, 1).long(), ValueError, r"ids must be \[B\], got shape \[3, 1\]"),
        (torch.zeros(3, device="meta").long(), RuntimeError, "on the CPU or cpu, got meta"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_bad_ids(tmp_path, ids, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path).lookup(ids)


def test_unknown_policy(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match='miss must be "error" or "compute", got'):
        ReferenceCache(tmp_path, miss="ignore")
