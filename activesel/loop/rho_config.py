# SPDX-License-Identifier: Apache-2.0
"""All that fixes a run by RHO-LOSS's protocol: equal configurations give equal weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

from activesel.loop import records

FASHION_MNIST = "fashion-mnist"
METHODS = {"uniform": "uniform", "train-loss": "hard", "rho": "rho_loss"}
"""The selector's method by that of the protocol."""

CHOICES = {
    "method": tuple(METHODS),
    "schedule": ("decayed", "constant"),
    "selection_mode": ("eval", "train"),
}
SIZES = ("updates", "keep", "width", "checks")


def known_data(data: str) -> None:
    """ValueError unless `data` is a name or a folder."""
    if data != FASHION_MNIST and not Path(data).is_dir():
        raise ValueError(
            f'data must be "{FASHION_MNIST}", or a folder with the binary files of CIFAR-10 or '
            f"CIFAR-100, got {data!r}"
        )


def _at_least(names: tuple[str, ...], config: object) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


@dataclass(frozen=True)
class RhoConfig:
    """One run by RHO-LOSS's protocol: keep the `keep` rows of each super-batch that score highest.

    Half of the training rows (even numbers) is trained on; the other half is for the model whose
    losses cannot be reduced (the irreducible losses), of the same architecture.

    Attributes:
        method: "uniform"; "train-loss", highest loss first; "rho", highest loss minus irreducible
            loss first. Uniform too keeps some of each super-batch.
        data: "fashion-mnist", or a folder with the binary files of CIFAR-10 or CIFAR-100.
        updates: optimizer steps of the learner.
        super_batch, keep: rows drawn and kept per update.
        noise: share of wrong labels in either half.
        seed: of labels, order, initial weights and uniform's choice.
        width: of the learner; 64 is ResNet-18.
        schedule: "decayed", the learning rate falls to zero over the run's own updates (cosine);
            "constant", as published.
        selection_mode: the mode of the learner while it scores: "eval"; or "train", as published,
            where BatchNorm sees the super-batch, and its running averages follow it.
        lr, weight_decay: of AdamW, torch's defaults as published.
        warmup: updates to reach `lr`; none as published.
        reference_width, reference_updates, reference_keep, reference_lr: of the irreducible-loss
            model; its learning rate decays.
        reference_augment: it learns from shifted and mirrored images, as published for CIFAR-10.
        reference_checks: of its checkpoints, the one with the lowest loss on the training half
            counts.
        evaluations: points of the accuracy curve; all but the last use `quick` test rows.
    """

    loop: ClassVar[str] = "rho"

    method: Literal["uniform", "train-loss", "rho"] = "rho"
    data: str = FASHION_MNIST
    updates: int = 1200
    super_batch: int = 320
    keep: int = 32
    noise: float = 0.1
    seed: int = 0
    width: int = 8
    schedule: Literal["decayed", "constant"] = "decayed"
    selection_mode: Literal["eval", "train"] = "eval"
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 0
    reference_width: int = 8
    reference_updates: int = 900
    reference_keep: int = 128
    reference_lr: float = 1e-3
    reference_augment: bool = False
    reference_checks: int = 3
    evaluations: int = 12
    quick: int = 2000

    def __post_init__(self) -> None:
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                known = ", ".join(values)
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        known_data(self.data)
        theirs = (f"reference_{name}" for name in SIZES)
        _at_least((*SIZES[:3], "evaluations", "quick", *theirs), self)
        if self.super_batch < self.keep:
            raise ValueError(
                f"super_batch must be at least keep={self.keep}, got {self.super_batch}"
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be in [0, 1], got {self.noise}")
        if self.method == "uniform":  # scores nothing: else equal runs had two names
            object.__setattr__(self, "selection_mode", "eval")
        if self.method != "rho":
            for field in fields(self):
                if field.name.startswith("reference_"):
                    object.__setattr__(self, field.name, field.default)

    @property
    def name(self) -> str:
        """Readable and unique."""
        head = f"rholoss-{self.method}-u{self.updates}-{self.schedule}-s{self.seed}"
        return f"{head}-{records.digest(asdict(self))}"

    @property
    def reference(self) -> IrreducibleConfig | None:
        """The model to be trained before this run, if any."""
        if self.method != "rho":
            return None
        shared = ("data", "noise", "seed", "weight_decay")
        theirs = ("width", "updates", "keep", "lr", "augment", "checks")
        return IrreducibleConfig(
            **{name: getattr(self, name) for name in shared},
            **{name: getattr(self, f"reference_{name}") for name in theirs},
        )


@dataclass(frozen=True)
class IrreducibleConfig:
    """The model trained on the held-out half, and its losses on the training half."""

    loop: ClassVar[str] = "rho"
    reference: ClassVar[None] = None

    data: str = FASHION_MNIST
    updates: int = 900
    keep: int = 128
    noise: float = 0.1
    seed: int = 0
    width: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 0
    augment: bool = False
    checks: int = 3

    def __post_init__(self) -> None:
        known_data(self.data)
        _at_least(SIZES, self)

    @property
    def name(self) -> str:
        return f"irreducible-s{self.seed}-{records.digest(asdict(self))}"
