"""Which rank keeps the others waiting, from what each says of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshbolt.compat import Collective
from meshbolt.monitoring.stacks import ThreadStack
from meshbolt.units import format_seconds


@dataclass(frozen=True)
class Report:
    """What a rank says of itself when it is asked.

    Attributes:
        rank: in the world.
        host: the machine it is on.
        pid: its process there.
        mark: how many marks it has passed; equal marks are the same point of the run on all ranks.
        doing: since the last one, such as "a training step".
        step: of the optimizer.
        seconds: how long that is.
        patience_seconds: how long it may be.
        stacks: of its threads, the main one first.
        collectives: what it does in each group, the latest first.
    """

    rank: int
    host: str
    pid: int
    mark: int
    doing: str
    step: int
    seconds: float
    patience_seconds: float
    stacks: tuple[ThreadStack, ...] = ()
    collectives: tuple[Collective, ...] = ()

    @property
    def is_late(self) -> bool:
        """Whether it is longer than it may be."""
        return self.seconds > self.patience_seconds

    @property
    def place(self) -> str:
        """Where its main thread is, in the user's code if it can be told."""
        return self.stacks[0].place if self.stacks else ""

    @property
    def waits(self) -> bool:
        """Whether its main thread is in code that exchanges between ranks."""
        return bool(self.stacks) and self.stacks[0].waits

    @property
    def waits_in(self) -> Collective | None:
        """The collective that it waits in, if it does."""
        return next((each for each in self.collectives if not each.is_done), None)


@dataclass(frozen=True)
class Verdict:
    """Who is at fault.

    Attributes:
        culprits: their ranks; all where nothing tells them apart.
        why: a sentence about them.
    """

    culprits: tuple[int, ...]
    why: str


def judge(reports: Sequence[Report], missing: Mapping[int, str]) -> Verdict:
    """Return who keeps the others waiting.

    Args:
        reports: of the ranks that have answered.
        missing: why each of the others has not.
    """
    if missing:
        why = "; ".join(f"rank {rank} {reason}" for rank, reason in sorted(missing.items()))
        return Verdict(tuple(sorted(missing)), why)
    absent = _absent(reports)
    if absent and len(absent) < len(reports):
        return Verdict(tuple(sorted(absent)), _why_absent(reports, absent))
    if absent:
        return _crossed(reports)
    for late in (_behind(reports), [report for report in reports if not report.waits]):
        if 0 < len(late) < len(reports):
            why = f"{_named(late)} not got as far as the others: in {late[0].doing}, {_places(late)}"
            return Verdict(_ranks(late), why)
    return Verdict(_ranks(reports), f"nothing tells the ranks apart: all are in {reports[0].doing}, {_places(reports)}")


def _behind(reports: Sequence[Report]) -> list[Report]:
    first = min((report.mark for report in reports), default=0)
    return [report for report in reports if report.mark == first]


def _absent(reports: Sequence[Report]) -> dict[int, Collective]:
    """Return the ranks that have not begun a collective in which another one waits, and that collective."""
    begun = {(report.rank, each.group): each.last_number for report in reports for each in report.collectives}
    absent: dict[int, Collective] = {}
    for report in reports:
        for waited in report.collectives:
            late = [] if waited.is_done else waited.ranks
            for rank in late:
                if begun.get((rank, waited.group), 0) < waited.number:
                    absent.setdefault(rank, waited)
    return absent


def _why_absent(reports: Sequence[Report], absent: Mapping[int, Collective]) -> str:
    culprits = [report for report in reports if report.rank in absent]
    waited = next(iter(absent.values()))
    waiting = [report.rank for report in reports if report.rank not in absent]
    verb = "waits" if len(waiting) == 1 else "wait"
    return f"{_named(culprits)} not come to {described(waited)}, in which {_list(waiting)} {verb}: {_places(culprits)}"


def _crossed(reports: Sequence[Report]) -> Verdict:
    """Return who has skipped a collective, where each rank waits for another one in a collective of its own.

    That is who has gone further than one that still waits, or else who waits in another collective than most.
    """
    behind = _behind(reports)
    ahead = [report for report in reports if report not in behind]
    kinds = Counter(_kind(report) for report in reports)
    most, count = kinds.most_common(1)[0]
    few = [report for report in reports if _kind(report) != most] if count > len(reports) / 2 else list(reports)
    waits = "; ".join(
        f"rank {report.rank} in {described(report.waits_in) if report.waits_in else 'none'}"
        f"{f' at {report.place}' if report.place else ''}"
        for report in reports
    )
    culprits = ahead or few
    who = "" if len(culprits) == len(reports) else f", it seems by {_list(_ranks(culprits))}"
    why = f"the ranks wait for each other in different collectives, so that one was skipped{who}: {waits}"
    return Verdict(_ranks(culprits), why)


def _kind(report: Report) -> tuple[str, int, str] | None:
    each = report.waits_in
    return None if each is None else (each.group, each.number, each.name)


def described(collective: Collective) -> str:
    """Return a collective in words."""
    return f"{collective.name} (number {collective.number} of {collective.about})"


def report_lines(reports: Sequence[Report], missing: Mapping[int, str]) -> Iterator[str]:
    """Yield the lines of a table of all ranks, and all of their stacks; equal ones once.

    Args:
        reports: of the ranks that have answered.
        missing: why each of the others has not.
    """
    for report in reports:
        yield (
            f"  rank {report.rank} ({report.host}, process {report.pid}): step {report.step}, in {report.doing} for "
            f"{format_seconds(report.seconds)}; {_exchange(report)}"
        )
    yield from (f"  rank {rank}: {reason}" for rank, reason in sorted(missing.items()))
    alike: dict[tuple[ThreadStack, ...], list[int]] = {}
    for report in reports:
        alike.setdefault(report.stacks, []).append(report.rank)
    for stacks, ranks in alike.items():
        yield f"stacks of {_list(ranks)}, the innermost call last:"
        for stack in stacks:
            yield f"  {stack.name}:"
            yield from (f"  {line}" for line in stack.lines)


def _exchange(report: Report) -> str:
    if report.waits_in is not None:
        return f"waits in {described(report.waits_in)}"
    return (
        f"last collective: {described(report.collectives[0])}, done"
        if report.collectives
        else "no collective is recorded"
    )


def _ranks(reports: Sequence[Report]) -> tuple[int, ...]:
    return tuple(sorted(report.rank for report in reports))


def _named(reports: Sequence[Report]) -> str:
    if len(reports) > 1:
        return f"{_list(_ranks(reports))} have"
    return f"rank {reports[0].rank} ({reports[0].host}, process {reports[0].pid}) has"


def _list(ranks: Sequence[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, sorted(ranks)))}"


def _places(reports: Sequence[Report]) -> str:
    places = {report.place for report in reports if report.place}
    return "; ".join(sorted(places)) or "in a library"
