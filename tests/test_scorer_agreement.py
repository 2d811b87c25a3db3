# SPDX-License-Identifier: Apache-2.0
"""Rounding of whole scorers: the finer, the closer to float64, for a pair that hardly differs."""

import io

import pytest
import torch
from rich.console import Console

from activesel.loop import data
from bench import scorer_agreement as agreement
from bench.scorer_agreement import AIM, EAGER, RMS, WAYS, Setting, halves

SMALL = Setting(32, 2, 2, rows=60, updates=30, batch=32, lr=4e-3)


@pytest.fixture(scope="module")
def made():
    """Two measured scorers on bars at the place of their label, one at patches of 2."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(data.CLASSES, (256,), generator=generator)
    images = torch.randint(256, (256, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images[torch.arange(256), 0, 2 * labels] = 255
    rows = data.Labelled(images, labels, torch.zeros(256, dtype=torch.bool))
    small = Setting(32, 1, 2, rows=20, updates=5, batch=8, lr=4e-3, patch=2)
    with torch.no_grad():
        scorers = {s.name: agreement.measure(s, rows, log=lambda _: None) for s in (SMALL, small)}
    return {"scorers": scorers}


def test_errors_are_ordered_as_the_roundings_are(made):
    row = made["scorers"][SMALL.name]
    assert abs(row["learnability_rms"] / RMS - 1) < 0.4 and row["kept"] == 12
    error = {name: found["error_rms"] for name, found in row["agreement"].items()}
    assert set(error) == {*WAYS, *EAGER}
    assert 0 < error["float32"] < 1e-6 < error["fp16"] < error["bf16"] < error[EAGER[0]]
    assert error["fp16, two halves where it matters"] < error["fp16"] < error["fp8 linear layers"]
    parts = {name: e for name, e in error.items() if "only" in name}
    assert parts.pop("fp16, only weights of patches") < 1e-6  # exact where channels share a std
    assert min(parts.values()) > 1e-6 and max(parts.values()) < 3 * error["fp16"]
    assert row["agreement"]["float32"]["overlap"] >= AIM


def test_two_halves_hold_22_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) + 2
    assert 0 < (halves(x) - x).abs().max() < 2**-20 < 2**-12 < (x.half() - x).abs().max()


def test_tables_show_every_way_and_scorer(made):
    text = agreement.table(made)
    assert "20 rows of Fashion-MNIST" in text and "depth 1, 196 tokens" in text
    assert all(f"| {name} |" in text for name in (*WAYS, *EAGER))
    console = Console(file=io.StringIO(), width=200)
    console.print(agreement._rich(made))
    assert "wanted 98%" in console.file.getvalue()
