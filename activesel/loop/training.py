# SPDX-License-Identifier: Apache-2.0
"""What every loop does the same way: the schedule, the clock, exact resume, references."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from activesel.ledger import Ledger
from activesel.loop import data, records
from activesel.selector import Selector

SCALARS = 10.0


class Schedule(Protocol):
    """What training takes from a config, of a run or of a reference."""

    @property
    def name(self) -> str: ...
    @property
    def updates(self) -> int: ...
    @property
    def keep(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def seed(self) -> int: ...


def cosine(step: int, updates: int, warmup: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, cosine to zero at `updates`.

    >>> [round(cosine(step, 100, 10), 3) for step in (0, 9, 50, 99)]
    [0.1, 0.98, 0.5, 0.0]
    """
    decay = 0.5 * (1 + math.cos(math.pi * step / updates))
    return decay * min(1.0, (step + 1) / max(warmup, 1))


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for `anneal`, which needs to know the peak learning rate.

    Single numbers (a contrastive loss's scale and bias) get `SCALARS` times that rate and no decay:
    in runs as short as these they would hardly move otherwise.
    """
    scalars = [p for p in model.parameters() if p.numel() == 1]
    rest = [p for p in model.parameters() if p.numel() > 1]
    groups: list[dict[str, Any]] = [{"params": rest, "initial_lr": lr}]
    if scalars:
        groups.append({"params": scalars, "initial_lr": SCALARS * lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def anneal(optimizers: Iterable[torch.optim.Optimizer], config: Schedule, step: int) -> None:
    """Set the learning rates of `step`."""
    share = cosine(step, config.updates, config.warmup)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step down the gradient of `loss`."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generator starts from `seed`; outside it is as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Clock:
    """Wall and process seconds spent inside its `with` blocks, added up."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc: object) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else work still under way would not be counted
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu


def fit(
    model: nn.Module,
    config: Schedule,
    rows: int,
    loss: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Train a reference: `config.updates` steps on `loss(index)`, epoch after epoch of `rows`.

    Returns:
        The seconds it took.
    """
    optimizer = adamw(model, config.lr, config.weight_decay)
    order, clock = records.seed(config.seed, "reference order"), Clock()
    with clock:
        for step in range(config.updates):
            anneal([optimizer], config, step)
            descend(optimizer, loss(data.draw(step, config.keep, rows, order)))
    return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds}


class Trainer(ABC):
    """Models, optimizers and selector of one run, with everything needed to stop and go on.

    Args:
        config: a frozen dataclass.
        models: those this run trains: "learner", and perhaps "online" and "reference".
        rates: peak learning rates by model.
        device: where models are and batches go; the data stays in host memory.

    Attributes:
        counts: what was kept so far, tensors of a fixed shape.
    """

    config: Any
    selector: Selector
    counts: dict[str, Tensor]
    per_update: Ledger
    once: Ledger

    def __init__(
        self,
        config: Any,
        models: Mapping[str, nn.Module],
        rates: Mapping[str, float],
        device: str | torch.device = "cpu",
    ) -> None:
        self.config, self.step, self.clock = config, 0, Clock()
        self.device = torch.device(device)
        self.models = {name: model.to(self.device) for name, model in models.items()}
        self.optimizers = {
            name: adamw(model, rates[name], config.weight_decay) for name, model in models.items()
        }

    def place(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """A batch on the device of the models."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    @property
    def ledger(self) -> Ledger:
        """FLOPs so far; a reference trained beforehand counts in full from the start."""
        return self.once + self.per_update * self.step

    def update(self) -> None:
        """Draw a super-batch, keep some of it, train the learner and the scorers on that."""
        with self.clock:
            batch, kept = self.choose()
        self.count(batch, kept)
        with self.clock:
            anneal(self.optimizers.values(), self.config, self.step)
            self.learn(kept)
            self.step += 1

    @abstractmethod
    def choose(self) -> tuple[Any, Any]:
        """The super-batch of this step, and what is kept of it."""

    @abstractmethod
    def count(self, batch: Any, kept: Any) -> None:
        """Add to `counts`, before any model has learned from this batch; not timed."""

    @abstractmethod
    def learn(self, kept: Any) -> None:
        """One step of every model that is trained."""

    @abstractmethod
    def measure(self, last: bool) -> dict[str, float]:
        """What a point of the curve holds beside the costs."""

    def point(self, measured: Mapping[str, float]) -> dict[str, float]:
        """One row of the curve."""
        return {
            "update": self.step,
            **measured,
            "seconds": self.clock.seconds,
            "cpu_seconds": self.clock.cpu_seconds,
            **{f"flops_{name}": value for name, value in asdict(self.ledger).items()},
            "flops_total": self.ledger.total,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "step": self.step,
            "counts": {name: value.clone() for name, value in self.counts.items()},
            "clock": [self.clock.seconds, self.clock.cpu_seconds],
            "learner": self.models["learner"].state_dict(),
            "optimizer": self.optimizers["learner"].state_dict(),
            "selector": self.selector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; it must come from the same config."""
        if state["config"] != asdict(self.config):
            raise ValueError(f"state must be of {self.config}, got {state['config']}")
        self.step, self.counts = state["step"], state["counts"]
        self.clock.seconds, self.clock.cpu_seconds = state["clock"]
        self.models["learner"].load_state_dict(state["learner"])
        self.optimizers["learner"].load_state_dict(state["optimizer"])
        self.selector.load_state_dict(state["selector"])


def train(
    trainer: Trainer,
    folder: Path,
    checkpoint_every: int,
    on_update: Callable[[Any], object] | None,
) -> list[dict[str, float]]:
    """From the last checkpoint in `folder`, or from the start, to the end of the schedule.

    Returns:
        The curve, `config.evaluations` points; the last is the end.

    Raises:
        ValueError: a damaged checkpoint or one of another config.
    """
    updates, evaluations = trainer.config.updates, trainer.config.evaluations
    points = {round(i * updates / evaluations) for i in range(evaluations + 1)}
    curve: list[dict[str, float]] = []
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.is_file():
        state = records.read_checkpoint(checkpoint)
        trainer.load_state_dict(state["trainer"])
        curve = state["curve"]
    folder.mkdir(parents=True, exist_ok=True)
    while trainer.step < updates:
        trainer.update()
        last = trainer.step == updates
        if trainer.step in points:
            curve.append(trainer.point(trainer.measure(last)))
        if trainer.step % checkpoint_every == 0 and not last:
            records.write_checkpoint(checkpoint, {"trainer": trainer.state_dict(), "curve": curve})
        if on_update is not None:
            on_update(trainer)
    return curve


def finish(
    trainer: Trainer, folder: Path, curve: list[dict[str, float]], result: dict[str, Any]
) -> dict[str, Any]:
    """Write the record of a run, completed by what all records have, and drop the checkpoint.

    Returns:
        The content of `run.json`.
    """
    record = {
        "schema": records.SCHEMA,
        "name": trainer.config.name,
        "config": asdict(trainer.config),
        "environment": records.environment(),
        **result,
        "ledger": {**asdict(trainer.ledger), "total": trainer.ledger.total},
        "seconds": trainer.clock.seconds,
        "cpu_seconds": trainer.clock.cpu_seconds,
        "curve": curve,
    }
    records.write_csv(folder / "run.csv", curve)
    records.write_json(folder / "run.json", record)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return records.read_json(folder / "run.json")  # where a tuple is a list
