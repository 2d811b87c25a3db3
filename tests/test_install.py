# SPDX-License-Identifier: Apache-2.0
"""Installs as users make them: with and without compilers, twice, editable, from the sdist."""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PACKAGES = [path for path in sys.path if path.endswith("-packages")]
PROBE = """
import torch, activesel
from activesel import _native
picked = activesel.select(online=torch.arange(8.0), k=2, temperature=0.0, seed=0)
assert picked.indices.tolist() == [6, 7]
print("installed", activesel.__file__, _native.available(), _native.reason())
print("cuda", _native.available() and _native._module().cuda)
"""


def has_nvcc():
    return bool(shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists())


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, without what was ever built in them."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "CMakeLists.txt"):
        shutil.copy(ROOT / name, copy)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "activesel"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def run(command, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACTIVESEL_")} | environment
    outside = tempfile.gettempdir()  # so that the sources here are not imported by accident
    return subprocess.run(
        list(map(str, command)), text=True, env=env, cwd=outside,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def install(source, target, **environment):
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--upgrade"]
    return run([*pip, "--target", target, source], **environment)


def probe(target):
    """What it says of itself; -S, lest an editable install here lend it a native module."""
    path = os.pathsep.join([str(target), *PACKAGES])
    out = run([sys.executable, "-S", "-c", PROBE], PYTHONPATH=path)
    assert out.returncode == 0 and str(target) in out.stdout, out.stdout
    return out.stdout


def test_twice_in_the_same_tree(tree, tmp_path):
    for target in (tmp_path / "first", tmp_path / "second"):
        done = install(tree, target)
        assert done.returncode == 0, done.stdout
        said = probe(target)
        assert "True activesel._C loaded" in said and f"cuda {has_nvcc()}" in said


def test_without_cuda(tree, tmp_path):
    assert install(tree, tmp_path / "out", ACTIVESEL_CUDA="off").returncode == 0
    assert "True activesel._C loaded" in (said := probe(tmp_path / "out")) and "cuda False" in said


def test_without_a_compiler_after_one_with(tree, tmp_path):
    assert install(tree, tmp_path / "with", ACTIVESEL_CUDA="off").returncode == 0
    bare = {"PATH": str(tmp_path), "CXX": ""}
    done = install(tree, tmp_path / "without", **bare)
    assert done.returncode == 0, done.stdout
    assert "no C++ compiler found, installing the pure-torch package" in done.stdout
    assert "False activesel._C cannot be loaded" in probe(tmp_path / "without")
    refused = install(tree, tmp_path / "refused", ACTIVESEL_CUDA="on", **bare)
    assert refused.returncode != 0 and "needs a C++ compiler" in refused.stdout


def test_a_broken_build_is_loud(tree, tmp_path):
    with (tree / "csrc" / "select_cpu.cpp").open("a") as source:
        source.write("#error broken on purpose\n")
    done = install(tree, tmp_path / "out", ACTIVESEL_CUDA="off")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "the native build failed" in done.stdout and "Advice: " in done.stdout


def test_cuda_on_needs_nvcc(tree, tmp_path):
    for mode, said in (("on", "ACTIVESEL_CUDA=on needs nvcc"), ("yes", "must be auto, on or off")):
        done = install(tree, tmp_path / "out", ACTIVESEL_CUDA=mode, CUDACXX=str(tmp_path / "nvcc"))
        assert done.returncode != 0 and said in done.stdout, done.stdout


def site_of(environment):
    (site,) = environment.glob("lib/python*/site-packages")
    return site


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees this one's packages, torch above all."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site_of(tmp_path / "venv") / "theirs.pth").write_text("\n".join(PACKAGES) + "\n")
    return tmp_path / "venv"


def test_editable(tree, environment):
    python = environment / "bin" / "python"
    for bare in ({}, {"PATH": str(environment), "CXX": ""}):
        done = run(
            [python, "-m", "pip", "install", "--no-deps", "-e", tree], ACTIVESEL_CUDA="off", **bare
        )
        assert done.returncode == 0, done.stdout
        said = run([python, "-c", PROBE]).stdout
        assert f"installed {tree / 'activesel'}" in said
        assert f"{not bare} activesel._C" in said  # the second install must not keep the first's


def test_sdist(tree, environment, tmp_path):
    python = environment / "bin" / "python"
    for command in (["-m", "pip", "install", "setuptools>=77"], ["setup.py", "-q", "sdist"]):
        done = subprocess.run([python, *command], cwd=tree, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    done = install(sdist, tmp_path / "out", ACTIVESEL_CUDA="off")
    assert done.returncode == 0, done.stdout
    assert "True activesel._C loaded" in probe(tmp_path / "out")
