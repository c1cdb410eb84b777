"""Values that another stage holds: tensors without memory, which every computation with them becomes.

Parameters of other stages are replaced by tensors that have a shape and a dtype but no values. What is computed without them,
masks or positions, is computed; what would need them is again such a tensor, and so is recognised wherever it goes. Mistakes
cannot be silent: a change of a real tensor by a foreign value, which would lose the mark, is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meshbolt.compat import FakeTensor, FakeTensorMode, storage_identity, tree_leaves, written_arguments
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.shapes import computed
from meshbolt.pipeline.streams import draws


def is_foreign(value: Any) -> bool:
    """Return whether a value is a tensor that another stage holds."""
    return isinstance(value, FakeTensor)


class Foreign(FakeTensorMode):
    """Makes tensors that stand for another stage's, and computes with them; it is never entered as a context.

    Args:
        may_change: real tensors that foreign values may be written to, without effect: buffers, while a module is only
            looked at.
    """

    def __init__(self, *, may_change: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.on_draw: Callable[[], None] = lambda: None
        self._may_change = {storage_identity(tensor) for tensor in may_change}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, unless a real tensor would be changed."""
        changes = _changes_arguments(func)
        if changes and any(map(is_foreign, tree_leaves((args, kwargs)))):
            for written in written_arguments(func, args, kwargs or {}):
                if not is_foreign(written) and storage_identity(written) not in self._may_change:
                    raise self.refuse_write(func, written, (args, kwargs))
        if draws(func, kwargs):
            self.on_draw()
        # As values do not matter, a tensor that has some becomes one without; torch's own way of doing so takes long and warns.
        args, kwargs = (
            self._without_values(args),
            {key: self._without_values(each) for key, each in (kwargs or {}).items()},
        )
        compute = functools.partial(super().__torch_dispatch__, func, types, args, kwargs)
        return compute() if changes else computed(self, func, args, kwargs, compute)

    def refuse_write(self, func: Any, written: torch.Tensor, given: Sequence[Any]) -> UnsupportedError:
        """Return the error for a foreign value that is to be written into a real tensor.

        Args:
            func: what writes.
            written: to which tensor.
            given: the arguments of what writes.
        """
        return UnsupportedError(
            f"{func} writes a value that another pipeline stage computes into a tensor of {tuple(written.shape)} that this one "
            "has made. A sum over layers that is kept outside of them, such as a router's auxiliary loss, cannot be cut: leave "
            "it out of the loss, or let the layers pass it on as an argument."
        )

    def _without_values(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            is_own = isinstance(value, FakeTensor) and value.fake_mode is self
            return value if is_own else self.like(value, device=value.device)
        return type(value)(map(self._without_values, value)) if type(value) in (list, tuple) else value

    def like(self, tensor: torch.Tensor, *, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that stands for one of the same shape, without reading it.

        Args:
            tensor: on any device, meta included.
            device: where computations with it would take place.
            dtype: None: the tensor's.
        """
        meta = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=dtype or tensor.dtype, device="meta")
        return FakeTensor(self, meta, device)


@functools.cache
def _changes_arguments(operation: Any) -> bool:
    return bool(operation._schema.is_mutable)


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """In which dtypes a module computes, where parameters are stored in others.

    Attributes:
        parameters: by name, the dtype in which each is gathered; that of others is the stored one.
        inputs: by name of a unit, the dtype to which it casts what it is called with.
    """

    parameters: Mapping[str, torch.dtype] = field(default_factory=dict)
    inputs: Mapping[str, torch.dtype] = field(default_factory=dict)


@contextmanager
def foreign_parameters(
    module: nn.Module,
    names: Iterable[str],
    mode: Foreign,
    *,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Iterator[None]:
    """Put tensors without values in the place of parameters for a while; those that are shared stay shared.

    Args:
        module: whose parameters.
        names: in `module`, every name of a shared one.
        mode: makes the tensors.
        device: where the module computes.
        dtypes: by name, of those that are not to have the parameter's.
    """

    def foreign(name: str, parameter: nn.Parameter) -> torch.Tensor:
        return mode.like(parameter, device=device, dtype=(dtypes or {}).get(name))

    with _replaced(module, names, foreign):
        yield


@contextmanager
def plain_parameters(module: nn.Module, names: Iterable[str], *, device: torch.device) -> Iterator[None]:
    """Let a module compute with parameters as whole tensors on a device for a while; those without values are zeros there.

    Args:
        module: whose parameters.
        names: in `module`, every name of a shared one.
        device: where the module computes.
    """

    def plain(_: str, parameter: nn.Parameter) -> torch.Tensor:
        if parameter.is_meta or type(parameter) is not nn.Parameter:  # or one that ranks share
            return torch.zeros(tuple(parameter.shape), dtype=parameter.dtype, device=device)
        return parameter.detach().to(device)

    with _replaced(module, names, plain):
        yield


@contextmanager
def _replaced(
    module: nn.Module, names: Iterable[str], make: Callable[[str, nn.Parameter], torch.Tensor]
) -> Iterator[None]:
    """Put tensors in the place of parameters for a while; those that are shared stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    wanted = frozenset(names)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in wanted:
            continue
        if parameter not in made:
            made[parameter] = nn.Parameter(make(name, parameter), requires_grad=parameter.requires_grad)
        owner, _, key = name.rpartition(".")
        held.append((module.get_submodule(owner), key, parameter))
    try:
        # By assignment, not in the dictionary: recurrent layers keep a list of their own.
        for owner_module, key, parameter in held:
            setattr(owner_module, key, made[parameter])
        yield
    finally:
        for owner_module, key, parameter in held:
            setattr(owner_module, key, parameter)


@contextmanager
def buffers_apart(module: nn.Module, *, device: torch.device | str = "cpu") -> Iterator[Mapping[str, torch.Tensor]]:
    """Let a module compute with copies of its buffers for a while, where it has none yet with zeros; yields them by name.

    Args:
        module: whose buffers.
        device: for those that have no values yet.
    """
    held = [
        (child, key, buffer)
        for child in module.modules()
        for key, buffer in child._buffers.items()
        if buffer is not None
    ]
    copies = {
        id(buffer): torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.clone()
        for _, _, buffer in held
    }
    try:
        for child, key, buffer in held:
            child._buffers[key] = copies[id(buffer)]
        yield dict(module.named_buffers(remove_duplicate=False))
    finally:
        for child, key, buffer in held:
            child._buffers[key] = buffer
