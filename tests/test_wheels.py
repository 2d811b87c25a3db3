# SPDX-License-Identifier: Apache-2.0
"""`make wheels`: what is in the wheels, what they need, and that the same sources give the same
bytes; and what a build refuses."""

import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from activesel import __version__ as VERSION

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("builds a checkout, which this is not", allow_module_level=True)
CHOICES = ("ACTIVESEL_", "CUDA", "CMAKE_", "TORCH_CUDA", "PYTHON", "SOURCE_DATE")  # of the user's
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith(CHOICES)}
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
KINDS = ["cpu", *(["cuda"] if NVCC else [])]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
LIBRARIES = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0",
             "libdl.so.2", "librt.so.1"}  # fmt: skip


def run(*command, cwd="/", ok=True, **environment):
    done = subprocess.run(
        list(map(str, command)), text=True, env=PLAIN | environment, cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout
    return done.stdout


def copy(folder, source=ROOT):
    """The sources as they lie, without what was built or measured; no git, so one fixed time."""
    hide = ("bench", "tests", "runs", "build", "dist", ".*", "*.so", "__pycache__", "*.egg-info")
    return shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*hide))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tree after `make wheels` for this Python, and what that printed."""
    tree = copy(tmp_path_factory.mktemp("wheels") / "tree")
    (tree / "activesel" / "_C.stale.so").touch()  # an earlier build's
    (tree / "dist").mkdir()
    (tree / "dist" / f"activesel-{VERSION}-cp39-cp39-linux_x86_64.whl").touch()
    make = ("make", "--silent", "wheels", f"PYTHON={sys.executable}")
    return tree, run(*make, cwd=tree, PYTHONS=sys.executable)


@pytest.fixture(scope="module", params=KINDS)
def wheel(request, made, tmp_path_factory):
    """Kind, path, and the folder that it is unpacked in."""
    local = "+cu*" if request.param == "cuda" else ""
    (path,) = made[0].glob(f"dist/activesel-{VERSION}{local}-*.whl")
    folder = tmp_path_factory.mktemp(request.param)
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder)
    return request.param, path, folder


def module_of(folder):
    (module,) = folder.glob("activesel/_C.*.so")
    return module


@pytest.mark.slow
def test_one_of_each_kind(made):
    tree, said = made
    tag = f"cp3{sys.version_info.minor}"
    wheels = sorted(path.name for path in (tree / "dist").iterdir())
    local = [r"\+cu\d+"] if NVCC else []
    patterns = [
        *(
            rf"activesel-{re.escape(VERSION)}{part}-{tag}-{tag}-manylinux_2_\d+_\w+\.whl"
            for part in [*local, ""]
        ),
        rf"activesel-{re.escape(VERSION)}\.tar\.gz",
    ]
    assert len(wheels) == len(patterns), wheels
    assert all(map(re.fullmatch, patterns, wheels)), wheels
    said = re.findall("^(activesel-.+?)  .+$", said, re.M)  # besides what pip says
    assert said == sorted(wheels, key=len), made[1]
    assert "no CUDA  glibc >= 2." in made[1]
    assert NVCC is None or "  80-real 90" in made[1]
    assert not list(tree.glob("activesel/_C.c*")), "a build leaves the tree alone"


@pytest.mark.slow
def test_what_is_inside(wheel):
    kind, path, folder = wheel
    (info,) = folder.glob("*.dist-info")
    metadata = (info / "METADATA").read_text().partition("\n\n")[0].splitlines()
    local = path.name.split("-")[1].partition("+")[2]
    assert bool(local) == (kind == "cuda")
    assert f"Version: {VERSION}{local and '+' + local}" in metadata
    assert {"License-Expression: Apache-2.0", "Requires-Python: >=3.10"} < set(metadata)
    assert "Requires-Dist: torch>=2.9" in metadata
    (tag,) = re.findall(r"^Tag: (.+)$", (info / "WHEEL").read_text(), re.M)
    assert path.name.endswith(f"-{tag}.whl"), "the tag inside is the name's"
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("activesel/**/*.py")}
    sources |= {"activesel/py.typed", "activesel/loop/report/page.html.j2"}
    sources.add(str(module_of(folder).relative_to(folder)))
    own = ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")
    expected = sources | {f"{info.name}/{name}" for name in own}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == expected
    with (info / "RECORD").open(newline="") as record:
        rows = {name: (digest, size) for name, digest, size in csv.reader(record)}
    assert set(rows) == expected
    for name, (digest, size) in rows.items():
        if name != f"{info.name}/RECORD":
            data = (folder / name).read_bytes()
            found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={found}", len(data)), name
    assert path.stat().st_size < 20e6


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_what_it_needs(wheel):
    _, path, folder = wheel
    module = module_of(folder)
    dynamic = run("readelf", "-Wd", module)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert {"libc.so.6"} <= {n for n in needed if not n.startswith("ld-linux")} <= LIBRARIES
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert not re.search("torch|cuda|nvidia|not found", run("ldd", module).partition("=>")[2])
    promised = tuple(map(int, re.findall(r"manylinux_(\d+)_(\d+)", path.name)[0]))
    asked = re.findall(r"GLIBC_(\d+)\.(\d+)", run("readelf", "-WV", module))
    assert max(tuple(map(int, version)) for version in asked) <= promised
    symbols = [line.split() for line in run("readelf", "-W", "--dyn-syms", module).splitlines()]
    exported = [
        s[7] for s in symbols if len(s) > 7 and s[4] in ("GLOBAL", "WEAK") and s[6] != "UND"
    ]
    assert exported == ["PyInit__C"]


def cuobjdump():
    """CUDA's own, or the one that Triton brings."""
    beside = [Path(NVCC).resolve().parent, "/usr/local/cuda/bin"]
    beside += [Path(path, "triton/backends/nvidia/bin") for path in sys.path]
    found = (shutil.which("cuobjdump", path=path) for path in (None, *map(str, beside)))
    return next(filter(None, found), None)


@pytest.mark.slow
@needs_nvcc
def test_the_promised_architectures(wheel):
    kind, _, folder = wheel
    if (tool := cuobjdump()) is None:
        pytest.skip("needs cuobjdump, CUDA's or Triton's")
    module = module_of(folder)
    machine, ptx = (
        set(re.findall(r"\.(sm_\w+)\.", run(tool, option, module, ok=kind == "cuda")))
        for option in ("--list-elf", "--list-ptx")
    )
    if kind == "cpu":
        assert not machine and not ptx
        return
    major, minor = map(int, re.findall(r"release (\d+)\.(\d+)", run(NVCC, "--version"))[0])
    new = {"sm_100", "sm_120"} if (major, minor) >= (12, 8) else set()
    assert machine == {"sm_80", "sm_90"} | new
    assert ptx == {"sm_90"} | (new & {"sm_120"})


@pytest.mark.slow
def test_it_is_imported_without_a_driver(wheel):
    kind, _, folder = wheel
    code = (
        "import sys; sys.path.append(sys.argv[1]); import _C; print(_C.version, _C.cuda, _C.isa());"
        "print('libcuda' in open('/proc/self/maps').read(), _C.noise(0, 0, 0, 0, 0, 0, 1))"
    )
    said = run(sys.executable, "-c", code, folder / "activesel")
    assert re.fullmatch(rf"{re.escape(VERSION)} {kind == 'cuda'} \w+\nFalse None\n", said)


@pytest.mark.slow
def test_the_same_bytes_elsewhere(made, tmp_path):
    tree, _ = made
    other = copy(tmp_path / "another, and longer, path" / "tree", tree)
    for path in other.rglob("*"):
        path.chmod(0o700)
        os.utime(path)
    (tmp_path / "scratch").mkdir()
    python = tree / "build" / "wheels" / "bin" / "python"
    command = f"umask 077; exec {python} tools/wheels.py --out there {sys.executable}"
    run("sh", "-c", command, cwd=other, TMPDIR=str(tmp_path / "scratch"), TZ="Asia/Tokyo")
    for first in (tree / "dist").iterdir():
        second = other / "there" / first.name
        assert first.read_bytes() == second.read_bytes(), first.name
    assert len(list((other / "there").iterdir())) == len(KINDS) + 1, "and nothing else is left"


def python_that(folder, says, then=""):
    """An interpreter that describes itself in these words, and does nothing else."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo "{says}" && exit 0\n{then}\n')
    path.chmod(0o755)
    return path


REFUSED = {
    "old": ("cpython usual True 3 9", ["(cpython usual 3.9)", "no CPython 3.10 to 3.14"]),
    "free-threaded": ("cpython free-threaded True 3 14", ["(cpython free-threaded 3.14)"]),
    "pypy": ("pypy usual True 3 11", ["(pypy usual 3.11)", "no CPython"]),
    "no headers": ("cpython usual False 3 12", ["it has no Python.h"]),
    "none": ("", ["does not run as Python 3"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pythons_that_get_no_wheel(case, tmp_path):
    says, expected = REFUSED[case]
    python = python_that(tmp_path, says)
    tool = (sys.executable, ROOT / "tools" / "wheels.py", "--out", tmp_path / "dist", python)
    said = run(*tool, ok=False, ACTIVESEL_CUDA="off")
    assert all(part in said for part in expected), said
    assert not (tmp_path / "dist").exists()


def test_a_failing_build_leaves_dist_as_it_was(tmp_path):
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / f"activesel-{VERSION}-cp310-cp310-linux_x86_64.whl").write_text("older")
    python = python_that(tmp_path, "cpython usual True 3 12", "echo no such luck; exit 7")
    tool = (sys.executable, ROOT / "tools" / "wheels.py", "--out", tmp_path / "dist", python)
    said = run(*tool, ok=False, ACTIVESEL_CUDA="off")
    assert "no such luck" in said and f"--python {python} wheel" in said
    assert [path.read_text() for path in (tmp_path / "dist").iterdir()] == ["older"]


def test_what_no_wheel_is_built_with(tmp_path):
    bare = {"PATH": str(tmp_path), "CXX": "", "ACTIVESEL_CUDA": "off"}
    said = run(sys.executable, ROOT / "tools" / "wheels.py", ok=False, **bare)
    assert "wheels need a C++ compiler: install one or set CXX" in said
    said = run(sys.executable, ROOT / "tools" / "wheels.py", ok=False, SOURCE_DATE_EPOCH="now")
    assert "SOURCE_DATE_EPOCH must be seconds since 1970, got 'now'" in said


PLAN = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); import setup
found = setup.toolkit(setup.cuda_mode())
print(setup.version(), *(setup.architectures(*found) if found else ["no", "CUDA"]))
"""


def plan(ok=True, **environment):
    """The version and the architectures that setup.py would build, or what it says instead."""
    return run(sys.executable, "-c", PLAN, ok=ok, **environment).strip()


@needs_nvcc
@pytest.mark.parametrize("asked, built", [
    ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}, "80-real 90"),
    ({"TORCH_CUDA_ARCH_LIST": "8.0;8.6, 9.0a"}, "80-real 86-real 90a-real"),
    ({"TORCH_CUDA_ARCH_LIST": " "}, None),
    ({"CUDAARCHS": "80-real;90-virtual", "TORCH_CUDA_ARCH_LIST": "8.6"}, "80-real 90-virtual"),
    ({"CUDAARCHS": "90a"}, "90a"),
    ({"CMAKE_CUDA_ARCHITECTURES": "86"}, "86"),
    ({"CUDAARCHS": "all-major"}, "80-real 90-real 100-real"),
])  # fmt: skip
def test_architectures_that_are_asked_for(asked, built):
    answer = plan(**asked).partition(" ")[2]
    if asked.get("CUDAARCHS") == "all-major":  # whatever else the toolkit has
        assert built in answer and re.search(r" \d+0$", answer)
    else:
        assert answer == (built or plan().partition(" ")[2])


@needs_nvcc
@pytest.mark.parametrize("asked, said", [
    ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "must be like '8.0 9.0+PTX', got 'Hopper'"),
    ({"TORCH_CUDA_ARCH_LIST": "9"}, "must be like '8.0 9.0+PTX', got '9'"),
    ({"TORCH_CUDA_ARCH_LIST": "8.0 2.0"}, "TORCH_CUDA_ARCH_LIST asks for 2.0; nvcc"),
    ({"CUDAARCHS": "sm_90"}, "CUDAARCHS must be like '80-real;90', got 'sm_90'"),
    ({"CUDAARCHS": "90;all"}, "CUDAARCHS must be like '80-real;90', got 'all'"),
    ({"CUDAARCHS": "80a"}, "CUDAARCHS asks for 80a; nvcc"),
    ({"CMAKE_CUDA_ARCHITECTURES": "80;999"}, "CMAKE_CUDA_ARCHITECTURES asks for 999; nvcc"),
])  # fmt: skip
def test_architectures_that_no_toolkit_has(asked, said):
    answer = plan(ok=False, **asked)
    (name,) = asked
    assert said in answer and f": set {name} to some of these, or unset it for 80-real 90" in answer
    assert (" 8.0 " if "TORCH" in name else " 80 ") in answer.partition(") has ")[2]


def nvcc_that(folder, text):
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_default_is_the_toolkit_s(tmp_path):
    for release, built in {"12.4": "80-real 90", "12.8": "80-real 90 100-real 120"}.items():
        old = nvcc_that(tmp_path, f"echo 'Cuda compilation tools, release {release}, V{release}.9'")
        assert plan(CUDACXX=old) == f"{VERSION} {built}"
    unknown = "case $* in *90*) echo 'Unsupported gpu architecture';; *) echo release 11.4;; esac"
    answer = plan(ok=False, CUDACXX=nvcc_that(tmp_path, unknown))
    assert "the default asks for 90; nvcc 11.4 (" in answer and "set CUDAARCHS to some of" in answer


@pytest.mark.slow
@needs_nvcc
def test_a_host_compiler_that_nvcc_refuses(tmp_path):
    tree = copy(tmp_path / "tree")
    new = tmp_path / "g++"
    new.write_text('#!/bin/sh\nexec c++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    new.chmod(0o755)
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    said = run(*build, cwd=tree, ok=False, CUDAHOSTCXX=str(new))  # ACTIVESEL_CUDA=auto
    assert "unsupported GNU version" in said
    assert "CUDAHOSTCXX=... the one behind nvcc" in said.splitlines()[-1]
    assert not list(tree.glob("activesel/_C*")), "no silent build for CPUs"


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_an_nvcc_that_does_not_run_is_not_passed_over(mode, tmp_path):
    broken = nvcc_that(tmp_path, "echo cannot load libfoo; exit 1")
    for nvcc, why in ((broken, "cannot load libfoo"), (str(tmp_path / "none"), "No such file")):
        answer = plan(ok=False, CUDACXX=nvcc, ACTIVESEL_CUDA=mode)
        assert f"ACTIVESEL_CUDA={mode} needs nvcc, and {nvcc} does not run as one" in answer
        assert why in answer and "or set ACTIVESEL_CUDA=off to build without CUDA" in answer


def test_no_nvcc_in_sight(tmp_path):
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    assert plan(**nowhere) == f"{VERSION} no CUDA"
    answer = plan(ok=False, ACTIVESEL_CUDA="on", **nowhere)
    assert answer.startswith("ACTIVESEL_CUDA=on needs nvcc: put it on PATH, set CUDA_HOME")


def test_the_local_part_of_the_version():
    answer = plan(ACTIVESEL_CUDA="off", ACTIVESEL_LOCAL_VERSION="cu13.a")
    assert answer == f"{VERSION}+cu13.a no CUDA"
    for wrong in ("cu 13", "+cu13", "cu13/..", "CU13"):
        answer = plan(ok=False, ACTIVESEL_LOCAL_VERSION=wrong)
        assert f"ACTIVESEL_LOCAL_VERSION must be like cu13 or cu13.site2, got {wrong!r}" in answer
