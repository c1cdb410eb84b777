"""What commands print: JSON for programs, or a few lines and tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from meshbolt.callbacks.console import write_line
from meshbolt.checkpoint.formats import Conversion
from meshbolt.units import format_bytes


def tell_json(content: Any) -> None:
    """Print JSON."""
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def tell_conversion(done: Conversion, *, verb: str, as_json: bool) -> None:
    """Print what an export or import has done.

    Args:
        done: what it has done.
        verb: what it did, in the past.
        as_json: for a program.
    """
    if as_json:
        tell_json(dataclasses.asdict(done))
        return
    size = format_bytes(done.num_bytes)
    write_line(f"{verb} {short(done.source)} to {short(done.out)}: {done.format}, {done.num_tensors} tensors, {size}")
    for note in done.notes:
        write_line(f"note: {note}")


def short(path: str) -> str:
    """Return a path as a person in this directory would write it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) and path != str(here) else path
