"""What became of each rank of a `run_ranks` call, and the error that says so."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["returned", "raised", "died", "stuck", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one rank.

    Attributes:
        rank: The rank.
        kind: `returned` a value; `raised` an exception; `died` without a word (a signal, `os._exit`); `stuck` past the
            time limit and killed; `stopped`, that is killed because another rank had failed.
        seconds: When it was known, counted from the start of the call.
        value: What the function returned.
        error_types: Qualified names of the exception's class and of its bases, the class first.
        message: The exception's message, or one line on how the rank ended.
        exit_code: Exit code of a rank that died; negative for a signal.
        traceback: The traceback of a rank that raised, or the Python stacks of every thread of one that was killed.
        output: The last lines that a rank which said nothing else wrote to its standard output and error.
    """

    rank: int
    kind: Kind
    seconds: float = 0.0
    value: Any = None
    error_types: tuple[str, ...] = ()
    message: str = ""
    exit_code: int | None = None
    traceback: str = ""
    output: str = ""

    def raised(self, error: type[BaseException]) -> bool:
        """Return whether the rank raised `error` or a subclass of it."""
        return type_name(error) in self.error_types

    def headline(self) -> str:
        """Return one line: the rank, how it ended, and when."""
        what = f"{self.error_types[0].removeprefix('builtins.')}: {self.message}" if self.error_types else self.message
        return f"rank {self.rank} {self.kind} after {self.seconds:.1f} s{f' ({what})' if what else ''}"

    def report(self) -> str:
        """Return the headline, the traceback or stacks, and what the rank printed last."""
        printed = f"last output:\n{self.output}" if self.output else ""
        return "\n".join(part.rstrip() for part in (f"--- {self.headline()} ---", self.traceback, printed) if part)


class RankFailure(RuntimeError):  # noqa: N818 - it reports the failure of a rank; the rank's own error is inside
    """At least one rank did not return; the message has every failing rank, the first to fail on top.

    Attributes:
        outcomes: The outcome of every rank, by rank.
    """

    def __init__(self, outcomes: Sequence[Outcome], *, reason: str = "") -> None:
        """Keep the outcomes and make the message.

        Args:
            outcomes: The outcome of every rank, by rank.
            reason: What was expected instead; by default that every rank returns.
        """
        self.outcomes = tuple(outcomes)
        failed = sorted((one for one in self.outcomes if one.kind != "returned"), key=lambda one: one.seconds)
        head = reason or f"{len(failed)} of {len(self.outcomes)} ranks failed"
        calm = [one.headline() for one in self.outcomes if one.kind == "returned"]
        super().__init__("\n".join([head, *(one.report() for one in failed), *calm]))


def type_name(kind: type[BaseException]) -> str:
    """Return `module.qualname` of a class: how an exception's type travels between processes."""
    return f"{kind.__module__}.{kind.__qualname__}"


def exit_words(exit_code: int | None) -> str:
    """Return an exit code in words, signals by name.

    Example:
        >>> exit_words(-6)
        'killed by SIGABRT'
    """
    if exit_code is not None and exit_code < 0:
        try:
            return f"killed by {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"killed by signal {-exit_code}"
    return f"exit code {exit_code}"
