"""Find out how a step is cut, by running it once on tensors without values.

Every parameter is foreign for that run, so that whatever depends on one is marked wherever it goes. A stage begins when its
cut is called. What was made before that and is read after it crosses the cut: an argument of the cut module, or what a unit has
returned earlier. A value that is neither has no name by which a stage could be told to keep it, and is refused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshbolt.compat import TorchFunctionMode, tree_leaves, tree_map_only
from meshbolt.errors import MeshboltError, UnsupportedError
from meshbolt.pipeline.apart import attributes_kept
from meshbolt.pipeline.calls import Calls, Proceed
from meshbolt.pipeline.cost import Cost, CountCost
from meshbolt.pipeline.left import ELSEWHERE, BufferUses, holds_containers, place_of, tensors_in
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
        maker: the unit, or the function, that has.
        inside: the call of a unit that has made it and did not return it.
        output: by which a stage finds it.
        arguments: as which argument of a cut it was given, by the number of the cut.
        put_into_argument: a unit has put it into a container that it was called with.
        place: where code of a later stage has found it, if that was no argument and nothing that was returned.
        read: the last stage that reads it.
        reader: the call of a unit that does; None: code outside of units.
        read_beside: the stages whose code outside of units reads it.
    """

    tensor: torch.Tensor
    region: int
    maker: object
    inside: Call | None = None
    output: tuple[Call, int] | None = None
    arguments: dict[int, int] = field(default_factory=dict)
    put_into_argument: bool = False
    place: str | None = None
    read: int = -1
    reader: Call | None = None
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
    return _looked_at(module, calls, step, device=device, cost=cost, gathered=gathered or Gathered()).plan()


def passing_bytes(
    module: nn.Module, calls: Calls, step: Callable[[], Any], *, device: torch.device
) -> list[int | CutError]:
    """Return what passes each cut, in bytes of a microbatch, or why nothing can be cut there.

    Args:
        module: the user's, whole or on meta; it is left as it was.
        calls: with as many cuts as are to be looked at, which may lie in one another.
        step: runs one microbatch, from its inputs to the loss.
        device: where the module computes.
    """
    return _looked_at(module, calls, step, device=device, cost=None, gathered=Gathered()).passing_bytes()


def _looked_at(
    module: nn.Module,
    calls: Calls,
    step: Callable[[], Any],
    *,
    device: torch.device,
    cost: CountCost | None,
    gathered: Gathered,
) -> _Run:
    names = [name for name, _ in module.named_parameters(remove_duplicate=False) if name not in calls.replicated]
    with (
        _without_collecting(),
        stream(0, device=device, python_too=True),
        buffers_apart(module, device=device) as buffers,
    ):
        mode = Foreign(may_change=buffers.values())
        # Attributes come back first: recurrent layers note their parameters in one of theirs.
        with (
            foreign_parameters(module, names, mode, device=device, dtypes=gathered.parameters),
            plain_parameters(module, calls.replicated, device=device),
            attributes_kept(module),
        ):
            run = _Run(module, calls, cost, gathered.inputs, BufferUses(buffers))
            mode.on_draw = run.note_draw
            try:
                with cost or nullcontext(), unknown_outputs_assumed(run.is_in_unit, run.use), run:
                    run.finish(lambda: calls.run(step, run))
            finally:
                mode.on_draw = lambda: None  # or all that was seen would wait for the collector of garbage
    return run


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Let Python not look for garbage for a while, which takes a third of the time of a look and finds nothing."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Run(TorchFunctionMode):
    """Notes what a run makes and reads, and where."""

    def __init__(
        self,
        module: nn.Module,
        calls: Calls,
        cost: CountCost | None,
        casts: Mapping[str, torch.dtype],
        buffers: BufferUses,
    ) -> None:
        super().__init__()
        self._module, self._casts, self._buffers = module, casts, buffers
        cuts, self._around, self._replicated = calls.cuts, calls.around, calls.replicated
        # That run on one stage; others run on all that come to them.
        self._on_one_stage = frozenset(unit for unit in calls.inside if not calls.is_replicated(unit)) - calls.around
        self._draws_beside, self._ended_by = False, ""
        self._cost, self._before = cost, dict[Call, Cost]()
        self._cuts, self._region = cuts, 0
        self._units: list[Call] = []  # that are running, the outermost first
        self._begun: list[Call] = []
        self._leaves: list[int] = []
        self._unit_regions: dict[str, int] = {}
        self._seen: dict[int, _Seen] = {}
        self._returned_around: dict[int, int] = {}  # by identity, where a module has that holds a cut
        self._stubs: dict[Call, Any] = {}
        self._parameters: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(id(parameter), []).append(name)
        self._used: dict[str, set[int]] = {name: set() for names in self._parameters.values() for name in names}
        # One that is shared and not used has one home: gradients never come that would be added up.
        self._home = {
            name: min(_home(each, cuts) for each in names) for names in self._parameters.values() for name in names
        }

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
        return bool(self._units)

    def note_draw(self) -> None:
        """Note that random numbers are drawn for a foreign tensor."""
        self._draws_beside |= not self._units

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
        self._unit_regions.setdefault(call.unit, self._region)
        is_unit = call.unit not in self._around
        if is_unit:
            self._units.append(call)
        given, before = (args, kwargs), list(_foreign_leaves((args, kwargs)))
        for leaf in before:
            self._read(leaf)
        if not is_unit:
            return self._around_cuts(call, proceed, args, kwargs)
        if call.unit in self._casts:
            args, kwargs = _cast((args, kwargs), self._casts[call.unit])
        try:
            result = proceed(*args, **kwargs)
        finally:
            self._units.pop()
        self._returned(call, result)
        if holds_containers(given):
            known = set(map(id, before))
            for leaf in _foreign_leaves(given):
                if id(leaf) not in known:
                    self._note(leaf, call).put_into_argument = True
        self._stubs[call] = result
        return result

    def _around_cuts(self, call: Call, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        result = proceed(*args, **kwargs)
        for leaf in _foreign_leaves(result):
            self._returned_around.setdefault(id(leaf), self._region)
        return result

    def _returned(self, call: Call, result: Any) -> None:
        for index, leaf in enumerate(tree_leaves(result)):
            if not is_foreign(leaf):
                continue
            seen = self._note(leaf, call)
            if seen.output is None and seen.region == self._region:
                seen.output, seen.maker, seen.inside = (call, index), call, None

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
        leaves = tree_leaves((args, kwargs))
        for index, leaf in enumerate(leaves):
            if is_foreign(leaf) and id(leaf) not in self._parameters:  # which each stage has that reads it
                self._note(leaf, f"an argument of {call}").arguments.setdefault(self._region, index)
        self._leaves.append(len(leaves))
        self._begun.append(call)
        self._region += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note which parameters and foreign tensors a function reads, and what it makes."""
        result = func(*args, **(kwargs or {}))
        if _is_no_value(result) or (_name(func) == "__get__" and not isinstance(result, torch.Tensor)):
            return result  # asks what a tensor is, not for its values, as `.T` does
        for leaf in tensors_in((args, kwargs)):
            if not is_foreign(leaf):
                self._buffers.used(leaf, by=self._units[-1] if self._units else None, stage=self._region)
            elif not self._use(leaf):
                self._read(leaf)
        for leaf in tensors_in(result):
            if is_foreign(leaf):
                self._note(leaf, func)
        return result

    def _note(self, leaf: torch.Tensor, maker: object) -> _Seen:
        seen = self._seen.get(id(leaf))
        if seen is None:
            seen = self._seen[id(leaf)] = _Seen(leaf, self._region, maker, self._units[-1] if self._units else None)
        return seen

    def _use(self, parameter: torch.Tensor) -> bool:
        names = self._parameters.get(id(parameter), ())
        for name in names:
            self._used[name].add(self._region)
        return bool(names)

    def _read(self, leaf: torch.Tensor) -> None:
        seen = self._seen.get(id(leaf))
        if seen is None:
            return
        if self._region > seen.read:
            seen.read, seen.reader = self._region, self._units[-1] if self._units else None
        if not self._units:
            seen.read_beside.add(self._region)
        if seen.inside is not None and seen.place is None and self._region > seen.region:
            seen.place = place_of(leaf, self._module)

    # What it means --------------------------------------------------------------------------------------------------------

    def plan(self) -> PipelinePlan:
        """Return what was seen as a plan."""
        last = len(self._cuts)
        self._buffers.check(self._begun, self._on_one_stage)
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
            leaves=tuple(self._leaves),
        )

    def passing_bytes(self) -> list[int | CutError]:
        """Return what passes each cut, in bytes, or why the step cannot be cut there."""
        found: list[int | CutError] = [0] * len(self._cuts)
        for seen in self._seen.values():
            # Behind a module that holds other cuts, it is a unit, if no stage begins at these.
            named_from = 0 if seen.output is not None else self._returned_around.get(id(seen.tensor), len(found))
            num_bytes = seen.tensor.numel() * seen.tensor.element_size()
            for cut in range(seen.region, max([seen.read, *(each + 1 for each in seen.arguments)])):
                so_far = found[cut]
                if isinstance(so_far, CutError) or (cut not in seen.arguments and seen.read <= cut):
                    continue
                if cut < named_from and (cut not in seen.arguments or seen.put_into_argument):
                    found[cut] = CutError(self._begun[cut].unit, _in_short(seen))
                else:
                    found[cut] = so_far + num_bytes
        return found

    def _crossing(self, cut: int) -> Iterator[Crossing]:
        for seen in self._seen.values():
            argument = seen.arguments.get(cut)
            if seen.region > cut or (argument is None and seen.read <= cut):
                continue
            if seen.output is None and (argument is None or seen.put_into_argument):
                raise CutError(self._begun[cut].unit, self._why_not(seen, cut))
            yield Crossing(
                shape=tuple(seen.tensor.shape),
                dtype=seen.tensor.dtype,
                requires_grad=seen.tensor.requires_grad,
                argument=argument,
                output=seen.output,
            )

    def _why_not(self, seen: _Seen, cut: int) -> str:
        """Return why a value cannot pass a cut."""
        shape, reader = list(seen.tensor.shape), str(seen.reader or "the code outside of modules")
        if seen.inside is None:
            maker = seen.maker if isinstance(seen.maker, (str, Call)) else f"torch's {_name(seen.maker)}"
            return (
                f"{maker} makes a value of {shape} on stage {seen.region} that is read on stage {seen.read}, and it is neither "
                f"an argument of {self._begun[cut]}, with which stage {cut + 1} begins, nor what a module has returned: no stage "
                "could be told to pass it on. Compute it in a module of its own, pass it to the layers as an argument, name the "
                "modules that it is made from in `replicate`, or cut elsewhere."
            )
        place = "a dictionary or list that it is called with" if seen.put_into_argument else seen.place
        return (
            f"{seen.inside} makes a value of {shape} on stage {seen.region} and leaves it in {place or ELSEWHERE}, where "
            f"{reader} reads it on stage {max(seen.read, cut + 1)}: the rank of that stage does not run {seen.inside.unit}, and "
            "finds what was there before. Return it from the layer and pass it on as an argument, or cut where one stage has "
            "both. A loss that layers add up in this way has to be left out, or returned beside each layer's output."
        )


def _in_short(seen: _Seen) -> str:
    """Return why a value cannot pass a cut, where stages have no numbers yet."""
    shape, reader = list(seen.tensor.shape), str(seen.reader or "code outside of modules")
    if seen.inside is None:
        maker = seen.maker if isinstance(seen.maker, (str, Call)) else f"torch's {_name(seen.maker)}"
        return f"{maker} makes a value of {shape} before it that is read behind it, and that no module has returned"
    return (
        f"{seen.inside} leaves a value of {shape} in {seen.place or ELSEWHERE}, where {reader} reads it behind the cut"
    )


def _home(name: str, cuts: tuple[str, ...]) -> int:
    """Return the stage of a parameter that no computation uses: that of its neighbours, else the first."""
    return next((stage for stage, cut in reversed(list(enumerate(cuts, 1))) if name.startswith(f"{cut}.")), 0)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def _foreign_leaves(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if is_foreign(leaf))


def _is_no_value(result: object) -> bool:
    """Return whether a function has returned nothing that depends on a tensor's values, which foreign ones do not have."""
    if isinstance(result, tuple):
        return all(isinstance(each, int) for each in result)
    return isinstance(result, (int, float, torch.dtype, torch.device, torch.layout))


def _name(function: object) -> str:
    return str(getattr(function, "__name__", function))


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
