# SPDX-License-Identifier: Apache-2.0
"""The table of wheels in docs/clusters.md, from what `make wheels RECORD=...` wrote."""

from __future__ import annotations

from typing import Any

from bench import common

RESULTS = common.ROOT / "wheels.json"


def table(content: dict[str, Any]) -> str:
    """Size, time, GPUs and glibc of every wheel."""
    lines = ["| wheel | MB | seconds | machine code, PTX | glibc |", "|---|---|---|---|---|"]
    for it in content["wheels"]:
        cells = [
            f"`{it['wheel'].partition('-manylinux')[0]}`",
            f"{it['bytes'] / 1e6:.2f}",
            f"{it['seconds']:.0f}",
            inside(it["architectures"]),
            it["glibc"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    total = sum(it["seconds"] for it in content["wheels"]) / 60
    where = f"{content['toolkit']}, {content['cores']} cores, isolated builds"
    return "\n".join([*lines, "", f"{where}: {total:.1f} minutes in all."])


def inside(architectures: str) -> str:
    """CMake's names taken apart: 90 is machine code and PTX, 80-real code alone."""
    names = architectures.split()
    if not all(name[0].isdigit() for name in names):
        return "none"
    code = [name.partition("-")[0] for name in names if not name.endswith("-virtual")]
    ptx = [name.partition("-")[0] for name in names if not name.endswith("-real")]
    return f"{' '.join(code)}, PTX {' '.join(ptx) or 'none'}"
