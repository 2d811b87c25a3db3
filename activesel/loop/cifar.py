# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 from their standard binary files, in a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Layout:
    """One data set's files: records of label bytes, the last of them used, then the pixels."""

    folder: str
    train: tuple[str, ...]
    test: str
    labels: tuple[int, ...]  # classes of each label byte

    @property
    def classes(self) -> int:
        return self.labels[-1]

    @property
    def record(self) -> int:
        """Bytes per image."""
        return len(self.labels) + PIXELS


LAYOUTS = {
    "cifar-10": Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        (10,),
    ),
    "cifar-100": Layout("cifar-100-binary", ("train.bin",), "test.bin", (20, 100)),
}


@dataclass(frozen=True)
class Images:
    """Training and test images, with their true classes."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64
    test_images: Tensor  # [M, C, H, W] uint8
    test_labels: Tensor  # [M] int64
    classes: int


def find(folder: Path) -> tuple[str, Path]:
    """Which of the two data sets `folder` or a folder right below it holds, and where.

    Raises:
        ValueError: neither or both are there, or a file of one is missing.
    """
    places = [folder, *(folder / layout.folder for layout in LAYOUTS.values())]
    found = [
        (name, place)
        for place in places
        for name, layout in LAYOUTS.items()
        if (place / layout.test).is_file() or (place / layout.train[0]).is_file()
    ]
    if len(found) != 1:
        known = "; ".join(
            f"{', '.join((*layout.train, layout.test))} ({name}, binary version)"
            for name, layout in LAYOUTS.items()
        )
        got = " and ".join(str(place) for _, place in found) or "neither"
        raise ValueError(f"{folder} must hold the files of one data set: {known}; got {got}")
    name, place = found[0]
    layout = LAYOUTS[name]
    missing = [file for file in (*layout.train, layout.test) if not (place / file).is_file()]
    if missing:
        raise ValueError(f"{place} must hold all files of {name}, missing: {', '.join(missing)}")
    return name, place


def cifar(folder: Path) -> Images:
    """CIFAR-10 (10 classes) or CIFAR-100 (its 100 fine classes).

    Files may hold fewer images than the official ones, but only whole ones.

    Args:
        folder: with the binary files, or with `cifar-10-batches-bin` or `cifar-100-binary`.

    Raises:
        ValueError: see `find`; a file of a wrong size, or with labels out of range.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    name, place = find(folder)
    layout = LAYOUTS[name]
    parts = [_read(place / file, layout) for file in layout.train]
    images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    return Images(images, labels, *_read(place / layout.test, layout), layout.classes)


def _read(file: Path, layout: Layout) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64."""
    content, size = np.fromfile(file, np.uint8), layout.record
    if not len(content) or len(content) % size:
        raise ValueError(
            f"{file} must have a multiple of {size:,} bytes ({len(layout.labels)} label and"
            f" {PIXELS:,} pixel bytes an image), got {len(content):,}"
        )
    rows = content.reshape(-1, size)
    for position, classes in enumerate(layout.labels):
        most = int(rows[:, position].max())
        if most >= classes:
            raise ValueError(
                f"{file} must have labels in 0..{classes - 1} at byte {position} of every record,"
                f" got {most} in record {int(rows[:, position].argmax())}"
            )
    skip = len(layout.labels)
    pixels = np.ascontiguousarray(rows[:, skip:]).reshape(-1, 3, SIDE, SIDE)
    return torch.from_numpy(pixels), torch.from_numpy(rows[:, skip - 1].astype(np.int64))
