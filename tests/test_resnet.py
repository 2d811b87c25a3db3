# SPDX-License-Identifier: Apache-2.0
"""The residual network: ResNet-18's size, its preprocessing, and what it refuses."""

import pytest
import torch
from torch import nn

from activesel.ledger import forward_flops
from activesel.loop.resnet import ResNet


def test_sixty_four_wide_it_is_resnet_18():
    model = ResNet(64, channels=3, classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # He et al.'s, stem for CIFAR
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 17
    pixels, first = 32 * 32, 4 * 9 * 64**2  # every later stage halves both sides, doubles channels
    later = 3 * pixels // 4 * (9 * 64 * 128 + 3 * 9 * 128**2 + 64 * 128)
    assert forward_flops(model, (3, 32, 32)) == 2 * (pixels * (27 * 64 + first) + later + 512 * 10)


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32), (3, 33)])
def test_images_of_any_size_give_logits_with_gradients(channels, side):
    model = ResNet(2, channels=channels, classes=7, blocks=(1, 1))
    out = model(torch.rand(3, channels, side, side))
    out.sum().backward()
    assert out.shape == (3, 7) and all(p.grad is not None for p in model.parameters())
    assert model.forward_features(torch.rand(3, channels, side, side)).shape == (3, 4)


def test_bytes_are_what_floats_in_0_1_are():
    model = ResNet(2, channels=3, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4), blocks=(1,)).eval()
    images = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images / 255))
    plain = ResNet(2, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, blocks=(1,)).eval()
    plain.load_state_dict({**model.state_dict(), "mean": plain.mean, "std": plain.std})
    by_hand = (images / 255 - model.mean) / model.std
    torch.testing.assert_close(model(images), plain(by_hand))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"classes": -1}, "classes must be at least 1, got -1"),
        ({"blocks": (2, 0)}, "blocks must be at least 1, got 0"),
        ({"mean": (0.5,)}, "mean must hold 3 numbers, got 1"),
    ],
)
def test_bad_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**{"width": 2, **settings})
