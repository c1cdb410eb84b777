"""What modules keep in attributes, apart for every stage of one process, as it is apart for stages on ranks of their own."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from meshbolt.pipeline.plan import PipelinePlan

_DEPTH, _MOST_ITEMS, _MOST_KEPT = 3, 1000, 100_000  # what is longer is data, not what layers leave each other
# Not their subclasses, which may refuse to be changed.
_CONTAINERS = (list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque)
_ABSENT = object()
# What no layer keeps anything in, and whose objects hold the whole run.
_NOT_LOOKED_INTO = sys.stdlib_module_names | {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "numpy"}
_NO_STATE = (torch.Tensor, nn.Module, ModuleType, FunctionType, MethodType, type, str, int, float, type(None))


class Kept:
    """What a module, those in it and the Python modules of their classes keep: attributes, and what lies in them.

    Looked into are lists, dictionaries, sets, plain objects of the user's classes, their class attributes, and global variables
    of files that are not installed. Tensors are kept as they are.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._names: list[tuple[Any, dict[str, Any]]] = []
        self._buffers: set[int] = set()
        for child in module.modules():
            self._buffers.add(id(child._buffers))
            self._take(child.__dict__, _DEPTH + 1)
        for holder in _holders(module):
            names = {key: value for key, value in vars(holder).items() if _may_be_state(key, value)}
            self._names.append((holder, names))
            for value in names.values():
                self._take(value, _DEPTH)

    def with_own_buffers(self) -> Kept:
        """Return the same with copies in the place of registered buffers; those that are shared stay shared."""
        other = object.__new__(Kept)
        made: dict[int, torch.Tensor] = {}

        def own(buffer: torch.Tensor | None) -> torch.Tensor | None:
            return buffer if buffer is None else made.setdefault(id(buffer), buffer.detach().clone())

        other._contents = {
            key: (held, {name: own(each) for name, each in content.items()} if key in self._buffers else content)
            for key, (held, content) in self._contents.items()
        }
        other._names, other._buffers = self._names, self._buffers
        return other

    def put_back(self) -> None:
        """Let everything be as it was."""
        for held, content in self._contents.values():
            _fill(held, content)
        for holder, names in self._names:
            now = vars(holder)
            for key in [key for key, value in now.items() if key not in names and _may_be_state(key, value)]:
                delattr(holder, key)
            for key, value in names.items():
                if now.get(key, _ABSENT) is not value:
                    setattr(holder, key, value)

    def _take(self, value: Any, depth: int) -> None:
        if depth == 0 or id(value) in self._contents or isinstance(value, _NO_STATE):
            return
        if type(value) in _CONTAINERS or isinstance(value, tuple):
            if not isinstance(value, tuple) and len(value) <= _MOST_KEPT:
                self._contents[id(value)] = value, value.copy()
            items = value.values() if isinstance(value, dict) else value
            for each in items if len(value) <= _MOST_ITEMS else ():
                self._take(each, depth - 1)
        elif _is_plain(value):
            self._take(value.__dict__, depth)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Let a module, and what it shares with others, keep its attributes: a step that is only looked at may count itself.

    Args:
        module: what is called inside.
    """
    before = Kept(module)
    try:
        yield
    finally:
        before.put_back()


class StagesApart:
    """Lets every stage of a module find in attributes what a rank would that runs this stage alone.

    Args:
        module: the user's, whole.
        stages: how many.
    """

    def __init__(self, module: nn.Module, stages: int) -> None:
        self._module = module
        self._buffers = dict(module.named_buffers(remove_duplicate=False))
        self._before = Kept(module)
        self._stages = [self._before.with_own_buffers() for _ in range(stages)]

    @contextmanager
    def stage(self, stage: int) -> Iterator[None]:
        """Surround what runs a stage.

        Args:
            stage: which.
        """
        self._stages[stage].put_back()
        yield
        self._stages[stage] = Kept(self._module)

    def leave_as_it_was(self) -> None:
        """Undo all that stages have done, but for gradients."""
        self._before.put_back()

    @torch.no_grad()
    def join(self, plan: PipelinePlan) -> None:
        """Leave the attributes that the last stage has, and each buffer as the stage has it that runs its module first.

        Args:
            plan: of the stages.
        """
        found: dict[str, torch.Tensor] = {}
        for number, stage in enumerate(self._stages):
            stage.put_back()
            now = dict(self._module.named_buffers(remove_duplicate=False))
            found.update({name: buffer for name, buffer in now.items() if _owner(name, plan) == number})
        for name, buffer in found.items():
            path, _, key = name.rpartition(".")
            self._module.get_submodule(path)._buffers[key] = _as_before(self._buffers.get(name), buffer)


def _owner(name: str, plan: PipelinePlan) -> int:
    stages = plan.stages_of_units
    return next((stages[unit] for unit in stages if name.startswith(f"{unit}.")), plan.stages - 1)


def _as_before(before: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor:
    """Return a buffer as the tensor that was there before, with the values of now."""
    if before is None or before.shape != now.shape or before.dtype != now.dtype:
        return now
    return before.copy_(now)


def _fill(held: Any, content: Any) -> None:
    if isinstance(held, (list, collections.deque)):
        held.clear()
        held.extend(content)
    elif isinstance(held, set):
        held.clear()
        held.update(content)
    else:  # not emptied in passing: others may read it
        for key in held.keys() - content.keys():
            del held[key]
        held.update(content)


def _is_plain(value: Any) -> bool:
    if isinstance(value, SimpleNamespace):
        return True
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _NOT_LOOKED_INTO


def _may_be_state(key: str, value: Any) -> bool:
    if key.startswith("__"):
        return False
    is_value = isinstance(value, (torch.Tensor, str, int, float, type(None), list, dict, set, tuple))
    return is_value or (not isinstance(value, _NO_STATE) and not callable(value) and _is_plain(value))


def _holders(module: nn.Module) -> Iterator[Any]:
    """Yield the classes of modules that the user has written, and the Python modules that these lie in."""
    seen: set[int] = set()
    for kind in {kind for child in module.modules() for kind in type(child).__mro__}:
        file = sys.modules.get(kind.__module__)
        path = getattr(file, "__file__", None) or ""
        if file is None or "site-packages" in path or kind.__module__.partition(".")[0] in _NOT_LOOKED_INTO:
            continue
        for holder in (kind, file):
            if id(holder) not in seen:
                seen.add(id(holder))
                yield holder
