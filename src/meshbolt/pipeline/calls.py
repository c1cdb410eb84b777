"""Stand between a module's caller and the module, outside of hooks, recomputation, sharding and compilation."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils import checkpoint

from meshbolt.blocks import find_blocks
from meshbolt.errors import ConfigError, UnsupportedError, did_you_mean
from meshbolt.pipeline.plan import Call

Proceed = Callable[..., Any]
_running: list[Calls] = []
_KEY = "_meshbolt_calls"


def is_in_step() -> bool:
    """Return whether a step is running that a pipeline runs in parts, or looks at."""
    return bool(_running)


class Watcher(Protocol):
    """Is asked at every call of a unit."""

    def called(self, call: Call, module: nn.Module, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        """Return what the caller gets.

        Args:
            call: which one.
            module: the unit.
            proceed: calls it.
            args: the caller's.
            kwargs: the caller's.
        """


class Calls:
    """The calls of a module's units, one watcher at a time; without one they go through.

    Units are the modules with which stages begin, the model's repeated blocks, and the outermost modules in which none of these
    lies. They are the same for any number of stages that begin with blocks. Those in `around` hold cuts, and run as the code
    outside of units does.

    Args:
        module: the user's.
        cuts: names of the modules with which stages begin.
        units: names of further units.
        replicate: names of modules that every stage keeps.

    Attributes:
        replicated: names of the parameters of these modules, every name of a shared one.

    Raises:
        ConfigError: a cut names no module, one twice, or one that is never called; a module that every stage keeps is unknown
            or holds a cut.

    Example:
        >>> layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
        >>> list(Calls(layers, ["2"]).units)
        ['0', '1', '2', '3']
    """

    def __init__(
        self, module: nn.Module, cuts: Iterable[str], *, units: Iterable[str] = (), replicate: Iterable[str] = ()
    ) -> None:
        names = dict(module.named_modules())
        aliases = _Aliases(module)
        self.cuts, self._replicate = tuple(map(aliases.first, cuts)), tuple(map(aliases.first, replicate))
        _check(module, names, self.cuts)
        _check_replicate(module, names, self.cuts, self._replicate)
        self.replicated = _parameters_of(module, [names[name] for name in self._replicate])
        asked = (*self.cuts, *units)
        holding = aliases.holding(asked)
        blocks = find_blocks(module).keys()
        above = aliases.holding((*asked, *blocks)) | {""}
        outermost = {name for name in names if name and name not in above and name.rpartition(".")[0] in above}
        wanted = {*asked, *blocks, *outermost}
        self.units: Mapping[str, nn.Module] = {name: child for name, child in names.items() if name in wanted}
        self.around = holding & self.units.keys()
        # Units with parameters, and the modules in each.
        self.inside: Mapping[str, list[nn.Module]] = {
            name: list(unit.modules()) for name, unit in self.units.items() if next(unit.parameters(), None) is not None
        }
        self._watcher: Watcher | None = None
        self.is_in_pieces = False  # whether it can be called in steps only
        self.called_in = "a step"  # where it can be, in words
        self.hooks_to_leave_out: frozenset[int] = frozenset()  # which wait for no call whose result does not count
        self._is_in_backward = self._has_backward = False
        self._known = set[str]()
        self._counts = Counter[str]()
        self._ran: dict[int, tuple[int, set[Call]]] = {}
        for name, unit in self.units.items():
            unit.__dict__[_KEY] = _Watch(functools.partial(self._called, name, unit))
            unit.__class__ = _watched(cast("Any", type(unit)))

    def is_replicated(self, unit: str) -> bool:
        """Return whether a unit lies in a module that every stage keeps, or is one."""
        return any(f"{unit}.".startswith(f"{name}.") for name in self._replicate)

    def is_awaited(self, child: nn.Module) -> bool:
        """Return whether somebody's hook waits for a module's calls."""
        return not self.hooks_to_leave_out.issuperset((*child._forward_hooks, *child._forward_pre_hooks))

    def remove(self) -> None:
        """Leave the modules as they were."""
        for unit in self.units.values():
            del unit.__dict__[_KEY]
            # Where sharding has made a class of its own of ours, ours lets calls through from now on.
            if "_meshbolt_watches" in vars(type(unit)):
                unit.__class__ = type(unit).__bases__[0]

    def run(self, step: Callable[[], Any], watcher: Watcher) -> Any:
        """Return what a step returns while a watcher is asked."""
        if self._watcher is not None:
            raise AssertionError("A step of a pipeline was started inside of another one.")
        self._watcher, self._has_backward = watcher, torch.is_grad_enabled()
        self._counts.clear()
        _running.append(self)
        try:
            return step_begins(step)
        finally:
            _running.pop()
            self._watcher = None

    def ran_before(self, *, stage: int, microbatch: int) -> set[Call]:
        """Return the calls that earlier stages of this process have run for a microbatch; the stage adds its own.

        Args:
            stage: which is about to run.
            microbatch: its number in the step.
        """
        last, ran = self._ran.get(microbatch, (stage, set()))
        if stage <= last:  # of another step
            ran = set()
        self._ran[microbatch] = stage, ran
        return ran

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Refuse calls of units inside that no watcher is asked for: a step's backward passes call none."""
        self._is_in_backward = True
        try:
            yield
        finally:
            self._is_in_backward = False

    def _called(self, name: str, unit: nn.Module, proceed: Proceed, args: Any, kwargs: Any) -> Any:
        watcher = self._watcher
        if watcher is None and self._is_in_backward:
            raise _wrapped_in_checkpoint(name, "is called again in the backward pass")
        if watcher is not None and self._has_backward and name not in self._known:
            self._known.add(name)  # the first time is when the step is looked at
            if _is_inside(checkpoint.__file__, of=step_begins.__code__):
                raise _wrapped_in_checkpoint(name, "would be called again in the backward pass")
        if watcher is None and self.is_in_pieces:
            raise UnsupportedError(
                f"{name!r} was called outside of a step, and under pipeline parallelism no rank has all of the module. Call it "
                f"in {self.called_in}."
            )
        if watcher is None:
            return proceed(*args, **kwargs)
        call = Call(name, self._counts[name])
        self._counts[name] += 1
        return watcher.called(call, unit, proceed, args, kwargs)


@contextmanager
def calls_unseen(module: nn.Module) -> Iterator[None]:
    """Let a module be called for a while as if nothing stood between its units and their callers.

    Args:
        module: whose units may be watched, or not.
    """
    watches = [(child, child.__dict__.pop(_KEY)) for child in module.modules() if _KEY in child.__dict__]
    try:
        yield
    finally:
        for child, watch in watches:
            child.__dict__[_KEY] = watch


def step_begins(step: Callable[[], Any]) -> Any:
    """Return what a step returns; up to here its callers are the user's."""
    return step()


def _is_inside(file: str, *, of: CodeType) -> bool:
    """Return whether code of a file has called this, between here and where a step begins."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not of:
        if frame.f_code.co_filename == file:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wrapped_in_checkpoint(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name!r} {what}: the step has wrapped it in torch.utils.checkpoint, so that its random numbers and what other stages "
        "hold would be others. Recompute inside of the layers, as Hugging Face's gradient_checkpointing_enable() does, or with "
        "MeshStrategy(recompute=...)."
    )


class _Watch:
    """Sees the calls of one module; a copy of the module has none."""

    def __init__(self, called: Callable[..., Any]) -> None:
        self.called = called

    def __deepcopy__(self, _memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return _no_watch, ()


def _no_watch() -> None:
    """Stand in the place of a watch where a module is unpickled."""


@functools.cache
def _watched(kind: Any) -> type[nn.Module]:
    """Return a subclass whose calls are seen; by its name, and to whoever asks what a module is, it is the class itself."""

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch = self.__dict__.get(_KEY)
        if watch is None:  # another module of this class, such as a part of a sequence
            return kind.__call__(self, *args, **kwargs)
        return watch.called(functools.partial(kind.__call__, self), args, kwargs)

    inherited = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    watched: type[nn.Module] = type(
        kind.__name__, (kind,), {**inherited, "__call__": called, "_meshbolt_watches": True}
    )
    return watched


class _Aliases:
    """The names of modules that are registered in several places; each is known by its first."""

    def __init__(self, module: nn.Module) -> None:
        self._first = {id(child): name for name, child in module.named_modules()}
        self._all: dict[str, list[str]] = {}
        self._of: dict[str, str] = {}
        for name, child in module.named_modules(remove_duplicate=False):
            first = self._of[name] = self._first[id(child)]
            self._all.setdefault(first, []).append(name)

    def first(self, name: str) -> str:
        """Return the name that a module is known by; an unknown one as it is."""
        return self._of.get(name, name)

    def holding(self, names: Iterable[str]) -> set[str]:
        """Return the modules in which modules lie, by whatever name."""
        places = {alias for name in names for alias in self._all.get(self.first(name), ())}
        return {self.first(place[:index]) for place in places for index in _dots(place)}


def _dots(name: str) -> list[int]:
    return [index for index, letter in enumerate(name) if letter == "."]


def _check(module: nn.Module, names: Mapping[str, nn.Module], cuts: tuple[str, ...]) -> None:
    for cut in cuts:
        if cut not in names or not cut:
            known = [name for name in names if name and name.count(".") <= cut.count(".")]
            raise ConfigError(f"cuts: {type(module).__name__} has no module {cut!r}{did_you_mean(cut, known[:40])}.")
        if isinstance(names[cut], (nn.ModuleList, nn.ModuleDict)):
            first = next((f"{cut}.{key}" for key, _ in names[cut].named_children()), "one of its own")
            raise ConfigError(
                f"cuts: {cut!r} is a {type(names[cut]).__name__}, which is never called. Name a module in it: {first!r}."
            )
    twice = next((cut for cut in cuts if cuts.count(cut) > 1), None)
    if twice is not None:
        raise ConfigError(f"cuts={list(cuts)}: {twice!r} stands there twice, and a stage begins once in a step.")


def _check_replicate(
    module: nn.Module, names: Mapping[str, nn.Module], cuts: tuple[str, ...], replicate: tuple[str, ...]
) -> None:
    for name in replicate:
        if name not in names or not name:
            known = [each for each in names if each and each.count(".") <= name.count(".")]
            raise ConfigError(
                f"replicate: {type(module).__name__} has no module {name!r}{did_you_mean(name, known[:40])}."
            )
        cut = next((cut for cut in cuts if f"{cut}.".startswith(f"{name}.")), None)
        if cut is not None:
            raise ConfigError(
                f"replicate={list(replicate)}: a stage begins with {cut!r}, and {name!r} is to be kept whole by every stage. "
                "Name smaller modules, or cut elsewhere."
            )


def _parameters_of(module: nn.Module, kept: list[nn.Module]) -> frozenset[str]:
    """Return all names that the parameters of some modules have."""
    own = {id(parameter) for each in kept for parameter in each.parameters()}
    return frozenset(name for name, each in module.named_parameters(remove_duplicate=False) if id(each) in own)
