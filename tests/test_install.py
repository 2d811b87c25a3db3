# SPDX-License-Identifier: Apache-2.0
"""Installs as users make them: with and without compilers, twice, editable, from the sdist."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("installs a checkout, which this is not", allow_module_level=True)
PACKAGES = [path for path in sys.path if path.endswith("-packages")]
PROBE = """
import torch, activesel
from activesel import _native
picked = activesel.select(online=torch.arange(8.0), k=2, temperature=0.0, seed=0)
assert picked.indices.tolist() == [6, 7]
print("installed", activesel.__file__, _native.available(), _native.reason())
cuda = _native.available() and _native._module().cuda
print("cuda", cuda, _native._module().cuda_architectures if cuda else "")
"""
CPU = {"ACTIVESEL_CUDA": "off"}
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def copied(folder):
    """The sources, without what was ever built in them."""
    built = ("*.so", "__pycache__", "build", "dist", "runs", "*.egg-info", ".*", "results")
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*built))


@pytest.fixture
def tree(tmp_path):
    return copied(tmp_path / "tree")


@pytest.fixture
def tools(tmp_path):
    """A PATH with a C++ compiler and what it needs, without nvcc."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("sh", "c++", "g++", "clang++", "cc", "gcc", "as", "ld", "ar", "ranlib"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def run(command, **environment):
    theirs = ("ACTIVESEL_", "CUDA", "TORCH_CUDA_ARCH_LIST")
    env = {k: v for k, v in os.environ.items() if not k.startswith(theirs)} | environment
    outside = tempfile.gettempdir()  # so that the sources here are not imported by accident
    return subprocess.run(
        list(map(str, command)), text=True, env=env, cwd=outside,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def works(command, **environment):
    done = run(command, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def install(source, target, **environment):
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--upgrade"]
    return run([*pip, "--target", target, source], **environment)


def probe(target):
    """What it says of itself; -S, lest an editable install here lend it a native module."""
    path = os.pathsep.join([str(target), *PACKAGES])
    said = works([sys.executable, "-S", "-c", PROBE], PYTHONPATH=path)
    assert str(target) in said
    return said


def architectures():
    """Promised for this nvcc."""
    release = works([NVCC, "--version"]).partition("release ")[2].partition(",")[0]
    new = tuple(map(int, release.split("."))) >= (12, 8)
    return "80-real 90 100-real 120" if new else "80-real 90"


def test_twice_in_the_same_tree(tree, tmp_path, tools):
    """Then with an nvcc that is not on PATH, and an architecture of the user's choice."""
    done = install(tree, tmp_path / "first")
    assert done.returncode == 0, done.stdout
    said = probe(tmp_path / "first")
    assert "True activesel._C loaded" in said
    assert f"cuda True {architectures()}\n" in said if NVCC else "cuda False" in said
    if NVCC is None:
        assert install(tree, tmp_path / "second").returncode == 0
        return
    root = works([NVCC, "--dryrun", "-c", "x.cu"]).partition("TOP=")[2].partition("\n")[0]
    (tmp_path / "toolkit").symlink_to(Path(root).resolve())
    where = {"PATH": tools, "CUDA_HOME": str(tmp_path / "toolkit"), "CUDAARCHS": "90-real"}
    done = install(tree, tmp_path / "second", **where)
    assert done.returncode == 0, done.stdout
    assert f"CUDA compiler: {tmp_path}/toolkit/bin/nvcc" in done.stdout
    assert "cuda True 90-real\n" in probe(tmp_path / "second")


def hidden(*command):
    """A command for which /usr/local/cuda is empty, in a mount namespace of its own."""
    hide = 'for d in /usr/local/cuda*; do /bin/mount -t tmpfs none "$d" || exit; done; exec "$@"'
    new = ("--user", "--map-root-user", "--mount", "/bin/sh", "-c", hide, "sh")
    return [shutil.which("unshare"), *new, *command]


def test_without_nvcc(tree, tmp_path, tools):
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", tmp_path / "out"]
    if list(Path("/usr/local").glob("cuda*")):
        if shutil.which("unshare") is None or run(hidden("true")).returncode:
            pytest.skip("/usr/local/cuda is there and cannot be hidden")
        pip = hidden(*pip)
    works([*pip, tree], PATH=tools)
    assert "True activesel._C loaded" in (said := probe(tmp_path / "out")) and "cuda False" in said


def test_without_a_compiler_after_one_with(tree, tmp_path):
    assert install(tree, tmp_path / "with", **CPU).returncode == 0
    assert "True activesel._C loaded" in (said := probe(tmp_path / "with")) and "cuda False" in said
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
    done = install(tree, tmp_path / "out", **CPU)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "the native build failed" in done.stdout and "Advice: " in done.stdout


def test_cuda_on_needs_nvcc(tree, tmp_path):
    for mode, said in (("on", "ACTIVESEL_CUDA=on needs nvcc"), ("yes", "must be auto, on or off")):
        done = install(tree, tmp_path / "out", ACTIVESEL_CUDA=mode, CUDACXX=str(tmp_path / "nvcc"))
        assert done.returncode != 0 and said in done.stdout, done.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_architectures_that_the_toolkit_lacks(tree, tmp_path):
    done = install(tree, tmp_path / "out", CUDAARCHS="90;999")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "CUDAARCHS asks for 999" in done.stdout and "unset it for 80-real" in done.stdout


@pytest.fixture
def environment(tmp_path):
    """A virtual environment that sees this one's packages, torch above all."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "theirs.pth").write_text("\n".join(PACKAGES) + "\n")
    return tmp_path / "venv"


def test_editable_and_not(tree, environment):
    """Each install replaces all of the one before, its compiled module above all."""
    python = environment / "bin" / "python"
    bare = {"PATH": str(environment), "CXX": ""}
    for editable, tools in (("-e", CPU), ("", CPU), ("-e", bare), ("", bare)):
        works(
            [python, "-m", "pip", "install", "--no-deps", *filter(None, [editable]), tree], **tools
        )
        said = works([python, "-c", PROBE])
        assert f"installed {tree if editable else environment}/" in said
        assert f"{tools is CPU} activesel._C" in said


def test_uv(tree, environment):
    if not (uv := [sys.executable, "-m", "uv"] if find_spec("uv") else [shutil.which("uv")])[0]:
        pytest.skip("uv is not installed")
    python = environment / "bin" / "python"
    works([*uv, "pip", "install", "--no-deps", "--python", python, tree], **CPU)
    assert "True activesel._C" in works([python, "-c", PROBE])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What `python -m build` makes: the sdist, and from it the wheel."""
    pytest.importorskip("build", reason="`python -m build` needs the package build")
    folder = tmp_path_factory.mktemp("built")
    tree = copied(folder / "tree")
    works([sys.executable, "-m", "build", "--outdir", folder, tree], **CPU)
    return folder


def names(archive):
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_build(built, tmp_path):
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    kinds = {"activesel": {".py", ".j2", ".typed"}, "csrc": {".cpp", ".h", ".cu", ".cuh"}}
    for folder, kind in kinds.items():
        files = (path for path in (ROOT / folder).rglob("*") if path.suffix in kind)
        sources = {str(path.relative_to(ROOT)) for path in files}
        assert sources and sources <= names(sdist)
        assert folder == "csrc" or sources <= names(wheel)
    assert {"CMakeLists.txt", "setup.py", "LICENSE"} <= names(sdist)
    roots = {name.partition("/")[0] for name in names(wheel)}
    assert len(roots) == 2  # the package, its metadata
    assert sum(name.startswith("activesel/_C.") for name in names(wheel)) == 1
    assert install(wheel, tmp_path).returncode == 0 and "True activesel._C" in probe(tmp_path)


def test_sdist(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    done = install(sdist, tmp_path, **CPU)
    assert done.returncode == 0, done.stdout
    assert "True activesel._C loaded" in probe(tmp_path)


def test_an_unsupported_python_is_refused(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", tmp_path]
    done = run([*pip, "--python-version", "3.9", sdist])
    assert done.returncode != 0, done.stdout
    assert "requires a different Python: 3.9.0 not in '>=3.10'" in done.stdout, done.stdout


def test_an_unsupported_torch_is_refused(built, tmp_path):
    """Offered by an index of empty wheels, so that nothing is downloaded."""
    for name, version in (("torch", "2.8.0"), ("numpy", "2.0"), ("safetensors", "0.8")):
        told = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            wheel.writestr(f"{told}/METADATA", about)
            wheel.writestr(f"{told}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{told}/RECORD", "")
    (ours,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-index"]
    done = run([*pip, "--find-links", tmp_path, ours, "torch==2.8.0"])
    assert done.returncode != 0 and "conflicting dependencies" in done.stdout, done.stdout
    assert "depends on torch>=2.9" in done.stdout
