"""What layers leave each other beside their arguments and results: in attributes, lists, dictionaries, global variables."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meshbolt.pipeline.plan import Call, CutError

ELSEWHERE = "an object of its own, such as a list, a dictionary or a global variable"
_DEPTH = 3
# Objects that hold the whole run; nobody's layers keep values in them.
_NOT_LOOKED_INTO = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among what a function was given or has returned.

    Sooner than with torch's general trees: functions take and return no more than tuples, lists and dictionaries.

    Args:
        tree: of values.
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))


@dataclass(frozen=True)
class _Use:
    stage: int
    by: Call | None


class BufferUses:
    """Notes which units use buffers, and which write to them: what one stage writes, no other sees.

    Args:
        buffers: by name, as they are while a step is looked at.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self._names = {id(buffer): name for name, buffer in buffers.items()}
        self._versions = {id(buffer): buffer._version for buffer in buffers.values()}
        self._uses: dict[int, dict[_Use, None]] = {}
        self._writes: dict[int, dict[_Use, None]] = {}

    def used(self, tensor: torch.Tensor, *, by: Call | None, stage: int) -> None:
        """Note that a function was given a tensor, if that is a buffer.

        Args:
            tensor: any.
            by: the call of a unit in which it was; None: outside of units.
            stage: on which.
        """
        key = id(tensor)
        if key not in self._names:
            return
        use = _Use(stage, by)
        self._uses.setdefault(key, {})[use] = None
        if tensor._version != self._versions[key]:
            self._versions[key] = tensor._version
            self._writes.setdefault(key, {})[use] = None

    def check(self, begun: Sequence[Call], on_one_stage: Collection[str]) -> None:
        """Refuse buffers that a unit of one stage writes, and code of another one uses.

        Args:
            begun: the calls with which stages 1, 2, ... begin.
            on_one_stage: the units that only one stage runs.

        Raises:
            CutError: there is one.
        """
        for key, writes in self._writes.items():
            for write in writes:
                if write.by is not None and write.by.unit in on_one_stage:
                    self._check_uses(key, write, begun)

    def _check_uses(self, key: int, write: _Use, begun: Sequence[Call]) -> None:
        for use in self._uses[key]:
            if use.stage == write.stage:
                continue  # of code outside of units too, to which later stages come: whether they need it is not known
            first = min(use.stage, write.stage)
            raise CutError(
                begun[first].unit,
                f"{write.by} writes the buffer {self._names[key]!r} on stage {write.stage}, and {use.by or 'the code outside'} "
                f"uses it on stage {use.stage}, whose rank would not see what was written. Cut where one stage has both, or "
                "give each of them a buffer of its own.",
            )


def holds_containers(value: Any) -> bool:
    """Return whether arguments hold a list or a dictionary, into which a unit may put something.

    Args:
        value: the positional arguments, and those by name.
    """
    args, kwargs = value
    return any(map(_is_container, (*args, *kwargs.values())))


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict)) or (isinstance(value, tuple) and any(map(_is_container, value)))


def place_of(tensor: torch.Tensor, module: nn.Module) -> str:
    """Return in which attribute a tensor lies, in words; empty where it is in none of the module's.

    Args:
        tensor: which one.
        module: and those in it are looked through, with lists, dictionaries and plain objects that they keep.
    """
    for name, child in module.named_modules():
        for key, value in child.__dict__.items():
            if key in ("_modules", "_parameters"):
                continue
            if key == "_buffers":
                found = next((buffer for buffer, each in value.items() if each is tensor), None)
            else:
                found = key if _holds(value, tensor, _DEPTH) else None
            if found is not None:
                return f"the attribute {found!r} of {name or type(module).__name__}"
    return ""


def _holds(value: Any, tensor: torch.Tensor, depth: int) -> bool:
    if value is tensor:
        return True
    if depth == 0 or isinstance(value, (torch.Tensor, nn.Module, type, str)):
        return False
    return any(_holds(each, tensor, depth - 1) for each in _held_by(value))


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if type(value).__module__.partition(".")[0] in _NOT_LOOKED_INTO:
        return []
    return list(getattr(value, "__dict__", {}).values())
