# SPDX-License-Identifier: Apache-2.0
"""`python -m bench ledger`: what selection would cost for a learner and a scorer, three ways."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import activesel
from activesel.ledger import (
    LINES,
    METHODS,
    Cost,
    Plan,
    cost,
    learner_speedup,
    seconds,
    selection_flops,
)
from activesel.ledger.timing import median
from activesel.models import SIZES, vit
from bench import common
from bench.common import Row, Scale

NAME = "ledger"
PRINTED = {("Ti", "B"): 0.0713}
"""Forward cost over the learner's as the ClassAct paper's figures imply it."""


@dataclass(frozen=True)
class Subject:
    """A model by name, shapes and dtypes of a row of its inputs, and its FLOPs."""

    name: str
    model: Callable[..., Any]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    flops: Cost


def subject(name: str, classes: int = 1000, data: bool = False) -> Subject:
    """A model: `Ti`, `B@224/16`, `package.module:factory@3x224x224`, `file.py:name@77:int64`.

    Args:
        name: a size of `activesel.models.SIZES`, with pixels and patch if not 224 and 16; or where
            Python finds a module, or what makes one when called without arguments, and the shapes
            of a row of its inputs, separated by commas, float32 unless said.
        classes: outputs of a named size.
        data: make a named size's weights, so that it can run.

    Raises:
        ValueError: unknown name, which lists the known, or shape. TypeError: no model.
    """
    base, _, at = name.partition("@")
    if ":" in base:
        model, inputs = _imported(base), tuple(_shape(text, name) for text in at.split(","))
    else:
        model, inputs = _named(base, at or "224/16", classes, data)
    return Subject(name, model, inputs, cost(model, *inputs))


def _named(size: str, at: str, classes: int, data: bool) -> tuple[nn.Module, Any]:
    if size not in SIZES:
        raise ValueError(
            f"model must be one of {', '.join(SIZES)}, with @pixels/patch if not @224/16, or a "
            f"Python path such as package.module:factory@3x224x224, got {size!r}"
        )
    try:
        pixels, patch = map(int, at.split("/"))
    except ValueError:
        raise ValueError(f"model must be {size}@pixels/patch, got {size}@{at}") from None
    with torch.device("cpu" if data else "meta"):
        model = vit(size, image_size=pixels, patch=patch, classes=classes)
    return model, (((3, pixels, pixels), torch.float32),)


def _shape(text: str, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    sides, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype) or not all(s.isdigit() for s in sides.split("x")):
        raise ValueError(
            f"model must end with the shapes of a row, as in @3x224x224 or @77:int64, got {name!r}"
        )
    return tuple(map(int, sides.split("x"))), dtype


def _imported(path: str) -> Any:
    where, _, attribute = path.rpartition(":")
    if where.endswith(".py"):
        if not Path(where).is_file():
            raise ValueError(f"model must be in a file that exists, got {where}")
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None:
            raise ValueError(f"model must be in a Python file, got {where}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"model must be in a module that can be imported: {error}") from error
    if not hasattr(module, attribute):
        known = ", ".join(n for n, x in vars(module).items() if callable(x) and n[0] != "_")
        raise ValueError(f"model must be one of {where}'s {known}, got {attribute!r}")
    found = getattr(module, attribute)
    if callable(found) and not isinstance(found, nn.Module):
        found = found()
    if not callable(found):
        raise TypeError(f"{attribute} must be a model or make one, got {type(found).__name__}")
    return found


def columns(plan: Plan) -> list[Row]:
    """The three columns, flat."""
    return [
        {
            "column": column.name,
            "learner_speedup": 1 - plan.beta,
            "compute_speedup": column.compute_speedup,
            "compute_positive": column.compute_positive,
            "beta": plan.beta,
            "beta_max": column.beta_max,
            **{f"beta_max_{name}": column.without(*lines).beta_max for name, lines in WITHOUT},
            **{f"flops_{name}": value for name, value in column.lines.items()},
            "flops_total": column.total,
            "flops_uniform": column.base,
        }
        for column in plan.columns()
    ]


WITHOUT = (
    ("reference_training_free", ("reference_training",)),
    ("online_training_free", ("online_training",)),
    ("both_free", ("reference_training", "online_training")),
)


def command(
    learner: str = "B",
    scorer: str = "Ti",
    scale: Scale = "smoke",
    out: Path | None = None,
    method: str = "classact",
    rho: float = 2.0,
    beta: float = 0.82,
    runs: float = 1.0,
    cached: float | None = None,
    reference: str | None = None,
    classes: int = 1000,
    selection: float | None = None,
    decode: float = 0.0,
    row_bytes: float = 0.0,
    time: bool = False,
    rows: int = 8,
    system: Path | None = None,
) -> None:
    """What selection would cost: as published, computed, and with everything charged.

    Models are names (Ti, or B@224/16 with pixels and patch) or Python paths with the shapes of a
    row (package.module:factory@3x224x224, file.py:name@77:int64).

    Args:
        learner: model to be trained.
        scorer: model, online scorer and reference.
        scale: where to; "full" and "gpu" are committed.
        out: where to, without suffix.
        method: uniform, hard, selective-backprop, easy, classact, classact-ho, classact-online,
            activeclip, rho, jest or flexi-jest (whose scorer is the learner at coarse patches).
        rho: rows drawn per row kept.
        beta: updates needed over uniform's, for the same metric.
        runs: that share one reference; inf leaves its training free.
        cached: rows whose reference scores are computed once and kept, per row of uniform's budget.
        reference: a model, if not the scorer.
        classes: of named models.
        selection: FLOPs to select per row drawn, if not those for logits of so many classes.
        decode: FLOPs to load a row.
        row_bytes: to read a row.
        time: also time the models here, on the CPU.
        rows: of what is timed.
        system: a file written with --time elsewhere; its seconds are charged.
    """
    how = METHODS.get(method, METHODS["uniform"])
    scorers = (how.online is not None) + (how.reference is not None)
    models = [subject(n, classes, time) for n in (learner, scorer, reference or scorer)]
    plan = Plan(
        *(m.flops for m in models),
        method=method,
        rho=rho,
        beta=beta,
        runs=runs,
        cached=cached,
        selection=selection_flops(1, classes, scorers) if selection is None else selection,
        decode=decode,
        ratio=PRINTED.get((scorer, learner)) if reference in (None, scorer) else None,
    )
    table = columns(plan)
    content: Row = {
        **common.header(),
        "scale": scale,
        "learner": learner,
        "scorer": scorer,
        "reference": reference or scorer,
        "method": method,
        "rho": rho,
        "beta": beta,
        "runs": None if math.isinf(runs) else runs,
        "cached": cached,
        "f_ratio": models[1].flops.forward / models[0].flops.forward,
        "forward_flops": [m.flops.forward for m in models],
        "training_flops": [m.flops.train for m in models],
        "rows_read": plan.rows_read,
        "bytes_read": plan.rows_read * row_bytes,
        "rows": table,
    }
    headline = {
        **{name: content[name] for name in ("learner", "scorer", "method", "rho", "beta")},
        "learner_speedup": learner_speedup(beta),
        **{r["column"].replace(" ", "_"): r["compute_speedup"] for r in table},
        "compute_positive": table[-1]["compute_positive"],
        "beta_max": table[-1]["beta_max"],
    }
    if time or system:
        content["seconds"] = wall(plan, recorded(system, content) if system else clock(
            models, classes, rows
        ))  # fmt: skip
        headline["wall_speedup"] = content["seconds"]["wall_speedup"]
    _show(content)
    about = {name: content[name] for name in ("learner", "scorer", "method", "rho", "f_ratio")}
    path = out or common.results(scale, NAME)
    print("written:", *common.write(path, content, [{**about, **row} for row in table]))
    common.result(headline)


def clock(models: list[Subject], classes: int, rows: int) -> Row:
    """Seconds of a row here, on noise: forward and backward of each model, and of selecting."""

    def batch(sides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        make = torch.rand if dtype.is_floating_point else torch.ones
        return make(rows, *sides, dtype=dtype)

    spent = [seconds(m.model, *(batch(*spec) for spec in m.inputs), repeats=3) for m in models]
    logits, targets = torch.randn(256, classes), torch.zeros(256, dtype=torch.int64)

    def select() -> object:
        return activesel.select(online=logits, reference=logits, targets=targets, k=128, seed=0)

    return {
        "forward": [c.forward for c in spent],
        "backward": [c.train - c.forward for c in spent],
        "selection": median(select, 9) / 256,
        "rows": rows,
        "machine": common.header()["machine"],
    }


def recorded(path: Path, content: Row) -> Row:
    """The seconds in a file of another machine, for the same models."""
    theirs = common.read(path)
    for name in ("learner", "scorer", "reference"):
        if theirs.get(name) != content[name]:
            raise ValueError(f"{path} must be of {name} {content[name]}, got {theirs.get(name)}")
    if "seconds" not in theirs:
        raise ValueError(f"{path} must hold seconds: write it with --time")
    return theirs["seconds"]


def wall(plan: Plan, spent: Row) -> Row:
    """The plan in seconds per row of uniform's budget, all charged at one machine's rates."""
    costs = map(Cost, spent["forward"], spent["backward"])
    names = ("learner", "online", "reference")
    timed = dict(zip(names, costs, strict=True))
    column = replace(plan, **timed, selection=spent["selection"], decode=0.0).everything()
    learner = timed["learner"]
    return {
        **spent,
        "forward_share": learner.forward / learner.train,
        "lines": column.lines,
        "total": column.total,
        "uniform": column.base,
        "wall_speedup": column.compute_speedup,
        "beta_max": column.beta_max,
    }


def _show(content: Row) -> None:
    from rich.console import Console
    from rich.table import Table

    rows, console = content["rows"], Console(highlight=False)
    console.print(
        f"{content['learner']} learns, {content['scorer']} scores (forward costs 1 : "
        f"{content['f_ratio']:.4g}), {content['method']}, rho {content['rho']:g}, beta "
        f"{content['beta']:g}: learner speedup {rows[0]['learner_speedup']:+.1%}"
    )
    table = Table(title="% of the FLOPs of training on uniform rows to the same metric")
    table.add_column("")
    for row in rows:
        table.add_column(row["column"], justify="right")
    for line in LINES:
        cells = [row[f"flops_{line}"] / row["flops_uniform"] for row in rows]
        table.add_row(
            line.replace("_", " "),
            *(f"{100 * x:.2g}" if 0 < x < 1e-4 else f"{100 * x:.2f}" if x else "-" for x in cells),
        )
    table.add_section()
    table.add_row("total", *(f"{100 * r['flops_total'] / r['flops_uniform']:.2f}" for r in rows))
    table.add_row("compute speedup", *(f"{r['compute_speedup']:+.1%}" for r in rows))
    table.add_row("compute-positive", *("yes" if r["compute_positive"] else "no" for r in rows))
    table.add_section()
    table.add_row("beta to stay below", *(f"{r['beta_max']:.3f}" for r in rows))
    for name, _ in WITHOUT:
        cells = (f"{row[f'beta_max_{name}']:.3f}" for row in rows)
        table.add_row(f"  {name.replace('_', ' ')}", *cells)
    console.print(table)
    loaded = f"; {content['bytes_read']:.4g} bytes" if content["bytes_read"] else ""
    console.print(f"rows loaded per row that uniform loads: {content['rows_read']:.3g}{loaded}")
    if spent := content.get("seconds"):
        parts = ", ".join(
            f"{name.replace('_', ' ')} {100 * x / spent['uniform']:.1f} %"
            for name, x in spent["lines"].items()
            if x
        )
        console.print(
            f"in seconds ({spent['rows']} rows at a time): {parts}; a forward pass is "
            f"{spent['forward_share']:.0%} of the learner's step; wall speedup "
            f"{spent['wall_speedup']:+.1%}, beta to stay below {spent['beta_max']:.3f}"
        )


def text(content: Row) -> str:
    """The lines in Markdown, in percent of uniform's FLOPs."""
    rows = content["rows"]
    lines = [f"| | {' | '.join(r['column'] for r in rows)} |", f"|---|{'---|' * len(rows)}"]
    for line in (*LINES, "total"):
        cells = (f"{100 * r[f'flops_{line}'] / r['flops_uniform']:.1f} %" for r in rows)
        lines.append(f"| {line.replace('_', ' ')} | {' | '.join(cells)} |")
    for name in ("compute_speedup", "beta_max"):
        cells = (format(r[name], "+.1%" if name == "compute_speedup" else ".3f") for r in rows)
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{content['method']} at rho {content['rho']:g} and beta {content['beta']:g}, "
            f"{content['scorer']} scoring for {content['learner']}; in percent of what training on "
            "uniform rows costs.",
        ]
    )
