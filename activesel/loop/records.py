# SPDX-License-Identifier: Apache-2.0
"""What runs leave on disk, each file whole or absent, and how seeds and names are derived."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pickle
import platform
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors.torch import save_file
from torch import Tensor

from activesel.files import whole

SCHEMA = 1
"""Version of `run.json`."""


def digest(content: dict[str, Any]) -> str:
    """Eight hex digits that tell configurations apart.

    >>> digest({"a": 1}) == digest({"a": 1}) != digest({"a": 2})
    True
    """
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def seed(base: int, *purpose: str) -> int:
    """A 62-bit seed of its own for every purpose, so that no two streams of noise coincide.

    >>> seed(0, "order") == seed(0, "order") != seed(0, "learner")
    True
    """
    text = "/".join((str(base), *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def environment() -> dict[str, Any]:
    """Machine and versions, enough to judge a timing by."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def write_text(path: Path, text: str) -> None:
    whole(path, lambda file: file.write_text(text))


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError if the file holds anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    """Rows that share the columns of the first."""

    def writer(file: Path) -> None:
        with open(file, "w", newline="") as stream:
            table = csv.DictWriter(stream, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)

    whole(path, writer)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    whole(path, lambda file: save_file(tensors, file))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    whole(path, lambda file: torch.save({"schema": SCHEMA, **state}, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and primitives only; ValueError if the file is damaged or of another version."""
    try:
        state = torch.load(path, weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        BadZipFile,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} must be a whole checkpoint (delete it to start over), got: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} must be a checkpoint of schema {SCHEMA}, got {found}")
    return state
