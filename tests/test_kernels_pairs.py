# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of joint selection under the interpreter, held against float64.

What all backends share is tested with the other backends; here is what only these kernels have:
tiles and their ragged edges, masks, and one logarithm for many terms.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from activesel import Pairs, _triton, joint_select, spec_joint

if why := _triton.reason(torch.device("cpu")):
    pytest.skip(why, allow_module_level=True)

from activesel.kernels import config, pairs
from activesel.testing import assert_as_accurate

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
LOSSES = ["sigmoid", "softmax"]
SMALL = config.Tile(16, 32, 16, 4, 2)
TILES = sorted({t for tiles in config.PAIR_TILES.values() for t in tiles}, key=str)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def embed(rows, width, scale=10.0, bias=-10.0, dtype=BF16):
    image, text = F.normalize(torch.randn(2, rows, width), dim=2).to(dtype)
    return [image, text, torch.tensor([scale]), torch.tensor([bias])]


def start(loss, rows):
    return torch.zeros(1, rows) if loss == "sigmoid" else torch.full((4, rows), -INF)


def double(side):
    return [t.double() for t in side]


def truth(online, reference, rows, chunk, loss):
    """[1 | 4, R] float64: one matrix per model and direction, rows against themselves left out."""
    rows = torch.arange((online or reference)[0].shape[0]) if rows is None else rows
    state = start(loss, len(rows)).double()
    chunk = chunk[chunk >= 0]
    for m, side in enumerate((online, reference)):
        if not side:
            continue
        image, text, scale, bias = double(side)
        for way, (a, b) in enumerate(((image, text), (text, image))):
            x = scale * a[rows] @ b[chunk].T
            same = rows[:, None] == chunk
            if loss == "softmax":
                state[2 * m + way] = x.masked_fill(same, -INF).logsumexp(1)
            else:
                state[0] += (1 - 2 * m) * F.softplus(x + bias).masked_fill(same, 0).sum(1)
    return state


def check(online, reference, rows, chunk, loss, tile=None):
    """No worse than the specification in fp32, up to a few roundings of the sums."""
    count = (online or reference)[0].shape[0] if rows is None else len(rows)
    ours, plain = start(loss, count), start(loss, count)
    pairs.pair_add(ours, online, reference, rows, chunk, loss, tile)
    spec_joint.pair_add(plain, online, reference, rows, chunk, loss)
    exact = truth(online, reference, rows, chunk, loss)
    size = exact.abs().max() if loss == "sigmoid" else 1
    assert_as_accurate(ours, plain, exact, 2e-6 * (1 + float(size)))
    return ours


# ---------------------------------------------------------------------------------------- pair_add


@every_loss
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile, loss):
    online, reference = embed(150, 72), embed(150, 40, 20.0, -6.0)
    check(online, reference, None, torch.arange(3, 150, 2), loss, tile)


@every_loss
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("widths", [(1, 16), (17, 100), (200, 768), (1024, 8)])
def test_dtypes_and_widths(widths, dtype, loss):
    online, reference = (embed(20, width, dtype=dtype) for width in widths)
    check(online, reference, None, torch.tensor([0, 7, 19]), loss)


@every_loss
@pytest.mark.parametrize("kind", ["hard", "easy"])
def test_one_model(kind, loss):
    side = embed(40, 24)
    online, reference = (side, []) if kind == "hard" else ([], side)
    state = check(online, reference, None, torch.tensor([1, 8, 30]), loss)
    if loss == "softmax":  # an absent model's rows are left alone
        assert (state[2:] if kind == "hard" else state[:2]).eq(-INF).all()


@every_loss
def test_given_rows_in_any_order(loss):
    online, reference = embed(60, 24), embed(60, 16)
    rows = torch.randperm(60)[:37]
    check(online, reference, rows, torch.tensor([*rows[:20].tolist(), -1, 0, 59]), loss, SMALL)


@every_loss
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 95])
def test_ragged_chunks(columns, loss):
    online, reference = embed(99, 24), embed(99, 24)
    check(online, reference, None, torch.randperm(99)[:columns].sort().values, loss, SMALL)


@settings(max_examples=20)
@given(
    st.integers(1, 40), st.integers(0, 50), st.integers(1, 40), st.sampled_from(LOSSES),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(rows, columns, width, loss, subset, seed):
    torch.manual_seed(seed)
    online, reference = embed(rows, width), embed(rows, 9, 3.0, 1.0)
    which = torch.randperm(rows)[: 1 + rows // 2] if subset else None
    check(online, reference, which, torch.randint(-1, rows, (columns,)), loss, SMALL)


@every_loss
@pytest.mark.parametrize("chunk", [[], [-1], [-1] * 70])
def test_a_chunk_of_nothing_changes_nothing(chunk, loss):
    online, reference = embed(20, 16), embed(20, 16)
    state = torch.randn(1 if loss == "sigmoid" else 4, 20)
    before = state.clone()
    chunk = torch.tensor(chunk, dtype=torch.int64)
    pairs.pair_add(state, online, reference, None, chunk, loss, SMALL)
    torch.testing.assert_close(state, before, rtol=1e-6, atol=0)


@every_loss
def test_chunks_add_up(loss):
    online, reference = embed(70, 24), embed(70, 24)
    chunk, state = torch.randperm(70)[:48], start(loss, 70)
    for part in chunk.split(20):
        pairs.pair_add(state, online, reference, None, part, loss, SMALL)
    exact = truth(online, reference, None, chunk, loss)
    torch.testing.assert_close(state.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [-10.0, -20.0, -60.0])
def test_terms_far_below_one_are_not_lost(bias):
    """1 + exp(-20) rounds to 1; that many terms of it still count, in all their digits."""
    side = embed(256, 32, scale=1.0, bias=bias)
    state = start("sigmoid", 256)
    chunk = torch.arange(0, 256, 2)
    pairs.pair_add(state, side, [], None, chunk, "sigmoid", config.Tile(64, 256, 32, 4, 2))
    exact = truth(side, [], None, chunk, "sigmoid")
    torch.testing.assert_close(state.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e30])
@pytest.mark.parametrize("columns", [64, 256])
def test_products_of_many_terms_do_not_overflow(columns, scale):
    """Every term 1 + e is 2, or every logit is far beyond what an exponential holds."""
    side = embed(300, 16, scale, 0.0, FP32)
    chunk, state = torch.arange(columns), start("sigmoid", 300)
    tile = config.Tile(64, columns, 16, 4, 2)
    pairs.pair_add(state, side, [], None, chunk, "sigmoid", tile)
    exact = truth(side, [], None, chunk, "sigmoid")
    torch.testing.assert_close(state.double(), exact, rtol=1e-4, atol=0)


@every_loss
def test_bad_rows_taint_nobody(loss):
    """The first row, which stands in wherever a column counts nothing, is bad itself."""
    online, reference = embed(50, 24), embed(50, 24)
    good = torch.arange(50) % 7 != 0
    exact = truth(online, reference, None, torch.tensor([1, 2, 40]), loss)
    online[0][::14], online[1][7::14], reference[0][::7] = NAN, INF, -INF
    state = start(loss, 50)
    chunk = torch.tensor([-1, 1, 2, -1, 40])
    pairs.pair_add(state, online, reference, None, chunk, loss, SMALL)
    torch.testing.assert_close(state[:, good].double(), exact[:, good], rtol=1e-5, atol=1e-5)


def test_layouts_and_dtypes_that_differ():
    """Strided, misaligned, and an image tower in another dtype than the text's."""
    plain = embed(40, 24, dtype=FP32)
    wide = torch.randn(40, 2, 31)
    wide[:, 0, 5:29] = plain[0]
    text = plain[1].T.contiguous().T
    chunk = torch.tensor([3, 4, 30])
    expected = check(plain, [], None, chunk, "sigmoid")
    got = start("sigmoid", 40)
    pairs.pair_add(got, [wide[:, 0, 5:29], text, *plain[2:]], [], None, chunk, "sigmoid")
    assert torch.equal(got, expected)
    check([plain[0].to(BF16), *plain[1:]], [], None, chunk, "sigmoid")


def test_the_tile_is_the_widest_that_a_chunk_fills(monkeypatch):
    monkeypatch.setattr(config, "capability", lambda device: 90)
    x = torch.empty(1, dtype=BF16)
    widths = {c: config.pair_tile(x, c).block_n for c in (1, 62, 64, 120, 128, 250, 300, 512, 2048)}
    assert list(widths.values()) == [64, 64, 64, 128, 128, 256, 64, 256, 256]


# ------------------------------------------------------------------------------------- pair_logits


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (50, 768)])
def test_logits_of_pairs(shape, dtype):
    side = embed(*shape, dtype=dtype)
    x, flags = pairs.pair_logits(side)
    image, text, scale, bias = double(side)
    torch.testing.assert_close(x.double(), scale * (image * text).sum(1) + bias, rtol=0, atol=5e-6)
    assert flags == 0


def test_flags_are_those_of_the_specification():
    for change in (
        lambda s: s[0][5].mul_(2), lambda s: s[1][40].mul_(0.5), lambda s: s[2].fill_(NAN),
        lambda s: s[3].fill_(INF), lambda s: s[0][::9].fill_(NAN), lambda s: s[0][3, 1].fill_(NAN),
        lambda s: s[1][0, 0].fill_(-INF), lambda s: (s[2].fill_(INF), s[0][49].mul_(2)),
    ):  # fmt: skip
        side = embed(50, 20, dtype=FP32)
        change(side)
        x, flags = pairs.pair_logits(side)
        expected, expected_flags = spec_joint.pair_logits(side)
        assert flags == expected_flags
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


# ------------------------------------------------------------------------------------ joint_select


@every_loss
@pytest.mark.parametrize("bad", [False, True])
def test_the_same_rows_as_the_specification(bad, loss):
    """Noise keeps keys far apart, so that rounding of the scores decides nothing."""
    sides = embed(150, 40, 10.0, -4.0), embed(150, 24, 20.0, -8.0)
    if bad:
        sides[0][0][::10] = NAN
    online, reference = (Pairs(*side) for side in sides)
    ours, plain = (
        joint_select(online=online, reference=reference, k=30, chunks=4, loss=loss, seed=3,
                     temperature=5.0, backend=backend)
        for backend in ("triton", "torch")
    )  # fmt: skip
    assert torch.equal(ours.indices, plain.indices)
    torch.testing.assert_close(ours.scores, plain.scores, rtol=1e-5, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(ours.batch_score, plain.batch_score, rtol=1e-5, atol=1e-3)
    assert ours.flags == plain.flags
    assert not bad or not ours.scores[ours.indices].isnan().any()


def test_what_no_kernel_takes_is_left_to_torch():
    """An empty chunk never gets here from the driver, embeddings of no width may."""
    side = embed(9, 4)
    side[:2] = [t[:, :0] for t in side[:2]]
    state = start("sigmoid", 9)
    _triton.pair_add(state, side, [], None, torch.tensor([1, 2]), "sigmoid")
    assert state[0, 0] == pytest.approx(4 * math.log1p(math.exp(-10)))
