"""Charts as HTML: lines with what lies around them, areas on top of each other, shares of a bar.

Lines are SVG that is stretched to whatever width there is; what is written stands beside it as text, so that it is as large on a
telephone as on a screen. Each chart carries its numbers as JSON, from which `page.js` shows what is under the pointer; without
JavaScript, and on paper, everything but that is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from meshbolt.monitoring.report.axes import Axis, axis_of_steps, axis_of_values
from meshbolt.monitoring.report.envelope import Envelope, Stretch
from meshbolt.monitoring.report.wording import exact, write

COLOURS = 8
# So few values are shown one by one.
_DOTS = 40
_SIZE = 1000


@dataclass(frozen=True)
class Span:
    """The steps that charts show, and what happened at some of them.

    Attributes:
        first: step.
        last: step.
        marks: steps at which something happened, and what.
    """

    first: int
    last: int
    marks: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: in the legend.
        envelope: its values.
        colour: from 0; they repeat.
        note: what it means, in a sentence.
    """

    name: str
    envelope: Envelope
    colour: int = 0
    note: str = ""


@dataclass(frozen=True)
class Title:
    """What stands above a chart.

    Attributes:
        text: its name.
        unit: of its numbers, as the catalogue has it.
        note: what it shows, in a sentence.
        aside: at its right, such as the last value.
    """

    text: str
    unit: str = ""
    note: str = ""
    aside: str = ""


def line_chart(title: Title, series: Sequence[Series], span: Span, *, from_zero: bool) -> str:
    """Return lines over steps: the mean of each stretch, and as a band all that lies between its lowest and highest value.

    Args:
        title: what stands above.
        series: one or more.
        span: steps.
        from_zero: whether the axis begins at 0.
    """
    lines = [(each, each.envelope.stretches()) for each in series]
    bounds = [
        bound for _, stretches in lines for each in stretches if each.count for bound in (each.lowest, each.highest)
    ]
    x, y = axis_of_steps(span.first, span.last), axis_of_values(bounds, title.unit, from_zero=from_zero)
    drawn = [_band(stretches, each.colour, x, y) for each, stretches in lines]
    drawn += [_line(stretches, each.colour, x, y) for each, stretches in lines]
    dots = "".join(_dots(stretches, each.colour, x, y) for each, stretches in lines if len(stretches) <= _DOTS)
    data = {
        "x": [span.first, x.high],
        "y": [exact(y.low), exact(y.high), y.is_logarithmic],
        "unit": title.unit,
        "series": [_data_of_line(each, stretches) for each, stretches in lines],
    }
    told = "; ".join(f"{each.name}: {_told(each.envelope, title.unit)}" for each in series)
    note = " Logarithmic axis." if y.is_logarithmic else ""
    keys = [(each.name, each.colour, "", each.note) for each in series] if len(series) > 1 else []
    return _figure(_with_note(title, note), _Drawing(x, y, "".join(drawn), dots, told, span), legend(keys), data)


def area_chart(title: Title, series: Sequence[Series], span: Span, *, limit: float | None = None) -> str:
    """Return areas on top of each other over steps: the mean of each stretch.

    Args:
        title: what stands above.
        series: the lowest area first.
        span: steps.
        limit: a level that cannot be exceeded, drawn as a line.
    """
    x_of, columns = _columns([each.envelope for each in series])
    tops = [[math.fsum(column[: number + 1]) for column in columns] for number in range(len(series))]
    highest = max((max(top, default=0.0) for top in tops), default=0.0)
    shown = [0.0, highest] + ([limit] if limit is not None and limit < 4 * highest else [])
    x, y = axis_of_steps(span.first, span.last), axis_of_values(shown, title.unit, from_zero=True)
    floors = [[0.0] * len(columns), *tops[:-1]] if tops else []
    drawn = [_area(x_of, floor, top, each.colour, x, y) for each, floor, top in zip(series, floors, tops, strict=True)]
    if limit is not None and limit <= y.high:
        drawn.append(f'<path class="limit" d="M0 {_down(y, limit)}H{_SIZE}"/>')
    data = {
        "x": [span.first, x.high],
        "y": [exact(y.low), exact(y.high), False],
        "unit": title.unit,
        "stack": True,
        "at": x_of,
        "series": [
            {"name": each.name, "colour": each.colour % COLOURS, "mean": [exact(column[number]) for column in columns]}
            for number, each in enumerate(series)
        ],
    }
    told = "; ".join(f"{each.name}: {_told(each.envelope, title.unit)}" for each in series)
    keys = [(each.name, each.colour, "", each.note) for each in reversed(series)]
    return _figure(title, _Drawing(x, y, "".join(drawn), "", told, span), legend(keys), data)


def share_bar(parts: Sequence[tuple[str, float, int, str]], unit: str) -> str:
    """Return one bar that is divided, with a legend that tells the shares.

    Args:
        parts: name, amount, colour and meaning of each.
        unit: of the amounts.
    """
    whole = math.fsum(max(amount, 0.0) for _, amount, _, _ in parts) or 1.0
    boxes, keys = [], []
    for name, amount, colour, note in parts:
        share = max(amount, 0.0) / whole
        text = f"{name}: {write(amount, unit)}, {share:.1%}"
        label = f"<b>{share:.0%}</b>" if share >= 0.06 else ""
        boxes.append(
            f'<span class="f{colour % COLOURS}" style="flex:{share:.5f}" data-tip="{escape(text)}">{label}</span>'
        )
        keys.append((name, colour, f"{write(amount, unit)} · {share:.1%}", note))
    told = escape("; ".join(f"{name}: {value}" for name, _, value, _ in keys))
    return f'<div class="share" role="img" aria-label="{told}">{"".join(boxes)}</div>{legend(keys)}'


@dataclass(frozen=True)
class _Drawing:
    x: Axis
    y: Axis
    paths: str
    dots: str
    told: str
    span: Span


def _figure(title: Title, drawing: _Drawing, keys: str, data: Mapping[str, Any]) -> str:
    x, y = drawing.x, drawing.y
    grid = "".join(f"M0 {_down(y, tick)}H{_SIZE}" for tick, _ in y.ticks)
    left = "".join(f'<span style="bottom:{y.place(tick):.2%}">{escape(text)}</span>' for tick, text in y.ticks)
    below = "".join(f'<span style="left:{x.place(tick):.2%}">{escape(text)}</span>' for tick, text in x.ticks)
    marks = "".join(
        f'<i class="mark" style="left:{x.place(step):.2%}" data-tip="{escape(text)}"></i>'
        for step, text in drawing.span.marks
        if x.low <= step <= x.high
    )
    width = max((len(text) for _, text in y.ticks), default=1)
    note = f'<p class="note">{escape(title.note)}</p>' if title.note else ""
    aside = f'<span class="aside">{escape(title.aside)}</span>' if title.aside else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title.text)}</b>{aside}</figcaption>{note}'
        f'<div class="plot" style="--ys:{width}ch"><div class="ys">{left}</div>'
        f'<div class="field" tabindex="0" role="img" aria-label="{escape(f"{title.text}. {drawing.told}")}">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" aria-hidden="true"><path class="grid" d="{grid}"/>'
        f"{drawing.paths}</svg>{drawing.dots}{marks}</div>"
        f'<div class="x">step</div><div class="xs">{below}</div></div>{keys}'
        f'<script type="application/json">{json_for_page(data)}</script></figure>'
    )


def json_for_page(data: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it can end that.

    Args:
        data: anything that JSON knows.
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def legend(keys: Iterable[tuple[str, int, str, str]]) -> str:
    """Return what colours stand for.

    Args:
        keys: name, colour, value and meaning of each; the last two may be empty.
    """
    items = []
    for name, colour, value, note in keys:
        tip = f' data-tip="{escape(note)}"' if note else ""
        told = f" <em>{escape(value)}</em>" if value else ""
        items.append(f'<li{tip}><i class="f{colour % COLOURS}"></i>{escape(name)}{told}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def _with_note(title: Title, note: str) -> Title:
    return Title(title.text, title.unit, f"{title.note}{note}".strip(), title.aside)


def _told(envelope: Envelope, unit: str) -> str:
    parts = []
    for word, found in (("lowest", envelope.lowest), ("highest", envelope.highest), ("last", envelope.last)):
        if found is not None:
            parts.append(f"{word} {write(found[1], unit)} at step {found[0]:,}")
    return ", ".join(parts) or "no numbers"


def _data_of_line(series: Series, stretches: Sequence[Stretch]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": series.name,
        "colour": series.colour % COLOURS,
        "at": [each.first for each in stretches],
        "mean": [exact(each.mean) for each in stretches],
    }
    if any(each.last > each.first for each in stretches):
        data["to"] = [each.last for each in stretches]
    if any(each.count > 1 for each in stretches):
        data["low"] = [exact(each.lowest) for each in stretches]
        data["high"] = [exact(each.highest) for each in stretches]
    return data


def _right(x: Axis, stretch: Stretch) -> str:
    return f"{x.place((stretch.first + stretch.last) / 2) * _SIZE:.0f}"


def _down(y: Axis, value: float) -> str:
    return f"{(1 - y.place(value)) * _SIZE:.0f}"


def _line(stretches: Sequence[Stretch], colour: int, x: Axis, y: Axis) -> str:
    path, is_down = [], False
    for stretch in stretches:
        if stretch.count:
            path.append(f"{'L' if is_down else 'M'}{_right(x, stretch)} {_down(y, stretch.mean)}")
        is_down = stretch.count > 0
    return f'<path class="line l{colour % COLOURS}" d="{"".join(path)}"/>'


def _band(stretches: Sequence[Stretch], colour: int, x: Axis, y: Axis) -> str:
    found = [each for each in stretches if each.count]
    if not any(each.highest > each.lowest for each in found):
        return ""
    there = [f"{_right(x, each)} {_down(y, each.highest)}" for each in found]
    back = [f"{_right(x, each)} {_down(y, each.lowest)}" for each in reversed(found)]
    return f'<path class="band f{colour % COLOURS}" d="M{"L".join([*there, *back])}Z"/>'


def _dots(stretches: Sequence[Stretch], colour: int, x: Axis, y: Axis) -> str:
    places = [(x.place((each.first + each.last) / 2), y.place(each.mean)) for each in stretches if each.count]
    return "".join(
        f'<i class="dot f{colour % COLOURS}" style="left:{right:.2%};bottom:{up:.2%}"></i>' for right, up in places
    )


def _columns(envelopes: Sequence[Envelope]) -> tuple[list[float], list[list[float]]]:
    """Return where there are values of any envelope, and the values of all at each such place."""
    means: list[dict[float, float]] = []
    for envelope in envelopes:
        means.append({(each.first + each.last) / 2: each.mean for each in envelope.stretches() if each.count})
    places = sorted({place for found in means for place in found})
    before = [0.0] * len(envelopes)
    columns = []
    for place in places:
        before = [found.get(place, old) for found, old in zip(means, before, strict=True)]
        columns.append(before)
    return places, columns


def _area(places: Sequence[float], floor: Sequence[float], top: Sequence[float], colour: int, x: Axis, y: Axis) -> str:
    if not places:
        return ""
    rights = [f"{x.place(place) * _SIZE:.0f}" for place in places]
    if len(places) == 1:  # a level that was measured once
        rights, floor, top = ["0", f"{_SIZE}"], [*floor, *floor], [*top, *top]
    there = [f"{right} {_down(y, value)}" for right, value in zip(rights, top, strict=True)]
    back = [f"{right} {_down(y, value)}" for right, value in zip(reversed(rights), reversed(floor), strict=True)]
    return f'<path class="area f{colour % COLOURS}" d="M{"L".join([*there, *back])}Z"/>'
