# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA driver: which CUDA it takes, and why it would not run what was built."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from typing import Any

import torch

NONE = "no NVIDIA driver here: install one, or start the container with its GPUs"
OLDEST = {12: 525, 13: 580}  # for CUDA of a major version, whatever the minor


def dotted(version: int) -> str:  # 12040 -> "12.4"
    return f"{version // 1000}.{version % 1000 // 10}"


def newest_cuda() -> int:
    """12040 for a driver that takes CUDA up to 12.4, 0 without one; starts no CUDA context."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def too_old(newest: int, built: str, name: str) -> str:
    """Empty if a driver that takes CUDA `newest` runs what was built with `built`, else why not."""
    if newest // 1000 >= (major := int(built.partition(".")[0])):
        return ""
    return (
        f"the driver takes CUDA {dotted(newest)}, {name} was built with CUDA {built}: install"
        f" driver {OLDEST.get(major, 'for that')} or newer, or {name} for CUDA {newest // 1000}"
    )


@cache
def refusal(module: Any, device: int) -> str:
    """Empty if a device runs the GPU code of the compiled module, else why not."""
    if not (newest := module.cuda_driver_version()):  # CUDA would call it insufficient, not absent
        return NONE
    if why := too_old(newest, dotted(module.cuda_version), module.__name__):
        return why
    try:
        if device >= (count := module.cuda_device_count()):
            return f"device {device} is not there: the driver offers {count}"
        module.cuda_probe(device)
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            return f"CUDA cannot run here: {error}"
        known = torch.cuda.is_available()
        what = "{}.{}".format(*torch.cuda.get_device_capability(device)) if known else "of this GPU"
        return (
            f"{module.__name__} has no code for compute capability {what}, only for"
            f" {module.cuda_architectures}: reinstall with it in CUDAARCHS"
        )
    return ""
