# SPDX-License-Identifier: Apache-2.0
"""The compile gate: what it reads, what it refuses, and that the committed table is reproduced."""

import doctest
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import compilers, resources
from bench.compilers import Compiled, Row, Usage

triton = pytest.importorskip("triton")
tl = triton.language

GOOD = Row("head", "bf16", 90, 128, 0, 0, 100_000, 24, "triton 3.7.1")


@triton.jit
def multiply(
    x, y, out, rows, D: tl.constexpr, TIMES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """[rows, D] x [D, BLOCK], all of D at once, so many times over."""
    row = tl.arange(0, BLOCK)
    place = row[:, None] * D + tl.arange(0, D)[None, :]
    z = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(TIMES):
        a = tl.load(x + i * D * BLOCK + place, mask=row[:, None] < rows, other=0.0)
        b = tl.load(y + i * D * BLOCK + place)
        z = tl.dot(a, b.T, z, input_precision=PRECISION)
    tl.store(out + row[:, None] * BLOCK + row[None, :], z)


@triton.jit
def hold(x, out, BLOCK: tl.constexpr):
    """More live values than registers: a square held by one warp while its rows are normalized."""
    row = tl.arange(0, BLOCK)
    place = row[:, None] * BLOCK + row[None, :]
    a = tl.load(x + place)
    tl.store(out + place, a / tl.sum(a, 0)[None, :] / tl.sum(a, 1)[:, None])


def run(function, *args, warps=8, stages=2, **kwargs):
    return lambda: function[(1,)](
        *args, **kwargs, num_warps=warps, num_stages=stages, enable_fp_fusion=False
    )


def planted(arch):
    """As `resources.launches`, but most of these are too much for any device."""

    def product(width, dtype=torch.bfloat16, rows=128, stages=2, precision="tf32"):
        x, out = torch.empty(128, width, dtype=dtype), torch.empty(128, 128)
        return run(
            multiply, x, x, out, rows, stages=stages,
            D=width, TIMES=4, PRECISION=precision, BLOCK=128,
        )  # fmt: skip

    square = torch.empty(128, 128)
    yield "usual", product(64)
    yield "the same again", product(64)
    yield "other", product(64, rows=127)  # which Triton does not take for a multiple of 16
    yield "shared", product(256, stages=5)
    yield "scalar", product(16, torch.float32, stages=1, precision="ieee")
    yield "spills", run(hold, square, square, warps=1, BLOCK=128)
    yield "invalid", run(hold, square, square, BLOCK=100)


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))]
)
def test_planted_kernels(arch, monkeypatch):
    """In an environment that asks for the interpreter, as ours may."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows, failures = resources.compile_all(planted, [], [arch])
    assert os.environ["TRITON_INTERPRET"] == "1", "the caller's environment is left as it was"
    assert [row.variant for row in rows] == [
        "spills 128 1w 2s",
        "other d=64 times=4 precision=tf32 128 8w 2s",
        "scalar d=16 times=4 precision=ieee 128 8w 1s",
        "shared d=256 times=4 precision=tf32 128 8w 5s",
        "usual d=64 times=4 precision=tf32 128 8w 2s",
    ]
    usual, scalar = rows[4], rows[2]
    assert (usual.kernel, usual.arch) == ("multiply", arch)
    assert 32 <= usual.registers <= 255 and usual.shared_bytes >= 32 << 10
    assert usual.tensor_core_instructions > 0 == scalar.tensor_core_instructions
    assert usual.toolchain == f"triton {triton.__version__}"
    assert "arange's range must be a power of 2" in failures[0], "Triton's own words"
    hold, multiply = f"hold [{{}}] sm_{arch}: ", f"multiply [{{}}] sm_{arch}: "
    assert [failure.split(", got")[0].split(": at ")[0] for failure in failures] == [
        hold.format("invalid 100 8w 2s") + "does not compile",
        hold.format(rows[0].variant) + "spills must be 0 bytes",
        hold.format(rows[0].variant) + "stack must be 0 bytes",
        multiply.format(scalar.variant) + "its product must use tensor cores",
        multiply.format(rows[3].variant)
        + f"shared memory must be <= {resources.SHARED_LIMIT[arch]} bytes",
    ]


CUDA = """
namespace activesel {
namespace {
template <int N, typename T>
__global__ void fold(const T* x, T* y) {
  __shared__ T s[N];
  s[threadIdx.x % N] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[(threadIdx.x + 1) % N];
}
template __global__ void fold<128, float>(const float*, float*);
__global__ void __launch_bounds__(1024, 2) tight(const float* x, float* y, int n) {
  float a[96], t = 0;
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) t = t * a[95 - i] + a[i];
  y[threadIdx.x] = t;
}
void launch(const float* x, float* y) { tight<<<1, 1024>>>(x, y, 1); }
}  // namespace
void use() { launch(nullptr, nullptr); }
}  // namespace activesel
"""


@pytest.mark.skipif(compilers.nvcc() is None, reason="needs nvcc")
def test_planted_cuda(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(CUDA)
    rows, failures = resources.compile_all(None, [source], [80])
    fold, tight = rows
    assert (fold.kernel, fold.variant, fold.shared_bytes) == ("planted.cu:fold", "128, float", 512)
    assert fold.stack == fold.spills == 0 and fold.toolchain.startswith("nvcc ")
    assert (tight.kernel, tight.registers) == ("planted.cu:tight", 32)
    assert len(failures) == 2 and "tight [] sm_80: spills must be 0 bytes, got" in failures[0]


@pytest.mark.skipif(not (resources.ROOT / "CMakeLists.txt").exists(), reason="needs a checkout")
def test_cuda_is_compiled_as_the_build_does():
    text = (resources.ROOT / "CMakeLists.txt").read_text()
    (flags,) = re.findall(r"COMPILE_LANGUAGE:CUDA>:([^>]+)>", text)
    (standard,) = re.findall(r"CMAKE_CUDA_STANDARD (\d+)", text)
    assert {f"-std=c++{standard}", *flags.split()} < set(compilers.NVCC_FLAGS)


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for _Z6calleev
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 372 bytes cmem[0]
"""


def test_a_log_is_read_function_by_function():
    assert compilers.read(LOG) == {
        "_Z1fv": Usage(registers=40, stack=24, spills=20, shared=512),
        "_Z1gv": Usage(registers=8, stack=0, spills=0, shared=0),
    }
    with pytest.raises(ValueError, match="must state registers, stack and spills of _Z1gv"):
        compilers.read(LOG.replace("Used 8 registers", ""))


@pytest.mark.parametrize(
    "change, more, says",
    [
        ({}, (True, 512), None),
        ({"tensor_core_instructions": 0}, (), None),
        ({"tensor_core_instructions": 0}, (True,), "must use tensor cores, got no"),
        ({"spills": 4}, (), "spills must be 0 bytes, got 4"),
        ({"stack": 8}, (), "stack must be 0 bytes, got 8"),
        ({}, (True, 513), "tensor memory must be <= 512 columns, got 513"),
        ({"shared_bytes": 232_448}, (), None),
        ({"shared_bytes": 232_449}, (), "shared memory must be <= 232448 bytes, got 232449"),
        ({"shared_bytes": 166_912, "arch": 80}, (), None),
        ({"shared_bytes": 166_913, "arch": 80}, (), "shared memory must be <= 166912 bytes"),
    ],
)
def test_limits(change, more, says):
    broken = resources.violations(Compiled(replace(GOOD, **change), *more))
    assert len(broken) == (says is not None) and (says or "") in "".join(broken)


@pytest.mark.parametrize(
    "row, more, says",
    [
        ({}, {"programs": 2, "warps": 8}, None),
        ({}, {"programs": 3, "warps": 4}, "3 programs must share 233472 bytes of shared memory"),
        ({"arch": 80, "shared_bytes": 82_944}, {"programs": 2, "warps": 4}, None),
        ({"arch": 80, "shared_bytes": 82_945}, {"programs": 2, "warps": 4}, "got 167938"),
        ({"registers": 129}, {"programs": 2, "warps": 8}, "65536 registers, got 69632"),
        ({}, {"unguarded": ("stores before atom",)}, "on both sides of a ticket, got ('stores"),
        ({"kernel": "layer_kernel"}, {"narrow": ("ld.global.b16",) * 3}, "got 3 like ('ld.gl"),
        ({"kernel": "rows_kernel"}, {"narrow": ("ld.global.b16",)}, None),
    ],
)
def test_what_a_multiprocessor_holds_and_what_ptx_says(row, more, says):
    broken = resources.violations(Compiled(replace(GOOD, **row), **more))
    assert len(broken) == (says is not None) and (says or "") in "".join(broken)


TICKET = """
$L__BB0_7:                              // %._crit_edge
\t@%p1 st.global.b32 [ %rd7 + 0 ], { %r1 };
\tbar.sync \t0;
\tmov.b32 %r2, 1;
\t@%p1 st.shared.b32 [%r4], %r3;
\t@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [ %rd8 + 0 ], %r2;
\t@%p1 st.shared.b32 [%r4], %r3;
\tbar.sync \t0;
\t@%p2 bra $L__BB0_9;
\tst.global.b32 [%rd8], %r9;
\tcall.uni small, (param0);
$L__BB0_9:
\tret;
"""


@pytest.mark.parametrize(
    "old, new, wrong",
    [
        ("", "", None),
        ("\tbar.sync \t0;\n\tmov", "\tmov", "stores before"),
        ("\tbar.sync \t0;\n\tmov", "\tbar.warp.sync 0xffffffff;\n\tmov", "stores before"),
        ("\tbar.sync \t0;\n\tmov", "\tbar.sync 1, 128;\n\tmov", "stores before"),
        ("\tmov.b32 %r2", "\tst.global.v4.b32 [%rd9], %r1;\n\tmov.b32 %r2", "stores before"),
        ("\tmov.b32 %r2", "\tst.b32 [%rd9], %r1;\n\tmov.b32 %r2", "stores before"),
        ("\tmov.b32 %r2", "\tred.global.add.u32 [%rd9], 1;\n\tmov.b32 %r2", "stores before"),
        ("\tmov.b32 %r2", "\tcall.uni keys, (param0);\n\tmov.b32 %r2", "stores before"),
        ("\tmov.b32 %r2", "$L__BB0_8:\n\tmov.b32 %r2", "stores before"),
        ("\tbar.sync \t0;\n\t@%p2", "\tld.global.b32 %r5, [%rd1];\n\t@%p2", "loads after"),
        ("\tbar.sync \t0;\n\t@%p2", "\t@%p2", "loads after"),
        ("acq_rel", "relaxed", None),
    ],
)
def test_a_ticket_needs_barriers(old, new, wrong):
    assert TICKET.count(old) == 1 or not old
    found = compilers.unguarded(TICKET.replace(old, new) if old else TICKET)
    assert len(found) == (wrong is not None) and all(text.startswith(wrong) for text in found)


def test_narrow_loads_are_found():
    loads = "ld.global.{} %r1, [%rd1];"
    names = ("b8", "u16", "L1::evict_first.b16", "nc.v2.u8", "v4.b16", "b32", "nc.v4.b32", "b64")
    found = compilers.narrow("\n".join(map(loads.format, names)))
    assert [load.removeprefix("ld.global.") for load in found] == list(names[:4])


@pytest.mark.parametrize(
    "rows, says",
    [
        ([GOOD], None),
        ([], "head [bf16] sm_90: is in the table, but not compiled"),
        ([GOOD, replace(GOOD, arch=80)], "head [bf16] sm_80: must be in the table"),
        (
            [replace(GOOD, registers=129)],
            "head [bf16] sm_90: registers must be 128 as committed, got 129",
        ),
        ([replace(GOOD, shared_bytes=1)], "head [bf16] sm_90: shared_bytes must be 100000"),
    ],
)
def test_comparison(rows, says):
    differ, notes = resources.compare(rows, [GOOD])
    assert len(differ) == (says is not None) and (says or "") in "".join(differ)
    assert not notes


def test_figures_of_another_toolchain_are_not_compared():
    differ, notes = resources.compare(
        [replace(GOOD, registers=129, toolchain="triton 3.9.0"), replace(GOOD, arch=80)], [GOOD]
    )
    assert differ == ["head [bf16] sm_80: must be in the table"]
    assert notes == ["triton 3.7.1's figures are not compared with triton 3.9.0's"]


def steps(arch):
    """The same selection as training goes on, and as ranks and data sets differ."""
    from activesel import _triton

    features, weight = torch.randn(64, 32).bfloat16(), torch.randn(48, 32).bfloat16()
    sides, labels = ([features, weight], [torch.randn(64)]), torch.zeros(64).long()
    for i, offset in enumerate((0, 1, 16, (1 << 31) + 3, 1 << 40)):
        state = torch.tensor([i]), torch.tensor([i << 20]), torch.tensor([0.1 + i])

        def call(state=state, offset=offset, ignore=-100 + i):
            _triton.select(*sides, labels, 5 + offset % 3, *state, offset, "softmax", 0.0, ignore)

        yield f"turn {i}", call


def test_nothing_is_compiled_again_as_training_goes_on():
    with compilers.workers() as pool:
        variants = pool.submit(compilers.record, steps, 90).result()
    kernels = [variant.kernel for variant in variants]
    assert sorted(set(kernels)) == [
        "count_kernel",
        "head_kernel",
        "histogram_kernel",
        "write_kernel",
    ]
    assert all(variant.variant.startswith("turn 0") for variant in variants), kernels


def test_the_table_comes_back_as_written(tmp_path):
    rows = [GOOD, replace(GOOD, kernel="topk_cuda.cu:fold", variant="128, float")]
    resources.save(tmp_path / "table.csv", rows)
    assert resources.load(tmp_path / "table.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    (tmp_path / "table.csv").write_text("kernel,arch\n")
    with pytest.raises(ValueError, match="must have the columns"):
        resources.load(tmp_path / "table.csv")


@pytest.mark.skipif(compilers.nvcc() is None, reason="needs nvcc")
def test_a_table_that_breaks_limits_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resources, "launches", planted)
    monkeypatch.setattr(resources, "ROOT", tmp_path)  # where no CUDA sources are
    with pytest.raises(SystemExit, match="5 failures"):
        resources.command(out=tmp_path / "table.csv", arch=(90,))
    assert not list(tmp_path.iterdir())
    assert "8w 5s] sm_90: shared memory must be <= 232448 bytes" in capsys.readouterr().out


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"arch must be among \(80, 90, 100\), got \[70\]"):
        resources.command(arch=(70, 80))


def test_fp8_products_are_tensor_core_instructions():
    code = "HGMMA.64x64x16.F32 R4, R1\nQGMMA.64x64x32.F32.E4M3.E4M3 R4, R1\nLDGSTS.E.BYPASS.128"
    assert len(re.findall(compilers.TENSOR_CORES[90], code)) == 2


@pytest.mark.parametrize("module", [compilers, resources])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.slow
def test_the_committed_table_is_reproduced():
    """Every kernel, every tile, every architecture: minutes."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "resources", "--check"],
        cwd=Path(resources.ROOT), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels compiled in" in done.stdout
