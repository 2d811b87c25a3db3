# SPDX-License-Identifier: Apache-2.0
"""The contact sheet: which rows are extremes, and what is drawn of them."""

import doctest

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from activesel.loop import sheet
from activesel.loop.icons import IconPairs


@given(
    st.lists(st.integers(0, 12).flatmap(lambda d: st.tuples(st.integers(0, d), st.just(d)))),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_extremes_are_the_highest_and_lowest_rates_of_rows_known_well(counts, count, least):
    kept, drawn = torch.tensor(counts, dtype=torch.int32).reshape(-1, 2).T
    known = (drawn >= least).nonzero()[:, 0]
    if len(known) < 2 * count:
        with pytest.raises(ValueError, match=f"drawn {least} times or more, got {len(known)}"):
            sheet.extremes(kept, drawn, count, least)
        return
    most, fewest = sheet.extremes(kept, drawn, count, least)
    rate = kept / drawn
    ranked = rate[known].sort().values
    assert torch.equal(rate[most], ranked.flip(0)[:count])
    assert torch.equal(rate[fewest], ranked[:count])
    for found in (most, fewest):
        assert (drawn[found] >= least).all() and len(found.unique()) == count
        same = rate[found].diff() == 0
        assert (drawn[found].diff()[same] <= 0).all(), "among equals, those drawn more often first"


def test_pictures_and_captions_are_drawn(tmp_path):
    n = 30
    rows = IconPairs(
        images=torch.full((n, 1, 32, 32), 200, dtype=torch.uint8),
        tokens=torch.zeros(n, 10).long(),
        tier=torch.arange(n, dtype=torch.uint8) % 3,
        captions=[f"caption{number} of_an_unbreakable_length_{'x' * 40}" for number in range(n)],
        ids=torch.arange(n),
        sets=["any"] * n,
        emoji=torch.zeros(n, dtype=torch.bool),
    )
    kept, drawn = torch.arange(n), torch.full((n,), n)
    svg, png = sheet.sheet(rows, kept, drawn, tmp_path / "kept", count=12, least=5)
    assert png.stat().st_size > 20_000
    text = svg.read_text()
    assert "<!-- Kept most often: 4 clean, 4 noisy, 4 logo -->" in text
    assert "<!-- 29 of 30 -->" in text and "<!-- 0 of 30 -->" in text
    assert "caption29" in text and "caption12" not in text


def test_examples_run():
    result = doctest.testmod(sheet)
    assert result.attempted > 0 and result.failed == 0
