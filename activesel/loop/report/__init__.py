# SPDX-License-Identifier: Apache-2.0
"""One page about runs or results, whole in itself: `python -m activesel report RUN.json`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from activesel import __version__
from activesel.files import whole
from activesel.loop import records
from activesel.loop.report import results, runs, tables
from activesel.loop.report.parts import Section


def report(paths: Sequence[str | Path], out: str | Path) -> str:
    """Write an HTML page that needs no network and no script.

    Runs that differ in their seeds alone are one line with a band; those of uniform sampling are
    the baseline. Result files of the bench are shown as tables, with the pictures beside them.

    Args:
        paths: `run.json` files of one data set, and any result files.
        out: the page; written whole or not at all.

    Returns:
        One line that says what it holds.

    Raises:
        ValueError: a file that is damaged, foreign or of another schema version (says how to
            convert it); runs on different data, or the same run twice; `out` is one of `paths`.
        FileNotFoundError: no such file, or no folder for `out`.
        RuntimeError: matplotlib or Jinja2 is not installed.
    """
    files, out = [Path(path) for path in paths], Path(out)
    if not files:
        raise ValueError("paths must hold at least one file, got none")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} must be there already, got none")
    if out.is_dir() or out.resolve() in {file.resolve() for file in files}:
        raise ValueError(f"out must be a new page, got {out}, a folder or one of the inputs")
    found, read = [], []
    for file in files:
        content = records.read_json(file)
        if "config" in content and "curve" in content:
            found.append((file, runs.check(content, file)))
        else:
            read.append((file, results.check(content, file)))
    groups = runs.groups(found)
    try:
        sections = tables.sections(groups) if groups else []
        sections += [results.section(*pair) for pair in read]
        page = _page(tables.title(groups, [file for file, _ in read]), groups, sections)
    except ImportError as error:
        raise RuntimeError(f"{error}; reports take pip install 'activesel[loop]'") from error
    whole(out, lambda file: file.write_text(page, encoding="utf-8"))
    said = [f"{len(found)} runs in {len(groups)} groups"] * bool(found)
    said += [f"{len(read)} result files"] * bool(read)
    return f"{out}: {', '.join(said)}"


def _page(title: str, groups: Sequence[runs.Group], sections: Sequence[Section]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        verdicts=tables.verdicts(groups),
        sections=sections,
        version=__version__,
        schema=records.SCHEMA,
    )
