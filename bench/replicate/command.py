# SPDX-License-Identifier: Apache-2.0
"""`python -m bench replicate`: run what the parts need, write figures, tables and pictures."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import tyro

from bench import common, study
from bench.common import Row, Scale

NAME = "replicate"
PARTS = ("published", "ablation", "ratios", "scaling", "rho", "online")
"""Modules beside this one, the cheapest first: name, title, configs, content, pictures, text."""
DATA = "fashion-mnist"


def part(name: str) -> Any:
    """The module of a part.

    Raises:
        ValueError: unknown name; lists the known.
    """
    if name not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {name!r}")
    return importlib.import_module(f"bench.replicate.{name}")


def command(
    parts: tyro.conf.Positional[tuple[str, ...]] = PARTS,
    scale: Scale = "smoke",
    workers: int = 2,
    minutes: float | None = None,
    aggregate_only: bool = False,
    out: Path | None = None,
    data: str = DATA,
) -> None:
    """Replicate the papers' numbers: published ledger, RHO-LOSS, ClassAct, JEST, online scorer.

    Stop it at any time, the same line goes on; runs that are finished are not repeated, and parts
    share those they have in common.

    Args:
        parts: any of published, ablation, ratios, scaling, rho, online; all if none is named.
        scale: "smoke" (minutes), "full" (hours, what is committed) or "gpu".
        workers: processes, one thread each.
        minutes: stop the runs after so many, over all parts.
        aggregate_only: run nothing, make do with what there is.
        out: where to, without suffix; a part adds its name.
        data: of RHO-LOSS's protocol: "fashion-mnist", or a folder of CIFAR's binary files.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    modules = {name: part(name) for name in parts or PARTS}
    end = None if minutes is None else time.monotonic() + 60 * minutes
    headlines: Row = {}
    for name, module in modules.items():
        given = {"data": data} if name == "rho" else {}
        configs = list(module.configs(scale, **given))
        left = None if end is None else max(end - time.monotonic(), 0) / 60
        found, missing = study.gather(
            configs, scale, workers, left, aggregate_only or left == 0
        ) if configs else ([], [])  # fmt: skip
        console.rule(module.TITLE)
        if missing:
            console.print(f"unfinished: {len(missing)} of {len(configs)} runs are missing")
        if configs and not found:
            continue
        content = {
            **common.header(),
            "scale": scale,
            **module.content(found, missing, scale, **given),
            "missing": [config.name for config in missing],
        }
        suffix = f"-{content['data']}" if name == "rho" and data != DATA else ""
        path = out or common.results(scale, NAME)
        path = path.with_name(f"{path.name}-{name}{suffix}")
        files = [*write(path, content), *module.pictures(content, path)]
        console.print(Markdown(_spoken(module.text(content))))
        for sentence in content.get("left_out", ()):
            console.print(sentence)
        console.print("written:", *map(str, files), soft_wrap=True)
        headlines[name] = {**content.get("headline", {}), "missing": len(missing)}
    common.result({"scale": scale, **headlines})


def write(path: Path, content: Row) -> list[Path]:
    """The content, and its rows as a spreadsheet."""
    from bench.replicate.figures import flat

    return common.write(path, content, [flat(row) for row in content.get("rows", [])])


def _spoken(text: str) -> str:
    """Markdown without pictures."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("!["))
