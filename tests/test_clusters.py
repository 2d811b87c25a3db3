# SPDX-License-Identifier: Apache-2.0
"""The page for clusters: its scripts do what it says, and what it quotes stands in the sources."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import activesel
from activesel import __main__, doctor

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clusters.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
bash = pytest.mark.skipif(not shutil.which("bash"), reason="bash is not here")


def table(heading):
    """The cells of the first table after some words, without its head."""
    lines = PAGE.partition(heading)[2].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture(scope="module")
def sources():
    files = [*Path(activesel.__file__).parent.rglob("*.py")]
    for name in ("setup.py", "Makefile", "tools/wheels.py"):
        if not (ROOT / name).exists():
            pytest.skip(f"needs a checkout, {name} is not here")
        files.append(ROOT / name)
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)  # strings that go on in the next line


def run(script, folder):
    python = Path(sys.executable).parent
    env = os.environ | {"PATH": os.pathsep.join(map(str, (folder, python, os.environ["PATH"])))}
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True
    )


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@bash
@pytest.mark.parametrize("block", SHELL)
def test_shell_parses(block, tmp_path):
    assert (done := subprocess.run(["bash", "-n"], input=block, text=True)).returncode == 0, done


def test_commands_are_the_command_lines(monkeypatch):
    yaml = re.findall(r"command: \[(.*activesel.*)\]", PAGE)
    lines = [" ".join(part.strip() for part in line.split(",")) for line in yaml]
    lines += re.findall(r"^ *(python -m activesel .*)$", "".join(SHELL), re.MULTILINE)
    assert len(lines) == 3
    monkeypatch.setattr(doctor, "report", lambda *_, **__: True)
    for line in lines:
        assert __main__.main(shlex.split(line)[3:]) == 0


def test_kubernetes_manifest():
    yaml = pytest.importorskip("yaml")
    (manifest,) = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
    pod = manifest["spec"]["template"]
    assert manifest["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (check,) = pod["spec"]["initContainers"]
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in check["volumeMounts"]} == volumes
    assert check["env"][0]["value"] == check["volumeMounts"][0]["mountPath"]
    assert f"daemonset/{manifest['metadata']['name']}" in "".join(SHELL)


@bash
@pytest.mark.parametrize("status", [0, 1])
def test_slurm_script_passes_the_status_on(status, tmp_path):
    script = next(block for block in SHELL if "#SBATCH" in block)
    program(tmp_path / "srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
    program(tmp_path / "python", f'test -d "$TRITON_CACHE_DIR" && pwd > seen; exit {status}')
    done = run(f"export TMPDIR={shlex.quote(str(tmp_path))}\n{script}", tmp_path)
    assert done.returncode == status, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "seen", "srun"]


@bash
def test_unhealthy_nodes_are_listed(tmp_path):
    (tmp_path / "doctor-7-a.json").write_text('{"healthy": true, "faults": []}')
    (tmp_path / "doctor-7-b.json").write_text('{"healthy": false, "faults": ["cuda:3: off"]}')
    (tmp_path / "doctor-7-c.json").write_text("")
    done = run(next(block for block in SHELL if "json.loads" in block), tmp_path)
    expected = "doctor-7-b.json\n  cuda:3: off\ndoctor-7-c.json\n  no report\n"
    assert done.stdout == expected, done.stderr


def test_fields_are_the_report_s():
    rows = table("worth collecting")
    named = {name for row in rows for name in quoted(row[0])}
    assert named <= {field.name for field in dataclasses.fields(doctor.Examination)}
    assert {"healthy", "faults", "missing", "devices"} <= named


def test_variables_are_read_somewhere(sources):
    names = [name for row in table("## Variables") for name in quoted(row[0])]
    assert len(names) > 10
    for name in names:
        assert re.search(rf"\b{name}\b", sources), f"nothing reads {name}"


def test_messages_are_ours(sources):
    rows = table("## Messages")
    assert len(rows) > 10
    for said, *_ in rows:
        (message,) = quoted(said)
        for part in message.split("..."):
            assert part.strip() in sources, f"nothing says {part!r}"


def test_dockerfile_has_the_page_s_commands():
    recipe = ROOT / "tools" / "Dockerfile"
    if not recipe.exists():
        pytest.skip("needs a checkout")
    (block,) = (block for block in SHELL if "docker build" in block)
    for line in block.splitlines():
        assert f"#   {line}\n" in recipe.read_text()
