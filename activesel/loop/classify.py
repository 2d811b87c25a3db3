# SPDX-License-Identifier: Apache-2.0
"""Train a classifier on selected rows of Fashion-MNIST: `python -m activesel.loop.classify`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel.ledger import TRAIN, Ledger, forward_flops, selection_flops
from activesel.loop import data, records
from activesel.loop.config import Config, ReferenceConfig
from activesel.loop.evaluate import Accuracy, accuracy
from activesel.models import ViT, load, save, vit
from activesel.selector import Selector


def cosine(step: int, updates: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, cosine to zero at `updates`.

    >>> [round(cosine(step, 100, 10), 3) for step in (0, 9, 50, 99)]
    [0.1, 0.98, 0.5, 0.0]
    """
    decay = 0.5 * (1 + math.cos(math.pi * step / updates))
    return decay * min(1.0, (step + 1) / max(warmup, 1))


def _build(size: str, patch: int, seed: int) -> ViT:
    """A fresh model whose weights depend on the seed alone; torch's own generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return vit(
            size,
            image_size=28,
            patch=patch,
            channels=1,
            classes=data.CLASSES,
            mean=data.MEAN,
            std=data.STD,
        )


def _adamw(model: ViT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)


def _anneal(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = share * group["initial_lr"]


class Clock:
    """Wall and process seconds spent inside its `with` blocks, added up."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu


def reference(config: ReferenceConfig, out: Path, split: data.Split) -> tuple[ViT, dict[str, Any]]:
    """Train a reference scorer, or load it if `out` holds it already.

    Returns:
        The model, and its record: test accuracy, FLOPs, seconds.
    """
    folder = out / config.name
    weights, record = folder / "model.safetensors", folder / "reference.json"
    if record.is_file():
        return load(weights), records.read_json(record)
    rows = split.train if config.part == "train" else split.holdout
    model = _build(config.scorer, config.patch, records.seed(config.seed, "reference", config.part))
    optimizer = _adamw(model, config.lr, config.weight_decay)
    order = records.seed(config.seed, "reference order")
    clock = Clock()
    with clock:
        _anneal_start([optimizer])
        for step in range(config.updates):
            _anneal(optimizer, cosine(step, config.updates, config.warmup))
            index = data.draw(step, config.keep, len(rows), order)
            _train_step(
                model, optimizer, rows.images[index], rows.labels[index], config.label_smoothing
            )
    forward = forward_flops(model, tuple(rows.images.shape[1:]))
    folder.mkdir(parents=True, exist_ok=True)
    save(model, weights)
    entry = {
        "config": asdict(config),
        "accuracy": accuracy(model, split.test.images, split.test.labels).overall,
        "flops": config.updates * config.keep * TRAIN * forward,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
    }
    records.write_json(record, entry)
    return model, entry


def _anneal_start(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]


def _train_step(
    model: ViT,
    optimizer: torch.optim.Optimizer,
    images: Tensor,  # [k, 1, 28, 28] uint8
    labels: Tensor,  # [k] int64
    label_smoothing: float,
) -> None:
    loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


class Trainer:
    """Learner, scorers and selector of one run, with everything needed to stop and go on."""

    def __init__(
        self,
        config: Config,
        split: data.Split,
        reference: ViT | None,
        reference_flops: float = 0.0,
    ) -> None:
        self.config, self.rows = config, split.train
        self.step, self.kept, self.kept_mislabelled = 0, 0, 0
        self.clock = Clock()
        recipe, seed = config.recipe, config.seed
        self.learner = _build(config.learner, config.patch, records.seed(seed, "learner"))
        self.models = {"learner": self.learner}
        online: ViT | None = self.learner if recipe.online == "learner" else None
        if recipe.online == "scorer":
            online = self.models["online"] = _build(
                config.scorer, config.patch, records.seed(seed, "online")
            )
        if recipe.reference == "beside":
            reference = self.models["reference"] = _build(
                config.scorer, config.patch, records.seed(seed, "beside")
            )
        rates = {
            "learner": config.lr,
            "online": config.scorer_lr,
            "reference": 2 * config.scorer_lr,
        }
        self.optimizers = {
            name: _adamw(model, rates[name], config.weight_decay)
            for name, model in self.models.items()
        }
        _anneal_start(list(self.optimizers.values()))
        self.selector = Selector(
            online,
            reference,
            keep=config.keep,
            method=recipe.selector,
            optimizer=self.optimizers.get("online"),
            label_smoothing=config.online_smoothing,
            train_reference=recipe.reference == "beside",
            reference_optimizer=self.optimizers.get("reference"),
            temperature=config.temperature,
            seed=records.seed(seed, "selection"),
        )
        self._order = records.seed(seed, "order")
        self._per_update = self._price(online, reference)
        self._once = Ledger(reference_training=reference_flops)

    def _price(self, online: ViT | None, reference: ViT | None) -> Ledger:
        """FLOPs of one update, line by line."""
        keep, drawn = self.config.keep, self.config.super_batch
        shape = tuple(self.rows.images.shape[1:])
        costs = {
            name: forward_flops(model, shape) if model is not None else 0.0
            for name, model in (("online", online), ("reference", reference))
        }
        return Ledger(
            learner=keep * TRAIN * forward_flops(self.learner, shape),
            scoring_online=drawn * costs["online"],
            scoring_reference=drawn * costs["reference"],
            online_training=keep * TRAIN * costs["online"] if "online" in self.models else 0.0,
            reference_training=(
                drawn * TRAIN * costs["reference"] if "reference" in self.models else 0.0
            ),
            selection=selection_flops(
                drawn, data.CLASSES, (online is not None) + (reference is not None)
            ),
        )

    @property
    def ledger(self) -> Ledger:
        """FLOPs so far; a reference trained beforehand counts in full from the start."""
        return self._once + self._per_update * self.step

    def update(self) -> None:
        """Draw a super-batch, keep some of it, train the learner and the scorers on that."""
        config = self.config
        with self.clock:
            share = cosine(self.step, config.updates, config.warmup)
            for optimizer in self.optimizers.values():
                _anneal(optimizer, share)
            index = data.draw(self.step, config.super_batch, len(self.rows), self._order)
            kept = self.selector((self.rows.images[index], self.rows.labels[index], index))
            images, labels, index = kept
            _train_step(
                self.learner, self.optimizers["learner"], images, labels, config.label_smoothing
            )
            if "online" in self.models:
                self.selector.update(kept)
            self.step += 1
        self.kept += len(index)
        self.kept_mislabelled += int(self.rows.mislabelled[index].sum())

    def point(self, measured: Accuracy) -> dict[str, float]:
        """One row of the curve."""
        return {
            "update": self.step,
            "accuracy": measured.overall,
            "worst_class": measured.worst,
            "kept": self.kept,
            "kept_mislabelled": self.kept_mislabelled,
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            **{f"flops_{name}": value for name, value in asdict(self.ledger).items()},
            "flops_total": self.ledger.total,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "step": self.step,
            "counts": [self.kept, self.kept_mislabelled],
            "clock": [self.clock.seconds, self.clock.cpu_seconds],
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizers["learner"].state_dict(),
            "selector": self.selector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; it must come from the same config."""
        if state["config"] != asdict(self.config):
            raise ValueError(f"state must be of {self.config}, got {state['config']}")
        self.step = state["step"]
        self.kept, self.kept_mislabelled = state["counts"]
        self.clock.seconds, self.clock.cpu_seconds = state["clock"]
        self.learner.load_state_dict(state["learner"])
        self.optimizers["learner"].load_state_dict(state["optimizer"])
        self.selector.load_state_dict(state["selector"])


def run(
    config: Config,
    out: Path,
    split: data.Split | None = None,
    checkpoint_every: int = 500,
    on_update: Callable[[Trainer], object] | None = None,
) -> dict[str, Any]:
    """Train from the last checkpoint, or from the start, to the end; a finished run is just read.

    Args:
        config: the run.
        out: folder of all runs; this one writes `<out>/<config.name>/run.json` and `run.csv`.
        split: the data; Fashion-MNIST with the config's noise if not given.
        checkpoint_every: updates between checkpoints.
        on_update: called after every update; what it raises interrupts the run.

    Returns:
        The content of `run.json`.

    Raises:
        ValueError: a damaged checkpoint or one of another config.
    """
    folder = out / config.name
    if (folder / "run.json").is_file():
        return records.read_json(folder / "run.json")
    split = split or data.fashion_mnist(config.noise, config.seed)
    scorer, entry = (
        reference(config.reference, out, split) if config.reference else (None, {"flops": 0.0})
    )
    trainer = Trainer(config, split, scorer, entry["flops"])
    curve: list[dict[str, float]] = []
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        state = records.read_checkpoint(checkpoint)
        trainer.load_state_dict(state["trainer"])
        curve = state["curve"]
    folder.mkdir(parents=True, exist_ok=True)
    points = {round(i * config.updates / config.evaluations) for i in range(config.evaluations + 1)}
    test = split.test
    while trainer.step < config.updates:
        trainer.update()
        last = trainer.step == config.updates
        if trainer.step in points:
            rows = len(test) if last else config.quick
            measured = accuracy(trainer.learner, test.images[:rows], test.labels[:rows])
            curve.append(trainer.point(measured))
        if trainer.step % checkpoint_every == 0 and not last:
            records.write_checkpoint(checkpoint, {"trainer": trainer.state_dict(), "curve": curve})
        if on_update is not None:
            on_update(trainer)
    result = {
        "schema": records.SCHEMA,
        "name": config.name,
        "config": asdict(config),
        "environment": records.environment(),
        "accuracy": measured.overall,
        "worst_class": measured.worst,
        "by_class": list(measured.by_class),
        "base_rate": float(split.train.mislabelled.double().mean()),
        "kept": trainer.kept,
        "kept_mislabelled": trainer.kept_mislabelled,
        "ledger": {**asdict(trainer.ledger), "total": trainer.ledger.total},
        "seconds": trainer.clock.seconds,
        "cpu_seconds": trainer.clock.cpu_seconds,
        "reference": entry if config.reference else None,
        "curve": curve,
    }
    records.write_csv(folder / "run.csv", curve)
    records.write_json(folder / "run.json", result)
    checkpoint.unlink(missing_ok=True)
    return result


def main() -> None:
    """Command line: every field of `Config`, and the folder to write to."""
    import tyro
    from rich.console import Console
    from rich.progress import Progress

    from activesel.loop import plots

    def command(config: Config, out: Path = Path("runs")) -> None:
        """Train one classifier on selected rows; stop it at any time, the same line goes on."""
        with Progress(transient=True) as progress:
            bar = progress.add_task(config.name, total=config.updates)
            result = run(
                config,
                out,
                on_update=lambda trainer: progress.update(bar, completed=trainer.step),
            )
        folder = out / config.name
        plots.curves({config.method: [result]}, folder / "curves")
        Console().print(
            f"accuracy {result['accuracy']:.4f}, worst class {result['worst_class']:.4f}, "
            f"{result['ledger']['total']:.3g} FLOPs, {result['seconds']:.0f} s; "
            f"{folder}/run.json, run.csv, curves.svg, curves.png"
        )

    tyro.cli(command, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
