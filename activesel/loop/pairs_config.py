# SPDX-License-Identifier: Apache-2.0
"""The methods for image-text pairs by name, and all that fixes a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from activesel.loop import records

Method = Literal[
    "uniform", "hard", "easy", "activeclip", "activesiglip", "independent", "jest", "jest-easy",
    "flexi-jest", "jest++", "jest-pool", "jest-emoji",
]  # fmt: skip
Part = Literal["clean", "pool", "emoji", "++"]
Loss = Literal["sigmoid", "softmax"]
Subset = Literal["full", "demo", "tiny"]


@dataclass(frozen=True)
class Recipe:
    """How a method selects, and with which models.

    Attributes:
        selector: the selector's method.
        how: rows one by one by "dot" (-scale z.t), or by the contrastive loss itself, "single"
            (in one chunk, rows are still independent) or "joint".
        online: its own small scorer, or the learner at its coarse patch size.
        reference: the pairs its reference is trained on: the clean set, the mixed pool, the clean
            set's emoji, or the clean set and what a first reference ranks best in the pool.
        loss: the only one this method has; None leaves it to the config.
        flexi: half of the rows kept are trained on at the coarse patch size.
    """

    selector: Literal["uniform", "hard", "easy", "learnability"]
    how: Literal["dot", "single", "joint"] = "joint"
    online: Literal["scorer", "coarse"] | None = None
    reference: Part | None = None
    loss: Loss | None = None
    flexi: bool = False


RECIPES: dict[str, Recipe] = {
    "uniform": Recipe("uniform"),
    "hard": Recipe("hard", "dot", online="scorer"),
    "easy": Recipe("easy", "dot", reference="clean"),
    "activeclip": Recipe("learnability", "dot", "scorer", "clean", loss="softmax"),
    "activesiglip": Recipe("learnability", "dot", "scorer", "clean", loss="sigmoid"),
    "independent": Recipe("learnability", "single", "scorer", "clean"),
    "jest": Recipe("learnability", "joint", "scorer", "clean"),
    "jest-easy": Recipe("easy", "joint", reference="clean"),
    "flexi-jest": Recipe("learnability", "joint", "coarse", "clean", flexi=True),
    "jest++": Recipe("learnability", "joint", "scorer", "++"),
    "jest-pool": Recipe("learnability", "joint", "scorer", "pool"),
    "jest-emoji": Recipe("learnability", "joint", "scorer", "emoji"),
}


@dataclass(frozen=True)
class PairsConfig:
    """One training run, complete: the same config gives the same weights.

    Attributes:
        method: a key of `RECIPES`.
        rho: super-batch over kept rows, 1 / (1 - f); 1 for uniform, whatever is given.
        temperature: of the softmax sampling.
        chunks: of joint selection; methods that choose rows one by one ignore it.
        loss: contrastive loss of the learner, the scorers and joint selection; activeclip is
            always softmax, activesiglip always sigmoid.
        online: "recipe" leaves the online scorer to the method; "learner" scores with the learner
            itself, as it is trained.
        updates: optimizer steps of the learner; the cosine schedule ends at zero after them.
        keep: rows per update of the learner.
        seed: of data, order, initial weights and selection.
        subset, mix, noise: of the data, see `icons`.
        rows: "ui" leaves emoji out of the pool and of the test rows; always so for jest-emoji.
        learner, scorer: names of `DualEncoder` sizes.
        patch, scorer_patch: sides in pixels of the learner's and the scorers' patches.
        coarse: side of flexi-jest's other patches.
        lr, scorer_lr, online_lr: peak learning rates of learner, reference and online scorer,
            reached after `warmup` updates.
        reference_updates: optimizer steps of a reference, `keep` rows each.
        joined: rows of the pool that jest++ adds to the clean set, over the size of that.
        evaluations: points of the curve.
        compare_every: updates between two comparisons of joint with independent picks.
    """

    loop: ClassVar[str] = "contrastive"

    method: Method = "jest"
    rho: int = 5
    temperature: float = 1.0
    chunks: int = 16
    loss: Loss = "sigmoid"
    online: Literal["recipe", "learner"] = "recipe"
    updates: int = 1000
    keep: int = 256
    seed: int = 0
    subset: Subset = "demo"
    mix: tuple[float, float, float] = (0.2, 0.5, 0.3)
    noise: float = 0.0
    rows: Literal["all", "ui"] = "all"
    learner: str = "micro"
    scorer: str = "nano"
    patch: int = 8
    scorer_patch: int = 8
    coarse: int = 16
    lr: float = 2e-3
    scorer_lr: float = 4e-3
    online_lr: float = 4e-3
    weight_decay: float = 0.01
    warmup: int = 50
    reference_updates: int = 1000
    joined: float = 2.0
    evaluations: int = 6
    compare_every: int = 50

    def __post_init__(self) -> None:
        if self.method not in RECIPES:
            raise ValueError(f"method must be one of {', '.join(RECIPES)}, got {self.method!r}")
        positive = ("rho", "chunks", "updates", "keep", "reference_updates", "evaluations")
        for name in (*positive, "compare_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be {' or '.join(values)}, got {getattr(self, name)!r}"
                )
        for name in ("temperature", "joined"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.chunks > self.keep:
            raise ValueError(f"chunks must be at most keep={self.keep}, got {self.chunks}")
        object.__setattr__(self, "mix", tuple(self.mix))
        fixed: dict[str, Any] = {"loss": self.recipe.loss} if self.recipe.loss else {}
        if self.recipe.online != "scorer":
            fixed["online"] = "recipe"
        if self.method == "uniform":
            fixed |= {"rho": 1, "temperature": 1.0}
        if self.method == "jest-emoji":
            fixed["rows"] = "ui"
        for name, value in fixed.items():
            object.__setattr__(self, name, value)

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.method]

    @property
    def super_batch(self) -> int:
        """Rows drawn per update."""
        return self.rho * self.keep

    @property
    def picks(self) -> int | None:
        """`chunks` of the selector: None chooses rows one by one, by dot products."""
        return {"dot": None, "single": 1, "joint": self.chunks}[self.recipe.how]

    @property
    def name(self) -> str:
        """Readable and unique: the usual suspects in clear, everything in the digest."""
        head = f"{self.method}-u{self.updates}-r{self.rho}-s{self.seed}"
        return f"{head}-{records.digest(asdict(self))}"

    @property
    def reference(self) -> PairsReference | None:
        """The reference to be trained before this run, if any."""
        if self.recipe.reference is None:
            return None
        names = (
            "loss", "updates", "keep", "seed", "subset", "mix", "noise", "scorer", "scorer_patch",
            "weight_decay", "warmup", "joined",
        )  # fmt: skip
        shared = {name: getattr(self, name) for name in names}
        shared |= {"updates": self.reference_updates, "lr": self.scorer_lr}
        return PairsReference(part=self.recipe.reference, **shared)


CHOICES = {
    "loss": ("sigmoid", "softmax"),
    "online": ("recipe", "learner"),
    "rows": ("all", "ui"),
    "subset": ("full", "demo", "tiny"),
}


@dataclass(frozen=True)
class PairsReference:
    """One reference scorer, trained before any run; its fields are as in `PairsConfig`."""

    loop: ClassVar[str] = "contrastive"

    part: Part = "clean"
    loss: Loss = "sigmoid"
    updates: int = 1000
    keep: int = 256
    seed: int = 0
    subset: Subset = "demo"
    mix: tuple[float, float, float] = (0.2, 0.5, 0.3)
    noise: float = 0.0
    scorer: str = "nano"
    scorer_patch: int = 8
    lr: float = 4e-3
    weight_decay: float = 0.01
    warmup: int = 50
    joined: float = 2.0

    def __post_init__(self) -> None:
        if self.part != "++":  # else equal references would have several names
            object.__setattr__(self, "joined", 0.0)

    @property
    def name(self) -> str:
        return f"reference-{self.part}-s{self.seed}-{records.digest(asdict(self))}"

    @property
    def reference(self) -> PairsReference | None:
        """The first reference, which ranks the pool for this one."""
        if self.part != "++":
            return None
        first = {**asdict(self), "part": "clean"}
        return PairsReference(**first)
