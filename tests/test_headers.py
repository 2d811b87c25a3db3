# SPDX-License-Identifier: Apache-2.0
"""The headers shared by host and device, compiled alone; what the kernels' objects may contain."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from activesel import spec

CSRC = Path(__file__).parent.parent / "csrc"
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{CSRC}"]
pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no C++ compiler"),
    pytest.mark.skipif(not CSRC.exists(), reason="needs a checkout's csrc"),
]

PROGRAM = r"""
#include "gumbel.h"
#include <cstdio>
using namespace activesel;
int main() {
  uint32_t c[6];  // counter and key
  while (scanf("%x %x %x %x %x %x", c, c + 1, c + 2, c + 3, c + 4, c + 5) == 6) {
    const Words words = philox(c[0], c[1], c[2], c[3], c[4], c[5]);
    for (uint32_t w : words.w) printf("%08x %08x ", w, as_bits(gumbel(w)));
    const float key = make_key(as_float(c[0]), gumbel(c[1]), temper(as_float(c[2])));
    printf("%08x %08x %08x\n", order(as_float(c[0])), as_bits(unorder(order(as_float(c[0])))),
           as_bits(key));
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run([CXX, *FLAGS, "main.cpp", "-o", "main"], cwd=folder, check=True)

    def run(rows):
        text = "".join(" ".join(f"{v:x}" for v in row) + "\n" for row in rows)
        out = subprocess.run([folder / "main"], input=text, text=True, stdout=-1, check=True).stdout
        return [[int(word, 16) for word in line.split()] for line in out.splitlines()]

    return run


def as_float(bits):
    return torch.tensor(bits).int().view(torch.float32)


def as_bits(x):
    return (x.view(torch.int32).long() & spec.MASK32).tolist()


def test_philox_gives_the_published_vectors(program):
    ones = 0xFFFFFFFF
    pi = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0
    rows = program([[0] * 6, [ones] * 6, pi])
    assert [row[0:8:2] for row in rows] == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_the_headers_are_the_specification(program):
    torch.manual_seed(0)
    words = torch.randint(0, 1 << 32, (4000, 6))
    edges = [0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F7FFFFF, 1 << 31]
    edges += [
        spec.NEAR_ONE - 1,
        spec.NEAR_ONE,
        spec.NEAR_ONE + 1,
        0x3F800000,
        0x00200000,
        spec.MASK32,
    ]
    words[: len(edges), 0] = torch.tensor(edges)
    words[: len(edges), 1] = torch.tensor(edges)
    words[::2, 2] = torch.tensor(edges).repeat(134)[:2000]
    rows = torch.tensor(program(words.tolist()))
    expected = torch.stack(spec.philox(words.T[:4], words.T[4:]))
    assert torch.equal(rows[:, 0:8:2].T, expected)
    assert rows[:, 1:8:2].T.flatten().tolist() == as_bits(spec.gumbel(expected.flatten()))

    scores, temperature = as_float(words[:, 0].tolist()), as_float(words[:, 2].tolist())
    ordered = spec.order(scores)
    same = torch.argsort(rows[:, 8], descending=True, stable=True)
    assert torch.equal(same, torch.argsort(ordered, descending=True))
    back = as_float(rows[:, 9].tolist())
    assert torch.equal(back, scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))

    noise = spec.gumbel(words[:, 1])
    keys = torch.cat([spec.key(*row)[0] for row in zip(*(
        x.split(1) for x in (scores, noise, temperature)), strict=True)])  # fmt: skip
    ours = as_float(rows[:, 10].tolist())
    assert torch.equal(ours.isnan(), keys.isnan())
    assert as_bits(ours[~ours.isnan()]) == as_bits(keys[~keys.isnan()])


@pytest.mark.parametrize("header", ["launch.h", "philox.h", "gumbel.h", "kernels_cpu.h"])
def test_each_header_stands_alone(header):
    code = f'#include "{header}"\n'
    subprocess.run([CXX, *FLAGS, "-Wno-unused-function", "-fsyntax-only", "-x", "c++", "-"],
                   input=code, text=True, check=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_the_shared_headers_compile_for_the_device(tmp_path):
    (tmp_path / "device.cu").write_text(
        '#include "gumbel.h"\n'
        "using namespace activesel;\n"
        "__global__ void noise(float* out, uint64_t seed) {\n"
        "  out[threadIdx.x] = gumbel(row_words(threadIdx.x, 0, 0, seed).w[0]);\n"
        "}\n"
    )
    command = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_80",
        "--fmad=false",
        f"-I{CSRC}",
        "-cubin",
        "device.cu",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("compiler, isa", [
    (CXX, []), (CXX, ["-mavx2"]),
    (CXX, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]),
    ("aarch64-linux-gnu-g++", []),
])  # fmt: skip
def test_kernels_leave_nothing_for_other_instruction_sets_to_pick_up(tmp_path, compiler, isa):
    """A weak symbol compiled for AVX-512 could be linked into code that runs everywhere."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    machine = subprocess.check_output([compiler, "-dumpmachine"], text=True)
    if isa and "x86_64" not in machine:
        pytest.skip(f"{compiler} is for {machine.strip()}")
    command = [compiler, "-std=c++17", "-O3", "-ffp-contract=off", "-Wno-psabi", *isa]
    command += ["-DACTIVESEL_ISA=some", "-c", CSRC / "kernels_cpu.cpp", "-o", tmp_path / "k.o"]
    subprocess.run(command, check=True)
    symbols = subprocess.check_output(["nm", tmp_path / "k.o"], text=True).splitlines()
    kinds = {line.split()[-2] for line in symbols if "some" in line or line.split()[-2] in "WVu"}
    assert kinds <= {"D", "R"}, symbols
