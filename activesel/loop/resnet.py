# SPDX-License-Identifier: Apache-2.0
"""A residual network for small images, as wide as one can afford."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and the way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.around = nn.Sequential()
        if stride > 1 or before != width:
            self.around.append(nn.Conv2d(before, width, 1, stride, bias=False))
            self.around.append(nn.BatchNorm2d(width))

    def forward(
        self,
        x: Tensor,  # [B, before, H, W]
    ) -> Tensor:  # [B, width, H / stride, W / stride]
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.around(x))


class ResNet(nn.Module):
    """ResNet-18 with a stem for small images: 3 x 3, stride 1, no pooling.

    Stages are `width`, 2, 4 and 8 times `width` channels wide. Image statistics are buffers, and
    uint8 images are divided by 255, so a saved model needs no preprocessing.

    Args:
        width: channels of the first stage; 64 is ResNet-18.
        channels: of the images.
        classes: outputs.
        mean, std: image statistics per channel, for images in [0, 1].
        blocks: of each stage.

    Raises:
        ValueError: sizes that are not positive, or statistics of another number of channels.

    Source: He et al. 2016 (arXiv 1512.03385); the stem as usual for CIFAR.

    >>> model = ResNet(4, channels=3, classes=10)
    >>> model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([2, 10])
    """

    mean: Tensor  # [1, C, 1, 1] float32
    std: Tensor  # [1, C, 1, 1] float32

    def __init__(
        self,
        width: int = 64,
        *,
        channels: int = 3,
        classes: int = 10,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        sizes = {"width": width, "channels": channels, "classes": classes, "blocks": min(blocks)}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name, given in (("mean", mean or (0.5,) * channels), ("std", std or (0.5,) * channels)):
            if len(given) != channels:
                raise ValueError(f"{name} must hold {channels} numbers, got {len(given)}")
            self.register_buffer(name, torch.tensor(given).view(1, -1, 1, 1))
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages, before = nn.Sequential(), width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                self.stages.append(Block(before, width << stage, stride))
                before = width << stage
        self.head = nn.Linear(before, classes)
        for weight in self.parameters():
            if weight.ndim == 4:  # on CPUs this halves the time of a training step
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def forward_features(
        self,
        images: Tensor,  # [B, C, H, W] uint8, or float in [0, 1]
    ) -> Tensor:  # [B, D] float
        x = images.to(self.stem.weight.dtype)
        x = x / 255 if images.dtype == torch.uint8 else x
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.stages(F.relu(self.norm(self.stem(x)))).mean(dim=(2, 3))

    def forward(
        self,
        images: Tensor,  # [B, C, H, W] uint8, or float in [0, 1]
    ) -> Tensor:  # [B, classes] float
        return self.head(self.forward_features(images))
