"""Operations on each element by itself: any split is kept, and other operands are cut to fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meshbolt.tensor.exchange import enter, own_part, part
from meshbolt.tensor.layout import Layout, SplitLostError
from meshbolt.tensor.split import SplitTensor, gathered, like, rule


@rule(
    *(
        "abs",
        "neg",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "log2",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "sin",
        "cos",
        "tanh",
    ),
    *(
        "sigmoid",
        "erf",
        "sign",
        "square",
        "relu",
        "gelu",
        "silu",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "mish",
        "softplus",
    ),
    *(
        "hardtanh",
        "relu6",
        "hardswish",
        "hardsigmoid",
        "logsigmoid",
        "softsign",
        "tanhshrink",
        "clamp",
        "clip",
        "nan_to_num",
    ),
    *(
        "isnan",
        "isinf",
        "isfinite",
        "logical_not",
        "round",
        "floor",
        "ceil",
        "trunc",
        "zeros_like",
        "ones_like",
        "full_like",
    ),
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "maximum", "minimum", "rsub"),
    *(
        "where",
        "masked_fill",
        "addcmul",
        "addcdiv",
        "lerp",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "logical_and",
        "logical_or",
    ),
    *("__radd__", "__rsub__", "__rmul__", "__rdiv__", "__rtruediv__", "__rpow__", "__and__", "__or__", "__invert__"),
    *("contiguous", "clone", "detach", "float", "double", "half", "bfloat16", "bool", "empty_like"),
    also=(torch.Tensor.__pos__,),
)
def elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the function to the parts."""
    split, local_args, local_kwargs = parts_of(args, kwargs)
    return _wrapped(split, func(*local_args, **local_kwargs))


@rule("to", "type_as")
def cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take another dtype or device, or those of another tensor."""
    first, *others = args
    others = [other.local if isinstance(other, SplitTensor) else other for other in others]
    if not isinstance(first, SplitTensor):
        return func(first, *others, **kwargs)
    return like(first, func(first.local, *others, **kwargs))


@rule(
    *("add_", "sub_", "mul_", "div_", "neg_", "clamp_", "masked_fill_", "relu_", "sigmoid_", "tanh_", "exp_", "pow_"),
    *("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"),
)
def in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change the part of the first operand."""
    target = args[0]
    if not isinstance(target, SplitTensor):
        return func(*gathered(args), **gathered(kwargs))
    split, local_args, local_kwargs = parts_of(args, kwargs)
    if split is not target:
        raise SplitLostError("its operands are split differently")
    changed = func(*local_args, **local_kwargs)
    if changed.shape != target.local.shape:
        raise AssertionError("An operation in place has changed a shape.")
    target.local = changed
    return target


def parts_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[SplitTensor, list[Any], dict[str, Any]]:
    """Return the first split operand, and the arguments with every tensor cut to this rank's part.

    Whole operands that have the split dim are cut; those without it, or with one element there, meet every part. Either way
    each rank's gradient of them is only its part of it, which is made up for.

    Raises:
        SplitLostError: operands are split differently.
    """
    operands = [*args, *kwargs.values()]
    splits = [value for value in operands if isinstance(value, SplitTensor)]
    first = max(splits, key=lambda split: split.dim())
    behind = first.dim() - first.division.dim
    for other in splits:
        if (other.dim() - other.division.dim, other.division.sections) != (behind, first.division.sections):
            raise SplitLostError(f"its operands are split differently, {first.division} and {other.division}")
        if other.shape[other.division.dim] != first.shape[first.division.dim]:
            raise SplitLostError("its operands have different sizes at the split dim")
    plain = [value for value in operands if isinstance(value, Tensor) and not isinstance(value, SplitTensor)]
    cut = dict(zip(map(id, plain), _cut_all(plain, first, behind), strict=True)) if plain else {}

    def local(value: Any) -> Any:
        if isinstance(value, SplitTensor):
            return value.local
        return cut[id(value)] if isinstance(value, Tensor) else value

    return first, [local(value) for value in args], {key: local(value) for key, value in kwargs.items()}


def _cut_all(plain: list[Tensor], first: SplitTensor, behind: int) -> list[Tensor]:
    if first.dim() < max(tensor.dim() for tensor in plain) and any(
        tensor.dim() > first.dim() and first.division.dim != first.dim() - behind for tensor in plain
    ):
        raise SplitLostError("an operand has more dims")
    has_dim = [tensor.dim() >= behind and tensor.shape[tensor.dim() - behind] != 1 for tensor in plain]
    for tensor, has in zip(plain, has_dim, strict=True):
        if has and tensor.shape[tensor.dim() - behind] != first.shape[first.division.dim]:
            raise RuntimeError(
                f"Tensors of the shapes {tuple(first.shape)} and {tuple(tensor.shape)} cannot be broadcast together."
            )
    if not first.axis.exchanges and any(has and t.requires_grad for t, has in zip(plain, has_dim, strict=True)):
        raise SplitLostError("it meets a whole tensor that has a gradient")
    shared = iter(enter(first.axis, *(t for t, has in zip(plain, has_dim, strict=True) if not has)))
    return [
        part(tensor, Layout(tensor.dim() - behind, first.division.sections), first.axis) if has else next(shared)
        for tensor, has in zip(plain, has_dim, strict=True)
    ]


def _wrapped(split: SplitTensor, result: Any) -> Any:
    dim = result.dim() - (split.dim() - split.division.dim)
    return like(split, result, split.division.moved(dim))


@rule("dropout", "dropout_", "feature_alpha_dropout_", "alpha_dropout_")
def dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drop what one process would drop: the mask is drawn for the whole tensor, on every rank from the same random state."""
    if getattr(func, "__name__", "") != "dropout":
        raise SplitLostError("only dropout() keeps a split")
    named = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    split: SplitTensor = named["input"]
    probability = named.get("p", 0.5)
    if func is torch.dropout and "train" in named:
        named["training"] = named["train"]
    if not named.get("training", True) or probability == 0:
        return split
    return like(split, split.local * drawn_noise(split, probability))


def drawn_noise(split: SplitTensor, probability: float) -> Tensor:
    """Return this rank's part of what dropout multiplies a tensor with."""
    if probability >= 1:
        return torch.zeros_like(split.local)
    order = sorted(range(split.dim()), key=lambda dim: -split.local.stride(dim))
    noise = split.local.new_empty([split.shape[dim] for dim in order])
    # In the order of memory, in which torch draws.
    noise = noise.permute([order.index(dim) for dim in range(split.dim())])
    noise.bernoulli_(1 - probability).div_(1 - probability)
    return own_part(noise, split.division, split.axis)
