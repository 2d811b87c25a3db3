# SPDX-License-Identifier: Apache-2.0
"""Whether selection keeps the rows that exact scores would keep, without a GPU.

The arithmetic of the Triton kernel is the interpreter's (products in fp32, as on a GPU, but another
order of sums); what a GPU's own does is a row of `python -m bench gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from activesel.loop import records
from bench import speed
from bench.gpu.agreement import agreement
from bench.gpu.device import Bench

RESULTS = Path(__file__).parent / "results" / "agreement-cpu.json"
SIZES = 16_384, 1000, 192  # rows, classes, features
BACKENDS = "native", "triton"


class OnCpu(Bench):
    def __init__(self, backend: str) -> None:
        super().__init__(rehearse=True)
        self.backend = backend

    def size(self, real: int, rehearsed: int) -> int:
        return real


def command(out: Path = RESULTS) -> None:
    """Compare the top fifth by learnability with that of float64 scores of the same bf16 inputs.

    Args:
        out: JSON file to write.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        again = [sys.executable, "-m", "bench", "agreement", "--out", str(out)]
        sys.exit(subprocess.run(again, env=environment, check=False).returncode)
    torch.set_grad_enabled(False)
    results: dict[str, Any] = {}
    for backend in BACKENDS:
        row = results[backend] = agreement(*SIZES, OnCpu(backend))
        for name, found in row["agreement"].items():
            print(
                f"{backend:8} {name:30} keeps {found['overlap']:.2%},"
                f" off by {found['error_rms']:.1e}"
            )
    sizes = dict(zip(("rows", "classes", "features"), SIZES, strict=True))
    content = {"schema": 1, "machine": speed.machine(), **sizes, "backends": results}
    records.write_json(out, content)
    print(f"written to {out}")
