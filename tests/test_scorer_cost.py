# SPDX-License-Identifier: Apache-2.0
"""The cost model of the scorer's kernels: what it counts, its bounds, and the table it made."""

import doctest
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the model reads the kernels' tiles")

from activesel.kernels import routes
from activesel.kernels.config import ScorerTile
from activesel.ledger import forward_flops
from activesel.models import ViT, ViTConfig
from activesel.packing import Packed
from bench import scorer_cost, scorer_predictions, scorer_text
from bench.scorer_cost import H200, Work, blocks, needed, one_launch, time, torch_route
from bench.scorer_predictions import CASES, shape

TILE = ScorerTile(64, 64, 4, 2, 2)


@pytest.mark.parametrize("module", [scorer_cost, scorer_predictions])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("sizes", [(32, 1, 16, 32), (64, 2, 8, 32), (192, 2, 8, 32)])
def test_needed_flops_are_those_that_torch_counts(sizes):
    s = shape(*sizes, classes=10)
    model = ViT(ViTConfig(s.width, s.depth, s.heads, s.image_size, s.patch_size, classes=10))
    assert needed(s, 3, 2) == 6 * forward_flops(model, (3, s.image_size, s.image_size))


def test_nothing_is_padded_where_all_sizes_are_whole_tiles():
    """64 tokens of width 64 in tiles of 64; the head takes two products instead of one."""
    s = shape(64, 2, 4, 32, classes=64)
    row = one_launch(s, 1 << 15, tile=TILE, group=1)
    images = row["programs"] * row["rounds"]
    flops = row["units"]["flops"] * H200.flops
    padded_patches = 2 * 64 * (s.KP - s.K) * 64
    tile = scorer_cost.HEAD_M
    heads = -(-row["rounds"] // tile) * tile / row["rounds"]  # images of a program, in tiles
    extra = 2 * images * (padded_patches + (2 * heads - 1) * 2 * 64 * s.classes)
    wide = -(-row["programs"] // H200.processors) * H200.processors / row["programs"]
    assert flops == pytest.approx((needed(s, images, 2) + extra) * wide, rel=1e-9)


def test_pixels_are_read_from_memory_once():
    for name, case in CASES.items():
        s, images = case.shape, case.images
        pixels = s.channels * s.image_size**2
        read = blocks(s, images)["phases"]["embed"]
        assert read >= images * pixels / H200.hbm, name
        work = scorer_cost.embed(s, 2, images, images * s.tokens, TILE)
        assert work.hbm == images * pixels and work.flops == 2 * images * s.tokens * 2 * s.DP * s.KP


amounts = st.floats(0, 1e15)


@given(
    st.builds(Work, amounts, amounts, amounts, amounts, amounts), st.integers(1, 4), st.booleans()
)
def test_time_lies_between_full_overlap_and_none(work, programs, streams):
    units = work.seconds(H200).values()
    found = time(work, H200, programs, streams)
    assert max(units) <= found * (1 + 1e-9) and found <= sum(units) * (1 + 1e-9)
    assert time(work + Work(starts=1.0), H200, programs, streams) >= found
    assert time(work, H200, programs + 1, streams) <= found * (1 + 1e-9)


@given(st.sampled_from(list(CASES)), st.integers(1, 1 << 16))
def test_more_images_take_more_time(name, images):
    s = CASES[name].shape
    for way in (blocks, lambda *a, **k: torch_route(*a, compiled=True, **k)):
        assert way(s, 2 * images)["seconds"] >= way(s, images)["seconds"]
        assert way(s, images, 2)["seconds"] >= way(s, images, 1)["seconds"]
    for tile in (TILE, ScorerTile(128, 32, 8, 3, 1)):
        row = one_launch(s, images, tile=tile)
        assert row["full_overlap"] < row["seconds"]
        assert row["programs"] * row["rounds"] * row["group"] >= images
        assert row["computed_per_needed"] > 1 and 0 <= row["scratch_missed"] <= 1


def test_scratch_that_fits_costs_no_memory_traffic():
    s = CASES["w64"].shape
    few, many = (one_launch(s, 1 << 15, tile=TILE, group=n) for n in (1, 16))
    assert few["scratch_missed"] == 0 < many["scratch_missed"]
    pixels = (1 << 15) * 3 * 224 * 224 / H200.hbm
    assert few["units"]["hbm"] == pytest.approx(pixels, rel=0.05)
    assert many["units"]["hbm"] > 1.5 * pixels


def test_e4m3_halves_products_and_weights():
    s = CASES["Ti/16"].shape
    half, low = (scorer_cost.layers(s, 1280, TILE, fp8) for fp8 in (False, True))
    assert low.flops == half.flops / 2 and low.l2 < half.l2 and low.hbm == half.hbm
    assert blocks(s, 4096, fp8=True)["seconds"] < blocks(s, 4096)["seconds"]


def test_kernels_are_for_many_images_only():
    for case in CASES.values():
        assert routes.one_launch(Packed(case.shape, 2, "meta")) == (case.route == "one launch")
        assert scorer_predictions.route(case.shape, 1) == "torch"
    assert scorer_predictions.smallest([CASES["mu"].shape]) in scorer_predictions.COUNTS


def test_the_committed_predictions_are_reproduced(tmp_path, capsys):
    scorer_text.command(tmp_path / "x.json")
    made, kept = (
        json.loads(path.read_text()) for path in (tmp_path / "x.json", scorer_text.RESULTS)
    )
    assert made == kept, "run python -m bench scorer-cost"
    assert "times faster" in capsys.readouterr().out


def test_work_adds_up():
    a, b = Work(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), Work(1.0)
    assert asdict(a * 2 + b) == {
        "flops": 3.0, "exps": 4.0, "lanes": 6.0, "l2": 8.0, "hbm": 10.0, "starts": 12.0,
    }  # fmt: skip
    assert set(a.seconds(H200)) == {"flops", "exps", "lanes", "l2", "hbm"}
    assert torch.tensor(list(a.seconds(H200).values())).isfinite().all()


def test_the_package_goes_by_these_sizes():
    found = {key: images for key, images in scorer_predictions.sizes().items() if images}
    assert found == routes.SIZES


@pytest.mark.parametrize(
    ("sizes", "images", "expected"),
    [
        ((64, 6, 32), 32_768, True), ((64, 6, 32), 32_767, False), ((40, 2, 32), 32_768, True),
        ((192, 12, 32), 1 << 20, False), ((64, 13, 32), 1 << 20, False),
    ],
)  # fmt: skip
def test_what_auto_goes_by(monkeypatch, sizes, images, expected):
    monkeypatch.setattr(routes, "INTERPRETED", False)
    assert routes.faster(shape(*sizes), torch.empty(images, 0)) == expected
