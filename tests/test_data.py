# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: found, checked, noised; and what is said when it is missing or damaged."""

import gzip
import hashlib
import os
import shutil

import pytest
import torch

from activesel.loop import data


@pytest.fixture(scope="module")
def real():
    """Folder of the real files, fetched if there is a way."""
    return data.locate()


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without data, package manager or network; returns its empty cache."""
    monkeypatch.delenv("ACTIVESEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(data, "OFFICIAL", "http://127.0.0.1:9")
    return tmp_path / "cache" / "activesel" / "fashion-mnist"


def everything_under(folder):
    return [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names]


def test_real_data_has_its_published_shape():
    split = data.fashion_mnist(noise=0.1, seed=3)
    assert [len(part) for part in (split.train, split.holdout, split.test)] == [
        50_000,
        10_000,
        10_000,
    ]
    assert split.train.images.shape == (50_000, 1, 28, 28)
    assert split.train.images.dtype == torch.uint8 and split.train.labels.dtype == torch.int64
    pixels = torch.cat([split.train.images, split.holdout.images]).double() / 255
    assert float(pixels.mean()) == pytest.approx(data.MEAN, abs=1e-4)
    assert float(pixels.std()) == pytest.approx(data.STD, abs=1e-4)
    assert split.train.mislabelled.sum() == 5_000 and split.holdout.mislabelled.sum() == 1_000
    assert not split.test.mislabelled.any()
    clean = data.fashion_mnist()
    assert not clean.train.mislabelled.any()
    assert torch.equal(clean.train.images, split.train.images), "the cut never changes"
    assert torch.equal(clean.train.labels != split.train.labels, split.train.mislabelled)
    assert torch.equal(clean.holdout.labels != split.holdout.labels, split.holdout.mislabelled)
    assert torch.bincount(torch.cat([clean.train.labels, clean.holdout.labels])).eq(6000).all()


def test_noise_has_the_right_rate_and_never_the_same_class():
    labels = torch.arange(10).repeat(2_000)
    noisy, wrong = data.symmetric_noise(labels, 0.3, 10, seed=1)
    assert wrong.sum() == 6_000
    assert torch.equal(noisy != labels, wrong), "a wrong label is never the right one"
    assert noisy.min() == 0 and noisy.max() == 9
    shift = torch.bincount((noisy - labels)[wrong] % 10, minlength=10)[1:].double()
    chi2 = float(((shift - 6_000 / 9) ** 2 / (6_000 / 9)).sum())
    assert chi2 < 26.1, "the other classes are equally likely (99.9 % of chi-squared with 8 df)"


def test_noise_is_deterministic_and_leaves_its_input_alone():
    labels = torch.arange(1_000) % 10
    before = labels.clone()
    once, again, other = (data.symmetric_noise(labels, 0.2, 10, seed) for seed in (5, 5, 6))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1], again[1])
    assert not torch.equal(once[1], other[1])
    assert torch.equal(labels, before)
    state = torch.random.get_rng_state()
    data.symmetric_noise(labels, 0.2, 10, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("share, classes", [(-0.1, 10), (1.1, 10), (float("nan"), 10), (0.1, 1)])
def test_noise_out_of_range_is_refused(share, classes):
    with pytest.raises(ValueError, match=r"share must|classes must"):
        data.symmetric_noise(torch.zeros(4, dtype=torch.int64), share, classes, seed=0)


@pytest.mark.parametrize("rows, size", [(100, 10), (103, 10), (64, 64)])
def test_an_epoch_holds_every_row_once_and_depends_on_the_step_alone(rows, size):
    steps = rows // size
    drawn = [data.draw(step, size, rows, seed=4) for step in range(2 * steps)]
    for epoch in (drawn[:steps], drawn[steps:]):
        assert len(torch.cat(epoch).unique()) == steps * size
    assert not torch.equal(torch.cat(drawn[:steps]), torch.cat(drawn[steps:]))
    assert torch.equal(data.draw(steps, size, rows, seed=4), drawn[steps])
    assert not torch.equal(data.draw(0, size, rows, seed=5), drawn[0])


def test_nothing_works_and_the_message_says_what_would(nowhere):
    with pytest.raises(FileNotFoundError) as error:
        data.locate()
    text = str(error.value)
    for way in ("(1) set ACTIVESEL_DATA", "(2) apt-get install", "(3) download", str(nowhere)):
        assert way in text
    assert "debian: no apt-get" in text and "official:" in text, "what was tried, and why it failed"
    assert everything_under(nowhere.parent) == []


def test_a_given_folder_is_believed_but_must_be_complete(nowhere, monkeypatch, tmp_path, real):
    monkeypatch.setenv("ACTIVESEL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="missing: train-images-idx3-ubyte"):
        data.locate()
    monkeypatch.setenv("ACTIVESEL_DATA", str(real))
    assert data.locate() == real


def test_fetched_files_are_checked_and_cached(nowhere, monkeypatch, real):
    monkeypatch.setattr(data, "OFFICIAL", real.as_uri())
    assert data.locate() == nowhere
    assert sorted(f.name for f in nowhere.iterdir()) == sorted(f"{name}.gz" for name in data.FILES)
    assert os.listdir(nowhere.parent) == [nowhere.name], "no temporary folder stays"
    monkeypatch.setattr(data, "OFFICIAL", "http://127.0.0.1:9")
    assert data.locate() == nowhere, "the second time needs no network"


@pytest.mark.parametrize("how", ["truncated", "other bytes"])
def test_a_corrupt_download_is_refused_and_nothing_written(
    nowhere, monkeypatch, tmp_path, real, how
):
    mirror = tmp_path / "mirror"
    shutil.copytree(real, mirror)
    victim = mirror / "t10k-labels-idx1-ubyte.gz"
    content = victim.read_bytes()
    os.chmod(victim, 0o644)
    victim.write_bytes(content[:-100] if how == "truncated" else gzip.compress(b"something else"))
    monkeypatch.setattr(data, "OFFICIAL", mirror.as_uri())
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz must unpack to SHA-256 0402a9"):
        data.locate()
    assert everything_under(nowhere.parent) == []


def test_a_damaged_copy_is_refused_by_name_with_both_hashes(monkeypatch, tmp_path, real):
    for name in data.FILES:
        os.symlink(real / f"{name}.gz", tmp_path / f"{name}.gz")
    victim = tmp_path / "train-labels-idx1-ubyte.gz"
    labels = bytearray(gzip.decompress(victim.read_bytes()))
    labels[-1] ^= 1
    victim.unlink()
    victim.write_bytes(gzip.compress(bytes(labels)))
    monkeypatch.setenv("ACTIVESEL_DATA", str(tmp_path))
    with pytest.raises(ValueError) as error:
        data.fashion_mnist()
    text = str(error.value)
    assert str(victim) in text and data.FILES["train-labels-idx1-ubyte"] in text
    assert hashlib.sha256(bytes(labels)).hexdigest() in text
