"""What is known of a pipeline before it runs: where each stage begins, what passes between them, who holds which parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.cost import Cost


class CutError(UnsupportedError):
    """A step cannot be cut at one of the places where it was to be."""

    def __init__(self, cut: str, message: str) -> None:
        """Make the error.

        Args:
            cut: the module that was to begin a stage.
            message: why it cannot.
        """
        super().__init__(message)
        self.cut = cut


@dataclass(frozen=True)
class Call:
    """One call of a unit in a step.

    Attributes:
        unit: name of the module.
        number: of the call of this unit in the step, from 0.
    """

    unit: str
    number: int = 0

    def __str__(self) -> str:
        """Return it as a reader names it."""
        return self.unit if self.number == 0 else f"{self.unit} (call {self.number + 1})"


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A tensor that one stage hands to the next.

    Attributes:
        shape: of one microbatch.
        dtype: of its values.
        requires_grad: whether a gradient comes back for it.
        argument: which tensor among the arguments of the cut module it is; None if it passes beside it.
        output: the call that has returned it and which tensor of what was returned; None if no unit has.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    argument: int | None = None
    output: tuple[Call, int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        """Return what it is, and how large."""
        what = f"argument {self.argument}" if self.output is None else f"output of {self.output[0]}"
        return f"{what}: {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """How a step is cut, for one signature of microbatches.

    Attributes:
        cuts: the calls with which stages 1, 2, ... begin.
        crossings: what passes each cut, in the order in which it is sent.
        stages_of: the stages that use a parameter, by every name of it; a parameter of several is tied over stages.
        stages_of_units: the stage that calls a unit first, by its name.
        before: how much work lies before each call of a unit, in their order; only where it was counted.
        stubs: what each call of a unit returns, with tensors without values.
        reads_beside: whether a stage's code outside of units reads what it was sent.
        draws_beside: whether code outside of units draws random numbers for values that only one stage has.
        leaves: how many leaves the arguments of each cut have.
        ended_by: the error with which the step ended when it was looked at, after the last cut; empty if it did not.
    """

    cuts: tuple[Call, ...]
    crossings: tuple[tuple[Crossing, ...], ...]
    stages_of: Mapping[str, tuple[int, ...]]
    stages_of_units: Mapping[str, int] = field(repr=False)
    before: Mapping[Call, Cost] = field(repr=False)
    stubs: Mapping[Call, Any] = field(repr=False)
    reads_beside: tuple[bool, ...]
    draws_beside: bool
    leaves: tuple[int, ...]
    ended_by: str

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.cuts) + 1

    def received(self, stage: int) -> tuple[Crossing, ...]:
        """Return what a stage gets from the one before it."""
        return self.crossings[stage - 1] if stage > 0 else ()

    def sent(self, stage: int) -> tuple[Crossing, ...]:
        """Return what a stage hands to the one after it."""
        return self.crossings[stage] if stage < len(self.cuts) else ()

    def owned(self, stage: int) -> frozenset[str]:
        """Return the names of the parameters that a stage holds."""
        return frozenset(name for name, stages in self.stages_of.items() if stage in stages)

    def form_of(self, stage: int) -> tuple[Any, ...]:
        """Return what tells graphs of a stage apart, whatever the sizes of the microbatches."""
        passing = (*self.received(stage), *self.sent(stage))
        return tuple((each.dtype, each.requires_grad, each.argument, each.output) for each in passing)

    def tied(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters that several stages hold, whose gradients are added up."""
        return {name: stages for name, stages in self.stages_of.items() if len(stages) > 1}


def plan_of_layers(cuts: Sequence[str], stages_of: Mapping[str, tuple[int, ...]]) -> PipelinePlan:
    """Return a plan for which nothing had to be looked at: of a module that knows which of its layers are on which stage.

    What passes between stages is found out with the first microbatch.

    Args:
        cuts: names of the modules with which stages 1, 2, ... begin.
        stages_of: the stages that use a parameter, by every name of it.
    """
    units: dict[str, int] = {}
    for name, stages in stages_of.items():
        unit = name.partition(".")[0]
        units[unit] = min(units.get(unit, stages[0]), *stages)
    return PipelinePlan(
        cuts=tuple(map(Call, cuts)),
        crossings=((),) * len(cuts),
        stages_of=dict(stages_of),
        stages_of_units=units,
        before={},
        stubs={},
        reads_beside=(False,) * (len(cuts) + 1),
        draws_beside=False,
        leaves=(0,) * len(cuts),
        ended_by="",
    )
