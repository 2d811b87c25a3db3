# SPDX-License-Identifier: Apache-2.0
"""`Forward` operands that a kernel takes from pixels on: nothing but the way there is different."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from activesel import Forward, Head, Selector, _triton, operands, score, select

if why := _triton.reason(torch.device("cpu")):
    pytest.skip(why, allow_module_level=True)

from on_gpu import exact
from scorers import CLASSES, IMAGES, TINY, Y, bytes_of, losses, near, tiny, triton, vit
from scorers import taken as taken  # a fixture
from test_kernels_scorer import e4m3 as e4m3  # a fixture

from activesel.kernels import routes

# ---------------------------------------------------------------------------------- what it returns


def test_a_pair(taken):
    online, reference = models = tiny()
    given = triton(online=Forward(online, IMAGES), reference=Forward(reference, IMAGES))
    picked = select(**given, k=4, seed=3, step=5, offset=2, temperature=0.5)
    assert taken == [2]
    near(picked.scores, models)
    exact(picked, 4, seed=3, step=5, offset=2, temperature=0.5)
    assert torch.equal(score(**given), picked.scores)
    torch.testing.assert_close(
        score(**given | {"backend": "torch"}), picked.scores, rtol=0.02, atol=0.02
    )
    assert taken == [2, 2] and not picked.scores.requires_grad


@pytest.mark.parametrize("name", ["online", "reference"])
def test_one_side(taken, name):
    model = tiny()[0]
    sign = 1 if name == "online" else -1
    forward = {name: Forward(model, IMAGES)}
    picked = select(**triton(**forward), k=3, seed=0)
    near(sign * picked.scores, [model])
    exact(picked, 3)
    assert taken == [1]


OTHERS = {
    "losses": lambda: torch.randn(len(Y)),
    "bf16 losses": lambda: torch.randn(len(Y)).bfloat16(),
    "logits": lambda: torch.randn(len(Y), CLASSES),
    "a head": lambda: Head(torch.randn(len(Y), 24), torch.randn(CLASSES, 24), torch.randn(CLASSES)),
    "another forward": lambda: Forward(
        nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), IMAGES / 255
    ),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_against_other_operands(taken, kind, swapped):
    model, other = tiny()[0], OTHERS[kind]()
    sides = (other, Forward(model, IMAGES)) if swapped else (Forward(model, IMAGES), other)
    picked = select(**triton(online=sides[0], reference=sides[1]), k=3, seed=0, label_smoothing=0.1)
    theirs = score(online=other, targets=None if kind.endswith("losses") else Y,
                   label_smoothing=0.1, backend="torch")  # fmt: skip
    ours = picked.scores * (-1 if swapped else 1) + theirs
    torch.testing.assert_close(
        ours.double(), losses(model, label_smoothing=0.1), rtol=0.02, atol=0.02
    )
    exact(picked, 3)
    assert taken == [1]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_losses_and_targets(taken, loss):
    models, y = tiny(), Y.clone()
    y[4], y[7] = 6, -1
    online, reference = (Forward(m, IMAGES) for m in models)
    given = dict(online=online, reference=reference, targets=y, loss=loss, ignore_index=-1)
    given["label_smoothing"] = 0.2
    got, want = (score(**given, backend=name) for name in ("triton", "torch"))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.05, equal_nan=True)
    assert got.isnan().nonzero().flatten().tolist() == [7]
    y[2] = CLASSES
    with pytest.raises(ValueError, match="targets must be classes"):
        score(**given, backend="triton")
    assert len(taken) == 2


def test_whoever_asks_for_compilation_gets_it(monkeypatch, taken):
    monkeypatch.setattr(operands, "_compiled", lambda: operands._features)
    model = tiny()[0]
    near(score(**triton(online=Forward(model, IMAGES, compile=True))), [model])
    assert not taken


def test_soft_targets_are_left_to_the_heads(taken):
    models, y = tiny(), torch.rand(len(Y), CLASSES)
    online, reference = (Forward(m, IMAGES) for m in models)
    given = dict(online=online, reference=reference, targets=y, loss="sigmoid")
    torch.testing.assert_close(
        score(**given, backend="triton"), score(**given, backend="torch"), rtol=1e-4, atol=1e-4
    )
    assert not taken


@pytest.mark.parametrize(
    "kind", ["NHWC", "float NHWC", "channels last", "float", "bf16", "strided"]
)
def test_images(taken, kind):
    models = tiny()
    images = {
        "NHWC": lambda: IMAGES.permute(0, 2, 3, 1).contiguous(),
        "float NHWC": lambda: IMAGES.permute(0, 2, 3, 1) / 255,
        "channels last": lambda: IMAGES.contiguous(memory_format=torch.channels_last),
        "float": lambda: IMAGES / 255,
        "bf16": lambda: (IMAGES / 255).bfloat16(),
        "strided": lambda: IMAGES.repeat_interleave(3, 0)[::3],
    }[kind]()
    online, reference = (Forward(m, images) for m in models)
    found = score(**triton(online=online, reference=reference))
    seen = 255 * images.double() if kind == "bf16" else IMAGES
    near(found, models, seen)
    assert taken == [2]


def test_scorers_of_a_half_width(taken):
    models = [m.bfloat16() for m in tiny()]
    online, reference = (Forward(m, IMAGES) for m in models)
    near(score(**triton(online=online, reference=reference)), models)
    assert taken == [2]


@pytest.mark.parametrize("k", [0, len(Y)])
def test_every_k(k):
    forward = Forward(tiny()[0], IMAGES)
    exact(select(**triton(online=forward), k=k, seed=0), k)
    with pytest.raises(ValueError, match=r"k must be in \[0, 11\], got 12"):
        select(**triton(online=forward), k=len(Y) + 1)


def test_many_images_take_a_second_launch(monkeypatch):
    online, reference = (Forward(m, IMAGES) for m in tiny())
    one = select(**triton(online=online, reference=reference), k=5, seed=1)
    monkeypatch.setattr(routes, "LAST_PROGRAMS_ROWS", len(Y) - 1)
    two = select(**triton(online=online, reference=reference), k=5, seed=1)
    exact(two, 5, seed=1)
    assert torch.equal(one.keys, two.keys) and torch.equal(one.indices, two.indices)


@pytest.mark.parametrize("side", ["online", "reference", "both"])
def test_a_launch_per_phase(monkeypatch, taken, side):
    models = tiny()
    monkeypatch.setattr(routes, "one_launch", lambda packed: False)
    names = ("online", "reference") if side == "both" else (side,)
    sides = {name: Forward(m, IMAGES) for name, m in zip(names, models, strict=False)}
    picked = select(**triton(**sides), k=4, seed=0)
    near(picked.scores * (-1 if side == "reference" else 1), models[: len(names)])
    exact(picked, 4)
    assert not taken


@pytest.mark.usefixtures("e4m3")
def test_fp8(taken):
    models = tiny()
    online, reference = (Forward(m, IMAGES, fp8=True) for m in models)
    given = triton(online=online, reference=reference)
    found, exactly = score(**given), losses(models[0]) - losses(models[1])
    rms = float((found - exactly).norm() / exactly.norm())
    assert 1e-3 < rms < 0.3 and taken == [2]
    given["reference"] = Forward(models[1], IMAGES)
    with pytest.raises(ValueError, match="fp8 must be the same for both, got True and False"):
        score(**given)


# ----------------------------------------------------------------------------- what it leaves alone


def test_new_weights_are_used():
    """However they are changed: by an optimizer, in place, through `.data`, by loading."""
    models = tiny()
    online, reference = (Forward(m, IMAGES) for m in models)
    given, seen = triton(online=online, reference=reference), []

    def optimizer():
        opt = torch.optim.SGD(models[0].parameters(), lr=0.1)
        F.cross_entropy(models[0](IMAGES), Y).backward()
        opt.step()

    def in_place():
        with torch.no_grad():
            models[0].blocks[0].up.bias.add_(1.0)

    changes = {
        "nothing": lambda: None,
        "optimizer": optimizer,
        "in place": in_place,
        "data": lambda: models[1].blocks[0].out.weight.data.mul_(2),
        "norm": lambda: models[1].norm.weight.data.mul_(2),
        "mean": lambda: models[0].mean.add_(0.1),
        "loading": lambda: models[0].load_state_dict(vit(*TINY, seed=5).state_dict()),
        "replaced": lambda: setattr(models[0].head, "bias", nn.Parameter(torch.ones(CLASSES))),
    }
    for change in changes.values():
        change()
        found = score(**given)
        near(found, models)
        seen.append(tuple(found.tolist()))
    assert len(set(seen)) == len(changes)


def test_roles_are_not_mixed_up():
    a, b = tiny()
    forwards = {"a": Forward(a, IMAGES), "b": Forward(b, IMAGES)}
    single = {name: score(**triton(online=f)) for name, f in forwards.items()}
    for first, second in ("ab", "ba", "aa", "ab"):
        found = score(**triton(online=forwards[first], reference=forwards[second]))
        torch.testing.assert_close(found, single[first] - single[second], rtol=1e-5, atol=1e-5)
    found = score(**triton(reference=forwards["a"]))
    torch.testing.assert_close(found, -single["a"])


def test_views_of_one_scorer():
    """The same parameters at two patch sizes have packed weights of their own."""
    model = vit(16, 1, 1, 16, 4, 3, "mean")
    images = bytes_of(11, 16)
    for view in (model, model.at(8), model.at(4, drop=0.5), model, model.at(8)):
        near(score(**triton(online=Forward(view, images))), [view], images)


def test_pairs_of_views_that_keep_other_patches():
    models = [m.at(4, 0.5, seed) for seed, m in enumerate(tiny())]
    online, reference = (Forward(m, IMAGES) for m in models)
    with pytest.raises(ValueError, match="scorers must keep the same patches"):
        score(**triton(online=online, reference=reference))


def test_buffers_go_with_the_tiny():
    models = tiny()
    online, reference = (Forward(m, IMAGES) for m in models)
    score(**triton(online=online, reference=reference))
    alive = [weakref.ref(m) for m in models]
    del models, online, reference
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_nothing_is_left_changed():
    models = tiny()
    models[0].blocks[0].eval()
    flags = [m.training for model in models for m in model.modules()]
    before, state = [copy.deepcopy(m.state_dict()) for m in models], torch.get_rng_state()
    online, reference = (Forward(m, IMAGES) for m in models)
    select(**triton(online=online, reference=reference), k=3, seed=0)
    assert flags == [m.training for model in models for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    for model, old in zip(models, before, strict=True):
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        new = model.state_dict()
        assert all(torch.equal(v, new[name]) for name, v in old.items())


def test_modes_of_the_caller():
    online, reference = (Forward(m, IMAGES) for m in tiny())
    given = triton(online=online, reference=reference)
    want = score(**given)
    online, reference = (Forward(m, IMAGES) for m in tiny())
    given |= {"online": online, "reference": reference}
    with torch.inference_mode():
        assert torch.equal(score(**given), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(**given), want)
    with torch.no_grad():
        assert torch.equal(score(**given), want)


def test_a_selector(monkeypatch, taken):
    """Its rows are those of `select`, before and after it has trained the online scorer."""
    monkeypatch.setenv("ACTIVESEL_BACKEND", "triton")
    online, reference = tiny()
    opt = torch.optim.SGD(online.parameters(), lr=0.1)
    selector = Selector(online, reference, keep=4, optimizer=opt, seed=9)
    for step in range(2):
        batch = selector((IMAGES, Y))
        forwards = {"online": Forward(online, IMAGES), "reference": Forward(reference, IMAGES)}
        want = select(**triton(**forwards), k=4, seed=9, step=step)
        near(selector.last.scores, (online, reference))
        assert torch.equal(selector.last.indices, want.indices)
        assert torch.equal(batch[0], IMAGES[want.indices])
        selector.update(batch)
    assert taken == [2] * 4 and online.training


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_tracing_sees_the_forward(taken):
    model = tiny()[0]
    want = score(online=Forward(model, IMAGES), targets=Y)

    @torch.compile(backend="eager")
    def traced(images):
        return score(online=Forward(model, images), targets=Y)

    torch.testing.assert_close(traced(IMAGES), want)
    assert not taken
