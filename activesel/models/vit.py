# SPDX-License-Identifier: Apache-2.0
"""A plain vision transformer with the scaling-study names, small enough to read in one go."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1
"""Version of the JSON header that `save` writes."""

SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (32, 2, 2),
    "micro": (64, 4, 2),
    "mini": (96, 4, 3),
    "mu": (32, 1, 2),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}
"""Width, depth and heads by name; the first three are meant for CPUs. The MLP is 4x as wide."""


@dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes the shapes of a `ViT`, and so what a weight file must carry.

    >>> ViTConfig(width=32, depth=2, heads=2, image_size=28, patch=7, channels=1).pool
    'mean'
    """

    width: int
    depth: int
    heads: int
    image_size: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    pool: Literal["mean", "class"] = "mean"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "image_size", "patch", "channels", "classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads={self.heads}, got width={self.width}"
            )
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of patch={self.patch}, got {self.image_size}"
            )
        if self.pool not in ("mean", "class"):
            raise ValueError(f"pool must be 'mean' or 'class', got {self.pool!r}")

    @property
    def tokens(self) -> int:
        """Sequence length inside the blocks, class token included.

        >>> ViTConfig(width=32, depth=2, heads=2, image_size=28, patch=7, pool="class").tokens
        17
        """
        return (self.image_size // self.patch) ** 2 + (self.pool == "class")


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,  # [B, T, D] float
    ) -> Tensor:  # [B, T, D]
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, tokens, width))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x


class ViT(nn.Module):
    """Vision transformer classifier: patches -> blocks -> pool -> linear head.

    logits = head(pool(norm(blocks(patch(x') + pos)))), with x' = (x - mean) / std, and x / 255
    first where x is uint8. Any image statistics are buffers, so a saved scorer needs no
    pre-processing of its own.

    Args:
        config: the shapes.
        mean, std: image statistics per channel (or one for all), for images in [0, 1].

    Raises:
        ValueError: the shapes do not fit together, or `std` is not positive.

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929); mean pooling as in Zhai et al. 2022.

    >>> model = ViT(ViTConfig(width=32, depth=2, heads=2, image_size=28, patch=7, channels=1))
    >>> model(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape
    torch.Size([3, 1000])
    """

    mean: Tensor  # [1, C, 1, 1] float32
    std: Tensor  # [1, C, 1, 1] float32

    def __init__(
        self,
        config: ViTConfig,
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
    ) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", _per_channel("mean", mean, config.channels))
        self.register_buffer("std", _per_channel("std", std, config.channels))
        width = config.width
        self.patch = nn.Linear(config.channels * config.patch**2, width)
        self.position = nn.Parameter(torch.empty(1, config.tokens, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if config.pool == "class" else None
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.position, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(
        self,
        x: Tensor,  # [B, C, H, W] uint8 in 0..255, or float in 0..1
    ) -> Tensor:  # [B, D]
        """Pooled and normalised features, the input of `head`.

        Raises:
            TypeError: images neither uint8 nor floating.
            ValueError: images of another shape than the model was built for.

        >>> vit("mu", classes=5).forward_features(torch.rand(2, 3, 224, 224)).shape
        torch.Size([2, 32])
        """
        c = self.config
        if x.shape[1:] != (c.channels, c.image_size, c.image_size):
            raise ValueError(
                f"x must be [B, {c.channels}, {c.image_size}, {c.image_size}], got {list(x.shape)}"
            )
        if x.dtype == torch.uint8:
            x = x.to(self.mean.dtype) / 255
        elif not x.is_floating_point():
            raise TypeError(f"x must be uint8 or floating, got {x.dtype}")
        x = (x - self.mean) / self.std
        side = c.image_size // c.patch
        x = x.reshape(-1, c.channels, side, c.patch, side, c.patch)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, c.channels * c.patch**2)
        x = self.patch(x)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = x[:, 0] if self.token is not None else x.mean(dim=1)
        features: Tensor = self.norm(x)
        return features

    def forward(
        self,
        x: Tensor,  # [B, C, H, W] uint8 in 0..255, or float in 0..1
    ) -> Tensor:  # [B, classes]
        """Logits of a batch of images; `head(forward_features(x))`."""
        logits: Tensor = self.head(self.forward_features(x))
        return logits


def _per_channel(name: str, value: float | tuple[float, ...], channels: int) -> Tensor:
    values = (value,) if isinstance(value, int | float) else tuple(value)
    if len(values) not in (1, channels):
        raise ValueError(f"{name} must hold 1 or {channels} numbers, got {len(values)}")
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std must be positive, got {min(values)}")
    return torch.tensor(values, dtype=torch.float32).expand(channels).clone().reshape(1, -1, 1, 1)


def vit(
    size: str,
    *,
    image_size: int = 224,
    patch: int = 16,
    channels: int = 3,
    classes: int = 1000,
    pool: Literal["mean", "class"] = "mean",
    mean: float | tuple[float, ...] = 0.5,
    std: float | tuple[float, ...] = 0.5,
) -> ViT:
    """Build a `ViT` of a named size, freshly initialised from torch's default generator.

    Args:
        size: a key of `SIZES`.
        image_size, patch: side lengths in pixels; the first a multiple of the second.
        channels, classes: input channels and outputs of the head.
        pool: "mean" over the tokens, or a "class" token.
        mean, std: image statistics, for images in [0, 1].

    Raises:
        ValueError: an unknown size, or shapes that do not fit together.

    >>> sum(p.numel() for p in vit("Ti", classes=1).parameters()) // 100_000  # 5.5 M
    55
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    width, depth, heads = SIZES[size]
    config = ViTConfig(width, depth, heads, image_size, patch, channels, classes, pool)
    return ViT(config, mean, std)


def save(
    model: ViT,
    path: str | os.PathLike[str],
) -> None:
    """Write weights and shapes to one safetensors file, all of it or nothing.

    Args:
        model: the model; its tensors are stored as they are (dtype kept).
        path: the file; its folder must exist.

    Raises:
        TypeError: `model` is not a `ViT`.

    >>> import tempfile
    >>> model = vit("mu", image_size=28, patch=7, channels=1, classes=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, f"{folder}/scorer.safetensors")
    ...     load(f"{folder}/scorer.safetensors").config == model.config
    True
    """
    if not isinstance(model, ViT):
        raise TypeError(f"model must be a ViT, got {type(model).__name__}")
    header = json.dumps({"format": FORMAT, "model": "vit", "config": asdict(model.config)})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
        save_file(tensors, temporary, metadata={"activesel": header})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
) -> ViT:
    """Read a model that `save` wrote.

    Args:
        path: the safetensors file.
        device: where the weights go.

    Raises:
        ValueError: the file is damaged, foreign, or of another format version.
        FileNotFoundError: there is no such file.

    >>> load("nowhere.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: no model file at nowhere.safetensors
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = (file.metadata() or {}).get("activesel")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from error
    config = _read_header(path, header)
    with torch.device("meta"):
        model = ViT(config)
    for name in ("mean", "std"):
        if name in tensors and tensors[name].shape == (1, config.channels, 1, 1):
            setattr(model, name, tensors[name])
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} must hold the weights of {config}, got: {error}") from error
    return model


def _read_header(path: str | os.PathLike[str], header: str | None) -> ViTConfig:
    expected = f"an 'activesel' header of format {FORMAT} for a vit"
    if header is None:
        raise ValueError(f"{path} must hold {expected}, got none")
    try:
        content: dict[str, Any] = json.loads(header)
        if content["format"] != FORMAT or content["model"] != "vit":
            raise ValueError(f"format {content['format']}, model {content['model']!r}")
        return ViTConfig(**content["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold {expected}, got: {error}") from error
