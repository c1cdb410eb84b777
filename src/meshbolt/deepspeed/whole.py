"""Sharded parameters that answer as whole ones for a while, to whoever holds them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import tree_map

_wholes: dict[int, nn.Parameter] = {}


class _Whole(DTensor):
    """A shard in whose place another tensor is used, whatever is done with it."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do an operation on the whole tensor."""
        if func is torch.Tensor.__deepcopy__:
            return copy.deepcopy(_whole_of(args[0]), *args[1:])
        return func(*tree_map(_whole_of, args), **tree_map(_whole_of, dict(kwargs or {})))


def _whole_of(leaf: Any) -> Any:
    return _wholes[id(leaf)] if type(leaf) is _Whole else leaf


class ZeroParamStatus(Enum):
    """Whether a parameter can be read: a shard cannot, outside of `zero.GatheredParameters`."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def mark(module: nn.Module) -> None:
    """Give the shards of a module the attributes by which scripts know that they have to be gathered to be read.

    Args:
        module: sharded.
    """
    for number, parameter in enumerate(module.parameters()):
        if isinstance(parameter, DTensor):
            attributes = {"ds_id": number, "ds_shape": parameter.shape, "ds_numel": parameter.numel()}
            vars(parameter).update(attributes, ds_status=ZeroParamStatus.NOT_AVAILABLE)


@contextmanager
def answering_as(pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> Iterator[None]:
    """Let parameters answer as whole ones: scripts hold the parameter that they ask for, and look at that.

    Args:
        pairs: what a script holds, a shard or what stood for it inside of a window of batches; and the whole one.
    """
    every: list[tuple[Any, nn.Parameter]] = [(held, whole) for held, whole in pairs if held is not whole]
    shards = [(held, whole) for held, whole in every if type(held) is DTensor]
    copies = [(held, whole, held.data) for held, whole in every if not isinstance(held, DTensor)]
    for shard, whole in shards:
        _wholes[id(shard)] = whole
        shard.__class__ = _Whole
    for held, whole, _ in copies:
        held.data = whole.data
    try:
        yield
    finally:
        for shard, _ in shards:
            shard.__class__ = DTensor
            del _wholes[id(shard)]
        for held, _, freed in copies:
            held.data = freed
