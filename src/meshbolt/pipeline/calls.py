"""Stand between a module's caller and the module, outside of hooks, recomputation, sharding and compilation."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

from torch import nn

from meshbolt.blocks import find_blocks
from meshbolt.errors import ConfigError, UnsupportedError, did_you_mean
from meshbolt.pipeline.plan import Call

Proceed = Callable[..., Any]
_KEY = "_meshbolt_calls"


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

    Raises:
        ConfigError: a cut names no module, one twice, or one that is never called.

    Example:
        >>> layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
        >>> list(Calls(layers, ["2"]).units)
        ['0', '1', '2', '3']
    """

    def __init__(self, module: nn.Module, cuts: Iterable[str]) -> None:
        names = dict(module.named_modules())
        self.cuts = tuple(cuts)
        _check(module, names, self.cuts)
        holding = {cut[:index] for cut in self.cuts for index in _dots(cut)}
        blocks = find_blocks(module).keys() - holding
        above = {name[:index] for name in (*self.cuts, *blocks) for index in (0, *_dots(name))} or {""}
        outermost = {name for name in names if name and name not in above and name.rpartition(".")[0] in above}
        wanted = {*self.cuts, *blocks, *outermost}
        self.units: Mapping[str, nn.Module] = {name: child for name, child in names.items() if name in wanted}
        self.around = holding & self.units.keys()
        # Units with parameters, and the modules in each.
        self.inside: Mapping[str, list[nn.Module]] = {
            name: list(unit.modules()) for name, unit in self.units.items() if next(unit.parameters(), None) is not None
        }
        self._watcher: Watcher | None = None
        self._is_in_backward = False
        self._counts = Counter[str]()
        for name, unit in self.units.items():
            unit.__dict__[_KEY] = functools.partial(self._called, name, unit)
            unit.__class__ = _watched(cast("Any", type(unit)))

    def remove(self) -> None:
        """Leave the modules as they were."""
        for unit in self.units.values():
            del unit.__dict__[_KEY]
            unit.__class__ = type(unit).__bases__[0]

    def run(self, step: Callable[[], Any], watcher: Watcher) -> Any:
        """Return what a step returns while a watcher is asked."""
        if self._watcher is not None:
            raise AssertionError("A step of a pipeline was started inside of another one.")
        self._watcher = watcher
        self._counts.clear()
        try:
            return step()
        finally:
            self._watcher = None

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
            raise UnsupportedError(
                f"{name!r} is called again in the backward pass: the step has wrapped it in torch.utils.checkpoint, so that its "
                "random numbers and what other stages hold would be others. Recompute inside of the layers, as Hugging Face's "
                "gradient_checkpointing_enable() does."
            )
        if watcher is None:
            return proceed(*args, **kwargs)
        call = Call(name, self._counts[name])
        self._counts[name] += 1
        return watcher.called(call, unit, proceed, args, kwargs)


@functools.cache
def _watched(kind: Any) -> type[nn.Module]:
    """Return a subclass whose calls are seen; by its name, and to whoever asks what a module is, it is the class itself."""

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watch = self.__dict__.get(_KEY)
        if watch is None:  # another module of this class, such as a part of a sequence
            return kind.__call__(self, *args, **kwargs)
        return watch(functools.partial(kind.__call__, self), args, kwargs)

    inherited = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    watched: type[nn.Module] = type(kind.__name__, (kind,), {**inherited, "__call__": called})
    return watched


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
