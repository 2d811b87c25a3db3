# SPDX-License-Identifier: Apache-2.0
"""The compile gate: every GPU kernel, compiled without a GPU, held to what the devices have.

Every variant that the launchers launch, with every tile of the table, for every architecture. What
fails: a spill or a stack; more shared or tensor memory than a block can have, which Triton notices
only at the first launch; a product that the tensor cores do not compute; a variant that does not
compile, as some do that the interpreter runs; and a committed table that says otherwise.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import asdict, astuple, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from activesel.loop import records
from bench import compilers
from bench.compilers import Case, Compiled, Row

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "resources.csv"
ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can opt in to
TENSOR_MEMORY_LIMIT = 512  # columns
PROCESSOR_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes, 1 KiB a block's own
PROCESSOR_REGISTERS = 65_536
WIDE = ("scorer_kernel", "embed_kernel", "layer_kernel", "attention_kernel")  # read 4 bytes or more


def launches(arch: int) -> Iterable[Case]:
    from bench import launches  # needs triton, which a machine with nvcc alone may lack

    return launches.launches(arch)


def violations(compiled: Compiled) -> list[str]:
    """Which limits of its device a kernel breaks."""
    row, columns = compiled.row, compiled.tensor_memory
    shared, code = SHARED_LIMIT[row.arch], compilers.TENSOR_CORES[row.arch]
    scalar = compiled.multiplies and not row.tensor_core_instructions
    programs, here = compiled.programs, PROCESSOR_SHARED[row.arch]
    held = programs * (row.shared_bytes + 1024)
    registers = programs * compiled.warps * 32 * -(-row.registers // 8) * 8  # given out by eights
    narrow = compiled.narrow if row.kernel in WIDE else ()
    limits = (
        (row.spills > 0, f"spills must be 0 bytes, got {row.spills}"),
        (row.stack > 0, f"stack must be 0 bytes, got {row.stack}"),
        (
            row.shared_bytes > shared,
            f"shared memory must be <= {shared} bytes, got {row.shared_bytes}",
        ),
        (
            columns > TENSOR_MEMORY_LIMIT,
            f"tensor memory must be <= {TENSOR_MEMORY_LIMIT} columns, got {columns}",
        ),
        (scalar, f"its product must use tensor cores, got no instruction like {code}"),
        (
            programs > 1 and held > here,
            f"{programs} programs must share {here} bytes of shared memory, got {held}",
        ),
        (
            registers > PROCESSOR_REGISTERS,
            f"{programs} programs must share {PROCESSOR_REGISTERS} registers, got {registers}",
        ),
        (
            bool(compiled.unguarded),
            f"a block barrier must stand on both sides of a ticket, got {compiled.unguarded}",
        ),
        (bool(narrow), f"loads must be of 4 bytes or more, got {len(narrow)} like {narrow[:1]}"),
    )
    return [f"{row.name}: {text}" for broken, text in limits if broken]


def compile_all(
    launches: Callable[[int], Iterable[Case]] | None,
    sources: Sequence[Path],
    archs: Sequence[int],
) -> tuple[list[Row], list[str]]:
    """Rows of all Triton kernels launched and all kernels of CUDA sources; what fails."""
    rows: list[Row] = []
    failures: list[str] = []
    with compilers.workers() as pool:
        jobs: dict[Future[list[Compiled]], str] = {}
        if launches:
            for variants in pool.map(compilers.record, [launches] * len(archs), archs):
                for v in variants:
                    job = pool.submit(compilers.compile_triton, v)
                    jobs[job] = f"{v.kernel} [{v.variant}] sm_{v.arch}"
        if compiler := compilers.nvcc():
            for arch in sorted(compilers.nvcc_archs(compiler).intersection(archs)):
                for source in sources:
                    job = pool.submit(compilers.compile_cuda, source, arch, compiler)
                    jobs[job] = f"{source.name} sm_{arch}"
        for job in as_completed(jobs):
            if error := job.exception():
                failures.append(f"{jobs[job]}: does not compile: {error}")
                continue
            for compiled in job.result():
                rows.append(compiled.row)
                failures += violations(compiled)
    counts = Counter(row.name for row in rows)
    failures += [
        f"{name}: variants must have names of their own" for name in counts - Counter(set(counts))
    ]
    return sorted(rows), sorted(failures)


def compare(found: Sequence[Row], committed: Sequence[Row]) -> tuple[list[str], list[str]]:
    """What differs between the two, and what could not be compared: figures of other toolchains.

    >>> row = Row("f", "bf16", 90, 32, 0, 0, 0, 0, "nvcc 13.0")
    >>> compare([row], [Row("f", "bf16", 90, 33, 0, 0, 0, 0, "nvcc 13.0")])[0]
    ['f [bf16] sm_90: registers must be 33 as committed, got 32']
    """
    new, old = ({row.name: row for row in rows} for rows in (found, committed))
    differ = [f"{name}: must be in the table" for name in new.keys() - old.keys()]
    differ += [f"{name}: is in the table, but not compiled" for name in old.keys() - new.keys()]
    notes = set()
    for name in new.keys() & old.keys():
        here, there = new[name], old[name]
        if here.toolchain != there.toolchain:
            notes.add(f"{there.toolchain}'s figures are not compared with {here.toolchain}'s")
            continue
        for field, got, wanted in zip(fields(Row), astuple(here), astuple(there), strict=True):
            if got != wanted:
                differ.append(f"{name}: {field.name} must be {wanted} as committed, got {got}")
    return sorted(differ), sorted(notes)


def load(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = [field.name for field in fields(Row)]
        if reader.fieldnames != names:
            raise ValueError(f"{path} must have the columns {names}, got {reader.fieldnames}")
        numbers = {field.name for field in fields(Row) if field.type == "int"}
        return [
            Row(**{name: int(text) if name in numbers else text for name, text in line.items()})
            for line in reader
        ]


def save(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    records.write_text(path, text.getvalue())


def summary(rows: Iterable[Row]) -> Table:
    """Per kernel and architecture, the most that any variant takes."""
    table = Table("kernel", "sm", "variants", "registers", "shared KiB", "tensor-core instructions")
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.arch), []).append(row)
    for (kernel, arch), group in sorted(groups.items()):
        counts = [row.tensor_core_instructions for row in group]
        registers = max(row.registers for row in group)
        shared = max(row.shared_bytes for row in group) / 1024
        instructions = f"{min(counts)} to {max(counts)}"
        table.add_row(
            kernel, str(arch), str(len(group)), str(registers), f"{shared:.1f}", instructions
        )
    return table


def command(check: bool = False, out: Path = RESULTS, arch: tuple[int, ...] = ARCHS) -> None:
    """Compile every GPU kernel without a GPU; fail where one breaks a limit of its device.

    Args:
        check: Compare with the table instead of writing it.
        out: The table.
        arch: Compute capabilities to compile for; rows of others stay as they are.
    """
    if unknown := sorted(set(arch) - set(ARCHS)):
        raise ValueError(f"arch must be among {ARCHS}, got {unknown}")
    start, console = time.monotonic(), Console()
    present = {"triton": importlib.util.find_spec("triton"), "nvcc": compilers.nvcc()}
    missing = [name for name, found in present.items() if not found]
    if len(missing) == len(present) or (missing and not check):
        raise RuntimeError(f"the table needs triton and nvcc, got no {' and no '.join(missing)}")
    committed = load(out) if check or out.exists() else []
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    rows, failures = compile_all(launches if present["triton"] else None, sources, arch)
    console.print(summary(rows))
    console.print(f"{len(rows)} kernels compiled in {time.monotonic() - start:.0f} s")
    if check:
        here = [r for r in committed if r.arch in arch and r.toolchain.split()[0] not in missing]
        differ, notes = compare(rows, here)
        failures += differ
        notes += [f"there is no {name} here, so its rows are not checked" for name in missing]
        for note in notes:
            console.print(note, markup=False)
    for failure in failures:
        console.print(failure, markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise SystemExit(f"{len(failures)} failures")
    if not check:
        save(out, sorted(rows + [row for row in committed if row.arch not in arch]))
        console.print(f"wrote {out}", markup=False)
