# SPDX-License-Identifier: Apache-2.0
"""Any result file of the bench: what is in it as tables, and the pictures that lie beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from activesel.loop.report.figures import address
from activesel.loop.report.parts import NOTHING, Figure, Section, Table, number, text

SCHEMA = 1
"""Of the files that `python -m bench` writes."""

VALUE = ("name", "value")
FOLD = 40  # rows; longer tables are opened by hand
LONG = 12  # values; longer lists are counted, not shown
KINDS = {"svg": "image/svg+xml", "png": "image/png"}


def check(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """`content`, if this version wrote it; ValueError says how to convert it if not."""
    found = content.get("schema")
    if found != SCHEMA:
        raise ValueError(
            f"{path} must be a run.json, or a result file of schema {SCHEMA}, got "
            f"{'neither' if found is None else f'schema {found!r}'} (written by activesel "
            f"{content.get('version', 'unknown')}). To convert it run the command that made it "
            f"again, with this version: {content.get('command', 'python -m bench ...')}"
        )
    return content


def section(path: Path, content: Mapping[str, Any]) -> Section:
    """All of a file."""
    facts: list[tuple[str, str]] = [("file", path.name)]
    tables: list[Table] = []
    for name, value in content.items():
        if _rows(value):
            tables.append(table(_title(name), _rows(value)))
        elif isinstance(value, dict):
            entries = [[_title(k), text(_short(v))] for k, v in flat(value).items()]
            if len(entries) > 4:
                tables.append(Table(_title(name), VALUE, entries))
            else:
                facts += [(f"{_title(name)}: {k}", v) for k, v in entries]
        else:
            facts.append((_title(name), text(_short(value))))
    tables.sort(key=lambda t: t.head[1:] == VALUE[1:])
    first = Table("About this file", VALUE, facts)
    lines = []
    if missing := content.get("missing"):
        lines.append(f"Unfinished: {len(missing)} runs are missing.")
    if left_out := content.get("left_out"):
        lines += [text(line) for line in (left_out if isinstance(left_out, list) else [left_out])]
    return Section(path.stem, lines, pictures(path), [first, *tables])


def _rows(value: Any) -> list[dict[str, Any]]:
    """The rows of a list of objects, or of an object of alike objects; else none."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return value
    if isinstance(value, dict) and len(value) > 1:
        rows = list(value.values())
        if all(isinstance(row, dict) and row for row in rows):
            shared = set.intersection(*map(set, rows))
            if 2 * len(shared) >= len(set.union(*map(set, rows))):
                return [{"name": key, **row} for key, row in value.items()]
    return []


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """One column per name; what is the same in all rows, or too long, is said beneath."""
    lines = [{k: _short(v) for k, v in flat(row).items()} for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    cells = {name: [text(line.get(name)) for line in lines] for name in names}
    same = [n for n in names[1:] if len(lines) > 1 and len(set(cells[n])) == 1]
    shown = [n for n in names if n not in same]
    said = [f"{_title(n)} {cells[n][0]}" for n in same if cells[n][0] != NOTHING]
    note = f"The same in all rows: {'; '.join(said)}." if said else ""
    body = [[cells[name][i] for name in shown] for i in range(len(lines))]
    return Table(f"{title} ({len(lines)})", [_title(n) for n in shown], body, note,
                 folded=len(body) > FOLD)  # fmt: skip


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects with their names joined; a mean with its interval becomes one text.

    >>> flat({"a": {"b": 1, "c": {"mean": 0.5, "low": 0.25, "high": 0.75, "std": 0.1}}})
    {'a b': 1, 'a c': '0.5 ± 0.25'}
    """
    made: dict[str, Any] = {}
    for name, entry in value.items():
        name = f"{prefix}{name}"
        if isinstance(entry, dict) and {"mean", "low", "high"} <= set(entry):
            made[name] = _spread(entry)
        elif isinstance(entry, dict) and entry:
            made |= flat(entry, f"{name} ")
        else:
            made[name] = entry
    return made


def _spread(entry: Mapping[str, Any]) -> Any:
    mean, low, high = (entry[name] for name in ("mean", "low", "high"))
    if not all(isinstance(x, int | float) for x in (mean, low, high)):
        return mean
    return f"{number(mean)} ± {number((high - low) / 2, 2)}"


def _short(value: Any) -> Any:
    if isinstance(value, list) and (len(value) > LONG or any(isinstance(v, dict) for v in value)):
        return f"{len(value)} values"
    return value


def _title(name: str) -> str:
    return str(name).replace("_", " ")


def pictures(path: Path) -> list[Figure]:
    """`<stem>.svg` and `<stem>-*.svg` (or .png) beside the file, as images that can run nothing."""
    others = [p.stem for p in path.parent.glob(f"{path.stem}-*.json")]
    found: dict[str, Path] = {}
    for suffix in KINDS:
        for file in [path.with_suffix(f".{suffix}"), *path.parent.glob(f"{path.stem}-*.{suffix}")]:
            foreign = any(file.stem == o or file.stem.startswith(f"{o}-") for o in others)
            if file.is_file() and not foreign:
                found.setdefault(file.stem, file)
    return [
        Figure(
            f"{found[stem].name}.",
            source=address(KINDS[found[stem].suffix[1:]], found[stem].read_bytes()),
            wide=True,
        )
        for stem in sorted(found)
    ]
