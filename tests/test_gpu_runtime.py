# SPDX-License-Identifier: Apache-2.0
"""Selection as a training loop on a GPU runs it: graphs, compilers, streams, and no waiting."""

import pytest
import torch
from on_gpu import (
    BF16,
    DEVICE,
    NEEDS_GPU,
    B,
    C,
    D,
    T,
    every_backend,
    every_backend_for_losses,
    exact,
    gpu,
    head,
    labels,
    randn,
)

import activesel
from activesel import Forward, Head, sample, select, spec
from activesel.models import vit
from activesel.operands import tensors

pytestmark = [pytest.mark.gpu, NEEDS_GPU]

KINDS = ("losses", "logits", "head", "tokens", "forward")


def operands():
    """One of each kind, with what it needs."""
    model = vit("mu", image_size=32, classes=C).to(DEVICE)
    images = torch.randint(256, (B, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    y = gpu(labels(B, ignored=False))
    yield "losses", dict(online=gpu(randn(B)), reference=gpu(randn(B)))
    yield "logits", dict(online=gpu(randn(B, C)), reference=gpu(randn(B)), targets=y)
    yield "head", dict(online=gpu(head(B, D)), reference=gpu(head(B, D)), targets=y)
    yield "tokens", dict(online=gpu(head(B, T, D)), targets=gpu(labels(B, T)), label_smoothing=0.1)
    yield "forward", dict(online=Forward(model, images), reference=gpu(randn(B)), targets=y)


def given_of(kind):
    return next(given for name, given in operands() if name == kind)


@pytest.mark.filterwarnings("default")  # a forward's compiler may warn
@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_never_waits_for_the_device(backend, kind):
    given = given_of(kind)
    scalars = dict(k=9, seed=1, step=2, temperature=0.5, backend=backend)
    tensors = scalars | dict(
        seed=gpu(torch.tensor([1])),
        step=gpu(torch.tensor([2])),
        temperature=gpu(torch.tensor([0.5])),
    )
    for _ in range(3):  # compiles what has to be, and records a forward's graph
        want = select(**given, **scalars)
    select(**given, **tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [select(**given, **scalars), select(**given, **tensors)]
        activesel.score(**given, backend=backend)
        found[0].weights()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got in found:
        assert torch.equal(got.indices, want.indices) and torch.equal(got.keys, want.keys)


@pytest.mark.filterwarnings("default")
@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_graph_replay_draws_fresh_noise(backend, kind):
    given, first = given_of(kind), 41
    seed, step, t = gpu([torch.tensor([9]), torch.tensor([first]), torch.tensor([0.5])])

    def call():
        picked = select(**given, k=9, seed=seed, step=step, temperature=t, backend=backend)
        step.add_(1)
        return picked

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picked = call()
    step.fill_(first)
    seen = set()
    for i in range(4):
        graph.replay()
        exact(picked, 9, seed=9, step=first + i, temperature=0.5)
        seen.add(tuple(picked.indices.tolist()))
    assert len(seen) > 1


@pytest.mark.filterwarnings("ignore")  # of an empty graph
@every_backend
def test_graph_capture_needs_a_seed(backend):
    scores = gpu(randn(B))
    sample(scores, 3, seed=0, backend=backend)
    with (
        pytest.raises(RuntimeError, match="seed must be given"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        sample(scores, 3, backend=backend)


@every_backend
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("kind", ["losses", "logits", "head", "tokens"])
def test_compiles_whole(backend, kind, compiler):
    torch._dynamo.reset()
    given = given_of(kind)

    def function(step):
        picked = select(**given, k=9, seed=3, step=step, backend=backend)
        return picked, picked.scores[picked.indices] * 2

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for i in range(2):
        step = torch.tensor([i], device=DEVICE)
        (got, kept), (want, expected) = compiled(step), function(step)
        for name in ("indices", "scores", "keys", "threshold", "flags"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(kept, expected)


@every_backend
@pytest.mark.parametrize("kind", ["losses", "logits", "head", "tokens"])
def test_opcheck(backend, kind):
    given = given_of(kind)
    sides = [tensors(given.get(name), name) for name in ("online", "reference")]
    common = ("softmax", 0.1, -100, backend)
    targets = given.get("targets")
    noise = gpu([torch.tensor([1]), torch.tensor([2]), torch.tensor([1.0])])
    torch.library.opcheck(torch.ops.activesel.score, (*sides, targets, *common))
    arguments = (*sides, targets, 9, *noise, 7, *common)
    torch.library.opcheck(torch.ops.activesel.select, arguments)


@every_backend_for_losses
def test_two_streams_do_not_disturb_each_other(backend):
    """Workspaces belong to the stream that uses them."""
    losses = [gpu(randn(163_840)) for _ in range(2)]
    want = [sample(x, 5000, seed=i, backend=backend) for i, x in enumerate(losses)]
    streams = [torch.cuda.Stream() for _ in losses]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for i, (x, stream) in enumerate(zip(losses, streams, strict=True)):
            with torch.cuda.stream(stream):
                found.append(sample(x, 5000, seed=i, backend=backend))
        torch.cuda.synchronize()
        for got, expected in zip(found, want, strict=True):
            assert torch.equal(got.indices, expected.indices)
            assert torch.equal(got.threshold, expected.threshold)


@every_backend_for_losses
def test_another_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two devices, torch finds {torch.cuda.device_count()}")
    losses = randn(10_000)
    picked = sample(losses.to("cuda:1"), 300, seed=0, backend=backend)
    assert picked.indices.device.index == 1 and torch.cuda.current_device() == 0
    exact(picked, 300)


def test_specification_is_the_same_on_the_device():
    arguments = [randn(1000), torch.tensor([5]), torch.tensor([6]), torch.tensor([0.3])]

    def keys(scores, seed, step, temperature):
        return spec.key(scores, spec.noise(1000, seed, step, 2**33 + 3), temperature)[0]

    here, there = keys(*arguments), keys(*gpu(arguments))
    assert torch.equal(here, there.cpu())
    for a, b in zip(spec.topk(here, 77), spec.topk(there, 77), strict=True):
        assert torch.equal(a, b.cpu())


# ------------------------------------------------------------------------------------ large offsets


def room(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of device memory, {free:.0f} are free")


@every_backend_for_losses
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "logits", "losses"])
def test_offsets_past_two_to_the_31(backend, kind):
    """The last rows lie more than 2^31 elements after the first."""
    if backend == "cuda" and kind != "losses":
        pytest.skip("the CUDA backend starts from losses")
    room(16)
    rows, width = {
        "head": (2**21 + 9, 1024),
        "logits": (70_001, 31_999),
        "losses": (2201, 1_000_003),
    }[kind]
    assert rows * width > 2**31
    x = torch.empty(rows, width, dtype=BF16, device=DEVICE).normal_()
    classes = 8 if kind == "head" else width
    y = torch.randint(classes, (rows,), device=DEVICE)
    weight = gpu(randn(classes, width, dtype=BF16)) / 32 if kind == "head" else None
    given = {
        "head": lambda s: dict(online=Head(x[s], weight), targets=y[s]),
        "logits": lambda s: dict(online=x[s], targets=y[s]),
        "losses": lambda s: dict(online=x[s, 0]),
    }[kind]
    picked = select(**given(slice(None)), k=rows // 5, seed=0, backend=backend)
    last = slice(rows - 64, rows)
    want = activesel.score(**given(last), backend="torch")
    torch.testing.assert_close(picked.scores[last], want, atol=1e-4, rtol=1e-5)
    exact(picked, rows // 5)
