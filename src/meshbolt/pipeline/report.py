"""What is told of a module that was cut into stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshbolt.pipeline.picture import draw
from meshbolt.pipeline.plan import PipelinePlan
from meshbolt.pipeline.timeline import Timeline, plan_timeline


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """What a module's stages hold, what passes between them, and whether they compute what the whole module does.

    Attributes:
        plan: the stages.
        cuts: the modules with which stages 1, 2, ... begin.
        shares: of the forward pass's work, by stage; their sum is 1.
        num_parameters: that each stage holds, tied ones on each of their stages.
        compared_with: "the whole module", or "one stage" where a step draws random numbers.
        loss_difference: the largest between losses.
        gradient_difference: the largest between gradients, relative to the largest gradient of the parameter.
        tolerance: of both.
    """

    plan: PipelinePlan
    cuts: tuple[str, ...]
    shares: tuple[float, ...]
    num_parameters: tuple[int, ...]
    compared_with: str
    loss_difference: float
    gradient_difference: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Whether the stages compute what they were compared with."""
        return max(self.loss_difference, self.gradient_difference) <= self.tolerance

    def holds(self, stage: int) -> tuple[str, ...]:
        """Return the modules and single parameters that a stage holds, the largest that it holds whole.

        Args:
            stage: which one.
        """
        return tuple(_whole(self.plan.owned(stage), self.plan.stages_of))

    def timeline(self, schedule: str = "1f1b", *, microbatches: int, ranks: int | None = None) -> Timeline:
        """Return when each stage would compute which microbatch, by the work that was counted.

        Args:
            schedule: its name.
            microbatches: of a step.
            ranks: among which the stages are distributed; None: one each.

        Raises:
            ConfigError: the schedule does not fit the numbers.
        """
        return plan_timeline(schedule, self.shares, ranks=ranks or self.plan.stages, microbatches=microbatches)

    def draw(self, path: str | Path, schedule: str = "1f1b", *, microbatches: int, ranks: int | None = None) -> None:
        """Write the timeline of a schedule as a picture.

        Args:
            path: of the SVG file.
            schedule: its name.
            microbatches: of a step.
            ranks: among which the stages are distributed; None: one each.
        """
        Path(path).write_text(draw(self.timeline(schedule, microbatches=microbatches, ranks=ranks)), encoding="utf-8")

    def __str__(self) -> str:
        """Return it as a table, with a line for what each stage holds and for each tensor that passes a cut."""
        lines = [
            f"{self.plan.stages} stages, the slowest with {max(self.shares) * self.plan.stages:.2f} of the mean work"
        ]
        for stage, (share, count) in enumerate(zip(self.shares, self.num_parameters, strict=True)):
            begins = f"begins with {self.cuts[stage - 1]}" if stage else "begins with the step"
            lines.append(f"  stage {stage}: {share:6.1%} of the work, {count:,} parameters, {begins}")
            lines.append(f"    holds {', '.join(_joined(self.holds(stage))) or 'nothing'}")
            lines += [f"    sends {crossing}, {crossing.num_bytes:,} bytes" for crossing in self.plan.sent(stage)]
        for name, stages in self.plan.tied().items():
            lines.append(f"  {name} is held by stages {', '.join(map(str, stages))}, which add up its gradients")
        verdict = "equal" if self.is_equal else "NOT EQUAL"
        lines.append(
            f"{verdict} to {self.compared_with}: losses differ by {self.loss_difference:.1e}, gradients by "
            f"{self.gradient_difference:.1e} (at most {self.tolerance:.0e})"
        )
        if not self.is_equal:
            lines.append(
                "  what is read on one stage may be kept, counted or drawn on another one, in an attribute, a list or a generator"
            )
        return "\n".join(lines)


def _whole(owned: Iterable[str], every: Iterable[str]) -> Iterator[str]:
    """Return the shortest beginnings of names, up to a dot, under which all names are owned, in their order."""
    owned = frozenset(owned)
    below: dict[str, bool] = {}
    names = list(every)
    for name in names:
        for prefix in _beginnings(name):
            below[prefix] = below.get(prefix, True) and name in owned
    return iter(dict.fromkeys(next(p for p in _beginnings(name) if below[p]) for name in names if name in owned))


def _beginnings(name: str) -> list[str]:
    return list(itertools.accumulate(name.split("."), "{}.{}".format))


def _joined(names: Sequence[str]) -> list[str]:
    """Return names with those that differ by consecutive numbers at their ends as one: `blocks.0-2`."""
    joined: list[tuple[str, int, int] | str] = []
    for name in names:
        start, _, end = name.rpartition(".")
        before = joined[-1] if joined else None
        if not end.isdigit():
            joined.append(name)
        elif isinstance(before, tuple) and before[0] == start and before[2] + 1 == int(end):
            joined[-1] = start, before[1], int(end)
        else:
            joined.append((start, int(end), int(end)))
    return [each if isinstance(each, str) else _as_range(*each) for each in joined]


def _as_range(start: str, first: int, last: int) -> str:
    numbers = str(first) if first == last else f"{first}-{last}"
    return f"{start}.{numbers}" if start else numbers
