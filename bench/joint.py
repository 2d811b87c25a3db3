# SPDX-License-Identifier: Apache-2.0
"""What joint selection costs on the CPU: same inputs, same noise, same process, turn by turn.

`published` holds the B x B matrix and multiplies it by a mask for every chunk, `matvec` takes
matrix-vector products of it instead; `incremental` is what one writes in torch without either,
`products` its matrix products alone. Their noise is made beforehand, ours is part of the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import activesel
from activesel import spec_joint
from activesel.loop import records
from bench.speed import THREADS, machine, threads

RESULTS = Path(__file__).parent / "results" / "joint-cpu.json"
ROWS, KEEP, WIDTH, CHUNKS = 8192, 1640, 256, 16
SEED = 1
LONGER = (16_384, 32_768, 65_536)  # rows
TARGETS = {"published": 12.0, "matvec": 4.5, "incremental": 1.2}  # times our speed
MEMORY = 64e6  # bytes

Loss = Literal["sigmoid", "softmax"]
Picked = tuple[Tensor, Tensor]  # rows chosen, ascending; scores at the last chunk


@dataclass(frozen=True)
class Inputs:
    online: activesel.Pairs
    reference: activesel.Pairs
    noise: Tensor  # [chunks, B]
    keep: int

    @classmethod
    def make(cls, rows: int = ROWS, keep: int = KEEP, width: int = WIDTH) -> Inputs:
        g = torch.Generator().manual_seed(0)

        def embed() -> activesel.Pairs:  # texts like their images, by and large
            image = torch.randn(rows, width, generator=g)
            text = image + 2 * torch.randn(rows, width, generator=g)
            return activesel.Pairs(F.normalize(image), F.normalize(text), 10.0, -5.0)

        seed, step = torch.tensor([SEED]), torch.tensor([0])
        noise = torch.stack([spec_joint.noise(rows, seed, step, 0, c) for c in range(CHUNKS)])
        return cls(embed(), embed(), noise, keep)


def ours(x: Inputs, loss: Loss = "sigmoid", backend: str = "native") -> Picked:
    picked = activesel.joint_select(
        online=x.online, reference=x.reference, k=x.keep, chunks=CHUNKS, loss=loss, seed=SEED,
        backend=backend,
    )  # fmt: skip
    return picked.indices, picked.scores


def pick(x: Inputs, own: Tensor, given: Callable[[Tensor, Tensor], Tensor]) -> Picked:
    """Chunk by chunk; `given(chosen [B] bool, new rows [c])` is what joins a row's own score."""
    chosen = torch.zeros_like(own, dtype=torch.bool)
    scores, new = own, own[:0].long()
    for c, size in enumerate(spec_joint.sizes(x.keep, CHUNKS)):
        if c:
            scores = own + given(chosen, new)
        new = (scores + x.noise[c]).masked_fill(chosen, -torch.inf).topk(size).indices
        chosen[new] = True
    return chosen.nonzero().squeeze(1), scores


def learnability(x: Inputs) -> Tensor:  # [B, B]
    def losses(p: activesel.Pairs) -> Tensor:
        logits = torch.addmm(torch.tensor(p.bias), p.image, p.text.T, alpha=float(p.scale))
        logits.diagonal().neg_()
        return F.softplus(logits)

    return losses(x.online).sub_(losses(x.reference))


def published(x: Inputs) -> Picked:
    s = learnability(x)

    def given(chosen: Tensor, _new: Tensor) -> Tensor:
        mask = chosen.float()
        return (s * mask).sum(1) + (s * mask[:, None]).sum(0)

    return pick(x, s.diagonal(), given)


def matvec(x: Inputs) -> Picked:
    s = learnability(x)

    def given(chosen: Tensor, _new: Tensor) -> Tensor:
        mask = chosen.float()
        return s @ mask + mask @ s

    return pick(x, s.diagonal(), given)


def logits_with(p: activesel.Pairs, new: Tensor) -> tuple[Tensor, Tensor]:  # two of [B, c]
    bias = torch.tensor(p.bias)
    return (
        torch.addmm(bias, p.image, p.text[new].T, alpha=float(p.scale)),
        torch.addmm(bias, p.text, p.image[new].T, alpha=float(p.scale)),
    )


def own_logits(p: activesel.Pairs) -> Tensor:  # [B]
    return p.scale * torch.linalg.vecdot(p.image, p.text) + p.bias


def incremental(x: Inputs) -> Picked:
    total = torch.zeros(len(x.online.image))

    def given(_chosen: Tensor, new: Tensor) -> Tensor:
        for p, sign in ((x.online, 1), (x.reference, -1)):
            for logits in logits_with(p, new):
                total.add_(F.softplus(logits).sum(1), alpha=sign)
        return total

    own = F.softplus(-own_logits(x.online)) - F.softplus(-own_logits(x.reference))
    return pick(x, own, given)


def incremental_softmax(x: Inputs) -> Picked:
    state = torch.full((4, len(x.online.image)), -torch.inf)

    def given(_chosen: Tensor, new: Tensor) -> Tensor:
        every = (logits for p in (x.online, x.reference) for logits in logits_with(p, new))
        for running, logits in zip(state, every, strict=True):
            torch.logaddexp(running, logits.logsumexp(1), out=running)
        return (state[0] + state[1] - state[2] - state[3]) / 2

    return pick(x, own_logits(x.reference) - own_logits(x.online), given)


def products(x: Inputs) -> None:
    """The products of `incremental`, as many rows at a time as stay in the cache."""
    size = spec_joint.sizes(x.keep, CHUNKS)[0]
    out = torch.empty(512, size)
    for _ in range(CHUNKS - 1):
        for p in (x.online, x.reference):
            for a, b in ((p.image, p.text), (p.text, p.image)):
                for rows in a.split(512):
                    torch.mm(rows, b[:size].T, out=out[: len(rows)])


def same(mine: Picked, theirs: Picked) -> float:
    """Refuse to time what picks other rows; returns the share of rows that are the same."""
    (a, scores), (b, their_scores) = mine, theirs
    share = len(set(a.tolist()) & set(b.tolist())) / max(len(a), len(b))
    if share < 0.999:
        raise AssertionError(f"rows must be the same, got {1 - share:.2%} others")
    if share == 1:  # else the sums are over other rows
        left = torch.ones(len(scores), dtype=torch.bool)
        left[a] = False  # a chosen row's scores are those of its pick, and theirs are not
        torch.testing.assert_close(scores[left], their_scores[left], rtol=1e-4, atol=1e-2)
    return share


def peak(function: Callable[[], object]) -> int:
    """Bytes of resident memory beyond those before the call, at most."""

    def status(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(rf"{name}:\s+(\d+) kB", text)[0])

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only: gives free memory back
        ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    function()
    return status("VmHWM") - before


@dataclass(frozen=True)
class Row:
    method: str
    loss: str
    threads: int
    rows: int
    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    cpu_seconds: float  # median, all threads; a busy neighbour moves it less
    ratio: float  # of the medians, to ours
    ratio_cpu: float
    turns: int


def times(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, list[list[float]]]:
    """Wall and CPU seconds of each, in turns, every second one backwards; the dense ones thrice."""
    taken: dict[str, list[list[float]]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(turns):
        for name in names if turn % 2 else names[::-1]:
            if name in ("published", "matvec") and turn >= 3:
                continue
            cpu, wall = time.process_time(), time.perf_counter()
            functions[name]()
            taken[name].append([time.perf_counter() - wall, time.process_time() - cpu])
    return taken


def measure(
    functions: dict[str, Callable[[], object]], loss: str, n: int, rows: int, turns: int
) -> list[Row]:
    with threads(n):
        functions["ours"]()
        taken = {name: list(zip(*t, strict=True)) for name, t in times(functions, turns).items()}
    out = []
    for name, both in taken.items():
        (wall, cpu), mine = map(statistics.median, both), map(statistics.median, taken["ours"])
        base, base_cpu = mine
        ordered = sorted(both[0])
        count = len(ordered)
        low, high = ordered[count // 5], ordered[count - 1 - count // 5]
        row = Row(name, loss, n, rows, wall, low, high, cpu, wall / base, cpu / base_cpu, count)
        print(
            f"{loss:8} {n} threads, B = {rows:6}  {name:11} {wall * 1e3:8.1f} ms"
            f" [{low * 1e3:.1f}, {high * 1e3:.1f}]  {row.ratio:6.2f} x"
            f"  (CPU seconds {row.ratio_cpu:6.2f} x)"
            + (f", wanted {TARGETS[name]:g} x" if name in TARGETS and loss == "sigmoid" else "")
        )
        out.append(row)
    return out


def command(out: Path = RESULTS, turns: int = 7) -> None:
    """Time joint selection against the published algorithm and plain torch, and write the table.

    Args:
        out: JSON file to write.
        turns: how often each is timed, the dense ones three times at most.
    """
    ours(Inputs.make(1000, 100))  # loads what loads once
    x = Inputs.make()
    dense = {"published": published, "matvec": matvec, "incremental": incremental}
    memory = {"ours": peak(partial(ours, x))} | {
        name: peak(partial(f, x)) for name, f in dense.items()
    }
    print("peak extra memory: " + ", ".join(f"{n} {m / 1e6:.0f} MB" for n, m in memory.items()))
    mine = ours(x)
    shares = {name: same(mine, f(x)) for name, f in dense.items()}
    shares["incremental_softmax"] = same(ours(x, "softmax"), incremental_softmax(x))
    rows = []
    for n in THREADS:
        each = {"ours": ours, **dense, "products": products}
        sigmoid = {name: partial(f, x) for name, f in each.items()}
        soft = {
            "ours": partial(ours, x, "softmax"),
            "incremental": partial(incremental_softmax, x),
        }
        rows += measure(sigmoid, "sigmoid", n, ROWS, turns)
        rows += measure(soft, "softmax", n, ROWS, turns)
    longer = {rows_: Inputs.make(rows_) for rows_ in LONGER}
    scaling = times(
        {str(b): partial(ours, y) for b, y in ({ROWS: x} | longer).items()}, max(3, turns // 2)
    )
    per_row = {b: min(t[1] for t in ts) / int(b) for b, ts in scaling.items()}
    print(
        "CPU microseconds per row: " + ", ".join(f"{b} {s * 1e6:.1f}" for b, s in per_row.items())
    )
    content = {
        "schema": 1,
        "machine": machine(),
        "shape": {"keep": KEEP, "width": WIDTH, "chunks": CHUNKS},
        "targets": {**TARGETS, "extra_bytes": MEMORY},
        "extra_bytes": memory,
        "same_rows": shares,
        "rows": [asdict(row) for row in rows],
        "cpu_seconds_per_row": per_row,
    }
    records.write_json(out, content)
    print(f"written to {out}")
