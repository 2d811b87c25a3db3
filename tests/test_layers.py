# SPDX-License-Identifier: Apache-2.0
"""The house: who may import whom, what importing costs, and how long files may get."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import activesel

ROOT = Path(__file__).parent.parent
PACKAGE = Path(activesel.__file__).parent  # the installed one, outside of a checkout
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high; a module imports from lower layers only (or from its own folder).
LAYERS = [
    {"files", "driver"},
    {"vit_parts"},
    {"spec", "spec_joint", "spec_scorer"},
    {"packing"},
    {"kernels"},
    {"_native", "_triton"},
    {"ops"},
    {"operands", "scorers", "arguments", "batches", "select", "joint", "losses"},
    {"cache", "cache_files"},
    {"selector", "testing"},
    {"models", "ledger"},
    {"loop", "doctor", "selftest"},
    {"__main__"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path, whole=True):
    """Absolute names that a file imports; only at import time unless `whole`."""
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif whole or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.extend(ast.iter_child_nodes(node))


def layer(name):  # "activesel.loop.data" -> "loop"
    return name.split(".")[1]


def own_layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path):
    name = own_layer(path)
    if name == "__init__":
        return
    assert name in LEVEL, f"{path.name} belongs to no layer of this test"
    for imported in imports(path):
        if imported.startswith("activesel.") and layer(imported) in LEVEL:
            other = layer(imported)
            if other == name:
                continue
            assert LEVEL[other] <= LEVEL[name], f"{name} imports {other}, which is above it"


def test_the_core_does_not_know_its_users():
    """selector -> select, joint -> ops -> {spec, _native, _triton -> kernels}, nothing beside."""
    allowed = {
        "spec": set(),
        "spec_joint": {"spec"},
        "driver": set(),
        "_native": {"spec", "spec_joint", "driver", "_C", "__version__"},
        "_triton": {"spec", "spec_joint", "kernels"},
        "vit_parts": set(),
        "packing": {"vit_parts", "spec_scorer", "files"},
        "spec_scorer": {"vit_parts"},
        "ops": {"spec", "spec_joint", "_native", "_triton"},
        "operands": set(),
        "losses": {"operands"},
        "scorers": {"ops", "operands", "packing", "vit_parts"},
        "arguments": {"ops", "operands", "scorers", "spec_joint"},
        "batches": set(),
        "select": {"ops", "operands", "arguments", "batches"},
        "joint": {"ops", "operands", "arguments", "select"},
        "cache": {"select", "operands", "cache_files", "files", "__version__"},
        "cache_files": {"arguments", "operands", "files"},
        "files": set(),
        "selector": {"select", "joint", "losses", "operands", "batches"},
        "testing": {"select"},
    }
    for name, expected in allowed.items():
        found = {layer(i) for i in imports(PACKAGE / f"{name}.py") if i.startswith("activesel")}
        assert found <= expected, f"{name} may import {expected}, got {found}"


def test_specification_imports_only_torch():
    standard = {"torch", "collections", "functools", "typing", "sys", "__future__"}
    for name in ("spec", "spec_joint", "spec_scorer"):
        roots = {name.split(".")[0] for name in imports(PACKAGE / f"{name}.py")}
        assert roots <= standard | {"activesel"}


def test_only_the_guard_knows_the_compiled_module():
    for path in MODULES:
        if path.name != "_native.py":
            assert "activesel._C" not in path.read_text(), path


def test_import_is_light():
    """No compiler, no compiled module, no plotting, no command line until somebody asks."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import activesel\n"
        "heavy = {'triton', 'matplotlib', 'scipy', 'tyro', 'rich', 'activesel._C', 'hypothesis',"
        " 'activesel.loop', 'activesel.models', 'activesel.testing'}\n"
        "sys.exit(' '.join(sorted(heavy & (set(sys.modules) - before))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def lines(folder, *patterns):
    root = PACKAGE.parent if folder == "activesel" else ROOT
    files = [path for pattern in patterns for path in (root / folder).rglob(pattern)]
    return {
        str(path.relative_to(root)): len(path.read_text().splitlines())
        for path in files
        if not {"build", ".venv"} & set(path.parts)
    }


def test_budgets():
    python, native = lines("activesel", "*.py"), lines("csrc", "*.cpp", "*.h", "*.cu", "*.cuh")
    rest = lines("tests", "*.py") | lines("bench", "*.py") | lines("examples", "*.py")
    long = {path: n for path, n in (python | native | rest).items() if n > 400}
    assert not long, "no file over 400 lines"
    assert sum(n for path, n in python.items() if "/loop/" not in path) < 9500
    assert sum(native.values()) < 3000


def test_every_source_file_names_its_licence():
    for folder, mark, suffixes in (
        (PACKAGE, "#", {".py"}), (ROOT / "tests", "#", {".py"}), (ROOT / "bench", "#", {".py"}),
        (ROOT / "csrc", "//", {".cpp", ".h", ".cu", ".cuh"}),
    ):  # fmt: skip
        for path in folder.rglob("*"):
            if path.suffix in suffixes:
                first = path.read_text().partition("\n")[0]
                assert first == f"{mark} SPDX-License-Identifier: Apache-2.0", path
