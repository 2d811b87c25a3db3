# SPDX-License-Identifier: Apache-2.0
"""Reference-system time: seconds per row of every model, taken in turn on one machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from activesel import Forward, score, select
from activesel.joint import joint_select
from activesel.ledger import Cost, Ledger, charge
from activesel.loop import data, icons, pairs_cost, training
from activesel.loop.config import Config
from activesel.loop.pairs_config import PairsConfig
from activesel.models import SIZES, TEXT_SIZES, contrastive_loss, vit
from activesel.operands import Pairs, untouched
from activesel.selector import NEEDS
from bench import common
from bench.common import Row, Scale

ROUNDS: dict[Scale, int] = {"smoke": 5, "full": 40, "gpu": 100}
LIMIT: dict[Scale, float] = {"smoke": 8.0, "full": 120.0, "gpu": 60.0}
"""Seconds after which no further round begins, of which there are three at least."""
TINY = 1324
"""Vocabulary of the pairs' tiny subset, whose seeds differ a little; the others' is full."""
SAME = ("python", "torch", "machine", "cpu", "cores", "kernels")
"""What machines share whose seconds stand for each other's; on a GPU, its name too."""
Run = Callable[[Callable[[], object]], object]


@dataclass(frozen=True)
class Part:
    """What is timed as one.

    Attributes:
        kind: "step" of a model in training, "forward" of a scorer, pixels to losses (classes) or
            embeddings (pairs), or "selection" among rows whose losses or embeddings are there.
        loop, model, patch: whose; with pairs, selection depends on the scorer's width.
        shape: width, depth and heads of the model, image tower first.
        rows: at a time.
        keep, method: of selection.
        vocabulary: of pairs.
    """

    kind: str
    loop: str
    model: str
    patch: int
    shape: str
    rows: int
    keep: int = 0
    method: str = ""
    vocabulary: int = 0

    def __str__(self) -> str:
        said = f"{self.kind} of {self.rows} rows, {self.loop}: {self.model or self.method}"
        return f"{said}, patch {self.patch}" if self.patch else said


def parts(config: Any) -> dict[str, Part]:
    """What a run is made of: "learner" and "training" steps, "online" and "reference", "selection".

    >>> found = parts(Config(method="easy", keep=64, rho=4))
    >>> {name: (part.model, part.rows) for name, part in found.items()}  # doctest: +ELLIPSIS
    {'learner': ('mini', 64), 'reference': ('nano', 256), 'training': ('nano', 64), ...}
    """
    pairs, recipe, drawn = config.loop == "contrastive", config.recipe, config.super_batch
    who = "learner" if recipe.online and config.online == "learner" else recipe.online
    if who == "coarse":
        raise ValueError(f"method must be one whose models have one patch, got {config.method!r}")
    patch = {"learner": config.patch, "scorer": config.scorer_patch if pairs else config.patch}
    words = 0 if not pairs else TINY if config.subset == "tiny" else icons.WORDS + 2

    def part(kind: str, name: str, rows: int, **more: Any) -> Part:
        size = str(getattr(config, name))
        towers = [SIZES[size], TEXT_SIZES[size]] if pairs else [SIZES[size]]
        shape = ", ".join("/".join(map(str, tower)) for tower in towers)
        return Part(kind, config.loop, size, patch[name], shape, rows, vocabulary=words, **more)

    found = {"learner": part("step", "learner", config.keep)}
    if who:
        found["online"] = part("forward", who, drawn)
    if recipe.reference:
        found["reference"] = part("forward", "scorer", drawn)
    if recipe.reference or who == "scorer":
        found["training"] = part("step", "scorer", config.keep)
    if recipe.selector == "uniform":
        return found
    if pairs:
        method = f"{recipe.how} {recipe.selector}"
        return found | {
            "selection": part("selection", "scorer", drawn, keep=config.keep, method=method)
        }
    chosen = Part("selection", config.loop, "", 0, "", drawn, config.keep, recipe.selector)
    return found | {"selection": chosen}


def rows(config: Any, pool: int = 0) -> tuple[Ledger, Ledger]:
    """Rows through each line of a run, of all its updates, and of its reference once.

    As the loops' FLOPs are charged: every row drawn is scored afresh by the reference, even where
    the run looked it up. `pool` is how many a reference ranks that is trained on the best of them.
    """
    made, kept, drawn = parts(config), config.keep, config.super_batch
    learnt = drawn if getattr(config, "online_rows", "kept") == "drawn" else kept
    scorer = config.recipe.online == "scorer" and config.online != "learner"
    each = Ledger(
        learner=kept,
        scoring_online=drawn * ("online" in made),
        scoring_reference=drawn * ("reference" in made),
        online_training=learnt * scorer,
        reference_training=drawn * (config.recipe.reference == "beside"),
        selection=drawn * ("selection" in made),
    )
    once, trained = Ledger(), config.reference
    while trained is not None:
        trained, this = trained.reference, Ledger(reference_training=trained.updates * trained.keep)
        once += this + Ledger(scoring_reference=pool if trained is not None else 0)
    return each * config.updates, once


class Clock:
    """Seconds per row, from the content of a clock's file.

    Raises:
        ValueError: not the content of a clock's file; something of `configs` was not timed.
    """

    def __init__(self, content: Row, configs: Sequence[Any] = ()) -> None:
        self.content = content
        names = [f.name for f in fields(Part)]
        try:
            self._rows = {Part(**{n: row[n] for n in names}): row for row in content["rows"]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"clock must be a file of this command, got no {error}") from error
        missing = sorted(str(p) for p in needed(configs) if p not in self._rows)
        if missing:
            raise ValueError(
                f"clock must hold all that the runs are made of, got none of {missing[0]}; "
                f"{len(missing)} missing in all: measure it again"
            )

    def _made(self, run: Row) -> tuple[Any, dict[str, Row]]:
        config = (PairsConfig if "recall" in run else Config)(**run["config"])
        return config, {name: self._rows[part] for name, part in parts(config).items()}

    def f_ratio(self, run: Row) -> float | None:
        """Seconds of a row in the costlier scorer over those of the learner's forward pass."""
        _, made = self._made(run)
        scorers = [made[who]["seconds"] for who in ("online", "reference") if who in made]
        return max(scorers) / made["learner"]["forward"] if scorers else None

    def spent(self, run: Row) -> tuple[Ledger, Ledger]:
        """Seconds of a run's updates, line by line, and of its reference once; from its record."""
        config, made = self._made(run)

        def cost(forward: str, step: str) -> Cost:
            f, s = (made[name]["seconds"] if name in made else 0.0 for name in (forward, step))
            return Cost(f, max(s - f, 0.0))

        costs = cost("", "learner"), cost("online", "training"), cost("reference", "training")
        selection = made["selection"]["seconds"] if "selection" in made else 0.0
        updates, once = (
            charge(part, *costs, selection=selection)
            for part in rows(config, sum(run.get("pool", {}).values()))
        )
        return updates, once

    @property
    def shares(self) -> list[Row]:
        """Rows of the steps, which hold the forward pass's share of each."""
        return [row for row in self.content["rows"] if row["kind"] == "step"]


def needed(configs: Sequence[Any]) -> dict[Part, Any]:
    """Every part of these runs once, and a run that it is of."""
    return {part: config for config in configs for part in parts(config).values()}


def measured(path: Path, configs: Sequence[Any], scale: Scale, device: str = "cpu") -> Clock:
    """The clock at `path` (without suffix) if it is this machine's and whole, else a new one.

    Args:
        path: where `path`.json and `path`.csv are read or written.
        configs: runs whose parts are timed.
        scale: says how many rounds, and stands in the file.
        device: where the runs train.
    """
    if device == "cuda":
        torch.cuda.init()  # else the machine would not be said to have a GPU
    head, same = common.header(), (*SAME, *(["gpu"] if device == "cuda" else []))
    if (file := path.with_name(f"{path.name}.json")).is_file():
        try:
            content = common.read(file)
            alike = all(content["machine"].get(n) == head["machine"].get(n) for n in same)
            if alike and content["device"] == device:
                return Clock(content, configs)
        except (ValueError, KeyError, TypeError):
            pass  # of another version, or of fewer models
    timed = measure(needed(configs), ROUNDS[scale], device, LIMIT[scale])
    content = {**head, "scale": scale, "device": device, "rows": timed}
    common.write(path, content, timed)
    return Clock(json.loads(json.dumps(content)), configs)


def measure(
    those: dict[Part, Any], rounds: int, device: str = "cpu", limit: float = np.inf
) -> list[Row]:
    """Seconds of a row in each part, medians of rounds in which all parts take turns.

    Turns, so that what slows the machine down for a while slows all alike; and, on a CPU, seconds
    of the process on one thread, so that waiting for the processor does not count. Drawing rows and
    fetching them is in none of the parts.

    Returns:
        A row per part: `seconds`, `p20`, `p80`, of `rounds` rounds; of a step also `forward`,
        `backward`, `optimizer`, `share` = forward / (forward + backward) and `share_step` =
        forward / (forward + backward + optimizer).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with training.seeded(0):
            runs = {
                part: _run(part, config, torch.device(device)) for part, config in those.items()
            }
            laps: dict[Part, list[list[float]]] = {part: [] for part in runs}
            stop = time.monotonic() + limit
            for number in range(rounds + 1):
                if number > 3 and time.monotonic() > stop:
                    break
                for part, run in runs.items():
                    taken = _laps(run, device)
                    if number:  # the first call sets up
                        laps[part].append(taken)
    finally:
        torch.set_num_threads(threads)
    return [_row(part, np.array(taken) / part.rows) for part, taken in laps.items()]


def _row(part: Part, laps: np.ndarray[Any, Any]) -> Row:
    low, seconds, high = np.quantile(laps.sum(1), (0.2, 0.5, 0.8)).tolist()
    row = {**asdict(part), "seconds": seconds, "p20": low, "p80": high, "rounds": len(laps)}
    if part.kind != "step":
        return row
    forward, backward, optimizer = np.median(laps, 0).tolist()
    return {
        **row,
        **{"forward": forward, "backward": backward, "optimizer": optimizer},
        "share": forward / (forward + backward),
        "share_step": forward / (forward + backward + optimizer),
    }


def _laps(run: Run, device: str) -> list[float]:
    stamps: list[float] = []

    def lap() -> None:
        if device == "cpu":
            stamps.append(time.process_time())
        else:
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    lap()
    run(lap)
    return np.diff(stamps).tolist()


def _run(part: Part, config: Any, device: torch.device) -> Run:
    """The part as the loops run it, on rows of their shapes."""
    n, pairs = part.rows, part.loop == "contrastive"
    side = pairs_cost.SIDE if pairs else 28
    images = torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8, device=device)
    targets = torch.randint(
        0,
        part.vocabulary if pairs else data.CLASSES,
        (n, icons.LENGTH) if pairs else (n,),
        device=device,
    )
    if part.kind == "selection":
        return _selection(config, (images, targets, torch.arange(n, device=device)))
    if pairs:
        model: Any = pairs_cost.build(part.model, part.patch, part.vocabulary)
    else:
        model = vit(
            part.model,
            image_size=side,
            patch=part.patch,
            channels=1,
            classes=data.CLASSES,
            mean=data.MEAN,
            std=data.STD,
        )
    model.to(device)

    def forward(lap: Callable[[], object]) -> None:
        if pairs:
            with untouched(model):
                model.forward_pairs(images, targets)
        else:
            score(online=Forward(model, images), targets=targets)
        lap()

    optimizer = training.adamw(model, 1e-5, 0.01)

    def step(lap: Callable[[], object]) -> None:
        if pairs:
            loss = contrastive_loss(model.forward_pairs(images, targets), config.loss)
        else:
            loss = F.cross_entropy(model(images), targets)
        lap()
        optimizer.zero_grad()
        loss.backward()
        lap()
        optimizer.step()
        lap()

    return step if part.kind == "step" else forward


def _selection(config: Any, batch: tuple[Tensor, ...]) -> Run:
    """From losses or embeddings of the models that the method compares to the rows kept."""
    pairs, n, device = config.loop == "contrastive", len(batch[0]), batch[0].device

    def said() -> Any:
        if not pairs:
            return torch.rand(n, device=device)
        shape = n, TEXT_SIZES[config.scorer][0]
        image, text = (F.normalize(torch.randn(shape, device=device), dim=1) for _ in range(2))
        return Pairs(image, text, 10.0, -5.0)

    sides = ("online", "reference")
    given: Any = {
        s: said() for s, use in zip(sides, NEEDS[config.recipe.selector], strict=True) if use
    }
    shared = {"k": config.keep, "temperature": config.temperature, "seed": 0, **given}

    def run(lap: Callable[[], object]) -> None:
        if pairs and config.picks is not None:
            picked = joint_select(chunks=config.picks, loss=config.loss, **shared)
        else:
            picked = select(loss="dot" if pairs else "softmax", **shared)
        picked.take(batch)
        lap()

    return run
