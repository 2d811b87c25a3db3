# SPDX-License-Identifier: Apache-2.0
"""What a page is made of, and how it writes numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOTHING, TIMES = "\u2013", "\u00d7"
POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
VALUE = rf"[-+<>]? ?\d[\d,.]*({TIMES}10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?"
NUMERIC = re.compile(rf"^({VALUE}( ± {VALUE})?(\s?%)?|{NOTHING})$")
BROAD = 12  # columns; more are not printed


@dataclass(frozen=True)
class Table:
    """Cells are text; the first of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False  # opened by hand, and not printed

    @property
    def broad(self) -> bool:
        return len(self.head) > BROAD

    @property
    def numeric(self) -> list[bool]:
        """Columns set flush right."""
        columns = zip(*self.rows, strict=True)
        return [i > 0 and all(map(NUMERIC.match, cells)) for i, cells in enumerate(columns)]


@dataclass(frozen=True)
class Figure:
    """A picture: SVG to be put inline, or the address of one, `data:` only."""

    caption: str
    svg: str = ""
    source: str = ""
    wide: bool = False  # scrolls on a narrow screen rather than shrink


@dataclass(frozen=True)
class Tile:
    """A row of a contact sheet."""

    source: str  # data: address
    caption: str
    kind: str
    mark: str  # "good", "poor" or "bad": the colour of its frame
    times: str  # how often it was kept


@dataclass(frozen=True)
class Sheet:
    caption: str
    tiles: Sequence[Tile]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    sheets: Sequence[Sheet] = ()
    code: Sequence[str] = ()

    @property
    def anchor(self) -> str:
        return re.sub("[^a-z0-9]+", "-", self.title.lower()).strip("-")


def text(value: Any) -> str:
    """Any JSON value, short.

    >>> [text(v) for v in (True, 1608, 0.123456, [1, 2], "x")]
    ['yes', '1,608', '0.1235', '1, 2', 'x']
    """
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or NOTHING
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(v)}" for name, v in value.items()) or NOTHING
    return str(value)


def number(value: float, digits: int = 4) -> str:
    """So many digits that count, without zeros behind them, in powers of ten beyond a million."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        written = f"{value:,.{decimals}f}"
        return written.rstrip("0").rstrip(".") if "." in written else written
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}{TIMES}10{str(int(power)).translate(POWERS)}"


def percent(share: float | None, digits: int = 1) -> str:
    return NOTHING if share is None else f"{100 * share:.{digits}f}\u00a0%"


def signed(share: float, digits: int = 1) -> str:
    """Percentage points, with the sign they are shown with.

    >>> signed(0.012), signed(-0.0001)
    ('+1.2', '0.0')
    """
    written = f"{100 * share:+.{digits}f}"
    return written[1:] if not float(written) else written
