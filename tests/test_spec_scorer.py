# SPDX-License-Identifier: Apache-2.0
"""The specification of the one-launch scorer is what `ViT` computes, and says what a ViT may be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from activesel import spec_scorer
from activesel.models.vit import ViT, ViTConfig
from activesel.packing import Packed

# Width, depth, heads, image size, patch, channels, pool: odd token counts, padded widths and heads.
FAMILIES = [
    (32, 1, 2, 28, 7, 1, "mean"),
    (48, 2, 2, 15, 3, 3, "class"),
    (96, 2, 3, 28, 4, 3, "mean"),
    (192, 2, 3, 16, 8, 3, "class"),
    (32, 12, 1, 32, 16, 2, "class"),
]


def build(width, depth, heads, image_size, patch, channels, pool, seed=0):
    """Weights far from their initialisation, where attention and GELU are nearly linear."""
    torch.manual_seed(seed)
    config = ViTConfig(width, depth, heads, image_size, patch, channels, 7, pool)
    model = ViT(config, tuple(torch.rand(channels).tolist()), (0.3,) * channels)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pictures(model, rows=3, dtype=torch.uint8):
    c = model.config
    images = torch.randint(0, 256, (rows, c.channels, c.image_size, c.image_size))
    return images.to(dtype) if dtype == torch.uint8 else torch.rand(images.shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@torch.no_grad()
def test_features_are_those_of_the_model(family, dtype):
    model = build(*family).double()
    images = pictures(model, dtype=dtype)
    expected = model.forward_features(images)
    parts, options = model.parts(), {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(spec_scorer.features(parts, images), expected, **options)
    last = spec_scorer.features(parts, images.permute(0, 2, 3, 1).contiguous(), channels_last=True)
    torch.testing.assert_close(last, expected, **options)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize(("patch", "drop"), [(8, 0.0), (4, 0.5), (16, 0.3), (2, 0.9)])
@torch.no_grad()
def test_features_of_a_view_are_those_of_the_view(pool, patch, drop):
    model = build(48, 2, 3, 32, 4, 3, pool).double().at(patch, drop=drop, seed=1)
    images = pictures(model)
    found = spec_scorer.features(model.parts(), images)
    torch.testing.assert_close(found, model.forward_features(images), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    heads=st.integers(1, 4),
    head=st.integers(1, 24),
    grid=st.integers(1, 5),
    patch=st.integers(1, 5),
    channels=st.integers(1, 4),
    pool=st.sampled_from(["mean", "class"]),
)
@torch.no_grad()
def test_any_shape(heads, head, grid, patch, channels, pool):
    model = build(heads * head, 1, heads, grid * patch, patch, channels, pool).double()
    images = pictures(model, rows=2)
    found = spec_scorer.features(model.parts(), images)
    torch.testing.assert_close(found, model.forward_features(images), rtol=0, atol=1e-12)


@torch.no_grad()
def test_pixels_are_exact_in_fp16_and_the_rest_is_rounded():
    model = build(*FAMILIES[2])
    images, seen = pictures(model), []

    def watch(x):
        seen.append(x)
        return spec_scorer.half(x)

    found = spec_scorer.features(model.parts(), images, rounded=watch)
    exact = spec_scorer.features(model.parts(), images)
    assert torch.equal(seen[0], spec_scorer.half(seen[0]))
    assert len(seen) == 1 + 7 * model.config.depth
    assert 1e-6 < (found - exact).abs().max() < 1e-2
    fp8 = spec_scorer.features(
        model.parts(), images, rounded=spec_scorer.half, operand=spec_scorer.e4m3
    )
    assert (fp8 - exact).abs().max() > 10 * (found - exact).abs().max()


@torch.no_grad()
def test_half_precision_models_are_computed_in_fp32():
    model = build(*FAMILIES[0]).bfloat16()
    images = pictures(model)
    found = spec_scorer.features(model.parts(), images)
    assert found.dtype == torch.float32
    expected = spec_scorer.features(model.double().parts(), images)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


class Quick(nn.Module):
    def forward(self, x):
        return x


class Own(ViT):
    pass


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.blocks[1].up)


def replaced(name, module):
    def change(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)

    return change


REFUSED = {
    "the scorer must be ViT, got Own": lambda m: setattr(m, "__class__", Own),
    "the scorer must have no hooks": lambda m: m.register_forward_hook(print),
    "blocks must be ModuleList, got Sequential": lambda m: setattr(
        m, "blocks", nn.Sequential(*m.blocks)
    ),
    "blocks.1 must be Block, got Quick": replaced("blocks.1", Quick()),
    "blocks.0.norm1 must be LayerNorm, got RMSNorm": replaced("blocks.0.norm1", nn.RMSNorm(32)),
    "blocks.1.norm2 must have weight and bias": replaced(
        "blocks.1.norm2", nn.LayerNorm(32, bias=False)
    ),
    "norm must be LayerNorm, got Identity": replaced("norm", nn.Identity()),
    "blocks.0.norm1 must have eps 0.1 as norm has, got 1e-05": replaced(
        "norm", nn.LayerNorm(32, eps=0.1)
    ),
    "blocks.1.up must be Linear, got ParametrizedLinear": parametrised,
    "blocks.1.out must have no hooks": lambda m: m.blocks[1].out.register_forward_pre_hook(print),
    "blocks.0.down must have no hooks": lambda m: setattr(m.blocks[0].down, "forward", print),
    "blocks.0 must have 2 heads, got 4": lambda m: setattr(m.blocks[0], "heads", 4),
    "patch must be Linear, got Conv2d": replaced("patch", nn.Conv2d(1, 32, 7)),
    "head must be Linear, got Sequential": replaced("head", nn.Sequential()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_plain_vit_is_refused_by_its_layer(message):
    model = build(32, 2, 2, 28, 7, 1, "mean")
    model.parts()
    REFUSED[message](model)
    with pytest.raises(TypeError, match=message):
        model.parts()


def test_parts_share_memory():
    model = build(32, 1, 2, 28, 7, 1, "class")
    parts = model.parts()
    assert parts.blocks[0].up.weight is model.blocks[0].up.weight
    assert parts.position.data_ptr() == model.position.data_ptr()
    assert parts.token.data_ptr() == model.token.data_ptr()


def test_a_layer_of_another_size_is_named():
    model = build(32, 2, 2, 28, 7, 1, "mean")
    model.blocks[1].up, model.blocks[1].down = nn.Linear(32, 64), nn.Linear(64, 32)
    with pytest.raises(ValueError, match=r"blocks.1.up.weight must be \[128, 32\], got \[64, 32\]"):
        Packed.of([model.parts()])
