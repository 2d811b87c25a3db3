# SPDX-License-Identifier: Apache-2.0
"""`Selection.take` on batches of any structure."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch

import activesel

Pair = namedtuple("Pair", "x y")
PICKED = activesel.sample(torch.tensor([0.0, 9.0, 9.0]), 2, temperature=0)


class Encoding(UserDict):  # what tokenizers return: a mapping that is not a dict
    def __init__(self, data, name):
        super().__init__(data)
        self.name = name


def test_take_keeps_structure():
    x, names = torch.arange(6).view(3, 2), ["a", "b", "c"]
    batch = {
        "pair": Pair(x, [names, {"deep": np.arange(3)}]),
        "tuple": (x, 5, None, "text"),
        "list": [x, x],
        "short": [1, 2],
        "other": torch.arange(4),
        "scalar": torch.tensor(3),
    }
    got = PICKED.take(batch)
    assert isinstance(got["pair"], Pair) and got["pair"].y[0] == ["b", "c"]
    assert torch.equal(got["pair"].x, x[1:]) and torch.equal(got["list"][1], x[1:])
    assert got["pair"].y[1]["deep"].tolist() == [1, 2]
    assert got["tuple"][1:] == (5, None, "text") and got["short"] == [1, 2]
    assert torch.equal(got["other"], torch.arange(4)) and got["scalar"] == 3
    assert names == ["a", "b", "c"] and batch["pair"].x is x


@pytest.mark.parametrize(
    "make",
    [dict, OrderedDict, UserDict, lambda d: defaultdict(list, d), lambda d: Encoding(d, "kept")],
)
def test_take_keeps_the_mapping_type(make):
    batch = make({"x": torch.arange(3), "n": ["a", "b", "c"]})
    got = PICKED.take(batch)
    assert type(got) is type(batch) and list(got) == ["x", "n"]
    assert got["x"].tolist() == [1, 2] and got["n"] == ["b", "c"]
    assert batch["x"].tolist() == [0, 1, 2]
    if isinstance(batch, Encoding):
        assert got.name == "kept"


def test_take_of_a_default_collated_batch():
    """torch's own collate function turns strings into a tuple when the samples are tuples."""
    samples = [(torch.tensor(i), f"row {i}") for i in range(3)]
    x, names = PICKED.take(torch.utils.data.default_collate(samples))
    assert x.tolist() == [1, 2] and list(names) == ["row 1", "row 2"]


def test_take_of_arrays():
    got = PICKED.take({"s": np.array(["a", "b", "c"]), "m": np.zeros((3, 2)), "n": np.zeros(4)})
    assert got["s"].tolist() == ["b", "c"] and got["m"].shape == (2, 2) and got["n"].shape == (4,)


def test_take_lists_of_rows():
    rows = [{"x": torch.tensor(i)} for i in range(3)]
    assert PICKED.take(rows) == rows[1:]
    ragged = [torch.arange(i + 1) for i in range(3)]  # the last happens to be 3 long
    assert [len(t) for t in PICKED.take(ragged)] == [2, 3]


def test_take_of_two_tensors_at_two_rows():
    picked = activesel.sample(torch.tensor([0.0, 9.0]), 1, temperature=0)
    x, y = picked.take([torch.arange(2), torch.arange(2)])
    assert x.tolist() == y.tolist() == [1]
    x, names = picked.take([torch.arange(2), ["a", "b"]])
    assert x.tolist() == [1] and names == ["b"]


def test_selection_is_frozen():
    with pytest.raises(AttributeError):
        PICKED.indices = torch.zeros(1)
