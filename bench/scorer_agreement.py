# SPDX-License-Identifier: Apache-2.0
"""How precise a whole scorer must be: which rows it keeps if its forward pass rounds so or so.

Trained scorers in pairs so close that learnability has rms 0.01, the hard case; both are rounded to
bf16 first, and the truth is float64 on those weights. What the one-launch kernel rounds is done by
its specification, `activesel.spec_scorer`, on weights packed as for the kernel.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel.loop import data, records, training
from activesel.loop.config import ReferenceConfig
from activesel.models import ViT, ViTConfig
from activesel.packing import Linear, Packed, Parts
from activesel.spec_scorer import Rounding, e4m3, exact, features, half
from bench import speed

RESULTS = Path(__file__).parent / "results" / "scorer-agreement-cpu.json"
RMS = 0.01  # of learnability
WANTED, AIM = 0.98, 0.995
SEARCHED = 512  # rows at most on which the distance of a pair is found

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A scorer of 28 x 28 pixels, how it is trained, and how many rows it chooses from."""

    width: int
    depth: int
    heads: int
    rows: int
    updates: int
    batch: int
    lr: float
    patch: int = 4  # to score at
    trained: int = 4  # the patch size it is trained at

    @property
    def name(self) -> str:
        tokens = (28 // self.patch) ** 2
        return f"width {self.width}, depth {self.depth}, {tokens} tokens"


SETTINGS = (
    Setting(32, 1, 2, rows=8192, updates=600, batch=64, lr=4e-3),
    Setting(64, 6, 2, rows=4096, updates=300, batch=64, lr=2e-3),
    Setting(192, 12, 3, rows=2048, updates=220, batch=32, lr=1e-3),
    Setting(192, 12, 3, rows=256, updates=220, batch=32, lr=1e-3, patch=2, trained=7),
)


# ------------------------------------------------------------------------------------- the scorers


class Pair:
    """A trained reference, and an online scorer a little further on; bf16 numbers, held in fp32."""

    def __init__(self, setting: Setting, rows: data.Labelled) -> None:
        s = setting
        config = ViTConfig(s.width, s.depth, s.heads, 28, s.trained, 1, data.CLASSES)
        with training.seeded(records.seed(0, "scorer")), torch.enable_grad():
            model = ViT(config, data.MEAN, data.STD)

            def loss(index: Tensor) -> Tensor:
                return F.cross_entropy(model(rows.images[index]), rows.labels[index])

            schedule = ReferenceConfig(updates=s.updates, keep=s.batch, lr=s.lr)
            training.fit(model, schedule, len(rows), loss)
            self.reference = _at(model, s.patch)
            optimizer = training.adamw(model, s.lr / 40, 0.0)
            for step in range(8):
                training.descend(optimizer, loss(data.draw(step, s.batch, len(rows), 1)))
        self._later, self.online = _at(model, s.patch), _at(model, s.patch)
        self._start = copy.deepcopy(self.reference)
        for p in self.reference.parameters():
            p.data = _bf16(p.data)

    def move(self, share: float) -> None:
        """Put the online scorer at that share of the way from the reference to a later step."""
        with torch.no_grad():
            several = (m.parameters() for m in (self.online, self._start, self._later))
            for p, start, later in zip(*several, strict=True):
                p.copy_(_bf16(start.lerp(later, share)))

    def separate(self, rms: Callable[[], float], tries: int = 14) -> float:
        """Move the online scorer until `rms` gives RMS within 3 %; returns that share."""
        low, high, share = 1e-3, 8.0, 0.2
        for _ in range(tries):
            self.move(share)
            found = rms()
            if abs(found / RMS - 1) < 0.03:
                break
            low, high = (low, share) if found > RMS else (share, high)
            share = (low * high) ** 0.5
        return share


def _at(model: ViT, patch: int) -> ViT:
    """A copy of the model whose native patches have that size."""
    config = {**asdict(model.config), "patch": patch}
    view = model.at(patch).parts()
    made = ViT(ViTConfig(**config), data.MEAN, data.STD).requires_grad_(False)
    resized = {"patch.weight": view.patch.weight, "position": view.position[None]}
    made.load_state_dict({**model.state_dict(), **resized})
    return made


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


# -------------------------------------------------------------------------------- ways of rounding


@dataclass(frozen=True)
class Way:
    """How the forward pass of a side rounds: its weights, and what it multiplies them with."""

    packed: bool = False  # weights as the kernel gets them, which rounds those of the patches
    fp8: bool = False
    patch: Rounding = exact  # of the patches' weights, scaled as packed
    rounded: Rounding = exact  # of pixels, q, k, v, exp(s - max)
    linear: Sequence[Rounding] = (exact,)  # of the inputs of qkv, out, up, down
    head: Rounding = exact  # of the features


def halves(x: Tensor) -> Tensor:
    """As the sum of two fp16 numbers: what two products with fp16 weights compute."""
    return half(x) + half(x - half(x))


def _keys_and_values(x: Tensor) -> Tensor:
    """Of qkv [B, T, 3 D] k and v in two halves, all else in one."""
    if x.ndim == 4:
        return half(x)
    q, *kv = x.chunk(3, -1)
    return torch.cat([half(q), *map(halves, kv)], -1)


WAYS = {
    "float32": Way(),
    "fp16": Way(True, rounded=half, linear=(half,)),
    "fp16, features too": Way(True, rounded=half, linear=(half,), head=half),
    "fp16, two halves where it matters": Way(
        rounded=_keys_and_values, linear=(halves, half, half, half)
    ),
    "bf16": Way(patch=_bf16, rounded=_bf16, linear=(_bf16,)),
    "fp8 linear layers": Way(True, fp8=True, rounded=half, linear=(e4m3,)),
    "fp16, only weights of patches": Way(True),
    "fp16, only inputs of linear layers": Way(linear=(half,)),
    "fp16, only q, k, v, exp": Way(rounded=half),
    "fp16, only features": Way(head=half),
}
EAGER = "torch, all in bf16", "torch in bf16, fp32 logits"


def _weights(parts: Sequence[Parts], way: Way) -> list[Parts]:
    """Both sides' weights as that way has them."""
    if way.packed:
        packed = Packed.of(parts, fp8=way.fp8)
        return [packed.parts(side) for side in range(len(parts))]
    out = []
    for p in parts:
        scale = 64 / 255 / p.std.item()
        weight = way.patch(p.patch.weight * scale) / scale
        # The specification derives the mean's share from rounded weights, packing from exact ones.
        left = (p.patch.weight - weight).sum(-1) * ((128 / 255 - p.mean) / p.std)
        out.append(p._replace(patch=Linear(weight, p.patch.bias + left)))
    return out


def _wide(x: Any) -> Any:
    """Parts in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        return type(x)(*map(_wide, x)) if hasattr(x, "_fields") else tuple(map(_wide, x))
    return x


def _losses(x: Tensor, head: Linear, targets: Tensor) -> Tensor:  # [B] float64
    return F.cross_entropy(F.linear(x, *head), targets, reduction="none").double()


# ------------------------------------------------------------------------------------- measurement


class Scores:
    """Learnability of rows by a pair, one way or another."""

    def __init__(self, pair: Pair, rows: data.Labelled, count: int, batch: int) -> None:
        self.pair, self.images, self.targets = pair, rows.images[:count], rows.labels[:count]
        self.slices = [slice(i, i + batch) for i in range(0, count, batch)]

    @property
    def parts(self) -> list[Parts]:
        return [self.pair.online.parts(), self.pair.reference.parts()]

    def _of(self, sides: Sequence[Callable[[Tensor, Tensor], Tensor]], rows: slice) -> Tensor:
        online, reference = (side(self.images[rows], self.targets[rows]) for side in sides)
        return online - reference

    def truth(self) -> Tensor:  # [B] float64
        return self.by(Way(), [_wide(p) for p in self.parts])

    def by(self, way: Way, parts: Sequence[Parts] | None = None) -> Tensor:  # [B] float64
        """As the specification computes it, rounding that way."""

        def side(p: Parts) -> Callable[[Tensor, Tensor], Tensor]:
            turn = cycle(way.linear)  # a forward pass takes whole turns

            def losses(images: Tensor, targets: Tensor) -> Tensor:
                x = features(p, images, rounded=way.rounded, operand=lambda y: next(turn)(y))
                return _losses(way.head(x), p.head, targets)

            return losses

        sides = [side(p) for p in parts or _weights(self.parts, way)]
        return torch.cat([self._of(sides, rows) for rows in self.slices])

    def eager(self) -> dict[str, Tensor]:
        """Of modules cast to bf16, with logits in bf16 and with logits in fp32 of bf16 features."""
        cast = [copy.deepcopy(m).bfloat16() for m in (self.pair.online, self.pair.reference)]

        def pieces() -> Iterator[list[Tensor]]:
            for rows in self.slices:
                both = []
                for model in cast:
                    x, targets = model.forward_features(self.images[rows]), self.targets[rows]
                    logits = model.head(x)
                    wide = Linear(model.head.weight.float(), model.head.bias.float())
                    narrow = F.cross_entropy(logits.float(), targets, reduction="none").double()
                    both.append(torch.stack([narrow, _losses(x.float(), wide, targets)]))
                yield list(both[0] - both[1])

        return dict(zip(EAGER, map(torch.cat, zip(*pieces(), strict=True)), strict=True))


def measure(setting: Setting, rows: data.Labelled, log: Callable[[str], None] = print) -> Row:
    """What every way of rounding keeps of the top fifth of `setting.rows` rows."""
    start = time.perf_counter()
    batch = max(16, min(256, 400_000 // (setting.width * (28 // setting.patch) ** 2)))
    pair = Pair(setting, rows)
    few = Scores(pair, rows, min(SEARCHED, setting.rows // 2), batch)
    share = pair.separate(lambda: few.by(Way()).square().mean().sqrt().item())
    scores = Scores(pair, rows, setting.rows, batch)
    truth, keep = scores.truth(), setting.rows // 5
    best, found = truth.topk(keep).indices, {}

    def compare(name: str, got: Tensor) -> None:
        error = got - truth
        found[name] = {
            "overlap": torch.isin(got.topk(keep).indices, best).double().mean().item(),
            "error_rms": error.square().mean().sqrt().item(),
        }
        log(f"{setting.name:32} {name:36} keeps {found[name]['overlap']:.2%}, "
            f"off by {found[name]['error_rms']:.1e}")  # fmt: skip

    for name, way in WAYS.items():
        compare(name, scores.by(way))
    for name, got in scores.eager().items():
        compare(name, got)
    spread = torch.tensor([0.1, 0.5, 0.8, 0.9], dtype=torch.float64)
    return {
        **asdict(setting),
        "learnability_rms": truth.square().mean().sqrt().item(),
        "learnability_std": truth.std().item(),
        "learnability_quantiles": dict(
            zip(map(str, spread.tolist()), truth.quantile(spread).tolist(), strict=True)
        ),
        "moved": share,
        "kept": keep,
        "agreement": found,
        "seconds": time.perf_counter() - start,
    }


def command(out: Path = RESULTS, only: tuple[int, ...] = ()) -> None:
    """Compare the top fifth by learnability with float64's, for every way of rounding a scorer.

    Args:
        out: JSON file to write.
        only: which of the scorers, from 0; what `out` holds of the others stays.
    """
    from rich.console import Console

    torch.set_grad_enabled(False)
    rows = data.fashion_mnist(0.1).train
    for number in only or range(len(SETTINGS)):
        row = measure(SETTINGS[number], rows)
        old = records.read_json(out)["scorers"] if out.is_file() else {}
        scorers = old | {SETTINGS[number].name: row}
        names = [s.name for s in SETTINGS if s.name in scorers]
        ordered = {name: scorers[name] for name in names}
        records.write_json(out, {"schema": 1, "machine": speed.machine(), "scorers": ordered})
    Console().print(_rich(records.read_json(out)))
    print(f"written to {out}")


# -------------------------------------------------------------------------------------- the tables


def _lines(content: Row) -> tuple[list[str], list[list[str]]]:
    scorers = content["scorers"]
    lines = []
    for name in (*WAYS, *EAGER):
        found = [row["agreement"].get(name) for row in scorers.values()]
        cells = [f"{f['overlap']:.1%} ({f['error_rms']:.0e})" if f else "-" for f in found]
        lines.append([name, *cells])
    return ["rounding", *scorers], lines


def table(content: Row) -> str:
    """Of the right rows how many each way of rounding keeps, in Markdown."""
    head, lines = _lines(content)
    text = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]
    rows = [row["rows"] for row in content["scorers"].values()]
    said = (
        f"Of the top fifth of {', '.join(f'{n:,}' for n in rows)} rows of Fashion-MNIST by "
        "learnability at T = 0, what scores rounded so keep (error, rms); right is what float64 "
        f"keeps. Trained ViTs of bf16 weights, and the same a few steps on: learnability rms {RMS}"
        ". fp16: operands of products are, sums are in fp32, as in the one-launch kernel; two "
        "halves: weights of patches unrounded, inputs of qkv, k and v sums of two fp16 numbers."
    )
    return "\n".join([*text, "", said])


def _rich(content: Row) -> Any:
    from rich.table import Table

    head, lines = _lines(content)
    made = Table(*head, title=f"right rows kept; wanted {WANTED:.0%}, aim {AIM:.1%}")
    for cells in lines:
        made.add_row(*cells)
    return made
