# SPDX-License-Identifier: Apache-2.0
"""Image and text towers: embeddings of length 1, padding that changes nothing, losses that fall."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import activesel
from activesel.models import (
    SIZES,
    TEXT_SIZES,
    DualConfig,
    DualEncoder,
    TextConfig,
    ViT,
    ViTConfig,
    contrastive_loss,
    dual,
    load,
    save,
    vit,
)


def small(size="nano", **changed):
    torch.manual_seed(0)
    shapes = {"image_size": 32, "patch": 8, "channels": 1, "vocabulary": 50, "length": 8}
    return dual(size, **shapes | changed)


def batch(rows=6, length=8):
    images = torch.randint(256, (rows, 1, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 50, (rows, length))
    return images, tokens


def pairs(rows=7, width=5, dtype=torch.float64):
    z = F.normalize(torch.randn(2, rows, width, dtype=dtype), dim=2).requires_grad_()
    scale = torch.tensor([12.0], dtype=dtype, requires_grad=True)
    return activesel.Pairs(*z, scale, torch.tensor([-3.0], dtype=dtype, requires_grad=True)), z


def test_every_size_of_the_image_tower_has_a_text_tower():
    assert list(TEXT_SIZES) == list(SIZES)
    for size in SIZES:
        with torch.device("meta"):
            model = dual(size, vocabulary=100, length=8)
        assert model.config.image.classes == model.config.text.embed == TEXT_SIZES[size][0]
        towers = [sum(p.numel() for p in t.blocks.parameters()) for t in (model.image, model.text)]
        assert towers[1] <= towers[0]


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_embeddings_have_length_1_and_scale_starts_at_10(pool):
    out = small(pool=pool)(*batch())
    assert type(out) is activesel.Pairs
    for embeddings in (out.image, out.text):
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    assert out.scale.shape == out.bias.shape == (1,)
    assert out.scale.item() == pytest.approx(10) and out.bias.item() == -10
    assert activesel.score(online=out, loss="sigmoid").isfinite().all()


def test_padding_changes_nothing():
    model = small("micro")
    tokens = torch.tensor([[3, 4, 5], [7, 0, 0], [0, 0, 0]])
    wide = F.pad(tokens, (0, 5))
    torch.testing.assert_close(model.text(wide), model.text(tokens))
    torch.testing.assert_close(model.text(wide[:1, :4]), model.text(tokens[:1]))
    assert not torch.allclose(model.text(wide[:1]), model.text(torch.tensor([[4, 3, 5]])))


def test_a_caption_of_padding_has_an_embedding_of_its_own():
    model = small("micro")
    images, tokens = batch(3)
    tokens[1] = 0
    text = model(images, tokens).text
    assert text.isfinite().all() and text[1].norm().item() == pytest.approx(1)
    contrastive_loss(model(images, tokens)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_rows_do_not_know_of_each_other():
    model, (images, tokens) = small(), batch()
    tokens[2:, 4:] = 0
    whole, part = model(images, tokens), model(images[2:4], tokens[2:4])
    torch.testing.assert_close(whole.image[2:4], part.image)
    torch.testing.assert_close(whole.text[2:4], part.text)


def oracle(p, loss):
    """The losses with every pair written out."""
    total, rows = 0.0, len(p.image)
    x = [[(p.scale * (z @ t)).squeeze() for t in p.text] for z in p.image]
    for i in range(rows):
        if loss == "sigmoid":
            for j in range(rows):
                sign = 1 if i == j else -1
                total = total - F.logsigmoid(sign * (x[i][j] + p.bias)).squeeze()
        else:
            row, column = torch.stack(x[i]), torch.stack([x[j][i] for j in range(rows)])
            total = total + (row.logsumexp(0) + column.logsumexp(0)) / 2 - x[i][i]
    return total / rows


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_losses_and_gradients_are_those_written_out(loss):
    p, z = pairs()
    leaves = (z, p.scale) if loss == "softmax" else (z, p.scale, p.bias)
    ours, expected = contrastive_loss(p, loss), oracle(p, loss)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)
    )


def test_extreme_scales_stay_finite():
    z = F.normalize(torch.randn(2, 9, 4), dim=2)
    for loss in ("sigmoid", "softmax"):
        assert contrastive_loss(activesel.Pairs(*z, 1e4, -10.0), loss).isfinite()
    with pytest.raises(ValueError, match='loss must be "sigmoid" or "softmax", got \'dot\''):
        contrastive_loss(activesel.Pairs(*z, 1.0), "dot")


def learnable(rows, seed):
    """Captions of three words, pictures that are the mean of what the words look like."""
    looks = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    looks = F.interpolate(looks, 32, mode="bilinear")
    g = torch.Generator().manual_seed(seed)
    words = torch.rand(rows, 40, generator=g).argsort(1)[:, :3]
    noise = 0.2 * torch.randn(rows, 1, 32, 32, generator=g)
    images = (0.35 * (looks[words].mean(1) + noise) + 0.5).clamp(0, 1)
    return (255 * images).to(torch.uint8), F.pad(words + 2, (0, 3))


@pytest.mark.parametrize("size, loss", [("micro", "sigmoid"), ("nano", "softmax")])
def test_training_at_two_patch_sizes_learns_at_both(size, loss):
    images, tokens = learnable(2000, seed=1)
    held = learnable(100, seed=2)
    model = small(size, patch=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(80):
        rows = torch.randint(2000, (64,))
        value = contrastive_loss(model.at((16, 32)[step % 2])(images[rows], tokens[rows]), loss)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    for patch in (16, 32):
        with torch.no_grad():
            out = model.at(patch)(*held)
        nearest = (out.image @ out.text.T).topk(10).indices
        hits = (nearest == torch.arange(100)[:, None]).any(1).float().mean()
        assert hits > 0.3, f"recall at 10 of 100, patch {patch}: chance is 0.1"


def test_a_view_shares_everything_but_the_patch_size():
    model, (images, tokens) = small(), batch()
    view = model.at(16, drop=0.25, seed=1)
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    whole, coarse = model(images, tokens), view(images, tokens)
    assert torch.equal(coarse.text, whole.text)
    assert torch.equal(coarse.image, F.normalize(model.image.at(16, 0.25, 1)(images), eps=1e-6))
    assert torch.equal(model(images, tokens).image, whole.image), "the model is as it was"
    assert torch.equal(model.at(8)(images, tokens).image, whole.image)
    contrastive_loss(coarse).backward()
    assert model.image.patch.weight.grad.any() and model.log_scale.grad.any()
    assert torch.equal(copy.deepcopy(view)(images, tokens).image, coarse.image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_the_same_model(tmp_path, dtype):
    path = tmp_path / "dual.safetensors"
    model = small(pool="class", mean=0.9, std=0.25).to(dtype)
    save(model.at(16), path)
    back = load(path, kind=DualEncoder)
    assert type(back) is DualEncoder and back.config == model.config
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())
    images, tokens = batch()
    images = (images / 255).to(dtype)
    assert torch.equal(back(images, tokens).image, model(images, tokens).image)
    assert torch.equal(back(images, tokens).text, model(images, tokens).text)
    assert all(p.requires_grad for p in back.parameters())


def test_files_of_the_other_kind_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save(small(), path)
    with pytest.raises(ValueError, match="for a vit, got: format 1, model 'dual'"):
        load(path)
    with pytest.raises(TypeError, match="kind must be ViT or DualEncoder"):
        load(path, kind=torch.nn.Linear)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(path, kind=DualEncoder)
    save(vit("mu", image_size=28, patch=7, channels=1), path)
    with pytest.raises(ValueError, match="for a dual, got: format 1, model 'vit'"):
        load(path, kind=DualEncoder)
    assert type(load(path, kind=ViT)) is ViT


@pytest.mark.parametrize("config", [{}, {"image": {}, "text": {}}, {"image": 1, "text": 2}, []])
def test_headers_that_name_no_shapes_are_refused(tmp_path, config):
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    content = json.dumps({"format": 1, "model": "dual", "config": config})
    save_file({"weight": torch.zeros(2)}, path, metadata={"activesel": content})
    with pytest.raises(ValueError, match="must hold an 'activesel' header of format 1 for a dual"):
        load(path, kind=DualEncoder)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, t: (x, t.int()), TypeError, "tokens must be int64, got torch.int32"),
        (lambda x, t: (x, t.float()), TypeError, "tokens must be int64, got torch.float32"),
        (lambda x, t: (x, t[:, 0]), ValueError, r"tokens must be \[B, L\], L in \[1, 8\], got"),
        (lambda x, t: (x, t[:, :0]), ValueError, r"got \[6, 0\]"),
        (lambda x, t: (x, t.repeat(1, 2)), ValueError, r"got \[6, 16\]"),
        (lambda x, t: (x, t + 50), IndexError, "index out of range"),
        (lambda x, t: (x, t[:4]), ValueError, r"tokens must have as many rows as images \(6\)"),
        (lambda x, t: (x[:, :, :16], t), ValueError, r"x must be \[B, 1, 32, 32\]"),
        (lambda x, t: (x.long(), t), TypeError, "x must be uint8 or floating"),
    ],
)
def test_wrong_batches_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        small()(*change(*batch()))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"size must be one of femto, .* got 'XXL'"):
        small("XXL")
    with pytest.raises(ValueError, match="image_size must be a multiple of patch=12, got 32"):
        small().at(12)
    with pytest.raises(ValueError, match="vocabulary must be at least 1, got 0"):
        small(vocabulary=0)
    with pytest.raises(TypeError, match="length must be an int, got float"):
        small(length=8.0)
    image = ViTConfig(32, 2, 2, classes=16)
    with pytest.raises(ValueError, match=r"text\.embed must be image\.classes=16, got 32"):
        DualConfig(image, TextConfig(32, 1, 2, vocabulary=9, length=4, embed=32))


def test_scale_is_learnt_in_the_log_domain():
    model = small()
    with torch.no_grad():
        model.log_scale.fill_(math.log(50.0))
    assert model(*batch()).scale.item() == pytest.approx(50)
