"""Sections that are curves: what the module logs, where time goes, memory, offloading, and whatever else is measured."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from meshbolt.monitoring.report.charts import Series, Span, Title, area_chart, line_chart, share_bar
from meshbolt.monitoring.report.envelope import Envelope
from meshbolt.monitoring.report.gather import Curves, Gathered
from meshbolt.monitoring.report.tables import missing, note, pairs, table
from meshbolt.monitoring.report.wording import meaning_of, unit_of, write

MOST_CHARTS = 48
MOST_LINES = 6
# Areas of single ranks: beyond, those with the most, the least and in the middle.
MOST_RANKS = 8

_STAGES = re.compile(r"^(train|training|val|valid|validation|test)([/_.])")
_ENDINGS = re.compile(r"[/_.](step|epoch)$")
_PARTS = ("compute", "exposed_communication", "optimizer", "offload_wait", "data_wait", "other")
# A part keeps its colour wherever it is drawn; "other" is grey.
_PART_COLOURS = {
    "compute": 0,
    "exposed_communication": 1,
    "optimizer": 2,
    "offload_wait": 3,
    "data_wait": 4,
    "other": 7,
}
_OWNERS = ("parameters", "gradients", "optimizer", "buffers", "gathered", "activations", "other")
_OWNER_COLOURS = {
    "parameters": 0,
    "gradients": 1,
    "optimizer": 2,
    "gathered": 3,
    "activations": 4,
    "buffers": 5,
    "other": 7,
}
_ENDS = re.compile(r"_(bytes(?=_per_second$)|bytes$|seconds$)")
_TIMES_OF_RANKS = {
    "own_seconds": "What each rank does by itself in a step",
    "data_seconds": "What each rank waits for data",
}
_MOST_NAMED = 8
_OVER_RANKS = re.compile(r"_(least|mean|most)_(bytes|rank)$|/peak_step$")
_CAPITALS = re.compile(r"\b(mfu|hfu|flops?|gpu|cpu|io)\b")


def losses(found: Gathered, span: Span) -> str:
    """Return the curves of what the module logs.

    Args:
        found: of the run.
        span: steps.
    """
    if not found.logged:
        return missing(
            "The module logged nothing that was recorded.", "RunReport()  # records what self.log() is given"
        )
    groups = defaultdict[str, list[str]](list)
    for name in found.logged:
        groups[_ENDINGS.sub("", _STAGES.sub("", name))].append(name)
    ordered = sorted(groups.items(), key=lambda item: ("loss" not in item[0], item[0]))
    charts = [
        line_chart(
            Title(names[0] if len(names) == 1 else group, aside=_aside(found, names)),
            [Series(name, found.logged[name], number) for number, name in enumerate(names[:MOST_LINES])],
            span,
            from_zero=False,
        )
        for group, unsorted in ordered[:MOST_CHARTS]
        for names in [sorted(unsorted, key=_training_first)]
    ]
    rest = [name for _, names in ordered[MOST_CHARTS:] for name in names]
    return cards(charts) + (_as_table(found.logged, rest) if rest else "")


def times(found: Gathered, span: Span) -> str:
    """Return where the time of steps goes, and the rates.

    Args:
        found: of the run.
        span: steps.
    """
    measured = found.kind("throughput")
    if not measured:
        return missing("Nobody measured how fast the run was.", "Trainer(callbacks=[RunReport(), ThroughputMonitor()])")
    parts = [(part, measured[name]) for part in _PARTS if (name := f"throughput/{part}_seconds") in measured]
    pieces = []
    if parts:
        pieces.append("<h3>Where a step's time goes</h3>")
        shares = [
            (_words(part), _mean(curves.whole), _PART_COLOURS[part], meaning_of(f"throughput/{part}_seconds"))
            for part, curves in parts
        ]
        pieces.append(share_bar(shares, "seconds"))
    stacked = [
        Series(_words(part), curves.whole, _PART_COLOURS[part], meaning_of(f"throughput/{part}_seconds"))
        for part, curves in parts
        if _highest(curves.whole) > 0
    ]
    charts = []
    if stacked:
        charts.append(area_chart(Title("Time of a step, by what it went to", "seconds"), stacked, span))
    charts += _step_times(measured, span)
    shown = {f"throughput/{part}_seconds" for part in _PARTS} | {
        f"throughput/{name}_seconds" for name in ("step", "step_p50", "step_p90", "step_max")
    }
    rest = {name: curves for name, curves in measured.items() if name not in shown}
    drawn = cards([*charts, *by_unit(rest, span)])
    return "".join(pieces) + over_ranks(measured) + drawn + _own_times(found) + texts(found, "throughput")


def memory(found: Gathered, span: Span) -> str:
    """Return who held memory, by rank.

    Args:
        found: of the run.
        span: steps.
    """
    measured = found.kind("memory")
    if not measured:
        return missing("Nobody measured memory.", "Trainer(callbacks=[RunReport(), MemoryMonitor()])")
    owners = [owner for owner in _OWNERS if f"memory/{owner}_bytes" in measured]
    ranks = sorted({rank for owner in owners for rank in measured[f"memory/{owner}_bytes"].ranks})
    charts = [_owners_of(rank, owners, measured, span) for rank in _some(ranks, owners, measured)]
    left_out = len(ranks) - len(charts)
    said = note(f"Of {len(ranks)} ranks, those with the most, the least and what is in the middle.") if left_out else ""
    shown = {f"memory/{owner}_bytes" for owner in (*owners, "peak", "limit")} if charts else set()
    # Of several ranks, bands show what these metrics are for loggers.
    rest = {name: each for name, each in measured.items() if name not in shown and not _OVER_RANKS.search(name)}
    return said + cards(charts) + _by_rank(measured) + cards(by_unit(rest, span)) + texts(found, "memory")


def by_unit(measured: Mapping[str, Curves], span: Span) -> list[str]:
    """Return charts of curves with one unit, a few in each.

    Args:
        measured: by name.
        span: steps.
    """
    units = defaultdict[tuple[str, str], list[str]](list)
    for name in measured:
        units[name.partition("/")[0], unit_of(name)].append(name)
    charts = []
    for (kind, unit), names in units.items():
        for begin in range(0, len(names), MOST_LINES):
            some = names[begin : begin + MOST_LINES]
            if len(some) == 1:
                charts += each_alone({some[0]: measured[some[0]]}, span)
                continue
            series = [
                Series(_short(name), measured[name].whole, number, meaning_of(name)) for number, name in enumerate(some)
            ]
            title = Title(f"{kind.capitalize()}: {_of_unit(unit)}", unit)
            charts.append(line_chart(title, series, span, from_zero=True))
    return charts


def each_alone(measured: Mapping[str, Curves], span: Span) -> list[str]:
    """Return a chart for each curve.

    Args:
        measured: by name.
        span: steps.
    """
    charts = []
    for number, (name, curves) in enumerate(measured.items()):
        unit, last = unit_of(name), curves.whole.last
        title = Title(_short(name), unit, meaning_of(name), f"last {write(last[1], unit)}" if last else "")
        charts.append(line_chart(title, [Series(name, curves.whole, number)], span, from_zero=True))
    return charts


def _step_times(measured: Mapping[str, Curves], span: Span) -> list[str]:
    names = [
        name
        for each in ("step", "step_p50", "step_p90", "step_max")
        if (name := f"throughput/{each}_seconds") in measured
    ]
    if not names:
        return []
    series = [Series(_short(name), measured[name].whole, number, meaning_of(name)) for number, name in enumerate(names)]
    return [line_chart(Title("Time of a step", "seconds", meaning_of(names[0])), series, span, from_zero=True)]


def _own_times(found: Gathered) -> str:
    """Return the mean times of each rank's own steps."""
    names = [name for name, ranks in found.own.items() if any(_highest(each) > 0 for each in ranks.values())]
    ranks = sorted({rank for name in names for rank in found.own[name]})
    if len(ranks) < 2:
        return ""
    rows = [
        [
            f"{rank}",
            *(write(_mean(found.own[name][rank]) if rank in found.own[name] else None, "seconds") for name in names),
        ]
        for rank in ranks
    ]
    heads = ["rank", *(_words(_ENDS.sub("", name)) for name in names)]
    return "<h3>Mean times of each rank</h3>" + table(heads, rows, numbers=range(1, len(heads)), name="times by rank")


def _owners_of(rank: int, owners: Sequence[str], measured: Mapping[str, Curves], span: Span) -> str:
    curves = {owner: measured[f"memory/{owner}_bytes"].ranks.get(rank) for owner in owners}
    series = [
        Series(_words(owner), envelope, _OWNER_COLOURS[owner], meaning_of(f"memory/{owner}_bytes"))
        for owner, envelope in curves.items()
        if envelope is not None and _highest(envelope) > 0
    ]
    limit = _of_rank(measured, "memory/limit_bytes", rank)
    peak = _of_rank(measured, "memory/peak_bytes", rank)
    aside = f"peak {write(peak, 'bytes')}" if peak is not None else ""
    words = f"Limit {write(limit, 'bytes')}." if limit is not None else ""
    return area_chart(Title(f"Rank {rank}", "bytes", words, aside), series, span, limit=limit)


def _some(ranks: Sequence[int], owners: Sequence[str], measured: Mapping[str, Curves]) -> list[int]:
    if len(ranks) <= MOST_RANKS:
        return list(ranks)

    def held(rank: int) -> float:
        return sum(
            _highest(envelope)
            for owner in owners
            if (envelope := measured[f"memory/{owner}_bytes"].ranks.get(rank)) is not None
        )

    return _spread(sorted(ranks, key=held))


def _by_rank(measured: Mapping[str, Curves]) -> str:
    """Return the most that each rank had of everything that is bytes."""
    names = [name for name in measured if name.endswith("_bytes") and not _OVER_RANKS.search(name)]
    names = [name for name in names if _highest(measured[name].whole) > 0]
    ranks = sorted({rank for name in names for rank in measured[name].ranks})
    if len(ranks) < 1 or not names:
        return ""
    rows = [[f"{rank}", *(write(_of_rank(measured, name, rank), "bytes") for name in names)] for rank in ranks]
    heads = ["rank", *(_short(name) for name in names)]
    return "<h3>The most of each rank</h3>" + table(heads, rows, numbers=range(1, len(heads)), name="memory by rank")


def _of_rank(measured: Mapping[str, Curves], name: str, rank: int) -> float | None:
    envelope = measured[name].ranks.get(rank) if name in measured else None
    return None if envelope is None or envelope.highest is None else envelope.highest[1]


def _as_table(envelopes: Mapping[str, Envelope], names: Iterable[str]) -> str:
    rows = []
    for name in names:
        each = envelopes[name]
        rows.append([name, *(write(found[1]) if found else "–" for found in (each.last, each.lowest, each.highest))])
    return "<h3>More metrics</h3>" + table(["name", "last", "lowest", "highest"], rows, numbers=(1, 2, 3))


def _aside(found: Gathered, names: Sequence[str]) -> str:
    last = found.logged[names[0]].last
    return f"last {write(last[1])}" if last else ""


def _training_first(name: str) -> tuple[bool, str]:
    return not name.startswith("train"), name


def texts(found: Gathered, kind: str) -> str:
    """Return the last text of each metric that is no number.

    Args:
        found: of the run.
        kind: of the metrics.
    """
    rows = [
        (_short(name), text, meaning_of(name)) for name, text in found.texts.items() if name.partition("/")[0] == kind
    ]
    rows += [
        (_short(name), _often(counts), meaning_of(name))
        for name, counts in found.named.items()
        if name.partition("/")[0] == kind and not _OVER_RANKS.search(name)
    ]
    return pairs(rows) if rows else ""


def of_ranks(found: Gathered, span: Span) -> list[str]:
    """Return charts with a line for each rank, where one of them has collected the times of all.

    Args:
        found: of the run.
        span: steps.
    """
    charts = []
    for name, ranks in found.of_ranks.items():
        kept = _spread([rank for _, rank in sorted((_mean(each), rank) for rank, each in ranks.items())])
        series = [Series(f"rank {rank}", ranks[rank], number) for number, rank in enumerate(kept)]
        words = f"{len(kept)} of {len(ranks)} ranks, from the fastest to the slowest." if len(kept) < len(ranks) else ""
        charts.append(line_chart(Title(_TIMES_OF_RANKS[name], "seconds", words), series, span, from_zero=True))
    return charts


def _often(counts: Counter[int]) -> str:
    whole = sum(counts.values())
    some = counts.most_common(_MOST_NAMED)
    rest = f", {len(counts) - len(some)} others" if len(counts) > len(some) else ""
    return ", ".join(f"rank {rank}: {count} of {whole}" for rank, count in some) + rest


def _spread(ranks: Sequence[int]) -> list[int]:
    """Return some of many ranks, the first and the last among them, in the order of their numbers."""
    if len(ranks) <= MOST_RANKS:
        return sorted(ranks)
    places = {round(number * (len(ranks) - 1) / (MOST_RANKS - 1)) for number in range(MOST_RANKS)}
    return sorted(ranks[place] for place in places)


def over_ranks(measured: Mapping[str, Curves]) -> str:
    """Return what lines and bands mean where several ranks measure the same; nothing where one does.

    Args:
        measured: by name.
    """
    ranks = max((len(each.ranks) for each in measured.values()), default=1)
    return note(f"Lines are means over {ranks} ranks, bands reach from the lowest to the highest.") if ranks > 1 else ""


def cards(charts: Sequence[str]) -> str:
    """Return charts beside each other, as many as there is room for.

    Args:
        charts: any number.
    """
    return f'<div class="cards">{"".join(charts)}</div>' if charts else ""


def _mean(envelope: Envelope) -> float:
    stretches = envelope.stretches()
    count = sum(each.count for each in stretches)
    return math.fsum(each.total for each in stretches) / count if count else 0.0


def _highest(envelope: Envelope) -> float:
    return envelope.highest[1] if envelope.highest is not None else 0.0


def _short(name: str) -> str:
    unit = unit_of(name)
    inner = name.partition("/")[2] or name
    if not unit:
        return inner
    return _CAPITALS.sub(lambda found: found[0].upper(), _words(_ENDS.sub("", inner)))


def _words(text: str) -> str:
    return text.replace("_", " ")


def _of_unit(unit: str) -> str:
    return {"bytes": "amounts", "bytes/s": "speeds", "seconds": "times", "fraction": "parts", "": "numbers"}.get(
        unit, unit
    )
