"""Run one stage's part of a step: the user's own step, entered at the stage's first unit and left after its last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from meshbolt.compat import NeedsValues, TorchFunctionMode, tree_leaves, tree_map_only
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.calls import Calls, Proceed
from meshbolt.pipeline.held import HeldElsewhereError
from meshbolt.pipeline.plan import Call, Crossing, PipelinePlan
from meshbolt.pipeline.strayed import never_called, never_came, refuse_strayed, returned_foreign, went_on
from meshbolt.pipeline.streams import DrawByNumber, stream, stream_seed
from meshbolt.pipeline.taint import buffers_apart, is_foreign


class StageDone(BaseException):
    """Ends a step at the cut behind a stage. Not an `Exception`, so that the user's code does not take it for one."""

    def __init__(self, sent: list[torch.Tensor]) -> None:
        """Keep what is to be sent."""
        super().__init__()
        self.sent = sent


def run_stage(
    calls: Calls,
    plan: PipelinePlan,
    step: Callable[[], Any],
    *,
    stage: int,
    received: Sequence[torch.Tensor] = (),
    seed: int = 0,
    microbatch: int = 0,
    device: torch.device,
    leaving: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ran: set[Call] | None = None,
) -> tuple[list[torch.Tensor], Any]:
    """Run one microbatch through a stage.

    Args:
        calls: of the module's units.
        plan: for this microbatch's signature.
        step: runs the microbatch from its inputs to the loss; parameters of other stages are foreign.
        stage: which part of it.
        received: what the stage before has sent, in the order of the plan.
        seed: of the step, for random numbers.
        microbatch: its number in the step.
        device: where the module computes.
        leaving: returns what leaves the stage as the next one takes it.
        ran: the calls that earlier stages have run for this microbatch on the same modules; None: as `calls` knows.

    Returns:
        What is to be sent to the next stage, and on the last one what the step has returned.

    Raises:
        UnsupportedError: the step does something else than it did when it was looked at.
    """
    outer = stream_seed(seed, microbatch)
    with torch.enable_grad():  # a module may change what it gets, which is no leaf in one process
        received = [_Leave.apply(tensor) if tensor.requires_grad else tensor for tensor in received]  # type: ignore[no-untyped-call]
    drawn = DrawByNumber(outer, device=device) if plan.draws_beside else None
    run = _Stage(
        calls,
        plan,
        stage,
        received,
        draw=lambda call: stream(stream_seed(seed, microbatch, call), device=device),
        drawn=drawn,
        ran=calls.ran_before(stage=stage, microbatch=microbatch) if ran is None else ran,
    )
    run.leaving = leaving
    read = _ReadReceived(run) if plan.reads_beside[stage] else contextlib.nullcontext()
    with stream(outer, device=device, python_too=True):
        try:
            with read, drawn or contextlib.nullcontext():
                result = calls.run(step, run)
        except StageDone as done:
            return done.sent, None
    run.check_result(result)
    return [], result


class _Stage:
    """Is asked at every call of a unit while a stage runs."""

    def __init__(
        self,
        calls: Calls,
        plan: PipelinePlan,
        stage: int,
        received: Sequence[torch.Tensor],
        *,
        draw: Callable[[Call], contextlib.AbstractContextManager[None]],
        drawn: DrawByNumber | None,
        ran: set[Call],
    ) -> None:
        self._calls, self._plan, self._stage, self._draw, self._drawn = calls, plan, stage, draw, drawn
        self._ran = ran
        self.leaving: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
        self._entry = plan.cuts[stage - 1] if stage > 0 else None
        self._exit = plan.cuts[stage] if stage < len(plan.cuts) else None
        self._received = list(zip(plan.received(stage), received, strict=True))
        self._to_send = {each.output for each in plan.sent(stage)}
        self._by_output = {each.output: tensor for each, tensor in self._received if each.output is not None}
        # By identity of the tensor without values which the code around the units holds in the place of a received one.
        self._real: dict[int, torch.Tensor] = {}
        self._held: list[Any] = []
        self._returned: dict[Call, Any] = {}
        self.is_inside, self.in_unit = stage == 0, False
        self._has_ended = False

    def called(self, call: Call, module: nn.Module, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        """Leave out what belongs to earlier stages, run what belongs to this one, and end before the next."""
        if call == self._exit:
            self._has_ended = True
            raise StageDone([self._leaving(each, args, kwargs) for each in self._plan.sent(self._stage)])
        if call == self._entry:
            self._enter(args, kwargs)
        if call.unit in self._calls.around:
            return proceed(*args, **kwargs)
        if not self.is_inside:
            return self._without(call, module, proceed, args, kwargs)
        refuse_strayed(call, module, self._plan, stage=self._stage, has_ended=self._has_ended)
        if _may_hold_foreign(args) or _may_hold_foreign(kwargs):
            args, kwargs = tree_map_only(torch.Tensor, lambda leaf: self.real(leaf, call), (args, kwargs))
        self._ran.add(call)
        self._set_in_unit(True)
        try:
            with self._draw(call):
                result = proceed(*args, **kwargs)
        finally:
            self._set_in_unit(False)
        self._keep(call, result)
        return result

    def real(self, leaf: torch.Tensor, reader: object) -> torch.Tensor:
        """Return what stands behind a tensor that code of this stage reads.

        Raises:
            UnsupportedError: another stage has it, and has not sent it.
        """
        if not is_foreign(leaf):
            return leaf
        if id(leaf) not in self._real:
            raise UnsupportedError(
                f"On stage {self._stage}, {reader} reads a tensor of {list(leaf.shape)} that another stage holds and has not "
                "sent: the step did not read it there when it was looked at. What a step computes may not depend on what only "
                "some stages know, nor on how often it ran."
            )
        return self._real[id(leaf)]

    def _set_in_unit(self, value: bool) -> None:
        self.in_unit = value
        if self._drawn is not None:
            self._drawn.is_in_unit = value

    def _enter(self, args: Any, kwargs: Any) -> None:
        leaves = tree_leaves((args, kwargs))
        # What it can compute by itself, from parameters that several stages hold, is no tensor without values.
        shapes = [each.shape for each, _ in self._received if each.argument is not None]
        places = [each.argument for each, _ in self._received if each.argument is not None]
        same = len(leaves) == self._plan.leaves[self._stage - 1]
        if not same or [tuple(getattr(leaves[place], "shape", ())) for place in places] != shapes:
            raise UnsupportedError(
                f"On stage {self._stage}, {self._entry} is called with other arguments than when the step was looked at: an "
                "earlier layer has put something into a list or dictionary that it was called with, and this rank does not run "
                "it. Let layers return what they make."
            )
        for crossing, tensor in self._received:
            if crossing.argument is not None:
                self._stand_in(leaves[crossing.argument], tensor)
            if crossing.output is not None:
                call, index = crossing.output
                self._stand_in(tree_leaves(self._returned.get(call, self._plan.stubs[call]))[index], tensor)
        self.is_inside = True

    def _stand_in(self, foreign: Any, tensor: torch.Tensor) -> None:
        self._real[id(foreign)] = tensor
        self._held.append(foreign)

    def _without(self, call: Call, module: nn.Module, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        if call not in self._plan.stubs:
            raise never_called(call)
        children = self._calls.inside.get(call.unit)
        # A unit without parameters is cheap; for another somebody may wait for what goes on inside, or it returns a value that
        # does not depend on parameters, which is another one in each step.
        if children is None or self._calls.is_replicated(call.unit):
            return self._run_without_values(call, proceed, args, kwargs)
        if any(map(self._calls.is_awaited, children)):
            return self._run_without_values(call, proceed, args, kwargs)
        if any(isinstance(leaf, torch.Tensor) and not is_foreign(leaf) for leaf in tree_leaves(self._plan.stubs[call])):
            return self._run_without_values(call, proceed, args, kwargs)
        return self._plan.stubs[call]

    def _run_without_values(self, call: Call, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        """Run a unit of an earlier stage for what it does beside; what needs values returns what it did when looked at."""
        # An earlier stage of this process has updated what the unit keeps of this microbatch, such as running statistics.
        keeps = buffers_apart(self._calls.units[call.unit]) if call in self._ran else contextlib.nullcontext()
        self._ran.add(call)
        self._set_in_unit(True)
        try:
            with self._draw(call), keeps:
                result = proceed(*args, **kwargs)
        except (*NeedsValues, HeldElsewhereError):
            result = self._plan.stubs[call]
        finally:
            self._set_in_unit(False)
        self._returned[call] = result
        return result

    def _keep(self, call: Call, result: Any) -> None:
        if any(output is not None and output[0] == call for output in self._to_send):
            self._by_output.update({(call, index): leaf for index, leaf in enumerate(tree_leaves(result))})

    def _leaving(self, crossing: Crossing, args: Any, kwargs: Any) -> torch.Tensor:
        if crossing.argument is not None:
            leaf = tree_leaves((args, kwargs))[crossing.argument]
            leaf = self._real.get(id(leaf), leaf)
        else:
            leaf = self._by_output.get(crossing.output) if crossing.output else None
        if isinstance(leaf, torch.Tensor) and not is_foreign(leaf):
            leaf = self.leaving(leaf)
        found = f"{list(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else f"{leaf!r}"
        if not isinstance(leaf, torch.Tensor) or is_foreign(leaf):
            raise UnsupportedError(
                f"Stage {self._stage} has no {crossing} to send to {self._exit}: it found {found}, which depends on another "
                "stage in a way that was not there when the step was looked at."
            )
        # Where parameters are gathered in 16 bits, values are of fewer bits than when it was looked at, with whole parameters.
        keeps_bits = torch.promote_types(leaf.dtype, crossing.dtype) == crossing.dtype
        if tuple(leaf.shape) != crossing.shape or not keeps_bits:
            raise UnsupportedError(
                f"Stage {self._stage} was to send {crossing} to {self._exit}, and it has {found}. The size of what passes a cut "
                "may depend on sizes of the batch, not on values."
            )
        if leaf.requires_grad and not crossing.requires_grad:
            raise UnsupportedError(
                f"Stage {self._stage} sends {crossing} to {self._exit}, for which a gradient has to come back, and the step was "
                "looked at as if none had. Let requires_grad not depend on values."
            )
        return left_stage(leaf)

    def check_result(self, result: Any) -> None:
        """Refuse what a step has returned if it is not of this stage.

        Raises:
            UnsupportedError: it depends on other stages, or the step has swallowed the end of a stage.
        """
        if self._exit is not None:
            raise went_on(self._stage) if self._has_ended else never_came(self._stage, self._exit)
        if (error := returned_foreign(result)) is not None:
            raise error


def left_stage(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it leaves a stage: another one of the same values, which is neither a view nor a leaf."""
    with torch.enable_grad():
        left: torch.Tensor = _Leave.apply(tensor)  # type: ignore[no-untyped-call]
    return left


def _may_hold_foreign(value: Any) -> bool:
    """Return whether a value is, or may hold, a tensor without values: sooner known than with torch's general trees."""
    if isinstance(value, torch.Tensor):
        return is_foreign(value)
    if isinstance(value, dict):
        return any(map(_may_hold_foreign, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_may_hold_foreign, value))
    return not isinstance(value, (str, int, float, type(None)))


class _ReadReceived(TorchFunctionMode):
    """Gives functions that the code outside of units calls what was received, where it holds a tensor without values."""

    def __init__(self, run: _Stage) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        kwargs = kwargs or {}
        if self._run.is_inside and not self._run.in_unit:
            known = self._run._real
            args, kwargs = tree_map_only(torch.Tensor, lambda leaf: known.get(id(leaf), leaf), (args, kwargs))
        return func(*args, **kwargs)


class _Leave(torch.autograd.Function):
    """The identity, whose result is neither a view nor a leaf, and lies in memory as it is sent."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as another one of the same memory, where that is contiguous."""
        return tensor.detach().contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        return gradient
