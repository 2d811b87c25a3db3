# SPDX-License-Identifier: Apache-2.0
"""Vision transformers by their tensors and shapes, whichever module those come from."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from torch import Tensor


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Norm(NamedTuple):
    weight: Tensor  # [D]
    bias: Tensor  # [D]


class Block(NamedTuple):
    norm1: Norm
    qkv: Linear  # rows: q of all heads, then k, then v
    out: Linear
    norm2: Norm
    up: Linear
    down: Linear


class Parts(NamedTuple):
    """A pre-norm ViT by its tensors, at the patch size it runs at."""

    patch: Linear  # [D, C * P * P], columns in the order channel, y, x
    position: Tensor  # [T, D] of the tokens kept, first that of the class token if there is one
    token: Tensor | None  # [D] class token, which is then what is pooled; None: the mean is
    mean: Tensor  # [C] of images in [0, 1]
    std: Tensor  # [C]
    blocks: tuple[Block, ...]
    norm: Norm
    head: Linear
    heads: int
    image_size: int
    patch_size: int
    kept: Tensor | None  # [n] int64 patches in raster order; None: all
    eps: float


# What is folded into something else comes before it, so that `check` names the cause.
OUTER = (
    *("mean", "std", "patch.weight", "patch.bias", "token", "position"),
    *("norm.weight", "norm.bias", "head.weight", "head.bias"),
)
BLOCK = tuple(f"{layer}.{kind}" for layer in Block._fields for kind in ("weight", "bias"))
LINEARS = ("qkv.weight", "out.weight", "up.weight", "down.weight")  # order of `Packed.scales`
_outer, _block = attrgetter(*OUTER), attrgetter(*BLOCK)


def tile(n: int) -> int:
    """Side of the tiles that a dimension of n is cut into.

    >>> [tile(n) for n in (8, 48, 96, 192)]
    [16, 64, 32, 64]
    """
    return _power(n) if n <= 64 else 64 if n % 64 == 0 else 32


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


class Shape(NamedTuple):
    """What a kernel is compiled and launched for; ``DP``, say, is D padded to whole tiles ``BD``.

    >>> shape = Shape(48, 6, 2, 192, 50, 3, 224, 32, 1000, True, False, 1e-5)
    >>> shape.grid, shape.DP, shape.HD, shape.AP, shape.KP, shape.weights
    (7, 64, 32, 64, 3072, 40960)
    """

    width: int  # D
    depth: int
    heads: int
    hidden: int  # H
    tokens: int  # T
    channels: int
    image_size: int
    patch_size: int
    classes: int  # C
    pooled_by_class: bool
    kept: bool  # not all patches
    eps: float

    @classmethod
    def of(cls, parts: Parts) -> Shape:
        """The shape of a model.

        Raises:
            ValueError: a tensor of it has another shape than the rest asks for.
        """
        tokens, width = parts.position.shape
        blocks, pooled = parts.blocks, parts.token is not None
        shape = cls(
            *(width, len(blocks), parts.heads, blocks[0].up.weight.shape[0] if blocks else 0),
            *(tokens, parts.mean.shape[0], parts.image_size, parts.patch_size),
            *(parts.head.weight.shape[0], pooled, parts.kept is not None, parts.eps),
        )
        if not blocks or parts.image_size % parts.patch_size or width % parts.heads:
            raise ValueError(f"depth, patch size and heads must fit each other, got {shape}")
        patches = shape.grid**2 if parts.kept is None else parts.kept.shape[0]
        if tokens != patches + pooled:
            raise ValueError(f"position must have {patches + pooled} rows, got {tokens}")
        for i, (tensor, size) in enumerate(zip(tensors(parts), shape.sizes, strict=True)):
            if tensor is not None and tensor.shape != size:
                name = shape.names[i]
                raise ValueError(f"{name} must be {list(size)}, got {list(tensor.shape)}")
        return shape

    @property
    def grid(self) -> int:  # patches along a side
        return self.image_size // self.patch_size

    @property
    def K(self) -> int:
        return self.channels * self.patch_size**2

    @property
    def BK(self) -> int:
        return min(64, _power(self.K))

    @property
    def KP(self) -> int:
        return padded(self.K, self.BK)

    @property
    def BD(self) -> int:
        return tile(self.width)

    @property
    def DP(self) -> int:
        return padded(self.width, self.BD)

    @property
    def HD(self) -> int:  # of one head
        return _power(self.width // self.heads)

    @property
    def A(self) -> int:  # of all heads
        return self.heads * self.HD

    @property
    def BA(self) -> int:
        return tile(self.A)

    @property
    def AP(self) -> int:
        return padded(self.A, self.BA)

    @property
    def HP(self) -> int:
        return padded(self.hidden, 64)

    @property
    def weights(self) -> int:
        """Numbers in the packed weights of a layer."""
        return (4 * self.AP + 2 * self.HP) * self.DP

    @property
    def vectors(self) -> int:
        """Numbers in the packed norms and biases of a layer."""
        return 6 * self.DP + 3 * self.AP + self.HP  # whole 16s, as each of them is

    @property
    def names(self) -> list[str]:
        """Of `tensors`."""
        return [*OUTER, *(f"blocks.{i}.{name}" for i in range(self.depth) for name in BLOCK)]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Of `tensors`."""
        d, h = self.width, self.hidden
        special: dict[str, tuple[int, ...]] = {
            **{"mean": (self.channels,), "std": (self.channels,), "patch.weight": (d, self.K)},
            **{"position": (self.tokens, d), "head.weight": (self.classes, d)},
            **{"head.bias": (self.classes,), "qkv.weight": (3 * d, d), "qkv.bias": (3 * d,)},
            **{"out.weight": (d, d), "up.weight": (h, d), "up.bias": (h,), "down.weight": (d, h)},
        }
        outer, block = ([special.get(name, (d,)) for name in names] for names in (OUTER, BLOCK))
        return outer + block * self.depth


def tensors(parts: Parts) -> list[Tensor | None]:
    """All of a model, `OUTER` and then `BLOCK` layer by layer."""
    return [*_outer(parts), *(tensor for block in parts.blocks for tensor in _block(block))]
