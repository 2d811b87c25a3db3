# SPDX-License-Identifier: Apache-2.0
"""The one-launch scorer under the interpreter: features, scores, keys and rows of every shape."""

import pytest
import torch

from activesel import _triton, spec

if why := _triton.reason(torch.device("cpu")):
    pytest.skip(why, allow_module_level=True)

import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from scorers import CLASSES, FAMILIES, check_features, pair, pictures, vit
from test_kernels import NOISE, check, labels_of
from triton.runtime import interpreter

from activesel.kernels import blocks, config, scorer, topk
from activesel.packing import BAD_WEIGHT, FP8, Packed

FP32, BF16, FP16, U8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
INF, NAN = float("inf"), float("nan")
TINY = 16, 1, 1, 8, 8, 1, "mean"  # one token


def wide(packed):
    """The interpreter takes as long for a wide tile as for a narrow one."""
    hidden = packed.shape.HP & -packed.shape.HP
    rows = 64 if packed.shape.tokens < 64 else 256
    return config.scorer_tile(packed)._replace(rows=rows, hidden=min(256, hidden))


def launch(
    models, images, *, y=None, given=None, sign=1, noise=NOISE, k=None, tile=None, **options
):
    """What `scorer` returns, and the weights."""
    pixels = scorer.pixels(images)
    fp8 = options.pop("fp8", False)
    packed = Packed.of([m.parts() for m in models], channels_last=pixels.last, fp8=fp8)
    labels = None if y is None else labels_of(y, packed.shape.classes, **options)
    noise = None if y is None else noise
    tile = tile or wide(packed)
    return *scorer.scorer(packed, pixels, labels, given, sign, noise, k, tile), packed


def features(models, images, **options):
    found, _, _, packed = launch(models, images, **options)
    check_features(found, models, packed, images)
    return found


# ---------------------------------------------------------------------------------------- features

LARGE = {"49 tokens, depth 12", "196 tokens", "197 tokens", "49 tokens, patch 16"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    models = pair(family)[: 1 if family in LARGE else 2]
    features(models, pictures(models[0], 2 if family in LARGE else 3))


TILES = {  # what an interpreter can tell apart
    (tile.rows, tile.hidden, tile.calls): tile
    for classes in config.SCORER_TILES.values()
    for *_, tiles in classes
    for tile in tiles
}


@pytest.mark.parametrize("tile", TILES.values(), ids=map(str, TILES))
def test_every_tile(tile):
    model = vit(96, 1, 3, 12, 4, 1, "mean")
    features([model], pictures(model, 8), tile=tile)


@pytest.mark.parametrize("pool", ["mean", "class"])
@pytest.mark.parametrize(("patch", "drop"), [(16, 0.0), (4, 0.6), (8, 0.3)])
def test_views(pool, patch, drop):
    models = [vit(32, 1, 2, 32, 8, 2, pool, seed=s).at(patch, drop, seed=3) for s in (1, 2)]
    features(models, pictures(models[0], 2))


def layouts(x):
    """Views of equal images, by what is unusual about their memory."""
    yield "NCHW", x
    yield "NHWC", x.contiguous(memory_format=torch.channels_last)
    yield "every other image", x.repeat_interleave(2, 0)[::2]
    yield "cropped", torch.nn.functional.pad(x, (3, 2, 1, 4), value=1)[..., 1:-4, 3:-2]
    last = x.permute(0, 2, 3, 1).contiguous()
    yield (
        "cropped NHWC",
        torch.nn.functional.pad(last, (0, 0, 3, 2), value=1)[:, :, 3:-2].permute(0, 3, 1, 2),
    )
    yield "RGBX", torch.nn.functional.pad(last, (0, 1), value=1)[..., :3].permute(0, 3, 1, 2)
    yield "transposed", x.mT.contiguous().mT


LAYOUTS = [name for name, _ in layouts(torch.zeros(2, 3, 16, 16))]
COPIED = {"RGBX", "transposed"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    model = vit(32, 1, 2, 16, 8, 3, "mean")
    images = dict(layouts(pictures(model, 3)))[name]
    features([model], images)
    found = scorer.pixels(images)
    assert found.last == ("NHWC" in name)
    assert (found.data.data_ptr() == images.data_ptr()) == (name not in COPIED)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("name", ["NCHW", "NHWC"])
def test_floating_images(dtype, name):
    model = vit(32, 1, 2, 16, 8, 3, "mean")
    features([model], dict(layouts(pictures(model, 2, dtype)))[name])


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("programs", [1, 3, 8])
@pytest.mark.parametrize("images", [1, 7])
def test_groups_and_programs(monkeypatch, images, programs, group):
    monkeypatch.setattr(config, "multiprocessors", lambda device: programs)
    monkeypatch.setattr(config, "group", lambda *_: group)
    model = vit(16, 1, 1, 4, 2, 1, "class")  # 5 tokens
    packed = Packed.of([model.parts()])
    tile = config.scorer_tile(packed)._replace(rows=16, programs=1)
    pictured, y = pictures(model, images), torch.arange(images)
    found, out, rows, packed = launch([model], pictured, y=y, k=images // 2, tile=tile)
    check_features(found, [model], packed, pictured)
    check_scores(out, found, packed, y)
    check_rows(out, rows, images // 2)


@pytest.mark.parametrize("family", ["17 tokens", "65 tokens", "head 12", "1 token, patch 32"])
def test_a_launch_per_phase(family):
    models = pair(family)
    by_phases(models, pictures(models[0], 3))


def by_phases(models, images, fp8=False):
    pixels = scorer.pixels(images)
    packed = Packed.of([m.parts() for m in models], channels_last=pixels.last, fp8=fp8)
    found = blocks.features(packed, pixels, wide(packed))
    check_features(found, models, packed, images)


def test_phases_of_some_images_at_a_time(monkeypatch):
    """Of five, two, two and one; channels last, and not all patches."""
    models = [vit(32, 1, 2, 16, 4, 3, "class", seed=seed).at(4, 0.5) for seed in (1, 2)]
    monkeypatch.setattr(blocks, "SCRATCH", 2 * 9 * (4 * 2 * 32 + 6 * 32))
    by_phases(models, pictures(models[0], 5).contiguous(memory_format=torch.channels_last))


def test_epsilon_is_the_models():
    model = vit(32, 1, 2, 8, 4, 1, "mean")
    for layer in (model.norm, model.blocks[0].norm1, model.blocks[0].norm2):
        layer.eps = 1.0
    features([model], pictures(model, 2))


def test_sharp_attention():
    """Logits of hundreds, in more than one tile of keys."""
    model = vit(32, 1, 2, 20, 2, 1, "mean")
    with torch.no_grad():
        model.blocks[0].qkv.weight.mul_(8)
    features([model], pictures(model, 1))


def test_images_do_not_touch_each_other():
    """Those that are NaN, or beyond fp16, leave the others of their tile as they are."""
    model = vit(32, 1, 2, 16, 8, 1, "mean")
    images = pictures(model, 6, FP32)
    expected = launch([model], images)[0]
    images[1, 0, 3, 5], images[4, 0, 0, 0] = NAN, 1e6
    found = launch([model], images)[0]
    assert found.isfinite().all(-1).tolist() == [[True, False, True, True, False, True]]
    alike = [0, 2, 3, 5]
    torch.testing.assert_close(found[:, alike], expected[:, alike], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- scores


def check_scores(out, found, packed, y, given=None, sign=1, **options):
    """Given the features, losses as of the specification, and keys to the bit."""
    width, head = packed.shape.width, packed.head.float()
    sides = [
        [found[i, :, :width], head[i, :, :width], packed.head_bias[i]] for i in range(len(head))
    ]
    sides = [*sides, [] if given is None else [given]][:2]
    check(out, *sides[::sign], y, **options)


@pytest.mark.parametrize(
    ("sigmoid", "smoothing", "classes"),
    [(False, 0.0, 10), (False, 0.2, 70), (True, 0.0, 70), (True, 0.2, 10), (True, 0.2, 1)],
)
def test_losses(sigmoid, smoothing, classes):
    models = [vit(*TINY, classes=classes, seed=seed) for seed in (1, 2)]
    images, y = pictures(models[0], 70), torch.arange(70) % classes
    y[3], y[5], y[66] = -100, classes - 1, -100
    options = dict(sigmoid=sigmoid, smoothing=smoothing)
    found, out, _, packed = launch(models, images, y=y, **options)
    check_scores(out, found, packed, y, **options)
    assert out.scores.isnan().nonzero().flatten().tolist() == [3, 66]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_targets_out_of_range(dtype):
    models = [vit(*TINY, seed=seed) for seed in (1, 2)]
    images, y = pictures(models[0], 5), torch.arange(5).to(dtype)
    y[2], y[3] = CLASSES, 255
    found, out, rows, packed = launch(models, images, y=y, k=4)
    check_scores(out, found, packed, y.long())
    assert out.scores.isnan().tolist() == [False, False, True, True, False]
    assert rows[2] == spec.BAD_TARGET | spec.NONFINITE_SCORE | spec.TOO_FEW_ROWS


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [None, FP32, BF16])
def test_one_side(sign, dtype):
    """Against the other's losses, as from a cache, or against none."""
    model = vit(*TINY)
    images, y = pictures(model, 9), (torch.arange(18) % CLASSES)[::2]
    given = None if dtype is None else torch.randn(18)[::2].to(dtype)
    if given is not None:
        given[2], given[3] = INF, NAN
    found, out, rows, packed = launch([model], images, y=y, given=given, sign=sign, k=3)
    check_scores(out, found, packed, y, given, sign)
    check_rows(out, rows, 3)


def test_bad_weights_are_flagged():
    models = [vit(*TINY, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        models[1].head.weight[3] = 1e6  # beyond fp16
    rows = launch(models, pictures(models[0], 3), y=torch.arange(3), k=1)[2]
    assert int(rows[2]) & BAD_WEIGHT


# ------------------------------------------------------------------------------------------- rows


def check_rows(out, found, k):
    indices, threshold, few = spec.topk(out.keys, k)
    assert torch.equal(found[0], indices)
    assert torch.equal(found[1].view(torch.int32), threshold.view(torch.int32))
    assert found[2] == out.flags.max() | few


@pytest.mark.parametrize(
    ("k", "temperature"),
    [(0, 0.5), (1, 0.0), (5, 0.0), (11, 0.0), (12, 0.0), (6, INF), (12, INF), (6, 0.5), (6, -1.0)],
)
def test_rows(k, temperature):
    """Of twelve: three that tie at T = 0, and one that is left out."""
    models = [vit(*TINY, seed=seed) for seed in (1, 2)]
    images, y = pictures(models[0], 12), torch.arange(12) % CLASSES
    images[3:5], y[3:5] = images[1], y[1]
    y[7] = -100
    noise = NOISE._replace(temperature=torch.tensor([temperature]))
    _, out, found, _ = launch(models, images, y=y, noise=noise, k=k)
    assert out.scores[1] == out.scores[3] == out.scores[4]
    keys, _ = spec.key(out.scores, spec.noise(12, *noise[:2], noise.offset), noise.temperature)
    assert torch.equal(out.keys.view(torch.int32), keys.view(torch.int32))
    check_rows(out, found, k)
    assert bool(found[2] & spec.BAD_TEMPERATURE) == (temperature < 0)
    assert bool(found[2] & spec.TOO_FEW_ROWS) == (k == 12)


def test_the_ticket_is_ready_for_the_next_launch(monkeypatch):
    ticket = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(scorer, "_ticket", lambda device: ticket)
    monkeypatch.setattr(config, "multiprocessors", lambda device: 3)
    models = [vit(*TINY, seed=seed) for seed in (1, 2)]
    packed = Packed.of([m.parts() for m in models])
    tile = wide(packed)._replace(programs=1)
    images, y = pictures(models[0], 9), torch.arange(9)
    first, second = (launch(models, images, y=y, k=4, tile=tile) for _ in range(2))
    assert ticket == 0 and len(first[1].flags) == 3
    for a, b in zip([*first[1], *first[2]], [*second[1], *second[2]], strict=True):
        assert torch.equal(a, b)


@triton.jit
def small_kernel(
    keys, partial, partials, bad, indices, threshold, flags, rows, k, BLOCK: tl.constexpr
):
    topk.small(keys, partial, partials, bad, indices, threshold, flags, rows, k, BLOCK)


def small(keys, k, partial, bad=0, block=scorer.KEYS):
    indices = torch.full((k + 1,), -7)  # one too many, to see whether it is written
    threshold, flags = torch.tensor(NAN), torch.tensor(-1, dtype=torch.int32)
    small_kernel[(1,)](
        keys, partial, len(partial), torch.tensor(bad, dtype=torch.int32), indices, threshold,
        flags, len(keys), k, BLOCK=block,
    )  # fmt: skip
    assert indices[k] == -7
    return indices[:k], threshold, flags


def agree(keys, k, block=16):
    partial = torch.tensor([0, spec.NONFINITE_SCORE], dtype=torch.int32)
    found, expected = small(keys, k, partial, BAD_WEIGHT, block), spec.topk(keys, k)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32))
    assert found[2] == BAD_WEIGHT | spec.NONFINITE_SCORE | expected[2]


@settings(max_examples=20)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 3e38, INF, -INF, NAN]),
        min_size=1,
        max_size=40,
    ),
    st.data(),
)
def test_rows_of_ties_and_specials(keys, data):
    agree(torch.tensor(keys), data.draw(st.integers(0, len(keys))))


@pytest.mark.parametrize("rows", [1, 1024, 3000])
def test_rows_of_several_blocks(rows):
    keys = torch.randn(rows).mul(20).round()  # many ties
    for k in {0, 1, rows // 5, rows}:
        agree(keys, k, scorer.KEYS)


def test_flags_of_many_programs():
    partial = torch.zeros(2100, dtype=torch.int32)
    partial[2050] = spec.BAD_TARGET | spec.NONFINITE_SCORE
    assert small(torch.randn(4), 2, partial)[2] == spec.BAD_TARGET | spec.NONFINITE_SCORE


# -------------------------------------------------------------------------------------------- fp8


@pytest.fixture
def e4m3(monkeypatch):
    """The interpreter loses the carry of a mantissa rounded up, and does not saturate."""
    convert = interpreter._convert_float

    def right(x, source, target, rounding):
        if target.name != "fp8e4nv":
            return convert(x, source, target, rounding)
        return torch.from_numpy(x).float().clamp(-448, 448).to(FP8).view(U8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", right)


@pytest.mark.parametrize("family", ["17 tokens", "head 12"])
def test_fp8(e4m3, family):
    models = pair(family)
    features(models[:1], pictures(models[0], 3), fp8=True)
    by_phases(models[1:], pictures(models[0], 3), fp8=True)
