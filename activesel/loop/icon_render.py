# SPDX-License-Identifier: Apache-2.0
"""Pictures of icons: rendered once over all processes, kept in one checked file."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from activesel.files import whole
from activesel.loop import icon_packages
from activesel.loop.icon_packages import Icon

SIDE = 32
CHUNK = 512  # icons per task; fewer than that are rendered in this process
FORMAT = "activesel icons 1"  # another number when icons are read or drawn in another way


@dataclass(frozen=True)
class Rendered:
    """Icons with their pictures."""

    images: Tensor  # [N, 1, 32, 32] uint8, black on white
    icons: list[Icon]  # without their SVG


def load(
    subset: str,
    sets: Collection[str] | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rendered:
    """Rendered icons of the sets, from the cache, which is filled if need be.

    Args:
        subset: name of this choice of sets, hence of the file.
        sets: prefixes of icon sets; None = all that are permissively licensed.
        on_progress: called with the number of icons rendered and their total.

    Raises:
        FileNotFoundError: packages missing and not to be fetched.
        RuntimeError: a package that renders is not installed, or its processes died.
        ValueError: a damaged or foreign cache or package; says which file to delete.
    """
    folder = icon_packages.locate()
    path = folder / f"{subset}.safetensors"
    for present in (path, folder / "full.safetensors"):
        if present.is_file():
            whole = sets is None or present != path
            rendered = _read(present, None if whole else sets)
            if sets is None or not whole:
                return rendered
            rows = [row for row, icon in enumerate(rendered.icons) if icon.set in sets]
            return Rendered(rendered.images[rows], [rendered.icons[row] for row in rows])
    _draw([])  # says what is not installed before anything is fetched
    icon_packages.fetch(folder)
    icons = icon_packages.read(folder, sets)
    images = render([icon.svg for icon in icons], on_progress)
    rendered = Rendered(torch.from_numpy(images), [icon._replace(svg="") for icon in icons])
    _write(path, rendered, sets)
    return rendered


def render(
    svgs: Sequence[str],
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:  # [N, 1, 32, 32]
    """Draw every SVG in grey on white, over the CPUs at hand.

    Args:
        svgs: documents of 32 x 32 pixels.
        on_progress: called with the number of pictures drawn and their total.

    Raises:
        RuntimeError: resvg-py or Pillow is not installed, or a process died.
        ValueError: an SVG that is none.

    >>> black = '<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><rect width="16" '
    >>> black += 'height="32"/></svg>'
    >>> render([black])[0, 0, 0, [0, 31]].tolist()
    [0, 255]
    """
    tasks = [svgs[at : at + CHUNK] for at in range(0, len(svgs), CHUNK)]
    images = np.empty((len(svgs), 1, SIDE, SIDE), np.uint8)
    workers = max(1, min(_cpus(), len(tasks)))
    done = 0
    try:
        # Spawned, for a forked child of a process with threads may hang.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for drawn in (map if workers == 1 else pool.map)(_draw, tasks):
                images[done : done + len(drawn)] = drawn
                done += len(drawn)
                if on_progress:
                    on_progress(done, len(svgs))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that renders icons died; a script that calls this must do so under "
            "`if __name__ == '__main__':`"
        ) from error
    return images


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _draw(svgs: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:  # [N, 1, 32, 32]
    try:
        import resvg_py
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            f"{error}; rendering icons takes pip install 'activesel[loop]'"
        ) from error
    images = np.empty((len(svgs), 1, SIDE, SIDE), np.uint8)
    for row, svg in enumerate(svgs):
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, background="white")
        images[row, 0] = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    return images


def _header(sets: Collection[str] | None) -> dict[str, str]:
    versions = {name: version for name, (version, _) in icon_packages.PACKAGES.items()}
    chosen = "all" if sets is None else " ".join(sorted(sets))
    return {"format": FORMAT, "packages": json.dumps(versions), "sets": chosen}


def _digest(images: Tensor, table: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (images, table):
        digest.update(part.numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _write(path: Path, rendered: Rendered, sets: Collection[str] | None) -> None:
    table = torch.frombuffer(bytearray(json.dumps(rendered.icons).encode()), dtype=torch.uint8)
    metadata = {**_header(sets), "fingerprint": _digest(rendered.images, table)}
    tensors = {"images": rendered.images, "icons": table}
    whole(path, lambda file: save_file(tensors, file, metadata))


def _read(path: Path, sets: Collection[str] | None) -> Rendered:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            expected = _header(sets)
            found = {name: metadata.get(name) for name in expected}
            if found != expected:
                raise ValueError(f"it must say {expected}, got {found}")
            images, table = file.get_tensor("images"), file.get_tensor("icons")
            if _digest(images, table) != metadata.get("fingerprint"):
                raise ValueError("its content differs from its fingerprint")
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or was made by another version: {error}; delete it and it will be "
            "made anew"
        ) from error
    return Rendered(images, [Icon(*row) for row in json.loads(table.numpy().tobytes())])
