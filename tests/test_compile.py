# SPDX-License-Identifier: Apache-2.0
"""`select` inside torch.compile(fullgraph=True): few graphs, the same rows."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import activesel
from activesel import Head

B, C, K = 32, 7, 8
LABELS = torch.arange(B) % C


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(a, b):
    for name in ("indices", "scores", "keys", "threshold", "flags"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


STEPS_AND_SEEDS = {
    "from zero": [(i, i) for i in range(20)],
    "later": [(100 + i, 7 * i + 3) for i in range(20)],
    "steps only": [(i, 1234) for i in range(20)],
    "64-bit seeds": [(i, (i + 1) * 0x0123456789ABCDEF % 2**64) for i in range(20)],
    "negative seeds": [(i, -i * 10**17 - 1) for i in range(20)],
}


@pytest.mark.parametrize("case", STEPS_AND_SEEDS)
def test_ints_compile_at_most_twice(backend, case):
    counter = CompileCounter()

    def function(x, y, seed, step):
        return activesel.select(
            online=x * 2, reference=y, targets=LABELS, k=K, seed=seed, step=step, backend=backend
        )

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    x, y = torch.randn(B, C), torch.randn(B, C)
    for step, seed in STEPS_AND_SEEDS[case]:
        same(compiled(x, y, seed, step), function(x, y, seed, step))
    assert counter.frame_count <= 2


def test_tensors_compile_once(backend):
    counter = CompileCounter()

    def function(x, temperature, seed, step):
        picked = activesel.sample(x, K, temperature, seed, step, backend=backend)
        return picked, picked.take((x, LABELS)), picked.weights()

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for i in range(5):
        arguments = (
            torch.randn(B), torch.tensor([0.5 + i]), torch.tensor([3**i]), torch.tensor([i]),
        )  # fmt: skip
        (a, taken, weights), (b, expected, plain) = compiled(*arguments), function(*arguments)
        same(a, b)
        assert torch.equal(taken[0], expected[0]) and torch.equal(weights, plain)
    assert counter.frame_count == 1


def test_batch_sizes_compile_at_most_twice(backend):
    counter = CompileCounter()

    def function(x, y):
        return activesel.select(
            online=x, targets=y, k=x.shape[0] // 2, seed=0, step=1, backend=backend
        )

    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for rows in (8, 10, 12, 40):
        x, y = torch.randn(rows, C), torch.arange(rows) % C
        same(compiled(x, y), function(x, y))
    assert counter.frame_count <= 2


def test_every_operand_compiles(backend):
    weight, bias = torch.randn(C, 4), torch.randn(C)

    def function(features, losses):
        return activesel.select(
            online=Head(features, weight, bias), reference=losses, targets=LABELS, k=K, seed=1,
            step=2, temperature=0.5, label_smoothing=0.1, loss="sigmoid", backend=backend,
        )  # fmt: skip

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    arguments = torch.randn(B, 4), torch.randn(B).bfloat16()
    same(compiled(*arguments), function(*arguments))


def test_fresh_seed_compiles():
    compiled = torch.compile(lambda x: activesel.sample(x, K).keys, backend="eager", fullgraph=True)
    x = torch.randn(B)
    assert not torch.equal(compiled(x), compiled(x))


def test_errors_are_raised_from_compiled_code():
    compiled = torch.compile(
        lambda x: activesel.sample(x, 40, seed=0).indices, backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"k must be in \[0, 32\], got 40"):
        compiled(torch.randn(B))


@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_inductor_gives_the_same_rows(backend):
    """The true compiler may reassociate the logits' arithmetic, never what follows the scores."""

    def function(scores, step):
        picked = activesel.sample(scores, K, seed=5, step=step, backend=backend)
        return picked, scores[picked.indices] * 2

    compiled = torch.compile(function, fullgraph=True)
    scores = torch.randn(B)
    for i in range(3):
        (a, kept), (b, expected) = (f(scores, torch.tensor([i])) for f in (compiled, function))
        same(a, b)
        assert torch.equal(kept, expected)
