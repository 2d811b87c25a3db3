# SPDX-License-Identifier: Apache-2.0
"""Contact sheet: the pairs that selection kept most often, and those it kept least often."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activesel.loop import plots
from activesel.loop.icons import IconPairs

COLUMNS = 10
WIDTH, LINES = 15, 3  # of a caption


def extremes(
    kept: Tensor,  # [N] int
    drawn: Tensor,  # [N] int
    count: int,
    least: int = 5,
) -> tuple[Tensor, Tensor]:  # [count] int64, twice
    """Rows with the highest and the lowest kept / drawn, of those drawn at least `least` times.

    Among equals those drawn more often come first, then chance, the same every time.

    Raises:
        ValueError: fewer than 2 x `count` rows were drawn that often.

    >>> most, fewest = extremes(torch.tensor([9, 0, 5, 1]), torch.tensor([9, 9, 9, 2]), count=1)
    >>> most.tolist(), fewest.tolist()
    ([0], [1])
    """
    rows = (drawn >= least).nonzero()[:, 0]
    if len(rows) < 2 * count:
        raise ValueError(f"{2 * count} rows must be drawn {least} times or more, got {len(rows)}")
    chance = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).numpy()
    often, rate = drawn[rows].numpy(), (kept[rows] / drawn[rows]).numpy()
    most, fewest = (rows[np.lexsort((chance, -often, sign * rate))[:count]] for sign in (-1, 1))
    return most, fewest


def sheet(
    rows: IconPairs,
    kept: Tensor,  # [N] int
    drawn: Tensor,  # [N] int
    path: Path,
    count: int = 40,
    least: int = 5,
) -> list[Path]:
    """Draw `count` pairs of either extreme, captions and kept / drawn beneath, frames by tier.

    Args:
        rows: the pool.
        kept, drawn: how often each of its rows was.
        path: where to, without suffix; `.svg` and `.png` are written.
        count: pictures per extreme.
        least: rows drawn less often than this are left out.

    Returns:
        The files.
    """
    titles = ("Kept most often", "Kept least often")
    with plots.style() as plt:
        high = -(-count // COLUMNS)
        figure = plt.figure(figsize=(1.15 * COLUMNS, 1.5 * 2 * high + 0.8), layout="constrained")
        parts = figure.subfigures(2, 1, hspace=0.02)
        for part, title, index in zip(
            parts, titles, extremes(kept, drawn, count, least), strict=True
        ):
            some = rows.rows(index)
            tiers = ", ".join(f"{n} {tier}" for tier, n in some.tiers.items())
            part.suptitle(f"{title}: {tiers}", x=0.01, ha="left", weight="bold")
            axes = part.subplots(high, COLUMNS, squeeze=False)
            for number, panel in enumerate(axes.flat):
                if number >= count:
                    panel.set_axis_off()
                    continue
                times = f"{int(kept[index[number]])} of {int(drawn[index[number]])}"
                _picture(panel, some, number, times)
        frames = [
            plt.Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=2.5, label=tier)
            for tier, colour in plots.TIERS.items()
        ]
        figure.legend(handles=frames, loc="upper right", ncols=len(frames))
        return plots.save(figure, path)


def _picture(panel: Any, rows: IconPairs, number: int, times: str) -> None:
    panel.imshow(rows.images[number, 0].numpy(), cmap="gray", vmin=0, vmax=255)
    panel.grid(visible=False)
    panel.set(xticks=[], yticks=[])
    colour = list(plots.TIERS.values())[int(rows.tier[number])]
    for spine in panel.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)
    text = textwrap.wrap(rows.captions[number], WIDTH, max_lines=LINES, placeholder=" …")
    panel.set_xlabel("\n".join([*text, times]), size=7, labelpad=3)
