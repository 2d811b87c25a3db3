# SPDX-License-Identifier: Apache-2.0
"""`Pairs`: rows scored one by one, and what joint selection refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from embeddings import embed, single, two

import activesel
from activesel import Pairs, joint_select, select

KINDS = ["learnability", "hard", "easy"]

# ------------------------------------------------------------------------------- Pairs in `select`


@pytest.mark.parametrize("loss", ["dot", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_as_per_row_losses(backend, loss, kind):
    online, reference = map(single, two(kind))

    def per_row(p):
        x = p.scale * (p.image.double() * p.text.double()).sum(1) + p.bias
        return F.softplus(-x) if loss == "sigmoid" else -x + p.bias

    want = torch.zeros(130, dtype=torch.float64)
    for p, sign in ((online, 1), (reference, -1)):
        want += 0 if p is None else sign * per_row(p)
    got = activesel.score(online=online, reference=reference, loss=loss, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    picked = select(online=online, reference=reference, k=9, loss=loss, seed=0, backend=backend)
    assert torch.equal(picked.scores, got)


def test_pairs_against_cached_losses():
    online = single(embed(16, 8))
    cached = torch.rand(16)
    got = activesel.score(online=online, reference=cached, loss="dot")
    want = activesel.score(online=online, loss="dot") - cached
    torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------------- bad input


def pairs(image=(8, 4), text=(8, 4), scale=1.0, bias=0.0, unit=True):
    z = [torch.randn(shape) for shape in (image, text)]
    return Pairs(*(F.normalize(x, dim=-1) if unit else x for x in z), scale, bias)


GOOD = pairs()
BAD = {
    "nothing": (dict(), ValueError, "online or reference must be given"),
    "not pairs": (dict(online=torch.rand(8)), TypeError, "online must be Pairs, got Tensor"),
    "k": (dict(online=GOOD, k=9), ValueError, r"k must be in \[1, 8\], got 9"),
    "k = 0": (dict(online=GOOD, k=0), ValueError, r"k must be in \[1, 8\], got 0"),
    "chunks": (dict(online=GOOD, chunks=5), ValueError, r"chunks must be in \[1, k=4\], got 5"),
    "no chunks": (dict(online=GOOD, chunks=0), ValueError, "chunks must be in"),
    "half a chunk": (dict(online=GOOD, chunks=1.5), TypeError, "chunks must be an int"),
    "loss": (dict(online=GOOD, loss="dot"), ValueError, "loss must be"),
    "normalize": (dict(online=GOOD, loss="softmax", normalize=True), ValueError, "normalize"),
    "rows": (dict(online=GOOD, reference=pairs((7, 4), (7, 4))), ValueError, "8 rows, got 7"),
    "towers": (dict(online=pairs((8, 4), (8, 5))), ValueError, "online.text must be"),
    "rank": (dict(reference=pairs((8, 4, 1), (8, 4, 1))), ValueError, "reference.image must be"),
    "dtype": (dict(online=Pairs(*(x.int() for x in GOOD[:2]), 1.0)), TypeError, "online.image"),
    "zero": (dict(online=pairs(unit=False)._replace(text=torch.zeros(8, 4))), ValueError, "length"),
    "length": (dict(reference=pairs(unit=False)), ValueError, "reference.image must have rows of"),
    "scale": (dict(online=pairs(scale=math.inf)), ValueError, "online.scale must be finite"),
    "scale tensor": (
        dict(online=pairs(scale=torch.tensor(math.nan))), ValueError, "online.scale must be finite",
    ),
    "bias": (dict(online=pairs(bias=math.nan)), ValueError, "online.bias must be finite"),
    "scales": (dict(online=pairs(scale=torch.ones(2))), ValueError, "online.scale must have one"),
    "a word": (dict(online=pairs(scale="10")), TypeError, "online.scale must be a number"),
    "device": (dict(online=GOOD, reference=GOOD._replace(image=GOOD.image.to("meta"))),
               RuntimeError, "reference"),
    "temperature": (dict(online=GOOD, temperature=-1.0), ValueError, "temperature"),
    "temperature tensor": (
        dict(online=GOOD, temperature=torch.tensor([-1.0])), ValueError, "temperature",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, error, message = BAD[name]
    with pytest.raises(error, match=message):
        joint_select(**{"k": 4, "chunks": 2, **arguments})


def test_pairs_have_no_softmax_loss_of_their_own():
    with pytest.raises(ValueError, match="joint_select"):
        select(online=GOOD, k=2)
    with pytest.raises(ValueError, match=r"online\.text must have rows"):
        select(online=GOOD._replace(text=torch.zeros(8, 4)), k=2, loss="dot")
    with pytest.raises(ValueError, match="targets must be None"):
        select(online=GOOD, targets=torch.zeros(8).long(), k=2, loss="dot")
