"""Find out how a step is cut, by running it once on tensors without values.

Every parameter is foreign for that run, so that whatever depends on one is marked wherever it goes. A stage begins when its
cut is called. What was made before that and is read after it crosses the cut: an argument of the cut module, or what a unit has
returned earlier. A value that is neither has no name by which a stage could be told to keep it, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshbolt.blocks import attributes_restored
from meshbolt.compat import TorchFunctionMode, tree_leaves, tree_map_only
from meshbolt.errors import MeshboltError, UnsupportedError
from meshbolt.pipeline.calls import Calls, Proceed
from meshbolt.pipeline.cost import Cost, CountCost
from meshbolt.pipeline.plan import Call, Crossing, CutError, PipelinePlan
from meshbolt.pipeline.streams import stream
from meshbolt.pipeline.taint import Foreign, Gathered, buffers_apart, foreign_parameters, is_foreign, plain_parameters
from meshbolt.pipeline.unknown import unknown_outputs_assumed


@dataclass
class _Seen:
    """A foreign tensor of the run.

    Attributes:
        tensor: itself, which is kept so that no other takes its identity.
        region: the stage that has made it.
        maker: what has.
        output: by which a stage finds it.
        arguments: as which argument of a cut it was given, by the number of the cut.
        read: the last stage that reads it.
        read_beside: the stages whose code outside of units reads it.
    """

    tensor: torch.Tensor
    region: int
    maker: str
    output: tuple[Call, int] | None = None
    arguments: dict[int, int] = field(default_factory=dict)
    read: int = -1
    read_beside: set[int] = field(default_factory=set)


def analyse(
    module: nn.Module,
    calls: Calls,
    step: Callable[[], Any],
    *,
    device: torch.device,
    cost: CountCost | None = None,
    gathered: Gathered | None = None,
) -> PipelinePlan:
    """Return how a step is cut.

    Args:
        module: the user's, whole or on meta; it is left as it was.
        calls: of its units.
        step: runs one microbatch, from its inputs to the loss.
        device: where the module computes.
        cost: counts the work, which takes a while.
        gathered: in which dtypes it computes; None: in those that are stored.

    Raises:
        CutError: the step cannot be cut at one of the cuts; the message names the value.
        UnsupportedError: the step cannot be cut anywhere.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in calls.replicated]
    gathered = gathered or Gathered()
    with stream(0, device=device, python_too=True), buffers_apart(module, device=device) as buffers:
        mode = Foreign(may_change=buffers.values())
        # Attributes come back first: recurrent layers note their parameters in one of theirs.
        with (
            foreign_parameters(module, names, mode, device=device, dtypes=gathered.parameters),
            plain_parameters(module, calls.replicated, device=device),
            attributes_restored(module),
        ):
            run = _Run(module, calls, cost, gathered.inputs)
            mode.on_draw = run.note_draw
            with cost or nullcontext(), unknown_outputs_assumed(run.is_in_unit, run.use), run:
                run.finish(lambda: calls.run(step, run))
    return run.plan()


class _Run(TorchFunctionMode):
    """Notes what a run makes and reads, and where."""

    def __init__(
        self, module: nn.Module, calls: Calls, cost: CountCost | None, casts: Mapping[str, torch.dtype]
    ) -> None:
        super().__init__()
        self._casts = casts
        cuts, self._around, self._replicated = calls.cuts, calls.around, calls.replicated
        self._draws_beside, self._ended_by = False, ""
        self._cost, self._before = cost, dict[Call, Cost]()
        self._cuts, self._region, self._inside = cuts, 0, 0
        self._begun: list[Call] = []
        self._unit_regions: dict[str, int] = {}
        self._seen: dict[int, _Seen] = {}
        self._stubs: dict[Call, Any] = {}
        self._parameters: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(id(parameter), []).append(name)
        self._used: dict[str, set[int]] = {name: set() for names in self._parameters.values() for name in names}
        self._home = {name: _home(name, cuts) for name in self._used}

    def finish(self, run: Callable[[], Any]) -> None:
        """Run; what fails after the last cut needed values, and nothing crosses a cut from there on.

        Raises:
            UnsupportedError: the run came to an end before the last cut.
        """
        try:
            run()
        except MeshboltError:
            raise
        except Exception as error:
            if not self._unit_regions:
                raise  # it never came to the model: nothing that cutting could have to do with
            self._ended_by = f"{type(error).__name__}: {error}"
            if self._region < len(self._cuts):
                at = f"stage {self._region}" + (f", after {self._begun[-1]}" if self._begun else "")
                raise UnsupportedError(
                    f"The step cannot be cut: {type(error).__name__} in {at}: {error}. Code between the units, "
                    "such as the forward around the layers, runs on every stage, most of which do not have the values; it cannot "
                    "branch on them or read them with .item()."
                ) from error
        if self._region < len(self._cuts):
            raise UnsupportedError(
                f"The step ended without calling {self._cuts[self._region]!r}, with which stage {self._region + 1} begins."
            )

    def is_in_unit(self) -> bool:
        """Return whether a unit is running."""
        return self._inside > 0

    def note_draw(self) -> None:
        """Note that random numbers are drawn for a foreign tensor."""
        self._draws_beside |= self._inside == 0

    def use(self, module: nn.Module) -> None:
        """Note that all parameters of a module are used now."""
        for parameter in module.parameters():
            self._use(parameter)

    # What happens ---------------------------------------------------------------------------------------------------------

    def called(self, call: Call, module: nn.Module, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        """Note a call of a unit, and what it returns."""
        if self._cost is not None:
            self._before[call] = self._cost.so_far
        if call.unit in self._cuts:
            self._begin(call, args, kwargs)
        for leaf in _foreign_leaves((args, kwargs)):
            self._read(leaf, beside=False)
        self._unit_regions.setdefault(call.unit, self._region)
        if call.unit in self._around:
            return proceed(*args, **kwargs)
        self._inside += 1
        if call.unit in self._casts:
            args, kwargs = _cast((args, kwargs), self._casts[call.unit])
        try:
            result = proceed(*args, **kwargs)
        finally:
            self._inside -= 1
        for index, leaf in enumerate(tree_leaves(result)):
            if is_foreign(leaf):
                seen = self._note(leaf, str(call))
                if seen.output is None and seen.region == self._region:
                    seen.output = (call, index)
        self._stubs[call] = result
        return result

    def _begin(self, call: Call, args: Any, kwargs: Any) -> None:
        expected = self._cuts[self._region] if self._region < len(self._cuts) else None
        if call.number > 0:
            raise CutError(
                call.unit,
                f"{call.unit!r}, with which a stage begins, is called {call.number + 1} times in a step, and a stage "
                "begins once. Choose a cut in front of what is repeated.",
            )
        if call.unit != expected:
            raise UnsupportedError(
                f"cuts={list(self._cuts)}: {call.unit!r} is called before {expected!r}. Name cuts in the order "
                "in which the forward reaches them."
            )
        for index, leaf in enumerate(tree_leaves((args, kwargs))):
            if is_foreign(leaf):
                self._note(leaf, f"an argument of {call}").arguments.setdefault(self._region, index)
        self._begun.append(call)
        self._region += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note which parameters and foreign tensors a function reads, and what it makes."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__" and not isinstance(result, torch.Tensor):
            return result  # asks what a tensor is, not for its values, as `.T` does
        for leaf in _foreign_leaves((args, kwargs)):
            if not self._use(leaf):
                self._read(leaf, beside=self._inside == 0)
        if self._inside == 0:
            for leaf in _foreign_leaves(result):
                self._note(leaf, f"torch's {getattr(func, '__name__', func)}")
        return result

    def _note(self, leaf: torch.Tensor, maker: str) -> _Seen:
        return self._seen.setdefault(id(leaf), _Seen(leaf, self._region, maker))

    def _use(self, parameter: torch.Tensor) -> bool:
        names = self._parameters.get(id(parameter), ())
        for name in names:
            self._used[name].add(self._region)
        return bool(names)

    def _read(self, leaf: torch.Tensor, *, beside: bool) -> None:
        seen = self._seen.get(id(leaf))
        if seen is not None:
            seen.read = max(seen.read, self._region)
            if beside:
                seen.read_beside.add(self._region)

    # What it means --------------------------------------------------------------------------------------------------------

    def plan(self) -> PipelinePlan:
        """Return what was seen as a plan."""
        last = len(self._cuts)
        crossings = tuple(tuple(self._crossing(cut)) for cut in range(last))
        beside = tuple(
            any(stage in seen.read_beside and seen.region < stage for seen in self._seen.values())
            for stage in range(last + 1)
        )
        unused = self._home
        if self._ended_by:  # on the last stage, which goes on from there with values
            unused = {name: home or last for name, home in self._home.items()}
        stages_of = {name: tuple(sorted(used)) or (unused[name],) for name, used in self._used.items()}
        stages_of.update(dict.fromkeys(self._replicated, tuple(range(last + 1))))
        return PipelinePlan(
            cuts=tuple(self._begun),
            crossings=crossings,
            stages_of=stages_of,
            stages_of_units={unit: region for unit, region in self._unit_regions.items() if unit not in self._around},
            before=self._before,
            draws_beside=self._draws_beside,
            ended_by=self._ended_by,
            stubs=_as_stubs(self._stubs),
            reads_beside=beside,
        )

    def _crossing(self, cut: int) -> Iterator[Crossing]:
        for seen in self._seen.values():
            argument = seen.arguments.get(cut)
            if seen.region > cut or (argument is None and seen.read <= cut):
                continue
            if argument is None and seen.output is None:
                entry = self._begun[cut]
                raise CutError(
                    entry.unit,
                    f"{seen.maker} makes a value of {list(seen.tensor.shape)} on stage {seen.region} that is read on stage "
                    f"{seen.read}, and it is neither an argument of {entry}, with which stage {cut + 1} begins, nor what a "
                    "module has returned: no stage could be told to pass it on. Compute it in a module of its own, pass it to "
                    "the layers as an argument, name the modules that it is made from in `replicate`, or cut elsewhere.",
                )
            yield Crossing(
                shape=tuple(seen.tensor.shape),
                dtype=seen.tensor.dtype,
                requires_grad=seen.tensor.requires_grad,
                argument=argument,
                output=seen.output,
            )


def _home(name: str, cuts: tuple[str, ...]) -> int:
    """Return the stage of a parameter that no computation uses: that of its neighbours, else the first."""
    return next((stage for stage, cut in reversed(list(enumerate(cuts, 1))) if name.startswith(f"{cut}.")), 0)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def _foreign_leaves(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if is_foreign(leaf))


def _as_stubs(results: Mapping[Call, Any]) -> dict[Call, Any]:
    """Return what calls have returned without the graphs behind it; a tensor that several have returned stays one."""
    made: dict[int, torch.Tensor] = {}

    def stub(tensor: torch.Tensor) -> torch.Tensor:
        return made.setdefault(id(tensor), _detached(tensor))

    return {call: tree_map_only(torch.Tensor, stub, result) for call, result in results.items()}


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    if not is_foreign(tensor):
        return tensor
    if not tensor.requires_grad:
        return tensor.detach()
    with torch.enable_grad():  # no leaf, as what a module returns is none, and may be changed in place
        stub: torch.Tensor = _OfAnotherStage.apply(tensor.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return stub


class _OfAnotherStage(torch.autograd.Function):
    """The identity, to which no gradient comes: what a stage reads of another one is put in its place before."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as another one."""
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Refuse."""
        raise UnsupportedError(
            "A gradient went to a value that another stage holds: a torch.autograd.Function between modules has read it, which "
            "cannot be seen. Put the function into a module of its own."
        )
