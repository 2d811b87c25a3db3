# SPDX-License-Identifier: Apache-2.0
"""What no kernel takes from pixels on: an error if asked by name, else the scorer's own forward."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from activesel import Forward, _triton, doctor, ops, score, select

if why := _triton.reason(torch.device("cpu")):
    pytest.skip(why, allow_module_level=True)

from scorers import CLASSES, IMAGES, TINY, Y, bytes_of, near, tiny, triton, vit
from scorers import taken as taken  # a fixture
from test_spec_scorer import Own, replaced

from activesel.kernels import routes

REFUSED = {
    "blocks.0.norm1 must be LayerNorm, got RMSNorm": replaced("blocks.0.norm1", nn.RMSNorm(16)),
    "the scorer must be ViT, got Own": lambda m: setattr(m, "__class__", Own),
    "blocks.0.up must have no hooks": lambda m: m.blocks[0].up.register_forward_hook(
        lambda module, x, out: out
    ),
    "blocks.0.qkv must be Linear, got ParametrizedLinear": lambda m: (
        nn.utils.parametrizations.weight_norm(m.blocks[0].qkv)
    ),
}


@pytest.fixture
def auto(monkeypatch):
    """On the CPU "auto" takes the kernel, as it does on a GPU."""
    monkeypatch.setattr(ops, "PREFERRED", {"cpu": ("triton",)})
    monkeypatch.setattr(routes, "faster", lambda *_: True)
    _triton.say_once.cache_clear()


@pytest.mark.parametrize("message", REFUSED)
def test_other_structures(auto, taken, caplog, message):
    """By name an error, under "auto" the scorer's own forward."""
    models = tiny()
    REFUSED[message](models[1])
    forwards = {"online": Forward(models[0], IMAGES), "reference": Forward(models[1], IMAGES)}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        score(**triton(**forwards))
    assert 'backend="auto" runs the scorer\'s own forward' in str(error.value)
    with caplog.at_level(logging.WARNING, logger="activesel"):
        for _ in range(2):
            found = score(**forwards, targets=Y)
    with torch.no_grad():
        each = [F.cross_entropy(m(IMAGES), Y, reduction="none") for m in models]
    torch.testing.assert_close(found, each[0] - each[1], rtol=1e-4, atol=1e-4)
    said = [r.message for r in caplog.records if message in r.message]
    assert len(said) == 1 and "the scorer's own forward is used instead" in said[0]
    assert not taken


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((208, 1, 13, *TINY[3:]), "width must be at most 192 .*got 208"),
        ((128, 1, 1, *TINY[3:]), "heads must be at most 64 wide .*got 128"),
        ((16, 1, 1, 80, 2, 3, "mean"), "tokens must be at most 1024 .*got 1600"),
    ],
)
def test_sizes_that_no_kernel_takes(auto, taken, caplog, sizes, said):
    model, images = vit(*sizes), bytes_of(2, sizes[3])
    given = dict(online=Forward(model, images), targets=Y[:2])
    for backend in ("auto", "triton"):
        near(score(**given, backend=backend), [model], images, Y[:2])
    assert len([r for r in caplog.records if re.search(said, r.message)]) == 1
    assert not taken


class Parted(nn.Module):
    """A model of the user's that has parts of another kind."""

    def __init__(self, parts):
        super().__init__()
        self.layer, self.parts = nn.Linear(192, CLASSES), parts

    def forward(self, x):
        return self.layer(x.flatten(1) / 255)


@pytest.mark.parametrize("parts", [nn.ModuleList(), lambda: [], "none"], ids=type)
def test_other_models_that_have_parts(auto, taken, parts):
    model = Parted(parts)
    forward = Forward(model, IMAGES)
    with torch.no_grad():
        want = F.cross_entropy(model(IMAGES), Y, reduction="none")
    for backend in ("auto", "triton"):
        torch.testing.assert_close(score(online=forward, targets=Y, backend=backend), want)
    assert not taken


def test_auto_takes_what_it_can(auto, taken):
    online, reference = (Forward(m, IMAGES) for m in tiny())
    near(score(online=online, reference=reference, targets=Y), [online.scorer, reference.scorer])
    assert taken == [2]


@pytest.mark.parametrize("sizes", [(32, *TINY[1:]), (16, 2, *TINY[2:]), (16, 1, 2, *TINY[3:])])
def test_pairs_of_two_shapes(auto, taken, sizes):
    models = [*tiny()[:1], vit(*sizes)]
    forwards = {"online": Forward(models[0], IMAGES), "reference": Forward(models[1], IMAGES)}
    with pytest.raises(ValueError, match=r"must have one shape, got .*Shape.* and .*Shape"):
        score(**triton(**forwards))
    near(score(**forwards, targets=Y), models)
    assert not taken


def test_a_pair_looks_at_the_same_images(auto, taken):
    models, other = tiny(), IMAGES.clone()
    online, reference = Forward(models[0], IMAGES), Forward(models[1], IMAGES[:])
    near(score(**triton(online=online, reference=reference)), models)
    reference = Forward(models[1], other)
    with pytest.raises(ValueError, match="must be given the same images"):
        score(**triton(online=online, reference=reference))
    near(score(online=online, reference=reference, targets=Y), models)
    assert taken == [2]


@pytest.mark.parametrize("name", ["online", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_are_not_finite(name, value):
    models = dict(zip(("online", "reference"), tiny(), strict=True))
    with torch.no_grad():
        models[name].blocks[0].up.weight[3, 5] = value
    forwards = {name: Forward(m, IMAGES) for name, m in models.items()}
    with pytest.raises(ValueError, match=rf"{name} blocks\.0\.up\.weight must be finite"):
        select(**triton(**forwards), k=3)
    with pytest.raises(ValueError, match=rf"{name} blocks\.0\.up\.weight must be finite"):
        score(**triton(**{name: forwards[name]}))


@pytest.mark.parametrize(
    ("images", "kind", "said"),
    [
        (bytes_of(11, 12), ValueError, r"online.images must be \[B, 3, 8, 8\] or \[B, 8, 8, 3\]"),
        (IMAGES[:, :2], ValueError, r"got \[11, 2, 8, 8\]"),
        (IMAGES[0], ValueError, r"got \[3, 8, 8\]"),
        (IMAGES.int(), TypeError, "online.images must be uint8, float32.*got torch.int32"),
        (IMAGES.double(), TypeError, "got torch.float64"),
    ],
)
def test_bad_images(images, kind, said):
    with pytest.raises(kind, match=said):
        score(**triton(online=Forward(tiny()[0], images)))


def test_a_scorer_elsewhere():
    with pytest.raises(RuntimeError, match="images must be on meta, got cpu"):
        score(**triton(online=Forward(tiny()[0].to("meta"), IMAGES)))


def test_bad_companions():
    forward = Forward(tiny()[0], IMAGES)
    with pytest.raises(ValueError, match=r"reference must have 11 rows, got 10"):
        score(**triton(online=forward, reference=torch.randn(10)))
    with pytest.raises(ValueError, match="targets must"):
        score(**triton(online=forward, targets=Y[:-1]))
    with pytest.raises(ValueError, match="targets must be given"):
        score(online=forward, backend="triton")
    with pytest.raises(TypeError, match="targets must"):
        score(**triton(online=forward, targets=Y.tolist()))


def test_no_images():
    forward = Forward(tiny()[0], IMAGES[:0])
    picked = select(**triton(online=forward, targets=Y[:0]), k=0, seed=0)
    assert picked.scores.shape == (0,) and picked.indices.shape == (0,)


def test_doctor_checks_it(monkeypatch):
    rows, found, worse = routes.rows, [], 0.0

    def wrong(*args):
        found[:] = found or [*rows(*args)]
        out, (indices, *rest) = found
        return out._replace(scores=out.scores + worse), (indices[backwards], *rest)

    monkeypatch.setattr(routes, "rows", wrong)
    cases = [(slice(None), 0.0, ""), (slice(None), 0.1, "scores are off by 1.0e-01")]
    cases.append((torch.arange(6, -1, -1), 0.0, "rows are not the specification's"))
    for backwards, worse, said in cases:  # noqa: B007
        assert doctor.check("triton", "scorer", torch.device("cpu")) == said
