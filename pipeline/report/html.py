"""Small pieces of HTML and the words for numbers; everything that comes from a run is escaped."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

_UNITS = ((1e12, 1e12, " T"), (1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k"))
"""From where on, how much, and its letter."""


def text(value: object) -> str:
    """Any value as text that cannot become markup."""
    return escape(str(value))


def section(title: str, *body: str, lead: str = "") -> str:
    """A part of the page with its heading and a sentence on how to read it."""
    told = f"<p class=lead>{text(lead)}</p>" if lead else ""
    return f"<section><h2>{text(title)}</h2>{told}{''.join(body)}</section>"


def missing(sentence: str, command: str = "") -> str:
    """What is not there, and the command that brings it."""
    told = f" <code>{text(command)}</code>" if command else ""
    return f"<p class=missing>{text(sentence)}{told}</p>"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> str:
    """A table whose first `words` columns are text and whose others are right-aligned numbers."""
    head = "".join(f"<th>{text(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<div class=scroll><table class=words{words}><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, body: str) -> str:
    """Something that opens when it is asked for."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def figures(*parts: str) -> str:
    """Charts side by side where there is room."""
    return f"<div class=figures>{''.join(parts)}</div>"


def figure(drawing: str, caption: str, *, wide: bool = False) -> str:
    """A chart or picture with its caption."""
    kind = " class=wide" if wide else ""
    return f"<figure{kind}><figcaption>{text(caption)}</figcaption>{drawing}</figure>"


def duration(seconds: float | None) -> str:
    """A time span in the two largest units that matter."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    if hours < 48:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"


def number(value: float | None, digits: int = 3) -> str:
    """A number with thousands as k, M, G, T."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 1e4 and float(value).is_integer():
        return f"{value:,.0f}"
    rounded = float(f"{value:.{digits}g}")  # 999,999 is 1 M, not 1e+03 k
    for limit, size, unit in _UNITS:
        if abs(rounded) >= limit:
            return f"{rounded / size:.{digits}g}{unit}"
    return f"{rounded:,.0f}" if abs(rounded) >= 1e3 else f"{value:.{digits}g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent."""
    if share is None or not math.isfinite(share):
        return "–"
    return f"{100 * share:.{digits}f} %"


def moment(seconds: float | None) -> str:
    """A point in time, UTC."""
    if seconds is None:
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _cell(cell: object) -> str:
    """Cells are escaped, except those that are markup of ours."""
    return cell.markup if isinstance(cell, Markup) else text(cell)


class Markup:
    """HTML of our own making, which is not escaped again."""

    def __init__(self, markup: str) -> None:
        self.markup = markup
