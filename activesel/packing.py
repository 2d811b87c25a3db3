# SPDX-License-Identifier: Apache-2.0
"""Weights of vision transformers as the one-launch scorer reads them: few buffers, padded tiles.

They are packed again before every scoring: the online scorer's change at every step, and some ways
of changing them leave no trace.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from activesel import files, spec_scorer
from activesel.vit_parts import (
    BLOCK,
    LINEARS,
    OUTER,
    Block,
    Linear,
    Norm,
    Parts,
    Shape,
    padded,
    tensors,
)

__all__ = ["BAD_WEIGHT", "FP8", "Block", "Linear", "Norm", "Packed", "Parts", "Shape"]

BAD_WEIGHT = 64
"""Bit of a selection's flags: a packed number is not finite, or beyond fp16 where that holds it."""

KIND = "packed scorer"
BUFFERS = (
    *("patch", "weights", "rows", "vectors", "norm", "head", "head_bias", "scales"),
    *("mean", "std", "units", "kept"),
)
SIDES = ("online", "reference")
FP8 = torch.float8_e4m3fn


class Packed:
    """One scorer, or two of one shape (S), in the layout of the kernel; what is padded is zero.

    `patch` fp16 [S, DP, KP] takes pixels as u = (p - 128) / 64 with p in 0..255, so it holds
    64 / (255 std) times the weights, over `units` fp32 [S], by which sums are multiplied. `rows`
    fp32 [S, T, DP] is what is added to embedded patches: position, bias, and what follows from mean
    and the 128; for the class token all there is.
    `weights` fp16 [S, depth, NL] has, per layer, qkv [3 AP, DP] (heads HD apart), out [DP, AP], up
    [HP, DP] and down [DP, HP]; `vectors` fp32 [S, depth, NV] norm1 (weight, bias), the biases of
    qkv and out, norm2, the biases of up and down. `norm` fp32 [S, 2, DP], `head` fp16 [S, C, DP],
    `head_bias` fp32 [S, C], `kept` int32 [n] or None.

    With `fp8` the four matrices of a layer are e4m3, each times the power of two that takes its
    largest entry into (224, 448]; `scales` fp32 [S, depth, 4] (qkv, out, up, down) undoes that.

    `bad` int32 [] is BAD_WEIGHT if anything packed is not finite, else 0; it stays on the device.

    Args:
        shape: of each side; see `of`, which also fills the buffers.
        sides: 1 or 2.
        device: where the buffers are.
        channels_last: columns of `patch` are in the order y, x, channel, as the pixels of NHWC are.
        fp8: see above.

    >>> from activesel.models import vit
    >>> parts = vit("nano", image_size=28, patch=7, channels=1, classes=10).parts()
    >>> packed = Packed.of([parts, parts])
    >>> packed.weights.shape, packed.bad.item()
    (torch.Size([2, 2, 12288]), 0)
    >>> parts.norm.bias.data[0] = float("nan")
    >>> packed.refresh([parts, parts])  # as before every scoring
    >>> packed.check()
    Traceback (most recent call last):
    ValueError: online norm.bias must be finite, and within 65504 in fp16, got nan
    """

    def __init__(
        self,
        shape: Shape,
        sides: int,
        device: torch.device | str = "cpu",
        *,
        channels_last: bool = False,
        fp8: bool = False,
    ) -> None:
        if sides not in (1, 2):
            raise ValueError(f"sides must be 1 or 2, got {sides}")
        self.shape, self.channels_last, self.fp8 = shape, channels_last, fp8
        n, depth, d = sides, shape.depth, shape.DP
        with torch.inference_mode(False):  # outside of which its tensors cannot be written to
            weights = n, depth, shape.weights
            self._half, (self.patch, self.head, *rest) = _carve(
                *(torch.float16, device, (n, d, shape.KP), (n, shape.classes, d)),
                *([] if fp8 else [weights]),
            )
            self.weights = rest[0] if rest else torch.zeros(weights, device=device).to(FP8)
            self._single, views = _carve(
                *(torch.float32, device, (n, shape.tokens, d), (n, depth, shape.vectors)),
                *((n, 2, d), (n, shape.classes), (n, depth, 4)),
                *((n, shape.channels), (n, shape.channels), (n,), ()),
            )
            self.rows, self.vectors, self.norm, self.head_bias, self.scales = views[:5]
            self.mean, self.std, self.units, self._total = views[5:]
            self._unit = torch.full((), 64 / 255, device=device)
            self.scales.fill_(1)
            self.kept: Tensor | None = None
            if shape.kept:
                n = shape.tokens - shape.pooled_by_class
                self.kept = torch.zeros(n, dtype=torch.int32, device=device)
            self.bad = torch.zeros((), dtype=torch.int32, device=device)
            self._plan()

    @classmethod
    def of(
        cls,
        sides: Sequence[Parts],  # online, reference; or one of them
        *,
        channels_last: bool = False,
        fp8: bool = False,
        like: Packed | None = None,
    ) -> Packed:
        """Pack for the first time.

        Args:
            like: of the same models before; spares comparing the patches they keep, which waits.

        Raises:
            ValueError: the two differ in shape, or in the patches they keep.
        """
        shape, device = Shape.of(sides[0]), sides[0].position.device
        packed = cls(shape, len(sides), device, channels_last=channels_last, fp8=fp8)
        if packed.kept is not None and sides[0].kept is not None:
            packed.kept.copy_(sides[0].kept)
        if like is not None and len(like._seen) == len(sides):
            packed._seen = list(like._seen)
        packed.refresh(sides)
        return packed

    def _plan(self) -> None:
        """Find where each tensor goes.

        `_views` are the buffers by name, cut where padding lies inside of a tensor (it does between
        heads). Where it does not, the tensor is copied straight there, by one launch along with all
        like it; the rest, and what has yet to be computed with, goes through `_staged`.
        """
        s, d, sides = self.shape, self.shape.width, len(self.patch)
        heads, hd = (s.heads, s.HD), d // s.heads
        sizes = [3 * s.AP * s.DP, s.DP * s.AP, s.HP * s.DP, s.DP * s.HP]
        qkv, out, up, down = self.weights.split(sizes, -1)
        qkv = qkv.unflatten(-1, (3, s.AP, s.DP))[..., : s.A, :d].unflatten(-2, heads)
        out = out.unflatten(-1, (s.DP, s.AP))[..., :d, : s.A].unflatten(-1, heads)
        raw = torch.zeros(sides, d, s.K, dtype=torch.float32, device=self.patch.device)
        embed = self.patch[..., :d, : s.K].unflatten(
            -1, (s.patch_size**2, s.channels) if self.channels_last else (s.channels, -1)
        )
        self._patch = embed.mT if self.channels_last else embed  # [S, D, C, P * P]
        views = {
            "mean": self.mean,
            "std": self.std,
            "patch.weight": raw,
            "patch.bias": torch.zeros_like(raw[..., 0]),
            "token": torch.zeros_like(raw[..., 0]),
            "position": self.rows[..., :d],
            "norm.weight": self.norm[:, 0, :d],
            "norm.bias": self.norm[:, 1, :d],
            "head.weight": self.head[..., :d],
            "head.bias": self.head_bias,
            "qkv.weight": qkv[..., :hd, :],
            "out.weight": out[..., :hd],
            "up.weight": up.unflatten(-1, (s.HP, s.DP))[..., : s.hidden, :d],
            "down.weight": down.unflatten(-1, (s.DP, s.HP))[..., :d, : s.hidden],
        }
        vectors = iter(self.vectors.split([s.DP, s.DP, 3 * s.AP, *[s.DP] * 3, s.HP, s.DP], -1))
        for name in BLOCK:
            if name == "qkv.bias":
                bias = next(vectors).unflatten(-1, (3, s.AP))[..., : s.A].unflatten(-1, heads)
                views[name] = bias[..., :hd]
            elif name not in LINEARS:
                views[name] = next(vectors)[..., : s.hidden if name == "up.bias" else d]
        self._views, self._staged = views, dict[str, Tensor]()
        for name, view in views.items():
            quantised = self.fp8 and name in LINEARS
            one = view[0, 0] if name in BLOCK else view[0]
            if quantised or not one.is_contiguous():
                dtype = torch.float32 if quantised else view.dtype
                self._staged[name] = torch.zeros(view.shape, dtype=dtype, device=view.device)
        names = [*OUTER, *BLOCK * s.depth]
        # By dtype, as a launch writes one: positions in `tensors` of all sides, and where they go.
        self._copies: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
        for side in range(sides):
            for i, (name, size) in enumerate(zip(names, s.sizes, strict=True)):
                if name == "token" and not s.pooled_by_class:
                    continue
                to = self._staged.get(name, views[name])[side]
                to = to[(i - len(OUTER)) // len(BLOCK)] if i >= len(OUTER) else to
                sources, targets = self._copies.setdefault(to.dtype, ([], []))
                sources.append(side * len(names) + i)
                targets.append(to.view(size))
        self._seen: list[Tensor | None] = [None] * sides

    @torch.no_grad()
    def refresh(self, sides: Sequence[Parts]) -> None:
        """Fill the buffers again, in place: few launches, and nothing waits for the device.

        Raises:
            ValueError: another number of sides, other shapes or other patches than at first.
        """
        if len(sides) != len(self.patch):
            raise ValueError(f"sides must be {len(self.patch)}, got {len(sides)}")
        found: list[Any] = []
        for i, parts in enumerate(sides):
            shape = Shape.of(parts)
            if shape != self.shape:
                raise ValueError(f"scorers must have one shape, got {self.shape} and {shape}")
            kept = parts.kept
            if self.kept is not None and kept is not None and kept is not self._seen[i]:
                if not torch.equal(self.kept, kept.to(self.kept)):  # waits, but only once
                    raise ValueError("scorers must keep the same patches")
                self._seen[i] = kept
            found += tensors(parts)
        for at, targets in self._copies.values():
            sources = [found[i] for i in at]
            for i, to in enumerate(targets):
                if sources[i] is None:
                    sources[i] = torch.zeros_like(to, dtype=sides[0].position.dtype)
            torch._foreach_copy_(targets, sources)  # the fast path wants one dtype on each side
        for name, staged in self._staged.items():
            if not (self.fp8 and name in LINEARS):
                self._views[name].copy_(staged)
        if self.fp8:
            self._quantise()
        self._embed()
        self._mark()

    def _mark(self) -> None:
        """Set `bad`: a sum is finite if and only if all of it is, for none overflows its dtype."""
        torch.sum(self._half, 0, dtype=torch.float32, out=self._total)  # which is in `_single`
        total = self._single.sum(dtype=torch.float64)
        torch.mul(total - total != 0, BAD_WEIGHT, out=self.bad)

    def _quantise(self) -> None:
        matrices = [self._staged[name] for name in LINEARS]
        norms = [torch.linalg.vector_norm(m.flatten(2), torch.inf, -1) for m in matrices]
        largest = torch.stack(norms, -1)  # [S, depth, 4]
        exponent = 1 - torch.frexp(448 / largest.clamp_min(1e-30)).exponent
        torch.ldexp(largest * 0 + 1, exponent, out=self.scales)  # NaN where a weight is inf or NaN
        factors = self.scales.reciprocal()
        for i, (name, m) in enumerate(zip(LINEARS, matrices, strict=True)):
            self._views[name].copy_((m.flatten(2) * factors[..., i, None]).view_as(m))

    def _embed(self) -> None:
        """Weights for u = (p - 128) / 64 in place of (p / 255 - mean) / std, and what they leave.

        sum_k w_k (p_k / 255 - mean) / std = sum_k v_k u_k + sum_k v_k (128 - 255 mean) / 64
        with v_k = 64 w_k / (255 std). Held are v_k over the first channel's 64 / (255 std), a unit
        that sums are multiplied with: so where channels share one, weights are not rounded again.
        """
        raw = self._views["patch.weight"].view(self._patch.shape)
        scale = torch.div(self._unit, self.std)  # [S, C]
        self.units.copy_(scale[:, 0])
        torch.mul(raw, (scale / scale[:, :1])[:, None, :, None], out=self._patch)
        offset = torch.rsub(self.mean, 2, alpha=255 / 64) * scale
        left = (raw * offset[:, None, :, None]).sum((2, 3)) + self._views["patch.bias"]
        rows = self._views["position"]  # [S, T, D]
        rows[:, self.shape.pooled_by_class :].add_(left[:, None])
        if self.shape.pooled_by_class:
            rows[:, 0].add_(self._views["token"])

    def check(self, names: Sequence[str] = SIDES) -> None:
        """Wait for the device and report what `bad` stands for.

        Args:
            names: of the sides, for the message.

        Raises:
            ValueError: a weight is NaN, infinite or, where it is held in fp16, beyond 65,504.
        """
        if not self.bad.item():
            return
        s = self.shape
        for side, who in zip(range(len(self.patch)), names, strict=False):
            for i, name in enumerate(s.names):
                kind = name.split(".", 2)[-1] if i >= len(OUTER) else name
                value = self._views[kind][side]
                value = value[(i - len(OUTER)) // len(BLOCK)] if i >= len(OUTER) else value
                held = [value, self.patch[side]] if name == "patch.weight" else [value]
                for x in held:
                    x = x.float()
                    if not x.isfinite().all():
                        wrong = x[~x.isfinite()][0].item()
                        raise ValueError(
                            f"{who} {name} must be finite, and within 65504 in fp16, got {wrong}"
                        )

    def parts(self, side: int = 0, dtype: torch.dtype = torch.float32) -> Parts:
        """A side as the kernel sees it, rounded weights unscaled; shares memory where it can.

        Bias of the patches and class token are part of `position` then.
        """
        s, view = self.shape, {name: v[side].to(dtype) for name, v in self._views.items()}
        if self.fp8:
            for i, name in enumerate(LINEARS):
                shape = (-1, *[1] * (view[name].ndim - 1))
                view[name] = view[name] * self.scales[side, :, i].view(shape).to(dtype)
        embed = self._patch[side].to(dtype) * self.units[side].to(dtype)
        bias = (embed.sum(-1) * ((255 * view["mean"] - 128) / 64)).sum(-1)
        weight = (embed * (view["std"] * (255 / 64))[:, None]).reshape(s.width, s.K)
        kinds: tuple[Any, ...] = (Norm, Linear, Linear, Norm, Linear, Linear)
        blocks: list[Block] = []
        for layer in range(s.depth):
            named = zip(BLOCK, s.sizes[len(OUTER) :], strict=False)
            flat = iter([view[name][layer].reshape(size) for name, size in named])
            blocks.append(Block(*(kind(next(flat), next(flat)) for kind in kinds)))
        return Parts(
            patch=Linear(weight, bias),
            position=view["position"],
            token=torch.zeros_like(view["token"]) if s.pooled_by_class else None,
            mean=view["mean"],
            std=view["std"],
            blocks=tuple(blocks),
            norm=Norm(view["norm.weight"], view["norm.bias"]),
            head=Linear(view["head.weight"], view["head.bias"]),
            heads=s.heads,
            image_size=s.image_size,
            patch_size=s.patch_size,
            kept=None if self.kept is None else self.kept.long(),
            eps=s.eps,
        )

    def __call__(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, classes]
        """Logits of the first side in plain torch, where no kernel takes it."""
        parts = self.parts()
        return F.linear(spec_scorer.features(parts, images), parts.head.weight, parts.head.bias)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the buffers to one safetensors file, all of it or nothing.

        >>> import tempfile
        >>> packed = Packed(Shape(32, 1, 2, 128, 16, 1, 28, 7, 10, False, False, 1e-5), sides=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     packed.save(f"{folder}/packed.safetensors")
        ...     Packed.load(f"{folder}/packed.safetensors").shape == packed.shape
        True
        """
        options = {"channels_last": self.channels_last, "fp8": self.fp8}
        config = {"shape": self.shape._asdict(), "sides": len(self.patch)} | options
        files.write(path, KIND, config, self._state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Packed:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, foreign, of another kind or of another format version.
            FileNotFoundError: there is no such file.

        >>> Packed.load("nowhere.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: no model file at nowhere.safetensors
        """

        def empty(config: dict[str, Any]) -> Packed:
            return cls(Shape(**config.pop("shape")), device="meta", **config)

        like, tensors = files.read(path, KIND, empty, device)
        expected = {name: (t.shape, t.dtype) for name, t in like._state().items()}
        if {name: (t.shape, t.dtype) for name, t in tensors.items()} != expected:
            raise ValueError(f"{path} must hold the buffers of {like.shape}, got others")
        options = {"channels_last": like.channels_last, "fp8": like.fp8}
        packed = cls(like.shape, len(like.patch), device, **options)
        for name, buffer in packed._state().items():
            buffer.copy_(tensors[name])
        packed._mark()
        return packed

    def _state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in BUFFERS if getattr(self, name) is not None}


def _carve(
    dtype: torch.dtype,
    device: torch.device | str,
    *shapes: tuple[int, ...],
) -> tuple[Tensor, list[Tensor]]:
    """Zeros, and the parts of it of those shapes, each at a multiple of 64 numbers."""
    sizes = [padded(math.prod(shape), 64) for shape in shapes]
    flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
    pieces = zip(flat.split(sizes), shapes, strict=True)
    return flat, [piece[: math.prod(shape)].view(shape) for piece, shape in pieces]
