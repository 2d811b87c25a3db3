# SPDX-License-Identifier: Apache-2.0
"""Every public name has a docstring with an example that runs; so does the README."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import activesel

ROOT = Path(__file__).parent.parent
PUBLIC = ["activesel", "activesel.testing", "activesel.ledger", "activesel.models"]


def names_of(module):
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return listed
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def public():
    """(full name, object, names whose docstring may hold the example)."""
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in names_of(module):
            value = getattr(module, name)
            if not (inspect.isfunction(value) or inspect.isclass(value)):
                continue
            yield f"{module_name}.{name}", value, value
            if not inspect.isclass(value):
                continue
            for member, function in vars(value).items():
                function = getattr(function, "fget", None) or getattr(
                    function, "__func__", function
                )  # properties and class methods count
                if member.startswith("_") or not inspect.isfunction(function):
                    continue
                if issubclass(value, torch.nn.Module) and member in ("forward",):
                    continue
                yield f"{module_name}.{name}.{member}", function, value


CASES = list(public())


@pytest.mark.parametrize("name, value, owner", CASES, ids=[c[0] for c in CASES])
def test_public_name_has_a_docstring_with_an_example(name, value, owner):
    assert value.__doc__ and value.__doc__.strip(), f"{name} has no docstring"
    own = ">>>" in value.__doc__
    member = name.rsplit(".", 1)[1]
    by_class = owner is not value and re.search(rf">>> .*\.{member}\b", owner.__doc__ or "")
    assert own or by_class, f"{name} has no example"


@pytest.mark.parametrize("name, value, owner", CASES, ids=[c[0] for c in CASES])
def test_examples_run(name, value, owner):
    module = importlib.import_module(value.__module__)
    finder = doctest.DocTestFinder(recurse=False)
    for test in finder.find(value, name, module=module, globs=dict(vars(module))):
        failures = []
        doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE).run(
            test, out=failures.append
        )
        assert not failures, "".join(failures)


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:  # later blocks go on from earlier ones
        exec(compile(block, "README.md", "exec"), scope)
    assert len(scope["batch"][0]) == 128 and len(scope["rows"]["name"]) == 64


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of it writes files
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), scope)


def test_readme_names_everything_public():
    text = (ROOT / "README.md").read_text()
    for name in activesel.__all__:
        assert f"`{name}" in text, f"README does not mention {name}"
    assert len(text.splitlines()) <= 180


def test_flags_documented_are_the_flags_there_are():
    from activesel import packing, spec, spec_joint

    bits = [spec.NONFINITE_SCORE, spec.TOO_FEW_ROWS, spec.BAD_TARGET, spec.BAD_TEMPERATURE]
    bits += [spec_joint.BAD_NORM, spec_joint.BAD_SCALE, packing.BAD_WEIGHT]
    text = " ".join(activesel.Selection.__doc__.split())
    assert [f"{b} " in text.partition("flags:")[2] for b in bits] == [True] * len(bits)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example_scripts_run(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
