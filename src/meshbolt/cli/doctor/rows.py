"""What a check finds: rows with a colour, the value that was measured, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["green", "yellow", "red"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finding.

    Attributes:
        area: what it belongs to, such as "disk".
        name: what was looked at.
        status: green: as it should be; yellow: worth knowing; red: training fails, or will.
        value: what was found, for people.
        mend: what to do about it, for a red row a command.
        measured: numbers for programs; names carry units.
    """

    area: str
    name: str
    status: Status
    value: str
    mend: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """Something that is looked at.

    Attributes:
        area: of its rows.
        doing: in the words of a line of progress.
        find: returns the rows.
        is_long: whether it takes seconds.
    """

    area: str
    doing: str
    find: Callable[[], Sequence[Row]]
    is_long: bool = False


def run_checks(checks: Sequence[Check], *, before: Callable[[Check], None]) -> Iterator[Row]:
    """Yield the rows of all checks; one that fails by itself is a row, too.

    Args:
        checks: in their order.
        before: is told of each before it begins.
    """
    for check in checks:
        before(check)
        try:
            yield from check.find()
        except Exception as error:  # of whatever is broken here; the others are to be seen all the same
            yield Row(
                area=check.area,
                name=check.doing,
                status="yellow",
                value=f"could not be checked: {type(error).__name__}: {error}",
            )
