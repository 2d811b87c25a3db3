# SPDX-License-Identifier: Apache-2.0
"""Kernels to machine code without a GPU, and what the assembler says of it.

Triton: the launchers run on small CPU tensors while a stand-in for Triton's driver says which
device they are on. Triton itself specializes the arguments, as at a launch; a hook takes each
variant down and ends the launch there. Another process then compiles it. CUDA sources go through
nvcc with the build's own flags. Either way `ptxas -v` reports, and the code is disassembled.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any

NVCC_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "--fmad=false")  # CMakeLists.txt's
TENSOR_CORES = {80: r"\bHMMA\b", 90: r"\b[HQ]GMMA\b", 100: r"\bUTC\w*MMA\b"}  # in machine code

# Constants of the scorer's kernels that others imply, or that its launcher never changes.
IMPLIED = {
    *("sign", "dp", "hd", "ap", "hp", "k", "kp", "grid", "bd", "ba", "be", "bk", "bq", "bt", "xs"),
    *("nw", "nv", "channels", "channel_stride", "row_stride", "column_stride"),
    *("head_m", "head_n", "head_k", "keys"),
}

# A launch and a name for what it launches; how many programs a multiprocessor is to hold, if told.
Case = tuple[str, Callable[[], object]] | tuple[str, Callable[[], object], int]


@dataclass(frozen=True, order=True)
class Row:
    """One kernel as compiled: bytes per thread of stack and spills, per block of shared memory."""

    kernel: str
    variant: str
    arch: int
    registers: int
    stack: int
    spills: int
    shared_bytes: int
    tensor_core_instructions: int
    toolchain: str

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.variant}] sm_{self.arch}"


@dataclass(frozen=True)
class Compiled:
    """A row, and what a table does not hold."""

    row: Row
    multiplies: bool = False  # it has a matrix product
    tensor_memory: int = 0  # columns
    warps: int = 0
    programs: int = 1  # that a multiprocessor is to hold
    unguarded: tuple[str, ...] = ()  # lines of PTX, see `unguarded`
    narrow: tuple[str, ...] = ()  # loads from global memory of less than 4 bytes


@dataclass(frozen=True)
class Usage:
    """What `ptxas -v` says of one kernel."""

    registers: int
    stack: int
    spills: int
    shared: int


def read(log: str) -> dict[str, Usage]:
    """Resources of each kernel in the log of `ptxas -v`, by mangled name.

    >>> read('''ptxas info    : Compiling entry function 'f' for 'sm_90a'
    ... ptxas info    : Function properties for f
    ...     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 32 registers, used 1 barriers, 512 bytes smem''')
    {'f': Usage(registers=32, stack=8, spills=16, shared=512)}
    """

    def numbers(pattern: str, text: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, text)]

    usages = {}
    _, *parts = re.split(r"Compiling entry function '([^']+)'", log)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        registers = numbers(r"Used (\d+) registers", text)
        stack = numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)", text)
        spills = numbers(r"(\d+) bytes spill (?:stores|loads)", text)
        if len(registers) != 1 or not stack or not spills:
            raise ValueError(f"log must state registers, stack and spills of {name}, got {text!r}")
        shared = numbers(r"(\d+) bytes smem", text)
        usages[name] = Usage(registers[0], max(stack), sum(spills), sum(shared))
    return usages


def unguarded(ptx: str) -> tuple[str, ...]:
    """Tickets (acquire and release) that no barrier of the block parts from stores or loads.

    Only one thread takes a ticket: what others stored must be behind a barrier when it does, and
    what others load must be behind the next. A label counts as a store, since anything may come
    from there, and so does a call.

    >>> unguarded("bar.sync 0;\\nst.global.b32 [%r1], %r2;\\natom.global.gpu.acq_rel.add.u32 %r3;")
    ('stores before atom.global.gpu.acq_rel.add.u32 %r3;',)
    """
    found, stored, taken = [], True, ""
    for line in ptx.splitlines():
        code = line.partition("//")[0].strip()
        if re.search(r"\bbar(rier)?\.sync(\.aligned)?\s+0;", code):
            stored, taken = False, ""
        elif re.search(r"\batom\.\S*acq_rel", code):
            if stored:
                found.append(f"stores before {code}")
            stored, taken = True, code
        elif re.search(r"\b(st|red|atom)\.(?!shared|param|local)|\bcall\b|^\$L__BB\w+:", code):
            stored = True
        if taken and re.search(r"\bld\.(?!shared|param|local)|\bcall\b|^\$L__BB\w+:", code):
            found.append(f"loads after {taken}")
            taken = ""
    return tuple(found)


def narrow(ptx: str) -> tuple[str, ...]:
    """Loads from global memory of less than 4 bytes at once.

    >>> narrow("ld.global.v2.b16 {%r1, %r2}; ld.global.b16 %r1; cp.async.ca.shared.global [], 0x4;")
    ('ld.global.b16',)
    """
    loads = re.finditer(r"\bld\.global(?:\.(?!v\d|[bufs]\d)[\w:]+)*(?:\.v(\d))?\.[bufs](\d+)", ptx)
    return tuple(found[0] for found in loads if int(found[1] or 1) * int(found[2]) < 32)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}{done.stdout}")
    return done.stdout + done.stderr


def disassemble(cubin: Path) -> dict[str, str]:
    """Machine code of each kernel, by mangled name."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    tool = shutil.which("cuobjdump", path=folder) or shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("cuobjdump must come with triton or be on PATH, got neither")
    _, *parts = re.split(r"Function : (\S+)", _run(tool, "-sass", cubin))
    return dict(zip(parts[::2], parts[1::2], strict=True))


@contextlib.contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """Fresh processes, one per core, without Triton's interpreter and with an empty cache."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
                yield pool
        finally:
            os.environ.clear()
            os.environ.update(before)


# ------------------------------------------------------------------------------------------ triton


@dataclass(frozen=True)
class Variant:
    """A launch that Triton has specialized: enough for another process to compile it."""

    kernel: str
    variant: str
    arch: int
    module: str
    data: str  # as `JITFunction.preload` takes it
    programs: int = 1


class Device:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # by which Triton keeps what it has compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def record(launches: Callable[[int], Iterable[Case]], arch: int) -> list[Variant]:
    """Call each launch and note the kernels it would run on that architecture, each once."""
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(Device(arch))
    label, programs = "", list[int]()
    variants: dict[tuple[str, str, str], Variant] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = compile["specialization_data"]
        constants = {
            parameter.name.lower(): compile["constants"][parameter.num,]
            for parameter in fn.jit_function.params
            if parameter.is_constexpr
        }
        name = " ".join(filter(None, (label, *_words(constants, json.loads(data)["options"]))))
        variant = Variant(fn.name, name, arch, fn.module, data, *programs)
        variants.setdefault((fn.module, fn.name, data), variant)
        return True  # which ends the launch

    knobs.runtime.jit_cache_hook = hook
    try:
        for label, launch, *programs in launches(arch):  # noqa: B007 - the hook reads both
            launch()
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(variants.values())


def _words(constants: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """What holds, numbers, sizes of blocks, warps, stages and registers asked for."""
    for name, value in constants.items():
        if name in IMPLIED:
            continue
        if value is True:
            yield name
        elif value is not False and not name.startswith("block"):
            yield f"{name}={value}"
    yield "x".join(str(value) for name, value in constants.items() if name.startswith("block"))
    yield f"{options['num_warps']}w"
    yield f"{options['num_stages']}s"
    if options.get("maxnreg"):
        yield f"{options['maxnreg']}r"


def compile_triton(variant: Variant) -> list[Compiled]:
    import triton
    from triton import knobs
    from triton.runtime import driver

    driver.set_active(Device(variant.arch))
    knobs.nvidia.dump_ptxas_log = True
    function = attrgetter(variant.kernel)(importlib.import_module(variant.module))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = function.preload(variant.data)
    except Exception as error:  # its cause, which is what one wants to know, would not travel
        raise RuntimeError("\n".join(_told(error))) from error
    ((name, usage),) = read(log.getvalue()).items()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        code = disassemble(cubin)[name]
    row = Row(
        variant.kernel,
        variant.variant,
        variant.arch,
        usage.registers,
        usage.stack,
        usage.spills,
        usage.shared + compiled.metadata.shared,
        len(re.findall(TENSOR_CORES[variant.arch], code)),
        f"triton {triton.__version__}",
    )
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    ptx = compiled.asm["ptx"]
    return [
        Compiled(
            row, "tt.dot" in compiled.asm["ttir"], tensor_memory, compiled.metadata.num_warps,
            variant.programs, unguarded(ptx), narrow(ptx),
        )
    ]  # fmt: skip


def _told(error: BaseException | None) -> Iterator[str]:
    while error:
        yield str(error)
        error = error.__cause__


# -------------------------------------------------------------------------------------------- CUDA


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def nvcc_archs(compiler: str) -> set[int]:
    return {int(arch) for arch in re.findall(r"sm_(\d+)\b", _run(compiler, "--list-gpu-code"))}


def nvcc_toolchain(compiler: str) -> str:
    found = re.search(r"release ([\d.]+)", _run(compiler, "--version"))
    if found is None:
        raise RuntimeError(f"{compiler} --version must name its release")
    return f"nvcc {found[1]}"


def compile_cuda(source: Path, arch: int, compiler: str) -> list[Compiled]:
    """All kernels of a source; shared memory is what they declare, not what a launch adds."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        log = _run(compiler, *NVCC_FLAGS, "-Xptxas=-v", target, "-cubin", "-o", cubin, source)
        code = disassemble(cubin) if (usages := read(log)) else {}
    compiled = []
    for mangled, usage in usages.items():
        name, _, arguments = demangle(mangled).partition("<")
        row = Row(
            f"{source.name}:{name}",
            arguments.removesuffix(">"),
            arch,
            usage.registers,
            usage.stack,
            usage.spills,
            usage.shared,
            len(re.findall(TENSOR_CORES[arch], code[mangled])),
            nvcc_toolchain(compiler),
        )
        compiled.append(Compiled(row))
    return compiled


def demangle(name: str) -> str:
    """A kernel as `fold<128, float>`: no parameters, and no namespace."""
    plain = _run("c++filt", "--no-params", name).strip().removeprefix("void ")
    return re.sub(r"activesel::(gpu::)?|\(anonymous namespace\)::", "", plain)
