"""The page: what stands on it in which order, in one file that asks for no other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from meshbolt.errors import ConfigError
from meshbolt.monitoring.report import curves, sections
from meshbolt.monitoring.report.charts import Span
from meshbolt.monitoring.report.facts import facts_of, status_of
from meshbolt.monitoring.report.gather import Gathered, gather
from meshbolt.monitoring.report.runs import Run
from meshbolt.monitoring.report.tables import figure
from meshbolt.monitoring.report.wording import format_date
from meshbolt.version import __version__

_SECTIONS = ("throughput", "memory", "communication", "offload")
# Nothing is loaded from anywhere, and a name in a record that is code by accident or intent does not run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"
_STATUS = {
    "finished": ("good", "finished"),
    "failed": ("bad", "failed"),
    "interrupted": ("warn", "interrupted"),
    "open": ("warn", "no end recorded"),
}


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        key: its anchor.
        name: its heading.
        html: what is in it.
    """

    key: str
    name: str
    html: str


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        run: as `find_runs` returns it.
        path: of the file; its directory is made where it is not there.

    Returns:
        The path.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    text = page(gather(run))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise ConfigError(
            f"The report cannot be written to {path}: {error.strerror}. Give another path: --output FILE, or "
            "RunReport(path='...')."
        ) from error
    return path


def page(found: Gathered) -> str:
    """Return the page of a run.

    Args:
        found: of the run.
    """
    shown = [section for section in _sections(found) if section.html]
    links = "".join(f'<a href="#{section.key}">{escape(section.name)}</a>' for section in shown)
    body = "".join(
        f'<section id="{section.key}"><h2>{escape(section.name)}</h2>{section.html}</section>' for section in shown
    )
    title = str(found.run.start.get("title") or found.run.directory.parent.name or "run")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} – meshbolt</title><style>{_shipped('page.css')}</style></head><body>"
        f'{_header(found, title)}<nav aria-label="Sections">{links}</nav><main>{body}</main>{_footer(found)}'
        f'<div id="tip" role="status" hidden></div><script>{_shipped("page.js")}</script></body></html>\n'
    )


def _sections(found: Gathered) -> list[Section]:
    span = _span(found)
    names = (*found.measured, *found.texts, *found.named)
    kinds = {name.partition("/")[0] for name in names if "/" in name and name not in found.logged} - {*_SECTIONS}
    parts = [
        Section("training", "Training", curves.losses(found, span)),
        Section("time", "Time and speed", curves.times(found, span)),
        Section("memory", "Memory", curves.memory(found, span)),
        Section("communication", "Communication", sections.communication(found, span) if _has_ranks(found) else ""),
        Section("pipeline", "Pipeline", sections.pipeline(found) if _has(found, "pp") or found.pipeline else ""),
        Section("offload", "Offloading", sections.offload(found, span) if _offloads(found) else ""),
    ]
    parts += [Section(kind, kind.capitalize(), sections.others(found, span, [kind])) for kind in sorted(kinds)]
    return [
        *parts,
        Section("events", "Events", sections.events(found)),
        Section("settings", "Settings", sections.settings(found)),
        Section("environment", "Environment", sections.environment(found)),
    ]


def _header(found: Gathered, title: str) -> str:
    start, run = found.run.start, found.run
    status, _ = status_of(found)
    colour, word = _STATUS.get(status, ("warn", status))
    ranks = start.get("world_size") or len(found.ranks)
    words = [
        str(start.get("strategy") or ""),
        f"{ranks} rank{'' if ranks == 1 else 's'}" + (f" ({start['device']})" if start.get("device") else ""),
        f"precision {start['precision']}" if start.get("precision") else "",
        format_date(run.begun),
    ]
    line = "".join(f"<span>{escape(each)}</span>" for each in words if each)
    figures = "".join(figure(fact.name, fact.text, fact.note) for fact in facts_of(found))
    return (
        f'<header><p class="brand">meshbolt run report</p><h1>{escape(title)} <i class="chip {colour}">{escape(word)}</i></h1>'
        f'<p class="line">{line}</p>{sections.ended(found)}<div class="figures">{figures}</div></header>'
    )


def _footer(found: Gathered) -> str:
    run = found.run
    thinned = any(each.is_thinned for each in found.logged.values()) or any(
        curves.whole.is_thinned for curves in found.measured.values()
    )
    words = [
        f"{found.num_records:,} records from {run.directory}",
        f"last one {format_date(run.ended)}",
        f"meshbolt {__version__}",
    ]
    said = (
        "Lines are means of neighbouring steps; bands reach from the lowest to the highest value of these. "
        if thinned
        else ""
    )
    return f"<footer><p>{escape(said)}{escape(' · '.join(words))}</p></footer>"


def _span(found: Gathered) -> Span:
    envelopes = [*found.logged.values(), *(each.whole for each in found.measured.values())]
    steps = [step for each in envelopes for stretch in each.stretches() for step in (stretch.first, stretch.last)]
    marks = tuple(
        (attempt.first_step, f"restart from step {attempt.first_step:,}") for attempt in found.run.attempts[1:]
    )
    return Span(min(steps, default=0), max(steps, default=1), marks)


def _mesh(found: Gathered) -> Mapping[str, int]:
    mesh = found.run.start.get("mesh")
    return mesh if isinstance(mesh, Mapping) else {}


def _has(found: Gathered, axis: str) -> bool:
    return int(_mesh(found).get(axis, 1)) > 1


def _has_ranks(found: Gathered) -> bool:
    """Whether ranks could talk to each other; where nobody knows how many there were, they may have."""
    return int(found.run.start.get("world_size") or 2) > 1 or bool(found.communication)


def _offloads(found: Gathered) -> bool:
    return bool(found.run.start.get("offloads")) or bool(found.kind("offload"))


def _shipped(name: str) -> str:
    return files("meshbolt.monitoring.report").joinpath(name).read_text(encoding="utf-8")
