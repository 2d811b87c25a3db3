# SPDX-License-Identifier: Apache-2.0
"""Runs on labelled rows: accuracy, and how often each row was drawn and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activesel.loop import data, records, training
from activesel.loop.evaluate import Accuracy, accuracy


class LabelledTrainer(training.Trainer):
    """A run on labelled rows, some of them wrongly labelled.

    Attributes:
        rows, test: what is trained on, and what is tested on.
        learner: whose accuracy counts.
        measured: its last accuracy.
    """

    rows: data.Labelled
    test: data.Labelled
    learner: nn.Module
    measured: Accuracy

    def fresh_counts(self) -> dict[str, Tensor]:
        """How often each row was "kept" and "drawn": never yet."""
        rows = len(self.rows)
        return {name: torch.zeros(rows, dtype=torch.int32) for name in ("kept", "drawn")}

    def tally(self, drawn: Tensor, kept: Tensor) -> None:
        """Count a super-batch and what was kept of it, both row numbers; no row is in it twice."""
        for name, index in (("drawn", drawn), ("kept", kept)):
            self.counts[name][index.cpu()] += 1

    def measure(self, last: bool) -> dict[str, float]:
        rows = len(self.test) if last else self.config.quick
        self.measured = accuracy(self.learner, self.test.images[:rows], self.test.labels[:rows])
        return {
            "accuracy": self.measured.overall,
            "worst_class": self.measured.worst,
            **self.kept(),
        }

    def kept(self) -> dict[str, int]:
        """Rows kept so far, and how many of their labels are wrong."""
        kept = self.counts["kept"]
        return {
            "kept": int(kept.sum()),
            "kept_mislabelled": int(kept[self.rows.mislabelled].sum()),
        }

    def result(self, folder: Path) -> dict[str, Any]:
        """What the record of the run says of it all; `kept.safetensors` says it of every row."""
        counts = {"ids": torch.arange(len(self.rows)), **self.counts}
        records.write_tensors(folder / "kept.safetensors", counts)
        return {
            "accuracy": self.measured.overall,
            "worst_class": self.measured.worst,
            "by_class": list(self.measured.by_class),
            "base_rate": float(self.rows.mislabelled.double().mean()),
            **self.kept(),
        }
