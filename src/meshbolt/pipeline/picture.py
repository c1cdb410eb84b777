"""Timelines as a picture: ranks from top to bottom, time from left to right."""

from __future__ import annotations

from collections.abc import Mapping

from meshbolt.pipeline.timeline import Span, Timeline

_WIDTH, _ROW, _GAP, _LEFT, _TOP, _BOTTOM = 1000, 36, 8, 70, 56, 24
# Work by hue, stages of a rank by lightness.
_HUES = {"F": 214, "B": 28, "I": 28, "W": 130}
_NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of parameters"}


def draw(timelines: Timeline | Mapping[str, Timeline]) -> str:
    """Return timelines as SVG, one below the other, in one unit of time.

    Args:
        timelines: of a step; several by what stands before their titles. The longest takes the whole width.
    """
    if isinstance(timelines, Timeline):
        timelines = {"": timelines}
    heights = [_TOP + each.ranks * (_ROW + _GAP) + _BOTTOM for each in timelines.values()]
    scale = _WIDTH / max(each.end for each in timelines.values())
    titles = [f"{name}{': ' if name else ''}{_title(each)}" for name, each in timelines.items()]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 16} {sum(heights)}" font-family="sans-serif">',
        f'<title>{"; ".join(titles)}</title><rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, timeline) in enumerate(zip(titles, timelines.values(), strict=True)):
        parts.append(f'<g transform="translate(0 {sum(heights[:number])})">')
        parts += [*_panel(title, timeline, scale), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _title(timeline: Timeline) -> str:
    return (
        f"{timeline.schedule}: {timeline.stages} stages on {timeline.ranks} ranks, {timeline.microbatches} microbatches, "
        f"bubble {timeline.bubble:.1%}"
    )


def _panel(title: str, timeline: Timeline, scale: float) -> list[str]:
    parts = [f'<text x="{_LEFT}" y="22" font-size="16">{title}</text>']
    for rank in range(timeline.ranks):
        y = _TOP + rank * (_ROW + _GAP)
        parts.append(f'<text x="8" y="{y + _ROW / 2 + 5}" font-size="14">rank {rank}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{timeline.end * scale:.2f}" height="{_ROW}" fill="#f1f1f1"/>')
    parts += [_box(span, timeline, scale) for span in timeline.spans if span.end > span.start]
    return [*parts, *_legend(timeline)]


def _box(span: Span, timeline: Timeline, scale: float) -> str:
    x, width = _LEFT + span.start * scale, (span.end - span.start) * scale
    y = _TOP + span.rank * (_ROW + _GAP)
    told = f"stage {span.stage}, microbatch {span.microbatch}: {_NAMES[span.work]}"
    box = (
        f'<g><title>{told}</title><rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW}" stroke="white" '
        f'fill="{_colour(span.work, span.stage // timeline.ranks)}"/>'
    )
    label = f'<text x="{x + width / 2:.2f}" y="{y + _ROW / 2 + 4}" font-size="12" text-anchor="middle">{span.microbatch}</text>'
    return box + (label if width > 14 else "") + "</g>"


def _legend(timeline: Timeline) -> list[str]:
    kinds = sorted({(span.work, span.stage // timeline.ranks) for span in timeline.spans if span.end > span.start})
    parts = []
    for at, (work, turn) in enumerate(kinds):
        x = _LEFT + at * 190
        which = "" if timeline.stages == timeline.ranks else f", {'first' if turn == 0 else 'later'} stages"
        parts.append(f'<rect x="{x}" y="32" width="12" height="12" fill="{_colour(work, turn)}"/>')
        parts.append(f'<text x="{x + 18}" y="43" font-size="12">{_NAMES[work]}{which}</text>')
    return parts


def _colour(work: str, turn: int) -> str:
    return f"hsl({_HUES[work]}, 70%, {max(60, 82 - 12 * turn)}%)"
