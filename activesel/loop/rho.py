# SPDX-License-Identifier: Apache-2.0
"""RHO-LOSS's protocol: keep 32 rows of 320, with the losses of a model trained on other rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel.cache import ReferenceCache, write_cache
from activesel.ledger import TRAIN, Ledger, forward_flops, selection_flops
from activesel.loop import cifar, data, records, training
from activesel.loop.evaluate import accuracy
from activesel.loop.labelled import LabelledTrainer
from activesel.loop.resnet import ResNet
from activesel.loop.rho_config import FASHION_MNIST, METHODS, IrreducibleConfig, RhoConfig
from activesel.selector import Selector

SHIFT = 4  # pixels at most, of an augmented image


@dataclass(frozen=True)
class Halves(data.Split):
    """Even rows to train on, odd rows held out, clean test rows, and what models need to know."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def prepare(configs: Sequence[RhoConfig]) -> None:
    """Fetch or check what is needed of the data; better once than by every worker."""
    for name in dict.fromkeys(config.data for config in configs):
        data.locate() if name == FASHION_MNIST else cifar.find(Path(name))


@lru_cache(maxsize=1)
def _images(name: str) -> cifar.Images:
    if name != FASHION_MNIST:
        return cifar.cifar(Path(name))
    folder = data.locate()
    return cifar.Images(
        images=data.read_images(folder, "train"),
        labels=data.read_labels(folder, "train"),
        test_images=data.read_images(folder, "t10k"),
        test_labels=data.read_labels(folder, "t10k"),
        classes=data.CLASSES,
    )


def split(name: str, noise: float, seed: int) -> Halves:
    """Rows of even and of odd numbers, a share `noise` of the labels of either half wrong.

    Args:
        name: as `RhoConfig.data`.
        noise: in [0, 1].
        seed: which labels are wrong, and how.
    """
    whole = _images(name)
    halves = []
    for first in (0, 1):
        labels = whole.labels[first::2]
        noisy, wrong = data.symmetric_noise(labels, noise, whole.classes, 2 * seed + first)
        halves.append(data.Labelled(whole.images[first::2], noisy, wrong))
    clean = torch.zeros(len(whole.test_labels), dtype=torch.bool)
    test = data.Labelled(whole.test_images, whole.test_labels, clean)
    pixels = halves[0].images.transpose(0, 1).flatten(1)
    spread = [torch.std_mean(channel.float() / 255) for channel in pixels]
    std, mean = (tuple(float(x) for x in both) for both in zip(*spread, strict=True))
    return Halves(halves[0], halves[1], test, whole.classes, mean, std)


def build(width: int, rows: Halves, seed: int) -> ResNet:
    """A fresh model whose weights depend on the seed alone."""
    channels = rows.train.images.shape[1]
    with training.seeded(seed):
        return ResNet(width, channels=channels, classes=rows.classes, mean=rows.mean, std=rows.std)


def augmented(
    images: Tensor,  # [B, C, H, W]
    seed: int,
) -> Tensor:  # [B, C, H, W]
    """Each image shifted by up to `SHIFT` pixels either way, zeros beyond, and maybe mirrored.

    >>> augmented(torch.ones(2, 1, 8, 8), seed=0).shape
    torch.Size([2, 1, 8, 8])
    """
    generator = torch.Generator().manual_seed(seed)
    b, _, h, w = images.shape
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, b, 1), generator=generator)
    mirror = torch.rand(b, 1, generator=generator) < 0.5
    column = torch.arange(w).expand(b, w)
    column = torch.where(mirror, w - 1 - column, column) + right
    row = torch.arange(h) + down
    padded = F.pad(images, (SHIFT,) * 4)
    return padded[torch.arange(b)[:, None, None], :, row[:, :, None], column[:, None, :]].permute(
        0, 3, 1, 2
    )


def reference(
    config: IrreducibleConfig,
    out: Path,
    rows: Halves | None = None,
    device: str = "cpu",
) -> tuple[ReferenceCache, dict[str, Any]]:
    """Train the irreducible-loss model and score the training half, or load what `out` holds.

    Of `config.checks` checkpoints, the one with the lowest loss on the training half is scored.

    Returns:
        The losses by row number, and a record: test accuracy, FLOPs, seconds.
    """
    folder = out / config.name
    record, table = folder / "reference.json", folder / "losses"
    if record.is_file():
        return ReferenceCache(table, device=device), records.read_json(record)
    rows = rows or split(config.data, config.noise, config.seed)
    held, half = rows.holdout, rows.train
    model = build(config.width, rows, records.seed(config.seed, "irreducible")).to(device)
    optimizer = training.adamw(model, config.lr, config.weight_decay)
    order, clock = records.seed(config.seed, "irreducible order"), training.Clock()
    checks = {round(i * config.updates / config.checks) for i in range(1, config.checks + 1)}
    best: dict[str, Tensor] = {}
    losses: list[float] = []
    with clock:
        for step in range(config.updates):
            index = data.draw(step, config.keep, len(held), order)
            images = held.images[index]
            if config.augment:
                images = augmented(images, records.seed(config.seed, "augment", str(step)))
            training.anneal([optimizer], config, step)
            logits = model(images.to(device))
            training.descend(optimizer, F.cross_entropy(logits, held.labels[index].to(device)))
            if step + 1 in checks:
                losses.append(_loss(model, half, device))
                if losses[-1] == min(losses):
                    best = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(best)
    folder.mkdir(parents=True, exist_ok=True)
    with clock:
        cache = write_cache(table, model, [(half.images, half.labels)], overwrite=True)
    forward = forward_flops(model, tuple(half.images.shape[1:]))
    entry = {
        "config": asdict(config),
        "accuracy": accuracy(model, rows.test.images, rows.test.labels).overall,
        "losses": losses,
        "flops": forward * (config.updates * config.keep * TRAIN + len(losses) * len(half)),
        "flops_table": forward * len(half),
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in best.items()}
    records.write_tensors(folder / "model.safetensors", tensors)
    records.write_json(record, entry)
    return ReferenceCache(table, device=device) if device != "cpu" else cache, entry


def _loss(model: ResNet, rows: data.Labelled, device: str) -> float:
    """Mean cross-entropy in evaluation mode."""
    model.eval()
    with torch.no_grad():
        parts = zip(rows.images.split(500), rows.labels.split(500), strict=True)
        total = sum(
            F.cross_entropy(model(x.to(device)), y.to(device), reduction="sum") for x, y in parts
        )
    model.train()
    return float(total) / len(rows)


class Trainer(LabelledTrainer):
    """One run: learner and selector; `counts` say how often each row was drawn and kept."""

    def __init__(
        self,
        config: RhoConfig,
        rows: Halves,
        losses: ReferenceCache | None = None,
        once: Ledger | None = None,
        device: str = "cpu",
    ) -> None:
        self.rows, self.test = rows.train, rows.test
        learner = build(config.width, rows, records.seed(config.seed, "learner"))
        super().__init__(config, {"learner": learner}, {"learner": config.lr}, device)
        self.learner = learner

        def as_published(images: Tensor) -> Tensor:  # logits; no module, so nothing is put back
            return learner(images)

        scores = config.method != "uniform"
        self.selector = Selector(
            (as_published if config.selection_mode == "train" else learner) if scores else None,
            losses,
            keep=config.keep,
            method=METHODS[config.method],  # type: ignore[arg-type]
            temperature=0.0 if scores else 1.0,
            seed=records.seed(config.seed, "selection"),
            id_key=2,
        )
        self._order = records.seed(config.seed, "order")
        self.counts = self.fresh_counts()
        forward = forward_flops(learner, tuple(self.rows.images.shape[1:]))
        self.per_update = Ledger(
            learner=config.keep * TRAIN * forward,
            scoring_online=config.super_batch * forward if scores else 0.0,
            selection=selection_flops(config.super_batch, rows.classes, int(scores)),
        )
        self.once = once or Ledger()

    def choose(self) -> tuple[Any, Any]:
        config = self.config
        index = data.draw(self.step, config.super_batch, len(self.rows), self._order)
        kept = self.selector(self.place(self.rows.images[index], self.rows.labels[index], index))
        return index, (*kept, self.selector.kept_ids)

    def count(self, batch: Any, kept: Any) -> None:
        self.tally(batch, kept[2])

    def learn(self, kept: Any) -> None:
        images, labels, _ = kept
        (optimizer,) = self.optimizers.values()
        if self.config.schedule == "constant":
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]
        training.descend(optimizer, F.cross_entropy(self.learner(images), labels))


def run(
    config: RhoConfig,
    out: Path,
    rows: Halves | None = None,
    checkpoint_every: int = 200,
    on_update: Callable[[Trainer], object] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train from the last checkpoint, or from the start, to the end; a finished run is just read.

    Args:
        config: the run.
        out: folder of all runs; this one writes `run.json`, `run.csv` and `kept.safetensors` (how
            often each training row was drawn and kept) into `<out>/<config.name>/`.
        rows: the data; what the config names if not given.
        checkpoint_every: updates between checkpoints.
        on_update: called after every update; what it raises interrupts the run.
        device: where to train.

    Returns:
        The content of `run.json`.

    Raises:
        ValueError: a damaged checkpoint or one of another config; damaged data.
    """
    folder = out / config.name
    if (folder / "run.json").is_file():
        return records.read_json(folder / "run.json")
    rows = rows or split(config.data, config.noise, config.seed)
    losses, entry, once = None, None, Ledger()
    if config.reference is not None:
        losses, entry = reference(config.reference, out, rows, device)
        once = Ledger(reference_training=entry["flops"], scoring_reference=entry["flops_table"])
    trainer = Trainer(config, rows, losses, once, device)
    curve = training.train(trainer, folder, checkpoint_every, on_update)
    more = {"rows": len(rows.train), "reference": entry}
    return training.finish(trainer, folder, curve, trainer.result(folder) | more)
