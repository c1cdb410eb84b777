"""`meshbolt report`: an HTML file about a run, from the records that it left."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from meshbolt.callbacks.console import print_table
from meshbolt.cli.commands import DONE, NO
from meshbolt.errors import ConfigError
from meshbolt.monitoring.records import DIRECTORY
from meshbolt.monitoring.report import Run, find_runs, summary_of, write_report
from meshbolt.monitoring.report.wording import format_date, format_duration

_FILE = "report.html"


def run(arguments: Sequence[str]) -> int:
    """Write the report of a run, and say where it is.

    Args:
        arguments: "report", then a directory and flags.

    Returns:
        1 where nothing was recorded.

    Raises:
        ConfigError: there is no such directory or run, or the file cannot be written.
    """
    options = _parser().parse_args(list(arguments[1:]))
    top = Path(options.directory)
    if not options.directory or not top.is_dir():
        raise ConfigError(
            f"{options.directory!r} is no directory. Give the one that a run wrote to, or one above it; `.` is this one."
        )
    runs = find_runs(top)
    if not runs:
        sys.stderr.write(
            f"meshbolt report: there are no records of a run in {top} or below: files rank_<rank>.jsonl. Add RunReport() to "
            "the callbacks of a Trainer to have them.\n"
        )
        return NO
    number = len(runs) if options.run is None else options.run
    if not 1 <= number <= len(runs):
        raise ConfigError(
            f"--run={number} is none of the {len(runs)} runs in {top}. Use 1 to {len(runs)}, the oldest first."
        )
    chosen = runs[number - 1]
    path = write_report(chosen, options.output or _place_of(chosen))
    if options.json:
        written = {"report": str(path), "run": number, "runs": len(runs), **summary_of(chosen)}
        sys.stdout.write(json.dumps(written, indent=2) + "\n")
        return DONE
    if len(runs) > 1:
        print_table("runs", columns=("run", "begun", "what", "steps", "time"), rows=_rows(runs))
    sys.stdout.write(f"report of run {number} of {len(runs)}: {path}\n")
    return DONE


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="meshbolt report",
        usage="meshbolt report DIRECTORY [--run N] [--output FILE] [--json]",
        description="Write a report of a run, as one HTML file that needs no network, from the records that its monitors left "
        "in a directory: also of a run that is under way, that failed, or that was killed. Restarts of a run belong to it.",
        epilog="example: meshbolt report lightning_logs/version_3",
    )
    parser.add_argument("directory", help="where the run wrote to, or a directory above")
    parser.add_argument(
        "--run", type=int | None, default=None, help="which of several, the oldest is 1; the last by default"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help=f"the file; {_FILE} beside the records by default"
    )
    parser.add_argument("--json", action="store_true", help="print the run's figures as JSON")
    return parser


def _place_of(chosen: Run) -> Path:
    directory = chosen.directory
    return (directory.parent if directory.name == DIRECTORY else directory) / _FILE


def _rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for number, each in enumerate(runs, start=1):
        seconds = sum(attempt.ended - attempt.begun for attempt in each.attempts)
        what = str(each.start.get("title") or each.directory)
        rows.append((f"{number}", format_date(each.begun), what, f"{each.last_step:,}", format_duration(seconds)))
    return rows
