"""What operations make of tensors without values, remembered: a model's layers do the same again and again.

torch remembers it too, for any kind of tensor and mode, at several times the cost. Here are plain strided tensors of one mode,
and operations that make new ones, or views that the meta device makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meshbolt.compat import FakeTensor, FakeTensorMode, on_meta, storage_identity

_MOST = 20_000
_PLAIN = (str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_aten = torch.ops.aten
_VIEWS = frozenset(
    {
        _aten._unsafe_view.default,
        _aten.alias.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.squeeze.dim,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)


class _CannotBeRememberedError(Exception):
    """An operation was given something else than plain tensors of the mode, and plain values."""


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_known: dict[Any, Any] = {}


def computed(
    mode: FakeTensorMode, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], compute: Callable[[], Any]
) -> Any:
    """Return what an operation that changes nothing makes, sooner than by computing it, where that is known.

    Args:
        mode: of the tensors.
        operation: as a dispatch mode gets it.
        args: its positional arguments.
        kwargs: its other arguments.
        compute: computes it.
    """
    if operation in _VIEWS:
        base = args[0]
        if isinstance(base, FakeTensor) and base.fake_mode is mode and not base.dtype.is_complex:
            return FakeTensor(mode, on_meta(mode, operation, args, kwargs), base.fake_device)
        return compute()
    if operation.is_view:
        return compute()
    inputs: list[torch.Tensor] = []
    try:
        key = operation, torch.get_default_dtype(), _key(mode, args, inputs), _key(mode, tuple(kwargs.items()), inputs)
    except _CannotBeRememberedError:
        return compute()
    known = _known.get(key)
    if known is None:
        result = compute()
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = _remembered(result, inputs) or False
        return result
    if known is False:
        return compute()
    return tuple(_made(mode, each) for each in known) if isinstance(known, tuple) else _made(mode, known)


def _key(mode: FakeTensorMode, value: Any, inputs: list[torch.Tensor]) -> Any:
    """Return what of a value decides on the shape of a result, and collect tensors.

    Raises:
        _CannotBeRememberedError: that is not known.
    """
    if isinstance(value, torch.Tensor):
        if not isinstance(value, FakeTensor) or value.fake_mode is not mode or value.constant is not None:
            raise _CannotBeRememberedError
        if value.layout is not torch.strided or value.dtype.is_complex:
            raise _CannotBeRememberedError
        inputs.append(value)
        return value.shape, value.stride(), value.dtype, value.fake_device
    if value is None or type(value) in (int, bool, float):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple(_key(mode, each, inputs) for each in value)
    if isinstance(value, _PLAIN):
        return value
    raise _CannotBeRememberedError


def _remembered(result: Any, inputs: Sequence[torch.Tensor]) -> Any:
    """Return the shapes of a result, None where it is not made of new plain tensors."""
    results = result if type(result) is tuple else (result,)
    if not results or not all(type(each) is FakeTensor and each.layout is torch.strided for each in results):
        return None
    storages = [storage_identity(each) for each in (*results, *inputs)]
    if len(set(storages[: len(results)])) < len(results) or set(storages[: len(results)]) & set(
        storages[len(results) :]
    ):
        return None
    if any(each.storage_offset() or each.dtype.is_complex for each in results):
        return None
    shapes = tuple(_Shape(tuple(each.shape), each.stride(), each.dtype, each.fake_device) for each in results)
    return shapes if type(result) is tuple else shapes[0]


def _made(mode: FakeTensorMode, shape: _Shape) -> torch.Tensor:
    meta = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
    return FakeTensor(mode, meta, shape.device)
