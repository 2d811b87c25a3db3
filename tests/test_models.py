# SPDX-License-Identifier: Apache-2.0
"""Models: their sizes, what they accept, and files that are whole or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from activesel.models import SIZES, ViTConfig, load, save, vit

# torch lists its constructors at the first use of a device context; poisoned ones must not be it.
with torch.device("meta"):
    torch.empty(0)

# Parameters in millions at 224 x 224 and patch 16, without the head.
PUBLISHED = {"mu": 0.044, "Ti": 5.5, "S": 21.7, "B": 85.8, "L": 303.0}


def tiny(**settings):
    return vit("mu", **{"image_size": 28, "patch": 7, "channels": 1, "classes": 10} | settings)


@pytest.mark.parametrize("size", PUBLISHED)
def test_named_sizes_have_the_published_number_of_parameters(size):
    with torch.device("meta"):
        model = vit(size, classes=1)
    body = sum(p.numel() for p in model.parameters()) - model.head.weight.numel() - 1
    assert body == pytest.approx(1e6 * PUBLISHED[size], rel=0.01)


def test_cpu_sizes_are_smaller_than_the_published_ones():
    width = {name: SIZES[name][0] for name in ("nano", "micro", "mini", "Ti")}
    assert list(width.values()) == sorted(width.values())


def test_uint8_and_float_images_give_the_same_logits():
    model, images = tiny(), torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(images.float() / 255))


def test_statistics_are_applied_to_images_in_0_to_1():
    torch.manual_seed(0)
    plain = tiny(mean=0.0, std=1.0)
    torch.manual_seed(0)
    shifted = tiny(mean=0.25, std=0.5)
    images = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(shifted(images), plain((images - 0.25) / 0.5))


def test_features_then_head_are_the_logits():
    model, images = tiny(pool="class"), torch.rand(4, 1, 28, 28)
    assert torch.equal(model(images), model.head(model.forward_features(images)))


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.rand(2, 3, 28, 28), ValueError, r"x must be \[B, 1, 28, 28\], got \[2, 3, 28, 28\]"),
        (torch.rand(28, 28), ValueError, r"got \[28, 28\]"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.int64), TypeError, "uint8 or floating, got torch.i"),
    ],
)
def test_wrong_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        tiny()(images)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"patch": 5}, "image_size must be a multiple of patch=5, got 28"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"pool": "max"}, "pool must be 'mean' or 'class', got 'max'"),
        ({"std": 0.0}, "std must be positive"),
        ({"mean": (0.1, 0.2)}, "mean must hold 1 or 1 numbers, got 2"),
    ],
)
def test_wrong_shapes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_unknown_size_and_wrong_heads_are_refused():
    with pytest.raises(ValueError, match=r"size must be one of femto, .* got 'XXL'"):
        vit("XXL")
    with pytest.raises(ValueError, match="width must be a multiple of heads=3, got width=32"):
        ViTConfig(width=32, depth=1, heads=3)
    with pytest.raises(TypeError, match="width must be an int, got float"):
        ViTConfig(width=32.0, depth=1, heads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_save_and_load_give_the_same_model(tmp_path, pool, dtype):
    model = tiny(pool=pool, mean=0.2860, std=0.3530).to(dtype)
    save(model, tmp_path / "scorer.safetensors")
    back = load(tmp_path / "scorer.safetensors")
    assert back.config == model.config
    expected = model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    images = torch.rand(2, 1, 28, 28, dtype=dtype)
    assert torch.equal(back(images), model(images))
    assert [file.name for file in tmp_path.iterdir()] == ["scorer.safetensors"]


def test_files_of_earlier_releases_load(tmp_path):
    """The header and the names of the tensors are a promise; this is what format 1 has held."""
    width, tensors = 8, {"mean": torch.full((1, 1, 1, 1), 0.3), "std": torch.ones(1, 1, 1, 1)}
    shapes = {"position": (1, 16, 8), "patch": (8, 49), "head": (3, 8), "norm": (8,)}
    layers = {"norm1": (8,), "qkv": (24, 8), "out": (8, 8), "norm2": (8,), "up": (32, 8)}
    layers["down"] = (8, 32)
    for name, shape in (shapes | {f"blocks.0.{n}": s for n, s in layers.items()}).items():
        if name == "position":
            tensors[name] = torch.randn(shape)
            continue
        tensors |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    config = {"width": width, "depth": 1, "heads": 2, "image_size": 28, "patch": 7, "channels": 1}
    metadata = {"activesel": header(config=config | {"classes": 3, "pool": "mean"})}
    save_file(tensors, tmp_path / "old.safetensors", metadata=metadata)
    model = load(tmp_path / "old.safetensors")
    assert model.config.width == width and torch.equal(model.mean, tensors["mean"])
    assert model(torch.zeros(2, 1, 28, 28)).isfinite().all()


def spoil(content, how):
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "no header":
        return content[:4]
    return b"not a model at all" if how == "text" else b""


@pytest.mark.parametrize("how", ["truncated", "no header", "text", "empty"])
def test_damaged_files_are_refused_by_name(tmp_path, how):
    path = tmp_path / "scorer.safetensors"
    save(tiny(), path)
    path.write_bytes(spoil(path.read_bytes(), how))
    with pytest.raises(ValueError, match=r"scorer\.safetensors must be a whole safetensors file"):
        load(path)


def header(**changes):
    config = {"width": 32, "depth": 1, "heads": 2, "image_size": 28, "patch": 7, "channels": 1}
    return json.dumps({"format": 1, "model": "vit", "config": config} | changes)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "must hold an 'activesel' header of format 1 for a vit, got none"),
        ({"activesel": "{"}, "must hold an 'activesel' header"),
        ({"activesel": header(format=2)}, "got: format 2"),
        ({"activesel": header(model="resnet")}, "model 'resnet'"),
        ({"activesel": header(config={"width": 32})}, "must hold an 'activesel' header"),
        ({"activesel": header()}, "must hold the weights of ViTConfig"),
    ],
)
def test_foreign_files_are_refused(tmp_path, metadata, message):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "scorer.safetensors"
    save(tiny(), path)
    before = path.read_bytes()
    with torch.device("meta"):
        hollow = tiny()  # no data: safetensors cannot write it
    with pytest.raises((NotImplementedError, RuntimeError, ValueError)):
        save(hollow, path)
    with pytest.raises(TypeError, match="model must be a ViT or DualEncoder, got L"):
        save(torch.nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["scorer.safetensors"]
