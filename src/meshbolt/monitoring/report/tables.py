"""Tables and figures in words, as HTML; everything that comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

MOST_ROWS = 256


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), name: str = "") -> str:
    """Return a table, which scrolls by itself where a window is too narrow for it.

    Args:
        heads: of the columns.
        rows: texts, as many as there are columns; those beyond 256 are counted.
        numbers: which columns are set to the right.
        name: what it holds, for those who have it read to them.
    """
    rights = [' class="n"' if column in numbers else "" for column in range(len(heads))]
    head = "".join(f"<th{right}>{escape(text)}</th>" for text, right in zip(heads, rights, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{right}>{escape(cell)}</td>' for cell, right in zip(row, rights, strict=True))}</tr>"
        for row in rows[:MOST_ROWS]
    )
    left_out = f'<p class="note">{len(rows) - MOST_ROWS:,} rows more.</p>' if len(rows) > MOST_ROWS else ""
    label = f' aria-label="{escape(name)}"' if name else ""
    return (
        f'<div class="scroll"><table{label}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{left_out}'
    )


def pairs(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return names with values and a remark each, one below the other; on a narrow window the remark goes below its value.

    Args:
        rows: name, value, remark.
    """
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        + (f"<dd class='from'>{escape(note)}</dd>" if note else "")
        + "</div>"
        for name, value, note in rows
    )
    return f'<dl class="pairs">{items}</dl>'


def figure(name: str, value: str, note: str = "") -> str:
    """Return one number of a run, large.

    Args:
        name: what it is.
        value: with its unit.
        note: what belongs to it, small.
    """
    below = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="figure"><span>{escape(name)}</span><strong>{escape(value)}</strong>{below}</div>'


def missing(text: str, code: str = "") -> str:
    """Return what stands where nothing was recorded: why, and what to write to have it.

    Args:
        text: in a sentence.
        code: a line of Python.
    """
    line = f"<code>{escape(code)}</code>" if code else ""
    return f'<div class="missing"><p>{escape(text)}</p>{line}</div>'


def note(text: str) -> str:
    """Return a paragraph.

    Args:
        text: plain.
    """
    return f'<p class="note">{escape(text)}</p>'
