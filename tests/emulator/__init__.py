# SPDX-License-Identifier: Apache-2.0
"""csrc/topk_cuda.cu built for the CPU, as `activesel._native` sees the compiled module."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

from activesel import _native

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
if sys.platform != "linux" or not CSRC.exists():
    CXX = None
NEEDS = "the CUDA emulator needs Linux, a C++ compiler and a checkout's csrc"
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-shared",
         "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", f"-I{HERE}"]  # fmt: skip


class Emulator:
    cuda = True

    def __init__(self, folder, csrc=CSRC):
        """Builds in `folder`."""
        built = folder / "emulated.so"
        subprocess.run([CXX, *FLAGS, f"-I{csrc}", HERE / "shim.cpp", "-o", built], check=True)
        self.library = ctypes.CDLL(str(built))

    def call(self, name, *arguments, result=ctypes.c_int64):
        function = getattr(self.library, name)
        function.restype = result
        return function(*(ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments))

    def checked(self, name, *arguments):
        if reason := self.call(name, *arguments, result=ctypes.c_char_p):
            raise RuntimeError(reason.decode())

    def topk_cuda_workspace(self, rows):
        return self.call("workspace", rows)

    def topk_cuda(self, *arguments):
        self.checked("run_topk", *arguments)

    def select_cuda(self, online, reference, *rest):
        sides = ((ctypes.c_int64 * 7)(*(side or [0] * 7)) for side in (online, reference))
        self.checked("run_select", *sides, *rest)

    def shuffle(self, seed):
        """Draws another order of threads and blocks."""
        self.call("shuffle", seed)

    def launches(self):
        """Launches and memsets since last asked."""
        return self.call("launches")


def emulate(patch, module):
    """From now on `_native` runs a module's GPU code, on CPU tensors."""
    patch.setattr(_native, "_load", lambda: (module, "emulated"))
    patch.setattr(_native, "GPU", "cpu")
    patch.setattr(_native, "_stream", lambda device: 0)
