"""Operations along dims: those of other dims than the split one are each rank's own; sums along it are added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.exchange import enter, total
from meshbolt.tensor.layout import SplitLostError, dim_from_front
from meshbolt.tensor.part import Split
from meshbolt.tensor.split import TENSORS, like, named, rule

_REDUCTIONS = "sum mean amax amin var std prod logsumexp norm any all argmax argmin"


@rule("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk")
def along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Work along one dim and keep it."""
    split = _first(args)
    name = getattr(func, "__name__", "")
    place, default = {"sort": (1, -1), "argsort": (1, -1), "topk": (2, -1)}.get(name, (1, None))
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    # Numbers alone say a dim; sort() also takes whether it is to be stable in that place.
    if not isinstance(dim, int) or isinstance(dim, bool) or dim_from_front(dim, split.dim()) == split.division.dim:
        raise SplitLostError("it works along the split dim")
    results = func(split.local, *args[1:], **kwargs)
    return like(split, results) if isinstance(results, TENSORS) else _each(split, results)


def _first(args: tuple[Any, ...]) -> Split:
    if not args or not isinstance(args[0], Split):
        raise SplitLostError("it is not its first argument that is split")
    return args[0]


def _each(split: Split, results: Any, dim: int | None = None) -> Any:
    layout = split.division if dim is None else split.division.moved(dim)
    # A named tuple of torch's.
    return type(results)([like(split, result, layout) for result in results])


@rule("normalize")
def normalize(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide by the norm along one dim."""
    split = _first(args)
    dim = named(("input", "p", "dim", "eps"), args, kwargs).get("dim", 1)
    if dim_from_front(dim, split.dim()) == split.division.dim:
        raise SplitLostError("it works along the split dim")
    return like(split, func(split.local, *args[1:], **kwargs))


@rule("max", "min")
def largest(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the largest or smallest along a dim, and where they are."""
    split = _first(args)
    given = named(("input", "dim", "keepdim"), args, kwargs)
    dim = given.get("dim")
    if not isinstance(dim, int) or dim_from_front(dim, split.dim()) == split.division.dim:
        raise SplitLostError("it is not of one other dim than the split one")
    gone = not given.get("keepdim", False) and dim_from_front(dim, split.dim()) < split.division.dim
    return _each(split, func(split.local, *args[1:], **kwargs), split.division.dim - gone)


@rule(*_REDUCTIONS.split())
def reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Reduce along dims."""
    split, name = _first(args), getattr(func, "__name__", "")
    place = 2 if "norm" in name else 1
    dims = _dims(kwargs.get("dim", args[place] if len(args) > place else None), split.dim())
    if split.division.dim in dims:
        return _added_up(name, split, dims, args, kwargs)
    # The dims are the same ones in the part.
    reduced = func(split.local, *args[1:], **kwargs)
    gone = 0 if reduced.dim() == split.dim() else sum(dim < split.division.dim for dim in dims)
    return like(split, reduced, split.division.moved(split.division.dim - gone))


def _dims(given: Any, dims: int) -> list[int]:
    if given is None or (isinstance(given, (tuple, list)) and not given):
        return [*range(dims)]
    listed: Sequence[Any] = given if isinstance(given, (tuple, list)) else [given]
    if any(not isinstance(dim, int) or isinstance(dim, bool) for dim in listed):
        raise SplitLostError("its arguments are written in a way that is not followed")
    return sorted({dim_from_front(dim, dims) for dim in listed})


def _added_up(name: str, split: Split, dims: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given = named(("input", "dim", "keepdim", "dtype"), args, kwargs) if name in ("sum", "mean") else None
    if (
        not split.axis.exchanges
        or given is None
        or (name == "mean" and not (given.get("dtype") or split.dtype).is_floating_point)
    ):
        raise SplitLostError("it works along the split dim")
    added = split.local.sum(dims, keepdim=given.get("keepdim", False), dtype=given.get("dtype"))
    added = total(added, split.axis)
    return added if name == "sum" else added / math.prod([split.shape[dim] for dim in dims])


@rule("layer_norm")
def layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normalise over the last dims."""
    names: tuple[str, ...] = ("input", "normalized_shape", "weight", "bias", "eps")
    return _normalised(func, named(names if func is F.layer_norm else (*names, "cudnn_enable"), args, kwargs))


@rule("rms_norm")
def rms_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normalise over the last dims."""
    return _normalised(func, named(("input", "normalized_shape", "weight", "eps"), args, kwargs))


def _normalised(func: Any, given: dict[str, Any]) -> Split:
    split = given["input"]
    weights = [key for key in ("weight", "bias") if given.get(key) is not None]
    if not isinstance(split, Split) or any(isinstance(given[key], Split) for key in weights):
        raise SplitLostError("its weights are split")
    if split.division.dim >= split.dim() - len(given["normalized_shape"]):
        raise SplitLostError("it normalises over the split dim")
    entered = enter(split.axis, *(given[key] for key in weights))
    result: Tensor = func(**{**given, **dict(zip(weights, entered, strict=True)), "input": split.local})
    return like(split, result)


@rule("glu")
def glu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply one half with the sigmoid of the other."""
    split = _first(args)
    first, second = split.chunk(2, dim=named(("input", "dim"), args, kwargs).get("dim", -1))
    return first * torch.sigmoid(second)
