# SPDX-License-Identifier: Apache-2.0
"""Builds `activesel._C` with CMake; everything that is not a build step is in pyproject.toml."""

from __future__ import annotations

import os
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


def find_nvcc() -> str | None:
    """Where CMake does not look by itself: CUDA_HOME, CUDA_PATH, /usr/local/cuda."""
    if found := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return found
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((n for h in homes if h and (n := shutil.which("nvcc", path=f"{h}/bin"))), None)


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
        if mode != "off" and (nvcc := find_nvcc()):
            env["CUDACXX"] = nvcc
        jobs = env.get("MAX_JOBS") or env.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count())
        with tempfile.TemporaryDirectory() as tmp:  # a cache names tools of a deleted environment
            configure = [
                *("cmake", "-S", str(ROOT), "-B", tmp, "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DACTIVESEL_CUDA={mode}",
                f"-DACTIVESEL_VERSION={self.distribution.get_version()}",
            ]
            try:
                subprocess.run(configure, check=True, env=env)
                subprocess.run(["cmake", "--build", tmp, "-j", jobs], check=True, env=env)
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    f"activesel: the native build failed ({error}); the log above says where.\n"
                    "Advice: ACTIVESEL_CUDA=off builds without CUDA; CXX=... picks a compiler;"
                    " with no C++ compiler on PATH the pure-torch package is installed."
                ) from error

    def copy_extensions_to_source(self) -> None:  # there may be none
        for built in Path(self.build_lib, "activesel").glob("_C*.so"):
            shutil.copy2(built, ROOT / "activesel" / built.name)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


setup(ext_modules=[Extension("activesel._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
