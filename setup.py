# SPDX-License-Identifier: Apache-2.0
"""The version, and how `activesel._C` is built with CMake; all else is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_mode() -> str:
    mode = os.environ.get("ACTIVESEL_CUDA", "auto").lower()
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"ACTIVESEL_CUDA must be auto, on or off, got {mode!r}")
    return mode


def version() -> str:
    """`activesel.__version__`, and what ACTIVESEL_LOCAL_VERSION adds: cu13 makes 0.1.0+cu13."""
    source = (ROOT / "activesel" / "__init__.py").read_text(encoding="utf-8")
    local = os.environ.get("ACTIVESEL_LOCAL_VERSION", "")
    if local and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local):
        raise SystemExit(f"ACTIVESEL_LOCAL_VERSION must be like cu13 or cu13.site2, got {local!r}")
    return re.findall(r'^__version__ = "(.+)"$', source, re.M)[0] + (local and f"+{local}")


def find_nvcc() -> list[str]:
    """What CUDACXX says, else nvcc on PATH, else in CUDA_HOME, CUDA_PATH or /usr/local/cuda."""
    if named := shlex.split(os.environ.get("CUDACXX", "")):
        return named
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    return [found] if found else []


def call(*command: str) -> str:
    """All that the command says, or why it cannot run."""
    try:
        ran = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return str(error)
    return ran.stdout


def toolkit(mode: str) -> tuple[list[str], tuple[int, int]] | None:
    """The nvcc to build with and its release; None without one, if that is allowed."""
    if mode == "off":
        return None
    fix = "or set ACTIVESEL_CUDA=off to build without CUDA"
    if not (nvcc := find_nvcc()):
        if mode == "auto":
            return None
        raise SystemExit(f"ACTIVESEL_CUDA=on needs nvcc: put it on PATH, set CUDA_HOME, {fix}")
    said = call(*nvcc, "--version")
    if release := re.search(r"\brelease (\d+)\.(\d+)", said):
        return nvcc, (int(release[1]), int(release[2]))
    name = shlex.join(nvcc)  # it was meant to be used: no silent build for CPUs
    raise SystemExit(
        f"ACTIVESEL_CUDA={mode} needs nvcc, and {name} does not run as one"
        f" ({said.strip().partition(chr(10))[0]}): set CUDACXX or CUDA_HOME to one that does, {fix}"
    )


def architectures(nvcc: list[str], release: tuple[int, int]) -> list[str]:
    """What to compile for, as CMake names it: sm_90 alone is 90-real, 90 is sm_90 and its PTX."""
    # sm_80 code also runs on 86 and 89, sm_100 code on 103; PTX is for what comes later.
    default = ["80-real", "90", *(["100-real", "120"] if release >= (12, 8) else [])]
    names = "CUDAARCHS", "CMAKE_CUDA_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST"
    name = next((n for n in names if os.environ.get(n, "").strip(" ,;")), None)
    asked = re.split(r"[ ,;]+", os.environ[name].strip(" ,;")) if name else default
    torch = name == "TORCH_CUDA_ARCH_LIST"
    form = r"(\d+)\.(\d)([af]?)(\+PTX)?" if torch else r"(\d+)(\d)([af]?)(-real|-virtual)?"
    fix = f"set {name or 'CUDAARCHS'} to some of these"
    fix += f", or unset it for {' '.join(default)}" if name else ""
    listed = re.findall(r"compute_(\d+)(\d)", call(*nvcc, "--list-gpu-arch"))
    has = f"nvcc {release[0]}.{release[1]} ({shlex.join(nvcc)}) has "
    has += " ".join(f"{a}.{b}" if torch else a + b for a, b in listed) + f": {fix}"
    trial = [*nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    if asked == ["native"] and not torch:  # CMake asks the GPUs
        if "Cannot find valid GPU" in call(*trial, "-arch=native"):
            raise SystemExit(f"{name}=native needs a GPU in this machine; {has}")
        return asked
    if asked in (["all"], ["all-major"]) and not torch:  # CMake's own lists may be older than nvcc
        kept = sorted(int(a + b) for a, b in listed if asked == ["all"] or b == "0")
        return [*(f"{number}-real" for number in kept[:-1]), str(kept[-1])]
    built = []
    for item in asked:
        if not (match := re.fullmatch(form, item)):
            like = "8.0 9.0+PTX" if torch else "80-real;90"
            raise SystemExit(f"{name} must be like {like!r}, got {item!r}; {has}")
        major, minor, feature, kind = match.groups()
        number = major + minor + feature
        said = call(*trial, f"-gencode=arch=compute_{number},code=sm_{number}")
        if "nsupported gpu arch" in said:
            raise SystemExit(f"{name or 'the default'} asks for {item}; {has}")
        built.append(number + ("" if kind == "+PTX" else "-real") if torch else item)
    return built


def has_compiler() -> bool:
    return bool(os.environ.get("CXX")) or any(map(shutil.which, ("c++", "g++", "clang++")))


def remove_modules(folder: Path) -> None:
    """An old module must not outlive a build that makes none."""
    for stale in folder.glob("_C*.so"):
        stale.unlink()


class CMakeBuild(build_ext):
    def run(self) -> None:
        if self.inplace:  # also true of an editable install
            remove_modules(ROOT / "activesel")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        remove_modules(target.parent)
        mode = cuda_mode()
        if not has_compiler():
            if mode == "on":
                raise SystemExit("ACTIVESEL_CUDA=on needs a C++ compiler: install one or set CXX")
            print("activesel: no C++ compiler found, installing the pure-torch package", flush=True)
            return
        import pybind11  # here and not above: only a build that compiles needs it

        env = dict(os.environ)
        cuda = []
        if found := toolkit(mode):
            env["CUDACXX"] = shlex.join(found[0])
            cuda = ["-DACTIVESEL_CUDA=ON"]
            cuda += [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures(*found))}"]
            # Serves profilers, and holds paths: not where the same bytes are asked for.
            cuda += [f"-DACTIVESEL_LINEINFO={'OFF' if env.get('SOURCE_DATE_EPOCH') else 'ON'}"]
        jobs = env.get("MAX_JOBS") or env.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count())
        with tempfile.TemporaryDirectory() as tmp:  # a cache names tools of a deleted environment
            configure = [
                *("cmake", "-S", str(ROOT), "-B", tmp, "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DACTIVESEL_VERSION={version().partition('+')[0]}",
                *cuda,
            ]
            try:
                subprocess.run(configure, check=True, env=env)
                subprocess.run(["cmake", "--build", tmp, "-j", jobs], check=True, env=env)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"activesel: the native build failed ({error}); the log above says where.\n"
                    "Advice: ACTIVESEL_CUDA=off builds without CUDA; CXX=... picks a compiler,"
                    " CUDAHOSTCXX=... the one behind nvcc, which refuses those newer than it knows;"
                    " with no C++ compiler on PATH the pure-torch package is installed."
                ) from error

    def copy_extensions_to_source(self) -> None:  # there may be none
        for built in Path(self.build_lib, "activesel").glob("_C*.so"):
            shutil.copy2(built, ROOT / "activesel" / built.name)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


if __name__ == "__main__":
    setup(
        version=version(),
        ext_modules=[Extension("activesel._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
