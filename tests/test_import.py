# SPDX-License-Identifier: Apache-2.0
"""What `import activesel` leaves as it was: all of other modules, the process, the GPU."""

import os
import subprocess
import sys

import pytest

NAMES = ["activesel", "activesel,activesel.ledger,activesel.models,activesel.doctor"]

# All that activesel imports is imported before, so that only its own doing is seen.
BEFORE = """
import contextlib, importlib, subprocess, sys
names = sys.argv[1].split(",")
OURS = {name.split(".")[0] for name in names} | {"__main__", "__mp_main__"}
ask = "import sys, " + sys.argv[1] + "; print(*sys.modules, sep='\\\\n')"
theirs = subprocess.check_output([sys.executable, "-c", ask], text=True).split("\\n")
for name in theirs:
    if name and name.split(".")[0] not in OURS:
        with contextlib.suppress(ImportError):  # "torch.ops" is no module's file
            importlib.import_module(name)
"""

CHANGES = """
CACHES = {"encodings._cache", "inspect", "linecache", "platform", "re", "sys.path_importer_cache"}
MAY_GROW = {  # operators and their FLOP formulas, as torch's interface registers them
    "torch.ops.activesel", "torch.ops._dir", "torch.library._defs", "torch.library._impls",
    "torch.jit._builtins._builtin_table", "torch.utils.flop_counter.flop_registry",
}

def attributes():
    "Everything reachable by module.name or module.Class.name, and what module.container holds."
    found, seen = {}, set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in OURS:
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            path = name + "." + key
            if path in CACHES or name in CACHES or value is sys.modules:
                continue
            found[path] = value
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, type):
                found |= {f"{path}.{inner}": v for inner, v in list(vars(value).items())}
            elif type(value) in (dict, set, list, tuple):
                held = value.items() if type(value) is dict else ((id(v), v) for v in value)
                found |= {f"{path}[{key!r}]": v for key, v in list(held)}
    return found

def changes(before, after):
    for path in sorted(before.keys() | after.keys()):
        if path not in before:
            if path.partition("[")[0] not in MAY_GROW:
                yield path + " is new"
        elif path not in after or before[path] is not after[path]:
            yield path + " is not what it was"

import gc, logging, os, random, signal, threading, warnings
import numpy, torch

def libraries():
    if sys.platform != "linux":
        return set()
    return {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}

def state():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    loggers = {n: l for n, l in logging.root.manager.loggerDict.items() if hasattr(l, "handlers")}
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path),
        "finders": [*sys.meta_path, *sys.path_hooks], "hooks": [sys.excepthook, sys.displayhook],
        "warnings": list(warnings.filters), "threads": threading.active_count(),
        "logging": [(n, l.level, list(l.handlers), l.propagate) for n, l in loggers.items()
                    if n != "activesel"] + [logging.root.level, list(logging.root.handlers)],
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "collector": [gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit()],
        "random": [random.getstate(), str(numpy.random.get_state()), torch.initial_seed(),
                   torch.get_rng_state().tolist()],
        "torch": [torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(),
                  torch.get_num_interop_threads(), torch.is_grad_enabled(),
                  torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
                  torch.is_deterministic_algorithms_warn_only_enabled(),
                  torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"),
                  torch.is_autocast_enabled("cuda"), torch.is_anomaly_enabled(),
                  torch.multiprocessing.get_sharing_strategy(),
                  torch.multiprocessing.get_start_method(allow_none=True)],
        "flags": [cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic,
                  cudnn.enabled, cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(),
                  cuda.mem_efficient_sdp_enabled(), torch.backends.mkldnn.enabled],
        "cuda": torch.cuda.is_initialized(), "libraries": libraries(),
    }

was, before = state(), attributes()
assert len(before) > 10_000
for name in names:
    importlib.import_module(name)
after, now = attributes(), state()
for change in changes(before, after):
    print(change)
assert not logging.getLogger("activesel").handlers
for what in was:
    if was[what] != now[what]:
        print(what, "is not what it was")
"""

WATCH = """
import sys, torch
names, tried = sys.argv[1].split(","), []

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" or name.startswith(("activesel._C", "activesel.kernels")):
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            tried.append((name, frame.f_globals["__name__"]))

sys.meta_path.insert(0, Watch())
for name in names:
    __import__(name)
for name, importer in tried:
    if names == ["activesel"] or importer.split(".")[0] not in ("triton", "torch"):
        print(importer, "imports", name)
import activesel  # what would be seen
activesel.sample(torch.ones(8), 2, seed=0)
assert ("activesel._C", "activesel._native") in tried
"""

# A worker that forks after the import, and one that imports: CUDA must still be usable in both.
WORKER = """
import torch
{early}

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row):
        import activesel
        assert not torch.cuda._is_in_bad_fork() and not torch.cuda.is_initialized()
        return activesel.sample(torch.arange(8.0) + row, 2, seed=0, temperature=0.0).indices

loader = torch.utils.data.DataLoader(
    Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork"
)
assert torch.cat(list(loader)).tolist() == [[6, 7]] * 4
"""


PLANTED = """
import os, signal, torch, torch.utils.flop_counter, warnings
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
warnings.simplefilter("ignore")
torch.set_default_dtype(torch.float64)
torch.Tensor.activesel = property(len)
torch.nn.functional.relu = torch.nn.functional.gelu
torch.set_num_threads(torch.get_num_threads() + 1)
torch.utils.flop_counter.flop_registry.pop(torch.ops.aten.mm)
"""


def run(code, *arguments, folder=None):
    command = [sys.executable, "-c", code, *arguments]
    paths = [str(folder)] if folder else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("names", NAMES)
def test_nothing_is_patched_or_set(names):
    assert run(BEFORE + CHANGES, names) == []


def test_what_is_patched_or_set_is_found(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    found = run(BEFORE + CHANGES, "planted", folder=tmp_path)
    for end in (
        "Tensor.activesel is new", "functional.relu is not what it was",
        "aten.mm')>] is not what it was", "environment is not what it was",
        "signals is not what it was",
        "warnings is not what it was", "torch is not what it was",
    ):  # fmt: skip
        assert any(line.endswith(end) for line in found), (end, found)


@pytest.mark.parametrize("names", NAMES)
def test_kernels_are_not_imported(names):
    """Triton neither, but where torch does so itself: its FLOP counter, which the ledger uses."""
    assert run(WATCH, names) == []


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
@pytest.mark.parametrize("early", ["", "import activesel"])
def test_a_forked_worker(early):
    run(WORKER.format(early=early))
