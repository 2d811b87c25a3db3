# SPDX-License-Identifier: Apache-2.0
"""Train a classifier on selected rows of Fashion-MNIST: `python -m activesel.loop.classify`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel.ledger import TRAIN, Ledger, forward_flops, selection_flops
from activesel.loop import data, records, training
from activesel.loop.config import Config, ReferenceConfig
from activesel.loop.evaluate import accuracy
from activesel.loop.labelled import LabelledTrainer
from activesel.models import ViT, load, save, vit
from activesel.selector import Selector


def prepare(configs: Sequence[Config]) -> None:
    """Fetch what is missing of the data; better once than by every worker."""
    data.locate()


def _build(size: str, patch: int, seed: int) -> ViT:
    """A fresh model whose weights depend on the seed alone; torch's own generator is untouched."""
    with training.seeded(seed):
        return vit(
            size,
            image_size=28,
            patch=patch,
            channels=1,
            classes=data.CLASSES,
            mean=data.MEAN,
            std=data.STD,
        )


def reference(
    config: ReferenceConfig,
    out: Path,
    split: data.Split | None = None,
    device: str = "cpu",
) -> tuple[ViT, dict[str, Any]]:
    """Train a reference scorer, or load it if `out` holds it already.

    Returns:
        The model, and its record: test accuracy, FLOPs, seconds.
    """
    folder = out / config.name
    weights, record = folder / "model.safetensors", folder / "reference.json"
    if record.is_file():
        return load(weights).to(device), records.read_json(record)
    split = split or data.fashion_mnist(config.noise, config.seed)
    rows = split.train if config.part == "train" else split.holdout
    model = _build(config.scorer, config.patch, records.seed(config.seed, "reference", config.part))
    model.to(device)
    smoothing = config.label_smoothing

    def loss(index: Tensor) -> Tensor:
        images, labels = rows.images[index].to(device), rows.labels[index].to(device)
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

    spent = training.fit(model, config, len(rows), loss)
    forward = forward_flops(model, tuple(rows.images.shape[1:]))
    entry = {
        "config": asdict(config),
        "accuracy": accuracy(model, split.test.images, split.test.labels).overall,
        "flops": config.updates * config.keep * TRAIN * forward,
        **spent,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save(model, weights)
    records.write_json(record, entry)
    return model, entry


class Trainer(LabelledTrainer):
    """One run: learner, scorers and selector; `counts` say how often each row was.

    Attributes:
        average: running average of the online scorer, if that is what scores.
    """

    def __init__(
        self,
        config: Config,
        split: data.Split,
        reference: ViT | None,
        reference_flops: float = 0.0,
        device: str = "cpu",
    ) -> None:
        recipe, seed = config.recipe, config.seed
        self.rows, self.test = split.train, split.test
        models = {"learner": _build(config.learner, config.patch, records.seed(seed, "learner"))}
        online: ViT | None = models["learner"] if recipe.online == "learner" else None
        if recipe.online == "scorer":
            online = models["online"] = _build(
                config.scorer, config.patch, records.seed(seed, "online")
            )
        if recipe.reference == "beside":
            reference = models["reference"] = _build(
                config.scorer, config.patch, records.seed(seed, "beside")
            )
        rates = {
            "learner": config.lr,
            "online": config.online_lr,
            "reference": 2 * config.online_lr,
        }
        super().__init__(config, models, rates, device)
        self.learner = models["learner"]
        self.average = copy.deepcopy(models["online"]) if config.online_average else None
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
        self.counts = self.fresh_counts()
        self.per_update = self._price(online, reference)
        self.once = Ledger(reference_training=reference_flops)

    def _price(self, online: ViT | None, reference: ViT | None) -> Ledger:
        """FLOPs of one update, line by line."""
        keep, drawn = self.config.keep, self.config.super_batch
        learnt = drawn if self.config.online_rows == "drawn" else keep  # by the online scorer
        shape = tuple(self.rows.images.shape[1:])
        costs = {
            name: forward_flops(model, shape) if model is not None else 0.0
            for name, model in (("online", online), ("reference", reference))
        }
        return Ledger(
            learner=keep * TRAIN * forward_flops(self.learner, shape),
            scoring_online=drawn * costs["online"],
            scoring_reference=drawn * costs["reference"],
            online_training=learnt * TRAIN * costs["online"] if "online" in self.models else 0.0,
            reference_training=(
                drawn * TRAIN * costs["reference"] if "reference" in self.models else 0.0
            ),
            selection=selection_flops(
                drawn, data.CLASSES, (online is not None) + (reference is not None)
            ),
        )

    def choose(self) -> tuple[Any, Any]:
        index = data.draw(self.step, self.config.super_batch, len(self.rows), self._order)
        batch = self.place(self.rows.images[index], self.rows.labels[index], index)
        self._drawn = batch
        if self.average is None:
            return batch, self.selector(batch)
        self.selector.online = self.average  # scores; what `update` trains are the weights
        try:
            return batch, self.selector(batch)
        finally:
            self.selector.online = self.models["online"]

    def count(self, batch: Any, kept: Any) -> None:
        self.tally(batch[2], kept[2])

    def learn(self, kept: Any) -> None:
        config = self.config
        images, labels, _ = kept
        logits = self.learner(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        training.descend(self.optimizers["learner"], loss)
        if "online" not in self.models:
            return
        if config.distil:  # the learner's opinion of these rows costs nothing more
            taught = F.one_hot(labels, data.CLASSES).float()
            kept = (images, taught.lerp(logits.detach().float().softmax(1), config.distil))
        self.selector.update(self._drawn if config.online_rows == "drawn" else kept)
        if self.average is not None:
            with torch.no_grad():
                mean, now = self.average.parameters(), self.models["online"].parameters()
                torch._foreach_lerp_(list(mean), list(now), 1 - config.online_average)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | ({"average": self.average.state_dict()} if self.average else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def run(
    config: Config,
    out: Path,
    split: data.Split | None = None,
    checkpoint_every: int = 500,
    on_update: Callable[[Trainer], object] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train from the last checkpoint, or from the start, to the end; a finished run is just read.

    Args:
        config: the run.
        out: folder of all runs; this one writes `run.json`, `run.csv` and `kept.safetensors` (how
            often each training row was drawn and kept) into `<out>/<config.name>/`.
        split: the data; Fashion-MNIST with the config's noise if not given.
        checkpoint_every: updates between checkpoints.
        on_update: called after every update; what it raises interrupts the run.
        device: where to train.

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
        reference(config.reference, out, split, device)
        if config.reference
        else (None, {"flops": 0.0})
    )
    trainer = Trainer(config, split, scorer, entry["flops"], device)
    curve = training.train(trainer, folder, checkpoint_every, on_update)
    spent = {"reference": entry if config.reference else None}
    return training.finish(trainer, folder, curve, trainer.result(folder) | spent)


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
