# SPDX-License-Identifier: Apache-2.0
"""One set of weights at several patch sizes, and on a share of the patches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import activesel
from activesel.ledger import forward_flops
from activesel.models import load, save, vit
from activesel.models.flexi import bilinear, patch_resize, spread

sides = st.integers(1, 24)


def small(size="nano", **changed):
    torch.manual_seed(0)
    shapes = {"image_size": 32, "patch": 8, "channels": 2, "classes": 5} | changed
    return vit(size, **shapes)


def resized(x, side):
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)


@settings(deadline=None)
@given(old=sides, new=sides)
def test_bilinear_is_torchs(old, new):
    x = torch.randn(2, 3, old, old, dtype=torch.float64)
    b = torch.from_numpy(bilinear(old, new))
    torch.testing.assert_close(b @ x @ b.T, resized(x, new))


@settings(deadline=None)
@given(old=sides, new=sides)
def test_a_larger_patch_gives_the_same_embedding_of_the_resized_picture(old, new):
    old, new = sorted((old, new))
    x, w = torch.randn(2, 3, old, old, dtype=torch.float64)
    p = torch.from_numpy(patch_resize(old, new))
    larger = resized(x.unsqueeze(0), new)[0]
    torch.testing.assert_close((larger * (p @ w @ p.T)).sum(), (x * w).sum())


@settings(deadline=None)
@given(old=sides, new=sides)
def test_a_smaller_patch_is_the_least_squares(old, new):
    new, old = sorted((old, new))
    w = torch.randn(old, old, dtype=torch.float64)
    p, b = torch.from_numpy(patch_resize(old, new)), torch.from_numpy(bilinear(old, new))
    error = b.T @ (p @ w @ p.T) @ b - w  # of <B x, w'> = <x, w>, for every x
    torch.testing.assert_close(b @ error @ b.T, torch.zeros(new, new, dtype=torch.float64))


@pytest.mark.parametrize("pool", ["mean", "class"])
def test_a_resized_picture_has_the_same_tokens(pool):
    """Twice the picture in patches twice the size, seen through the whole of the model."""
    model = small(pool=pool).double()
    images = torch.rand(3, 2, 4, 8, 4, 8, dtype=torch.float64)  # patch by patch: B stays inside
    patches = images.permute(0, 1, 2, 4, 3, 5).reshape(-1, 1, 8, 8)
    larger = resized(patches, 16).reshape(3, 2, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5)
    twice = small(pool=pool, image_size=64, patch=16).double()
    weight, _ = model.at(16)._view.resize(model.patch.weight, model.position, model.config)
    twice.load_state_dict(model.state_dict() | {"patch.weight": weight})
    torch.testing.assert_close(
        twice(larger.reshape(3, 2, 64, 64)), model(images.reshape(3, 2, 32, 32))
    )


def test_positions_are_resized_as_pictures_and_the_class_token_keeps_its_own():
    model = small(pool="class")
    _, position = model.at(16)._view.resize(model.patch.weight, model.position, model.config)
    grid = model.position[0, 1:].T.reshape(1, -1, 4, 4)
    torch.testing.assert_close(position[0, 1:], resized(grid, 2)[0].flatten(1).T)
    assert torch.equal(position[:, 0], model.position[:, 0])


def test_the_native_patch_gives_the_same_numbers():
    model, images = small(), torch.randint(256, (3, 2, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.at(8)(images), model(images))
    assert torch.equal(model.at(16).at(8)(images), model(images))
    assert not torch.allclose(model.at(16)(images), model(images))


@pytest.mark.parametrize("patch, drop", [(16, 0.0), (4, 0.5), (32, 0.0)])
@pytest.mark.parametrize("pool", ["mean", "class"])
def test_training_a_view_trains_the_model(pool, patch, drop):
    model, images = small(pool=pool), torch.rand(4, 2, 32, 32)
    view = model.at(patch, drop)
    before = model(images)
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))
    torch.optim.SGD(view.parameters(), lr=0.1).zero_grad()
    view(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (model.patch.weight, model.position))
    torch.optim.SGD(view.parameters(), lr=0.1).step()
    assert not torch.allclose(model(images), before)


def test_a_view_follows_its_model_and_a_copy_does_not():
    model, images = small(), torch.rand(2, 2, 32, 32)
    view = model.at(16)
    apart = copy.deepcopy(view)
    before = view(images)
    assert torch.equal(apart(images), before)
    model.load_state_dict(small("nano").double().state_dict(), assign=True)
    with torch.no_grad():
        model.patch.weight.neg_()
    assert view(images.double()).dtype == torch.float64
    assert torch.equal(apart(images), before)


@pytest.mark.parametrize("size", ["micro", "Ti"])
def test_coarse_and_dropped_patches_cost_what_their_number_says(size):
    with torch.device("meta"):
        model = vit(size, image_size=64, patch=8, channels=1, classes=8)
    cost = {p: forward_flops(model.at(p), (1, 64, 64)) for p in (8, 16)}
    assert cost[8] == forward_flops(model, (1, 64, 64))
    assert 0.18 < cost[16] / cost[8] < 0.32  # attention falls faster, a larger patch costs more
    half = forward_flops(model.at(8, drop=0.5), (1, 64, 64))
    assert 0.4 < half / cost[8] < 0.52


def test_only_kept_patches_are_looked_at():
    model, images = small(patch=4), torch.rand(2, 2, 32, 32)
    view = model.at(4, drop=0.75, seed=3)
    kept = spread(8, 0.75, seed=3)
    assert len(kept) == 16
    mask = torch.zeros(64)
    mask[kept] = 1
    mask = mask.reshape(1, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    elsewhere = images * mask + torch.rand_like(images) * (1 - mask)
    assert torch.equal(view(elsewhere), view(images))
    assert not torch.allclose(view(images * (1 - mask)), view(images))
    assert torch.equal(view(images), model.at(4, drop=0.75, seed=3)(images))


@settings(deadline=None)
@given(side=st.integers(1, 16), drop=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
def test_patches_kept_are_as_many_as_asked_for(side, drop, seed):
    kept = spread(side, drop, seed)
    assert len(kept) == max(1, round((1 - drop) * side**2))
    assert kept.unique().equal(kept) and kept[0] >= 0 and kept[-1] < side**2


def test_every_patch_is_kept_by_its_share_of_seeds_and_none_is_far_from_one():
    count = torch.zeros(64)
    for seed in range(200):
        kept = spread(8, 0.75, seed)
        count[kept] += 1
        per_quarter = torch.bincount(kept // 32 * 2 + kept % 8 // 4, minlength=4)
        assert per_quarter.min() >= 3, "4 on average"
    assert count.min() >= 35 and count.max() <= 65, "50 on average"


def test_views_are_scored_and_saved_like_models(tmp_path):
    model, images = small(), torch.rand(6, 2, 32, 32)
    view, targets = model.at(16), torch.arange(6) % 5
    scores = activesel.score(online=activesel.Forward(view, images), targets=targets)
    expected = F.cross_entropy(view(images), targets, reduction="none")
    torch.testing.assert_close(scores, expected)
    save(view, tmp_path / "view.safetensors")
    back = load(tmp_path / "view.safetensors")
    assert back.config.patch == 8 and torch.equal(back(images), model(images))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"patch": 12}, ValueError, "image_size must be a multiple of patch=12, got 32"),
        ({"patch": 0}, ValueError, "patch must be at least 1, got 0"),
        ({"patch": 8.0}, TypeError, "patch must be an int, got float"),
        ({"patch": 8, "drop": 1.0}, ValueError, r"drop must be in \[0, 1\), got 1.0"),
        ({"patch": 8, "drop": float("nan")}, ValueError, "got nan"),
    ],
)
def test_wrong_views_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        small().at(**settings)
