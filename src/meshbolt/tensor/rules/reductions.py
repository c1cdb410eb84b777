"""Operations along dims: those of other dims than the split one are each rank's own; sums along it are added up."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from meshbolt.tensor.exchange import enter, total
from meshbolt.tensor.layout import SplitLostError
from meshbolt.tensor.split import SplitTensor, like, rule


@rule("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp")
def along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Work along one dim and keep it."""
    split = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim is None or dim % split.dim() == split.division.dim:
        raise SplitLostError("it works along the split dim")
    return like(split, func(split.local, *args[1:], **kwargs))


@rule("normalize")
def normalize(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide by the norm along one dim."""
    split = args[0]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 1)
    if dim % split.dim() == split.division.dim:
        raise SplitLostError("it works along the split dim")
    return like(split, func(split.local, *args[1:], **kwargs))


@rule("sum", "mean", "amax", "amin", "var", "std", "prod", "logsumexp", "norm", "any", "all", "argmax", "argmin")
def reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Reduce along dims."""
    split, name = args[0], getattr(func, "__name__", "")
    given = kwargs.get("dim", kwargs.get("axis"))
    positional = 2 if name == "norm" else 1
    if given is None and len(args) > positional:
        given = args[positional]
    if isinstance(given, bool):
        raise SplitLostError("its arguments are written in a way that is not followed")  # var(x, unbiased)
    dims = sorted({dim % split.dim() for dim in _listed(given, split)})
    if split.division.dim in dims:
        return _added_up(func, name, split, dims, args, kwargs)
    # The arguments are counted from the front or from the back of the same dims in the part.
    reduced = func(split.local, *args[1:], **kwargs)
    if not isinstance(reduced, Tensor):
        raise SplitLostError("it returns several tensors")
    kept = reduced.dim() == split.dim()
    gone = 0 if kept else sum(dim < split.division.dim for dim in dims)
    return like(split, reduced, split.division.moved(split.division.dim - gone))


def _listed(given: Any, split: SplitTensor) -> list[int]:
    if given is None or (isinstance(given, (tuple, list)) and not given):
        return [*range(split.dim())]
    return list(given) if isinstance(given, (tuple, list)) else [given]


def _added_up(
    func: Any, name: str, split: SplitTensor, dims: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    if not split.axis.exchanges or name not in ("sum", "mean") or not (split.is_floating_point() or name == "sum"):
        raise SplitLostError("it works along the split dim")
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    added = total(split.local.sum(dims, keepdim=keep, dtype=kwargs.get("dtype")), split.axis)
    return added if name == "sum" else added / math.prod(split.shape[dim] for dim in dims)


@rule("layer_norm")
def layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normalise over the last dims."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    if func is torch.layer_norm:
        names = (*names, "cudnn_enable")
    return _normalised(func, dict(zip(names, args, strict=False)) | kwargs)


@rule("rms_norm")
def rms_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Normalise over the last dims."""
    names = ("input", "normalized_shape", "weight", "eps")
    return _normalised(func, dict(zip(names, args, strict=False)) | kwargs)


def _normalised(func: Any, named: dict[str, Any]) -> SplitTensor:
    split = named["input"]
    if not isinstance(split, SplitTensor) or split.division.dim >= split.dim() - len(named["normalized_shape"]):
        raise SplitLostError("it normalises over the split dim")
    weights = [key for key in ("weight", "bias") if isinstance(named.get(key), Tensor)]
    entered = enter(split.axis, *(named[key] for key in weights))
    named = {**named, **dict(zip(weights, entered, strict=True)), "input": split.local}
    return like(split, func(**named))
