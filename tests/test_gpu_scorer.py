# SPDX-License-Identifier: Apache-2.0
"""Pixels to rows on a GPU: against float64, against itself again and again, and at full size."""

import gc

import pytest
import torch
from on_gpu import DEVICE, NEEDS_GPU, exact, gpu
from scorers import CLASSES, FAMILIES, check_features, pair, pictures, vit
from test_gpu_runtime import room

import activesel
from activesel import Forward, select, spec

pytest.importorskip("triton")

from activesel.kernels import blocks, config, routes, scorer
from activesel.kernels.operands import Labels, Noise
from activesel.packing import BAD_WEIGHT, Packed

pytestmark = [pytest.mark.gpu, NEEDS_GPU]

TINY = 32, 1, 2, 16, 8, 3, "mean"
FULL = {  # and images
    "mu": ((32, 1, 2, 224, 16, 3, "mean"), 4096),
    "width 64, 49 tokens": ((64, 6, 2, 224, 32, 3, "mean"), 4096),
    "width 192, 49 tokens": ((192, 12, 3, 224, 32, 3, "mean"), 1024),
    "Ti/16": ((192, 12, 3, 224, 16, 3, "class"), 64),
}


def models_of(sizes, classes=CLASSES):
    return [vit(*sizes, classes=classes, seed=seed).to(DEVICE) for seed in (1, 2)]


def some(rows, count=32):
    """The first, the last and others."""
    return torch.linspace(0, rows - 1, min(rows, count)).round().long().to(DEVICE)


def targets(rows, classes=CLASSES):
    return torch.arange(rows, device=DEVICE) % classes


def noise():
    return Noise(*gpu([torch.tensor([5]), torch.tensor([7]), torch.tensor([0.5])]), 3)


def forwards(models, images, **options):
    online, reference = (Forward(m, images, **options) for m in models)
    y = targets(len(images), models[0].config.classes)
    return dict(online=online, reference=reference, targets=y, backend="triton")


# ---------------------------------------------------------------------------------------- features


def check(models, images, route, fp8=False, tight=2e-3, tile=0):
    pixels = scorer.pixels(images)
    packed = Packed.of([m.parts() for m in models], channels_last=pixels.last, fp8=fp8)
    tiles = config.scorer_candidates(packed)
    if tile >= len(tiles):
        pytest.skip(f"there are {len(tiles)} tiles for such scorers")
    if route == "blocks":
        found = blocks.features(packed, pixels, tiles[tile])
    else:
        found = scorer.scorer(packed, pixels, None, None, 1, None, None, tiles[tile])[0]
    rows = some(len(images))
    check_features(found[:, rows], models, packed, images[rows], tight)
    return found


every_route = pytest.mark.parametrize("route", ["one launch", "blocks"])


@every_route
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, route):
    models = [m.to(DEVICE) for m in pair(family)]
    check(models, pictures(models[0], 67).to(DEVICE), route)


@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("family", ["mu", "17 tokens", "49 tokens, patch 16"])
def test_other_tiles(family, tile):
    models = [m.to(DEVICE) for m in pair(family)]
    check(models, pictures(models[0], 1000).to(DEVICE), "one launch", tile=tile)


@every_route
@pytest.mark.parametrize("rows", [1, 1000, 5000])
def test_numbers_of_images(rows, route):
    models = models_of(TINY)
    check(models, pictures(models[0], rows).to(DEVICE), route)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_images(last, dtype):
    models = models_of(TINY)
    images = pictures(models[0], 130, dtype).to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    check(models, images, "one launch")
    check(models, images[::2], "one launch")


def test_crops():
    models = models_of(TINY)
    images = torch.nn.functional.pad(pictures(models[0], 130), (1, 2, 3, 1)).to(DEVICE)
    check(models, images[..., 3:-1, 1:-2], "one launch")


@pytest.mark.parametrize(("patch", "drop"), [(8, 0.4), (32, 0.0)])
def test_views(patch, drop):
    models = [m.at(patch, drop) for m in models_of((64, 2, 2, 224, 16, 3, "class"))]
    check(models, pictures(models[0], 300).to(DEVICE), "one launch")


@pytest.mark.slow
@every_route
@pytest.mark.parametrize("name", FULL)
def test_full_size(name, route):
    sizes, rows = FULL[name]
    models = models_of(sizes, 1000)
    check(models, torch.randint(256, (rows, 3, 224, 224), dtype=torch.uint8, device=DEVICE), route)


@every_route
@pytest.mark.parametrize("family", ["17 tokens", "49 tokens, depth 12", "197 tokens"])
def test_fp8(family, route):
    if not routes.multiplies_e4m3(torch.device(DEVICE, 0)):
        pytest.skip("the device does not multiply fp8")
    models = [m.to(DEVICE) for m in pair(family)]
    check(models, pictures(models[0], 130).to(DEVICE), route, fp8=True)


def test_images_do_not_touch_each_other():
    models = models_of((32, 1, 2, 16, 8, 1, "mean"))
    images = pictures(models[0], 60, torch.float32).to(DEVICE)
    images[7, 0, 3, 5] = torch.nan
    packed = Packed.of([m.parts() for m in models])
    found = scorer.scorer(packed, scorer.pixels(images), None, None, 1, None, None)[0]
    assert found.isfinite().all(2).all(0).logical_not().nonzero().flatten().tolist() == [7]


# ---------------------------------------------------------------------------------- scores and rows


@torch.no_grad()
@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_scores(loss, classes):
    """Of the kernel's own features, with the head's weights as packed."""
    models = models_of((64, 2, 2, 28, 4, 1, "mean"), classes)
    images, y = pictures(models[0], 700).to(DEVICE), targets(700, classes)
    y[5] = -100
    packed = Packed.of([m.parts() for m in models])
    labels = Labels(y, 1, classes, -100, loss == "sigmoid", 0.1)
    found, out, _ = scorer.scorer(packed, scorer.pixels(images), labels, None, 1, noise(), None)
    sides = [
        [x[:, :64].double(), w[:, :64].double(), b.double()]
        for x, w, b in zip(found, packed.head, packed.head_bias, strict=True)
    ]
    logits = [x @ w.T + b for x, w, b in sides]
    truth = logits[0].new_zeros(700)
    for sign, z in zip((1, -1), logits, strict=True):
        truth += sign * exact_loss(z, y, loss)
    slack = (3e-6 + 1e-7 * classes) * (1 + sum(z.abs().amax(1) for z in logits))
    wrong = (out.scores - truth).abs() > slack
    assert not wrong.any() and out.scores.isnan().nonzero().flatten().tolist() == [5]


def exact_loss(z, y, loss, smoothing=0.1):
    hot = torch.nn.functional.one_hot(y.clamp_min(0), z.shape[1]).double()
    hot = hot * (1 - smoothing) + smoothing / z.shape[1]
    if loss == "softmax":
        out = -(z.log_softmax(1) * hot).sum(1)
    else:
        out = torch.nn.functional.binary_cross_entropy_with_logits(z, hot, reduction="none").sum(1)
    return out.where(y >= 0, torch.nan)


@pytest.mark.parametrize("rows", [1, 2, 33, 1000, 8191, 8192, 8193, 20_000])
def test_rows(rows):
    """By the last program up to 8,192 images, by another launch beyond."""
    models = models_of(TINY)
    given = forwards(models, pictures(models[0], rows).to(DEVICE))
    for k in {0, 1, rows // 5, rows}:
        exact(select(**given, k=k, seed=3, step=4), k, seed=3, step=4)
    exact(select(**given, k=rows // 2, seed=3, temperature=0.0), rows // 2, 3, temperature=0.0)


def test_rows_that_tie_and_are_left_out():
    models = models_of(TINY)
    images = pictures(models[0], 40).to(DEVICE).repeat(150, 1, 1, 1)
    given = forwards(models, images)
    given["targets"] = targets(40).repeat(150)
    given["targets"][100:3000] = -100
    for k in (1, 2999, 3200):
        exact(select(**given, k=k, seed=0, temperature=0.0), k, temperature=0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_side_and_losses(sign):
    model, losses = models_of(TINY)[0], torch.randn(500, device=DEVICE)
    forward = Forward(model, pictures(model, 500).to(DEVICE))
    sides = dict(zip(("online", "reference")[::sign], (forward, losses), strict=True))
    y = targets(500)
    got = select(**sides, targets=y, k=50, seed=0, backend="triton")
    exact(got, 50)
    with torch.no_grad():
        truth = torch.nn.functional.cross_entropy(
            model.double()(forward.images), y, reduction="none"
        )
    torch.testing.assert_close(got.scores.double(), sign * (truth - losses), rtol=0, atol=0.02)


def test_bad_weights_are_flagged_without_waiting():
    models = models_of(TINY)
    given = forwards(models, pictures(models[0], 100).to(DEVICE))
    assert not int(select(**given, k=9, seed=0).flags)
    for rows in (100, 9000):
        given = forwards(models, pictures(models[0], rows).to(DEVICE))
        with torch.no_grad():
            models[1].blocks[0].up.weight.data[3, 4] = torch.nan
        assert int(select(**given, k=9, seed=0).flags) & BAD_WEIGHT
        with torch.no_grad():
            models[1].blocks[0].up.weight.data[3, 4] = 0.0
        assert not int(select(**given, k=9, seed=0).flags)


# ----------------------------------------------------------------------------------- as a loop runs


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("indices", "scores", "keys", "threshold", "flags")
    )


@pytest.mark.parametrize(
    "sizes", [TINY, FAMILIES["17 tokens"], FAMILIES["65 tokens"], (192, 2, 3, 56, 8, 3, "mean")]
)
def test_two_hundred_launches_agree(sizes):
    """Programs share nothing but the ticket, and warps only what a barrier has made visible."""
    models = models_of(sizes)
    given = forwards(models, pictures(models[0], 3001).to(DEVICE))
    want = select(**given, k=600, seed=1)
    exact(want, 600, seed=1)
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(200):
        got = select(**given, k=600, seed=1)
        differ += (got.scores != want.scores).sum() + (got.indices != want.indices).sum()
    assert int(differ) == 0
    assert all(int(ticket) == 0 for ticket in scorer._tickets.values())


def test_two_streams_do_not_disturb_each_other():
    """Workspaces, tickets and packed weights belong to the stream that uses them."""
    models = models_of(FAMILIES["17 tokens"])
    images = pictures(models[0], 4000).to(DEVICE)
    given = [forwards(models, images), forwards(models[::-1], images.flip(0))]
    want = [select(**g, k=500, seed=i) for i, g in enumerate(given)]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for i, (g, stream) in enumerate(zip(given, streams, strict=True)):
            with torch.cuda.stream(stream):
                found.append(select(**g, k=500, seed=i))
        torch.cuda.synchronize()
        assert all(map(same, found, want))


@pytest.mark.parametrize("rows", [1000, 9000])
def test_never_waits_for_the_device(rows):
    models = models_of(TINY)
    given = forwards(models, pictures(models[0], rows).to(DEVICE))
    numbers = dict(zip(("seed", "step", "temperature"), noise()[:3], strict=True))
    want = select(**given, k=200, **numbers)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = select(**given, k=200, **numbers)
        activesel.score(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(got, want)


@pytest.mark.parametrize("rows", [1000, 9000])
def test_graph_replay_sees_new_images_weights_and_steps(rows):
    models = models_of(TINY)
    images = pictures(models[0], rows).to(DEVICE)
    given = forwards(models, images)
    numbers = dict(zip(("seed", "step", "temperature"), noise()[:3], strict=True))

    def call():
        return select(**given, k=200, **numbers)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picked = call()
    seen = []
    for i in range(4):
        if i == 1:
            images.copy_(pictures(models[0], rows))
        if i == 2:
            for p in models[0].parameters():
                p.data.mul_(0.9)
        if i == 3:
            numbers["step"].add_(1)
        graph.replay()
        assert same(picked, call())  # what is not replayed, between replays
        seen.append((picked.scores.sum().item(), tuple(picked.indices.tolist())))
    assert len(set(seen)) == 4


def launches(function):
    """Names of the kernels that run on the device."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profile.events() if e.device_type == on_device]
    return [name for name in names if not name.startswith(("Mem", "Activity"))]


@pytest.mark.filterwarnings("default")  # the profiler's own
def test_one_launch():
    models = models_of(TINY)
    images = scorer.pixels(pictures(models[0], 8192).to(DEVICE))
    packed = Packed.of([m.parts() for m in models])
    labels = Labels(targets(8192), 1, CLASSES, -100, False, 0.0)
    numbers = noise()
    names = launches(lambda: scorer.scorer(packed, images, labels, None, 1, numbers, 1000))
    assert names == ["scorer_kernel"]
    counts = []
    for depth in (1, 12):
        given = forwards(models_of((32, depth, *TINY[2:])), images.data)
        names = launches(lambda given=given: select(**given, k=1000, seed=numbers[0]))
        assert names.count("scorer_kernel") == 1
        counts.append(len(names))
    assert counts[1] < counts[0] + 20, "packing launches do not grow with the number of tensors"


def test_memory_does_not_grow_with_the_logits():
    models = models_of(TINY, 1000)
    given = forwards(models, pictures(models[0], 65_536).to(DEVICE))
    select(**given, k=100, seed=0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select(**given, k=100, seed=0)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 65_536 * 2 * 32 * 4 + 2**26, "features of both, and what the processors hold"


def test_buffers_go_with_the_scorers():
    models = models_of(TINY)
    images = pictures(models[0], 10).to(DEVICE)
    select(**forwards(models, images), k=2, seed=0)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        select(**forwards(models_of(TINY), images), k=2, seed=0)
        gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.slow
def test_a_super_batch():
    """24 GB of pixels: offsets beyond 2^32."""
    room(32)
    rows = 163_840
    models = models_of(FULL["mu"][0], 1000)
    images = torch.empty(rows, 3, 224, 224, dtype=torch.uint8, device=DEVICE)
    for part in images.split(8192):
        part.random_(0, 256)
    given = forwards(models, images)
    picked = select(**given, k=rows // 5, seed=0)
    exact(picked, rows // 5)
    last = slice(rows - 64, rows)
    y = given["targets"][last]
    with torch.no_grad():
        losses = [
            spec.row_loss([m.double()(images[last])], y, "softmax", 0.0, -100)[0] for m in models
        ]
    torch.testing.assert_close(
        picked.scores[last].double(), (losses[0] - losses[1]).double(), rtol=0, atol=0.05
    )
