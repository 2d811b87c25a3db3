# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel cache`: from a model file and a data function to a cache, or a clear no."""

import os
import subprocess
import sys

import pytest
import torch

from activesel import __main__, score
from activesel.cache import ReferenceCache
from activesel.cache_files import fingerprint
from activesel.models import dual, load, save, vit
from activesel.operands import Forward

DATA = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
X = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8)
Y, T = torch.arange(20) % 5, torch.randint(9, (20, 3))

def tuples():
    return DataLoader(TensorDataset(X, Y), batch_size=8)

def pairs():
    for at in range(0, 20, 7):
        here = slice(at, at + 7)
        names = [f"icon {i}" for i in range(at, min(at + 7, 20))]
        yield {"images": X[here], "texts": T[here], "id": names}

def broken():
    yield X[:8], Y[:8]
    raise ValueError("icon 8 cannot be read")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models and the data's module."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(1)
    save(vit("mu", image_size=8, patch=4, channels=1, classes=5), folder / "vit.safetensors")
    two = dual("nano", vocabulary=9, length=3, image_size=8, patch=4, channels=1)
    save(two, folder / "dual.safetensors")
    (folder / "tiny_icons.py").write_text(DATA)
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """The command in this process, where it takes no time: exit status, output, errors."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)

    def call(*arguments):
        try:
            status = __main__.main(["cache", *arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def losses(out, **changes):
    given = {"model": "vit.safetensors", "data": "tiny_icons:tuples", "out": str(out)} | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def test_from_the_shell(place, tmp_path):
    command = [sys.executable, "-m", "activesel", "cache", *losses(tmp_path / "c", shard_rows=8)]
    paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/c: loss of 20 rows\n"
    assert "shard-00002.safetensors is written, 20 rows so far" in done.stderr
    model = load(place / "vit.safetensors")
    cache = ReferenceCache(tmp_path / "c", model=model)
    scope = {}
    exec(DATA, scope)
    assert cache.data == fingerprint({"inputs": scope["X"], "targets": scope["Y"]})
    for at in (0, 8, 16):
        x, y = scope["X"][at : at + 8], scope["Y"][at : at + 8]
        rows = torch.arange(at, min(at + 8, 20))
        assert torch.equal(cache.lookup(rows), score(online=Forward(model, x), targets=y))


def test_embeddings(run, place, tmp_path):
    how = {"model": "dual.safetensors", "data": "tiny_icons:pairs", "kind": "embeddings"}
    status, said, _ = run(*losses(tmp_path / "c", **how, dtype="bfloat16", preprocessing="8 px"))
    assert status == 0 and said == f"{tmp_path}/c: embeddings of 20 rows\n"
    cache = ReferenceCache(tmp_path / "c", preprocessing="8 px")
    found = cache.lookup(["icon 19", "icon 0"])
    assert found.image.shape == (2, 32) and found.text.dtype == torch.bfloat16
    assert found.scale.item() == pytest.approx(10) and found.bias.item() == -10


def test_repeated_and_replaced(run, tmp_path):
    assert run(*losses(tmp_path / "c"))[0] == 0
    before = (tmp_path / "c" / "shard-00000.safetensors").stat()
    assert run(*losses(tmp_path / "c"))[0] == 0
    assert (tmp_path / "c" / "shard-00000.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    status, _, errors = run(*losses(tmp_path / "c", preprocessing="rotated"))
    assert status == 2 and "preprocessing must be 'rotated', got ''" in errors
    assert run(*losses(tmp_path / "c", preprocessing="rotated"), "--overwrite")[0] == 0
    assert ReferenceCache(tmp_path / "c").preprocessing == "rotated"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": "nowhere.safetensors"}, "no model file at nowhere.safetensors"),
        ({"model": "tiny_icons.py"}, "tiny_icons.py must be a whole safetensors file"),
        ({"model": "dual.safetensors"}, "dual.safetensors must hold an 'activesel' header"),
        ({"kind": "embeddings"}, "vit.safetensors must hold an 'activesel' header"),
        ({"data": "tiny_icons"}, "--data must be MODULE:FUNCTION, got 'tiny_icons'"),
        ({"data": "tiny_icons:nothing"}, "has no attribute 'nothing'"),
        ({"data": "no_icons:tuples"}, "No module named 'no_icons'"),
        ({"data": ":tuples"}, "--data must be MODULE:FUNCTION, got ':tuples'"),
        ({"data": "tiny_icons:X.shape"}, "has no attribute 'X.shape'"),
        ({"data": "tiny_icons:X"}, "not callable"),
        ({"data": "tiny_icons:broken"}, "icon 8 cannot be read"),
        ({"data": "tiny_icons:pairs"}, "data must give dicts or tuples with ('inputs'"),
        ({"kind": "logits"}, "invalid choice: 'logits'"),
        ({"dtype": "float16"}, "dtype must be a float, for embeddings only"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"batch": "many"}, "invalid int value: 'many'"),
        ({"batch": "0"}, "must be >= 1, got 0"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_refusals(run, tmp_path, changes, said):
    status, _, errors = run(*losses(tmp_path / "c", **changes))
    assert status == 2 and said in errors and errors.startswith("usage: python -m activesel")
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("missing", ["model", "data", "out"])
def test_needed_arguments(run, tmp_path, missing):
    given = [a for a in losses(tmp_path) if not a.startswith(f"--{missing}")]
    status, _, errors = run(*given)
    assert status == 2 and f"the following arguments are required: --{missing}" in errors


def test_folder_of_something_else(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    status, _, errors = run(*losses(tmp_path), "--overwrite")
    assert status == 2 and "must be empty or hold a cache, got thesis.tex" in errors
    (tmp_path / "file").write_text("")
    status, _, errors = run(*losses(tmp_path / "file"))
    assert status == 2 and "Not a directory" in errors
