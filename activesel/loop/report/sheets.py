# SPDX-License-Identifier: Apache-2.0
"""Contact sheets: the rows that a run kept most and least often of those it drew."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from activesel.loop import data, icon_packages, rho
from activesel.loop.icons import TIERS
from activesel.loop.pairs_config import PairsConfig
from activesel.loop.report.figures import png
from activesel.loop.report.parts import Sheet, Tile
from activesel.loop.report.runs import Group, Run
from activesel.loop.rho_config import FASHION_MNIST
from activesel.loop.sheet import extremes

COUNT = 24  # rows of either extreme
LEAST = 5  # rows drawn less often are left out, where runs are long enough
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MARKS = {"clean": "good", "noisy": "poor", "logo": "bad"}


class Rows(ABC):
    """Pictures of a run's training rows, and what is said beneath them."""

    ids: Tensor  # [N] int64
    images: Tensor  # [N, C, H, W] uint8

    @abstractmethod
    def tile(self, row: int) -> tuple[str, str, str]:
        """Caption, kind and mark."""


class Labelled(Rows):
    def __init__(self, config: dict[str, Any]) -> None:
        name = config.get("data", FASHION_MNIST)
        noisy, clean = (
            rho.split(name, noise, config["seed"]).train
            if "data" in config
            else data.fashion_mnist(noise, config["seed"]).train
            for noise in (config["noise"], 0.0)
        )
        self.images, self.labels, self.wrong = noisy.images, noisy.labels, noisy.mislabelled
        self.truth, self.ids = clean.labels, torch.arange(len(noisy))
        self.names = CLASSES if name == FASHION_MNIST else [f"class {i}" for i in range(100)]

    def tile(self, row: int) -> tuple[str, str, str]:
        label, truth = (self.names[int(labels[row])] for labels in (self.labels, self.truth))
        if self.wrong[row]:
            return f"{label}, truly {truth}", "wrongly labelled", "bad"
        return label, "rightly labelled", "good"


class Icons(Rows):
    def __init__(self, config: dict[str, Any]) -> None:
        from activesel.loop.pairs_reference import pairs_of

        settings = PairsConfig(**config)
        rows = pairs_of(settings).pool
        self.rows = rows.rows(~rows.emoji) if settings.rows == "ui" else rows
        self.images, self.ids = self.rows.images, self.rows.ids
        self.names = {number: name for name, number in TIERS.items()}

    def tile(self, row: int) -> tuple[str, str, str]:
        tier = self.names[int(self.rows.tier[row])]
        return self.rows.captions[row], tier, MARKS[tier]


FRAMES = "Frames: solid for clean pairs and right labels, dashed for noisy pairs, dotted for logos "
FRAMES += "and wrong labels."


def sheets(group: Group) -> tuple[list[Sheet], str]:
    """Both extremes of the first run that counted its rows; if there is none, a line that says why.

    The data must be on this machine already: nothing is fetched.
    """
    if group.uniform:
        return [], f"{group.label}: every row has the same chance, so no sheet."
    pairs = zip(group.runs, group.paths, strict=True)
    run, path = next(((r, p) for r, p in pairs if _counts(p).is_file()), (None, group.paths[0]))
    try:
        if run is None:
            raise FileNotFoundError(f"no {_counts(path).name} beside {path}")
        return _sheets(group.label, run, _counts(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        return [], f"{group.label}: no contact sheet: {error}."


def _counts(path: Path) -> Path:
    return path.with_name("kept.safetensors")


def _sheets(label: str, run: Run, file: Path) -> tuple[list[Sheet], str]:
    counts = load_file(file)
    if not {"ids", "kept", "drawn"} <= set(counts):
        raise ValueError(f"{file} must hold ids, kept and drawn, got {sorted(counts)}")
    rows = _rows(run)
    if not torch.equal(counts["ids"], rows.ids):
        raise ValueError(f"the rows that {file} counted are not those of the data on this machine")
    kept, drawn = counts["kept"], counts["drawn"]
    least = max(1, min(LEAST, int(drawn.double().median())))
    made = []
    for title, index in zip(("most", "least"), extremes(kept, drawn, COUNT, least), strict=True):
        tiles, kinds = [], Counter[str]()
        for row in index.tolist():
            caption, kind, mark = rows.tile(row)
            kinds[kind] += 1
            times = f"{int(kept[row])} of {int(drawn[row])}"
            tiles.append(
                Tile(
                    png(rows.images[row].permute(1, 2, 0).squeeze(2).numpy()),
                    caption,
                    kind,
                    mark,
                    times,
                )
            )
        said = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        made.append(Sheet(f"{label}, kept {title} often: {said}", tiles))
    return made, (
        f"{label}: seed {run['config']['seed']}; of the {int((drawn >= least).sum()):,} rows drawn "
        f"{least} times or more; equals by how often they were drawn, then by chance."
    )


def _rows(run: Run) -> Rows:
    config = run["config"]
    if "subset" in config:
        folder = icon_packages.locate()
        files = [folder / f"{name}.safetensors" for name in (config["subset"], "full")]
        if not any(file.is_file() for file in files):
            raise FileNotFoundError(f"the icons are not on this machine ({files[0]})")
        return Icons(config)
    if config.get("data", FASHION_MNIST) != FASHION_MNIST:
        return Labelled(config)  # a folder, which says itself if it is missing
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(root) / "activesel" / "fashion-mnist"
    given = os.environ.get("ACTIVESEL_DATA")
    if not (given or any((f / f"{n}.gz").is_file() for f in (data.DEBIAN_FOLDER, cache)
                         for n in data.FILES)):  # fmt: skip
        raise FileNotFoundError("Fashion-MNIST is not on this machine")
    return Labelled(config)
