# SPDX-License-Identifier: Apache-2.0
"""Fashion-MNIST: find it, check it, split it, make some of its labels wrong."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
MEAN, STD = 0.2860, 0.3530  # of the training pixels, in [0, 1]
HOLDOUT = 10_000
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
OFFICIAL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"

# SHA-256 of the *unpacked* files: Debian ships the same bytes under another gzip header.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


@dataclass(frozen=True)
class Labelled:
    """Images, the labels one trains on, and which of those labels are wrong on purpose."""

    images: Tensor  # [N, 1, 28, 28] uint8
    labels: Tensor  # [N] int64
    mislabelled: Tensor  # [N] bool

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class Split:
    """Training rows, held-out rows (for held-out references only), and clean test rows."""

    train: Labelled
    holdout: Labelled
    test: Labelled


def fashion_mnist(noise: float = 0.0, seed: int = 0) -> Split:
    """Fashion-MNIST with 50,000 training, 10,000 held-out and 10,000 test rows.

    The cut between training and held-out rows never changes; a share `noise` of the labels on
    either side of it does.

    Args:
        noise: share of wrong labels in [0, 1], for training and held-out rows alike.
        seed: which labels are wrong, and how.

    Raises:
        FileNotFoundError: no copy found and none to be had; says what to do.
        ValueError: a damaged copy, or `noise` out of range.

    Source: Xiao, Rasul, Vollgraf 2017 (arXiv 1708.07747); MIT licence.
    """
    folder = locate()
    images, labels = read_images(folder, "train"), read_labels(folder, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = []
    for salt, rows in enumerate((order[HOLDOUT:], order[:HOLDOUT])):
        noisy, wrong = symmetric_noise(labels[rows], noise, CLASSES, 2 * seed + salt)
        parts.append(Labelled(images[rows], noisy, wrong))
    test = read_labels(folder, "t10k")
    clean = Labelled(read_images(folder, "t10k"), test, torch.zeros(len(test), dtype=torch.bool))
    return Split(parts[0], parts[1], clean)


def symmetric_noise(
    labels: Tensor,  # [N] int64 in 0..classes-1
    share: float,
    classes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:  # [N] int64, [N] bool
    """Replace round(share * N) labels, chosen at random, by a uniformly drawn other class.

    Args:
        labels: the true classes.
        share: in [0, 1].
        classes: at least 2.
        seed: the same seed gives the same noise.

    Returns:
        The noisy labels and the mask of the replaced ones.

    Raises:
        ValueError: `share` or `classes` out of range.

    >>> noisy, wrong = symmetric_noise(torch.arange(10) % 5, 0.3, classes=5, seed=0)
    >>> int(wrong.sum()), bool(torch.equal(noisy != torch.arange(10) % 5, wrong))
    (3, True)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    step = torch.randint(1, classes, rows.shape, generator=generator)
    noisy, wrong = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    noisy[rows] = (labels[rows] + step) % classes
    wrong[rows] = True
    return noisy, wrong


def draw(step: int, size: int, rows: int, seed: int) -> Tensor:  # [size] int64
    """Row numbers of super-batch `step`: each epoch is a fresh permutation, its rest dropped.

    A pure function, so that a resumed run reads on exactly where it stopped.

    Args:
        step: number of the super-batch, from 0.
        size: rows per super-batch, in 1..rows.
        rows: rows of the data set.
        seed: names the sequence of permutations.

    Raises:
        ValueError: `size` out of range.

    >>> rows = draw(0, 2, 5, seed=1).tolist() + draw(1, 2, 5, seed=1).tolist()
    >>> len(set(rows))  # within a pass no row comes twice
    4
    """
    if not 1 <= size <= rows:
        raise ValueError(f"size must be in [1, {rows}], got {size}")
    epoch, position = divmod(step, rows // size)
    return _permutation(rows, seed, epoch)[position * size : (position + 1) * size]


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> Tensor:  # [rows] int64
    key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return torch.randperm(rows, generator=generator)


def locate() -> Path:
    """Folder with the four files: $ACTIVESEL_DATA, Debian's, or the cache, filled if need be.

    Raises:
        FileNotFoundError: no copy and no way to fetch one.
        ValueError: a fetched file has another SHA-256 than expected.
    """
    given = os.environ.get("ACTIVESEL_DATA")
    if given:
        missing = [name for name in FILES if not (Path(given) / f"{name}.gz").is_file()]
        if missing:
            raise FileNotFoundError(
                f"ACTIVESEL_DATA={given} must hold {', '.join(f'{name}.gz' for name in FILES)}; "
                f"missing: {', '.join(f'{name}.gz' for name in missing)}"
            )
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(root) / "activesel" / "fashion-mnist"
    for folder in (DEBIAN_FOLDER, cache):
        if all((folder / f"{name}.gz").is_file() for name in FILES):
            return folder
    _fetch(cache)
    return cache


def _fetch(cache: Path) -> None:
    """Fill `cache` by the first way that works; it appears complete and checked, or not at all."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    ways: tuple[Callable[[Path], Path], ...] = (_from_debian, _from_official)
    for way in ways:
        with tempfile.TemporaryDirectory(dir=cache.parent) as temporary:
            try:
                source = way(Path(temporary))
            except (OSError, subprocess.SubprocessError) as error:
                failures.append(f"{way.__name__.removeprefix('_from_')}: {error}")
                continue
            for name in FILES:
                _unpack(source / f"{name}.gz")
            cache.mkdir(exist_ok=True)
            for name in FILES:
                os.replace(source / f"{name}.gz", cache / f"{name}.gz")
            return
    raise FileNotFoundError(
        "Fashion-MNIST is not here and could not be fetched. Any one of these helps: "
        f"(1) set ACTIVESEL_DATA to a folder with {', '.join(f'{name}.gz' for name in FILES)}; "
        f"(2) apt-get install {DEBIAN_PACKAGE}; "
        f"(3) download the four files from {OFFICIAL} into {cache}. "
        f"Tried: {'; '.join(failures)}"
    )


def _from_debian(temporary: Path) -> Path:
    """Download and unpack the Debian package, which takes no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError("no apt-get or dpkg-deb on this machine")

    def call(*command: str) -> None:
        subprocess.run(
            command, cwd=temporary, check=True, capture_output=True, text=True, timeout=300
        )

    call("apt-get", "download", DEBIAN_PACKAGE)
    (package,) = temporary.glob("*.deb")
    call("dpkg-deb", "-x", package.name, "unpacked")
    return temporary / "unpacked" / DEBIAN_FOLDER.relative_to("/")


def _from_official(temporary: Path) -> Path:
    for name in FILES:
        with (
            urllib.request.urlopen(f"{OFFICIAL}/{name}.gz", timeout=60) as response,
            open(temporary / f"{name}.gz", "wb") as file,
        ):
            shutil.copyfileobj(response, file)
    return temporary


def _unpack(path: Path) -> bytes:
    expected = FILES[path.name.removesuffix(".gz")]
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{path} must unpack to SHA-256 {expected}, got: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(f"{path} must unpack to SHA-256 {expected}, got {found}")
    return content


def read_images(folder: Path, part: str) -> Tensor:  # [N, 1, 28, 28] uint8
    content = _unpack(folder / f"{part}-images-idx3-ubyte.gz")
    pixels = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return torch.from_numpy(pixels.copy())


def read_labels(folder: Path, part: str) -> Tensor:  # [N] int64
    content = _unpack(folder / f"{part}-labels-idx1-ubyte.gz")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=8).astype(np.int64))
