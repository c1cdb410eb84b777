"""What ranks have failed with, which of them was the first, and how that is said."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "\x1emeshbolt "
"""The beginning of a line in the output of a node that is for the launcher of several, not for people."""
_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank that has failed.

    Attributes:
        rank: its number; None where a whole host is gone.
        host: where it ran; empty for this machine.
        code: its exit code; below zero the signal that killed it, as `subprocess` has it.
        words: its traceback, or what is known instead.
        summary: the first line of its error.
        seconds: when, by the clock of its host.
        is_of_another: whether it only waited for another rank, which has failed.
    """

    rank: int | None
    host: str = ""
    code: int = 1
    words: str = ""
    summary: str = ""
    seconds: float = 0.0
    is_of_another: bool = False

    @property
    def exit_code(self) -> int:
        """The code that a shell would have for it."""
        return 128 - self.code if self.code < 0 else self.code

    @property
    def who(self) -> str:
        """The rank and its host in words."""
        where = f" on {self.host}" if self.host else ""
        return f"host {self.host}" if self.rank is None else f"rank {self.rank}{where}"

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)


def in_order(failures: Iterable[Failure]) -> list[Failure]:
    """Return failures, the cause of the others first.

    A rank that was killed says nothing, and those that waited for it meet errors of their own a moment later; one that says
    itself that another has failed is never the cause. Those that torch's launcher has ended thereafter are left out.

    Args:
        failures: of all ranks.
    """
    failures = list(failures)
    said = [each for each in failures if each.words or not _was_told_to_end(each)] or failures
    return sorted(said, key=lambda each: (each.is_of_another, each.code >= 0 or _was_told_to_end(each), each.seconds))


def _was_told_to_end(failure: Failure) -> bool:
    return -failure.code in (signal.SIGTERM, signal.SIGINT)


def read_error(file: Path) -> dict[str, Any]:
    """Return what a rank has recorded of its error: words, seconds and whether it is another's; empty where there is none.

    Args:
        file: as torch's launcher keeps it.
    """
    try:
        message = json.loads(file.read_text())["message"]
        extra = message["extraInfo"]
        return {
            "words": str(extra.get("py_callstack") or message["message"]).rstrip(),
            "summary": str(message["message"]).partition("\n")[0],
            "seconds": float(extra.get("seconds", extra["timestamp"])),
            "is_of_another": bool(extra.get("is_of_another", False)),
        }
    except (OSError, ValueError, KeyError, TypeError):  # none, or of a program that writes it in another way
        return {}


def describe(failures: Iterable[Failure]) -> str:
    """Return what has happened: the first failure with all of its words, a line for each of the others.

    Args:
        failures: in order.
    """
    first, *others = failures
    how = f"was killed by {_name_of(-first.code)}" if first.code < 0 else f"failed with exit code {first.code}"
    if first.rank is None:
        how = "is lost"
    lines = [f"{first.who} {how}, the first to fail:", *(f"  {line}" for line in _words_of(first).splitlines())]
    for other in others[:_SHOWN]:
        lines.append(f"{other.who}, later: {other.summary or _words_of(other).strip().splitlines()[-1].strip()}")
    if len(others) > _SHOWN:
        lines.append(f"and {len(others) - _SHOWN} ranks more")
    return "\n".join(lines)


def _words_of(failure: Failure) -> str:
    if failure.words:
        return failure.words
    if failure.code == -signal.SIGKILL:
        return "It could say nothing. Where nobody has killed it, the system has, for want of memory: `dmesg` says so."
    if failure.code < 0:
        return "It could say nothing. With PYTHONFAULTHANDLER=1 it shows where it was."
    return "It has raised nothing; its own output says why, if anything does."


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
