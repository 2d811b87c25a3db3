# SPDX-License-Identifier: Apache-2.0
"""Recall counts what is truly first, and gives nothing away in doubt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activesel.loop.retrieval import embed, recall, retrieval
from activesel.models import dual
from activesel.operands import Pairs


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_recall_is_that_of_a_sorted_list(rows, k, seed):
    g = torch.Generator().manual_seed(seed)
    q, t = (torch.randint(-2, 3, (rows, 3), generator=g).float() for _ in range(2))  # many ties
    hits = 0
    for i in range(rows):
        scores = [float(q[i] @ key) for key in t]
        ahead = sum(s >= scores[i] for j, s in enumerate(scores) if j != i)
        hits += ahead < k
    assert recall(q, t, ks=(k,), block=7) == {str(k): pytest.approx(hits / rows)}


def test_what_is_not_finite_or_all_alike_finds_nothing():
    z = torch.eye(12)
    assert recall(torch.ones(12, 2), torch.ones(12, 2)) == {"1": 0.0, "10": 0.0}
    broken = z.clone()
    broken[3] = torch.nan
    assert recall(broken, z, ks=(1,)) == {"1": pytest.approx(11 / 12)}
    # nobody can be told apart from the key that is broken
    assert recall(z, broken, ks=(1,)) == {"1": 0.0}


def test_directions_are_told_apart():
    image, text = torch.eye(3), torch.tensor([[1.0, 0, 0], [2.0, 1, 0], [0, 0, 1]])
    found = retrieval(Pairs(image, text, 1.0))
    assert found["image_to_text"]["1"] == pytest.approx(2 / 3)
    assert found["text_to_image"]["1"] == pytest.approx(2 / 3)
    assert found["text_to_image"]["10"] == 1.0


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((0, 3), (0, 3))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="keys must be of the shape of queries"):
        recall(*(torch.zeros(shape) for shape in shapes))


def test_embedding_in_parts_changes_nothing_and_leaves_no_trace():
    model = dual("mu", image_size=32, patch=16, channels=1, vocabulary=9, length=3)
    model.train()
    images, tokens = torch.rand(7, 1, 32, 32), torch.randint(9, (7, 3))
    parts, whole = embed(model, images, tokens, batch=2), model.forward_pairs(images, tokens)
    assert torch.allclose(parts.image, whole.image, atol=1e-6)
    assert torch.allclose(parts.text, whole.text, atol=1e-6)
    assert model.training and not parts.image.requires_grad
