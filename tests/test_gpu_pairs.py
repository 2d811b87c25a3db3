# SPDX-License-Identifier: Apache-2.0
"""Joint selection on a GPU, held against float64 and the specification on the CPU."""

import math

import pytest
import torch
import torch.nn.functional as F
from on_gpu import BF16, DEVICE, FP16, FP32, NEEDS_GPU, NO_TRITON, every_backend, gpu

from activesel import Pairs, _triton, joint_select, spec_joint
from activesel.testing import assert_as_accurate

pytestmark = [
    pytest.mark.gpu, NEEDS_GPU, pytest.mark.skipif(NO_TRITON, reason="triton is not installed"),
]  # fmt: skip

LOSSES = ["sigmoid", "softmax"]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def embed(rows, width, scale=10.0, bias=-10.0, dtype=BF16):
    z = F.normalize(torch.randn(2, rows, width, device=DEVICE), dim=2).to(dtype)
    return [*z, torch.tensor([scale], device=DEVICE), torch.tensor([bias], device=DEVICE)]


def start(loss, rows):
    sigmoid = loss == "sigmoid"
    return torch.full((1 if sigmoid else 4, rows), 0.0 if sigmoid else -math.inf, device=DEVICE)


def check_add(online, reference, rows, chunk, loss, add=_triton.pair_add):
    """As near to float64 as the specification in fp32; float64 from `dense`'s own functions."""
    count = online[0].shape[0] if rows is None else len(rows)
    ours, plain = start(loss, count), start(loss, count)
    add(ours, online, reference, rows, chunk, loss)
    spec_joint.pair_add(plain, online, reference, rows, chunk, loss)
    rows = torch.arange(count, device=DEVICE) if rows is None else rows
    exact, chunk = start(loss, count).double(), chunk[chunk >= 0]
    same = rows[:, None] == chunk
    for m, side in enumerate((online, reference)):
        image, text, scale, bias = (t.double() for t in side)
        for way, (a, b) in enumerate(((image, text), (text, image))):
            x = scale * a[rows] @ b[chunk].T
            if loss == "softmax":
                exact[2 * m + way] = x.masked_fill(same, -math.inf).logsumexp(1)
            else:
                exact[0] += (1 - 2 * m) * F.softplus(x + bias).masked_fill(same, 0).sum(1)
    assert_as_accurate(ours, plain, exact, 5e-6)


@every_loss
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("columns", [1, 64, 130, 300, 512])
@pytest.mark.parametrize("widths", [(768, 64), (100, 24), (1024, 17)])
def test_what_a_chunk_adds(widths, columns, dtype, loss):
    online, reference = (embed(1111, width, dtype=dtype) for width in widths)
    chunk = torch.randperm(1111, device=DEVICE)[:columns].sort().values
    chunk[columns // 2] = -1
    check_add(online, reference, None, chunk, loss)
    check_add(online, reference, torch.randperm(1111, device=DEVICE)[:333], chunk, loss)


@every_loss
def test_every_tile(loss):
    from activesel.kernels import config, pairs

    online, reference = embed(1000, 200), embed(1000, 768)
    chunk = torch.arange(1, 1000, 2, device=DEVICE)
    for tile in config.pair_candidates(online[0]):
        check_add(online, reference, None, chunk, loss, lambda *a, t=tile: pairs.pair_add(*a, t))


@every_backend
@every_loss
@pytest.mark.parametrize("kind", ["learnability", "hard", "easy"])
def test_the_rows_are_those_picked_on_the_cpu(backend, kind, loss):
    """Noise keeps keys far apart, so that rounding of the scores decides nothing."""
    online, reference = (
        Pairs(*(t.cpu() for t in embed(700, width, bias=-6.0))) for width in (96, 40)
    )
    online.image[::50] = math.nan
    given = {"online": online, "reference": reference}
    given.pop({"hard": "reference", "easy": "online"}.get(kind), None)
    how = dict(k=150, chunks=5, loss=loss, seed=4, temperature=20.0)
    expected = joint_select(**given, **how, backend="torch")
    picked = joint_select(**gpu(given), **how, backend=backend)
    assert torch.equal(picked.indices.cpu(), expected.indices)
    torch.testing.assert_close(
        picked.scores.cpu(), expected.scores, rtol=1e-5, atol=1e-4, equal_nan=True
    )
    torch.testing.assert_close(picked.batch_score.cpu(), expected.batch_score, rtol=1e-5, atol=1e-3)
    assert picked.flags.cpu() == expected.flags


@every_loss
def test_twice_the_same_bits(loss):
    sides = [Pairs(*embed(5000, 256)) for _ in range(2)]
    first, second = (
        joint_select(online=sides[0], reference=sides[1], k=1000, chunks=4, loss=loss, seed=1)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_loss
def test_memory_grows_with_rows_not_with_their_square(loss):
    online, reference = (Pairs(*embed(40_000, 64)) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    joint_select(online=online, reference=reference, k=8000, chunks=8, loss=loss, seed=1)
    assert torch.cuda.max_memory_allocated() - before < 40_000 * 400


def test_embeddings_beyond_four_gigabytes():
    """Offsets that 32 bits do not hold; the last rows count."""
    rows, width = 2_200_000, 1024
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("the device has less than 14 GB free")
    image = torch.zeros(rows, width, dtype=BF16, device=DEVICE)
    image[:, 0] = 1
    text = image.clone()
    image[-3:] = text[-3:] = F.normalize(torch.randn(3, width, device=DEVICE), dim=1).to(BF16)
    numbers = [torch.tensor([v], device=DEVICE) for v in (10.0, -10.0)]
    chunk = torch.tensor([5, rows - 2], device=DEVICE)
    state = start("sigmoid", rows)
    _triton.pair_add(state, [image, text, *numbers], [], None, chunk, "sigmoid")
    few = torch.tensor([0, 5, rows - 3, rows - 2, rows - 1], device=DEVICE)
    expected = start("sigmoid", 5)
    spec_joint.pair_add(expected, [image, text, *numbers], [], few, chunk, "sigmoid")
    torch.testing.assert_close(state[:, few], expected, rtol=1e-5, atol=1e-6)
