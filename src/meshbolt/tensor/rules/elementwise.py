"""Operations on each element by itself: any split is kept, and other operands are cut to fit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import enter, own_part, part
from meshbolt.tensor.layout import Layout, SplitLostError, whole_shape, whole_strides
from meshbolt.tensor.part import Split
from meshbolt.tensor.split import TENSORS, gathered, like, named, rule

_OF_ELEMENTS = """
abs absolute neg negative positive sign sgn square reciprocal exp exp2 expm1 log
log1p log2 log10 sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh sigmoid
erf erfc erfinv logit relu gelu silu elu selu celu leaky_relu mish softplus
hardtanh relu6 hardswish hardsigmoid hardshrink softshrink logsigmoid softsign tanhshrink
threshold clamp clamp_min clamp_max clip nan_to_num isnan isinf isfinite isclose round
floor ceil trunc fix frac angle conj resolve_conj resolve_neg
add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow
maximum minimum fmax fmin rsub atan2 hypot logaddexp xlogy copysign
masked_fill addcmul addcdiv lerp eq ne lt le gt ge greater less not_equal
logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
__pow__ __eq__ __ne__ __radd__ __rsub__ __rmul__ __rdiv__ __rtruediv__ __rpow__
__floordiv__ __rfloordiv__ __rmod__ __and__ __or__ __xor__ __invert__
contiguous clone detach float double half bfloat16 bool long int cpu cuda
"""
_IN_PLACE = """
add_ sub_ mul_ div_ neg_ pow_ clamp_ clamp_min_ clamp_max_ masked_fill_ relu_ sigmoid_
tanh_ exp_ sqrt_ rsqrt_ square_ abs_ zero_ fill_ copy_ addcmul_ addcdiv_ lerp_
silu_ leaky_relu_ elu_ hardtanh_ celu_ selu_ logical_not_ floor_divide_ remainder_
__iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __ifloordiv__ __imod__
__iand__ __ior__ __ixor__
"""


@rule(*_OF_ELEMENTS.split())
def elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the function to the parts."""
    if not kwargs and len(args) <= 2 and (result := _simply(func, *args)) is not None:
        return result
    split, local_args, local_kwargs = parts_of(args, kwargs)
    result = func(*local_args, **local_kwargs)
    if result is split.local:
        return split  # changed in place
    return like(split, result, split.division.moved(result.dim() - split.dim() + split.division.dim))


def _simply(func: Any, first: Any, second: Any = None) -> Split | None:
    """Return the result for the operands that most calls have, in less time; None for others."""
    if not isinstance(first, Split):
        return None
    if second is None:
        local = func(first.local)
    elif isinstance(second, Split):
        alike = first.division == second.division and first._shape == second._shape
        if not alike or first.along_sequence != second.along_sequence:
            return None
        local = func(first.local, second.local)
    elif isinstance(second, TENSORS):
        if second.dim() > first.dim():
            return None
        local = func(first.local, *_cut_all([second], first, first.dim() - first.division.dim))
    else:
        local = func(first.local, second)
    return like(first, local)


@rule("where")
def where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Choose element by element."""
    if len(args) + len(kwargs) < 3:
        raise SplitLostError("it asks for the places that are not zero")
    return elementwise(func, args, kwargs)


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def filled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a tensor that is split like another."""
    if kwargs.get("requires_grad"):
        raise SplitLostError("its result would have a gradient of its own")
    return elementwise(func, args, kwargs)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
def new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a whole tensor, of the same dtype where the split one is."""
    split, *others = args
    if not isinstance(split, Split) or any(isinstance(value, Split) for value in [*others, *kwargs.values()]):
        raise SplitLostError("it is made of a split one")
    return func(split.local, *others, **kwargs)


@rule("to", "type_as", "type")
def cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take another dtype or device, or those of another tensor."""
    first = args[0]
    args = tuple(value.local if isinstance(value, Split) else value for value in args)
    kwargs = {key: value.local if isinstance(value, Split) else value for key, value in kwargs.items()}
    result = func(*args, **kwargs)
    return like(first, result) if isinstance(first, Split) and isinstance(result, TENSORS) else result


@rule("is_contiguous", "stride")
def in_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Say how the whole would lie in memory."""
    split = args[0]
    if func is torch.Tensor.is_contiguous:
        return func(split.local, *args[1:], **kwargs)
    strides = whole_strides(split.local.shape, split.local.stride(), split.division, split.axis.size)
    dim = named(("self", "dim"), args, kwargs).get("dim")
    return strides if dim is None else strides[dim]


@rule("register_hook", "retain_grad")
def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Watch the gradient, which is split as the tensor is."""
    split = args[0]
    if func is torch.Tensor.retain_grad:
        return split.local.retain_grad()
    hook = named(("self", "hook"), args, kwargs)["hook"]

    def on_part(gradient: Tensor) -> Any:
        changed = hook(like(split, gradient))
        if changed is None or isinstance(changed, Split):
            return None if changed is None else changed.local
        return own_part(changed, split.division, split.axis)

    return split.local.register_hook(on_part)


@rule(*_IN_PLACE.split())
def in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change the part of the first operand."""
    target = args[0]
    if not isinstance(target, Split):
        raise SplitLostError("it writes what is split into a whole tensor")
    split, local_args, local_kwargs = parts_of(args, kwargs)
    if split is not target:
        raise SplitLostError("its operands are split differently")
    target.local = func(*local_args, **local_kwargs)
    return target


def parts_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Split, list[Any], dict[str, Any]]:
    """Return the first split operand, and the arguments with every tensor cut to this rank's part.

    Whole operands that have the split dim are cut; those without it, or with one element there, meet every part. Either way
    each rank's gradient of them is only its part of it, which is made up for.

    Raises:
        SplitLostError: operands are split differently.
    """
    operands = [*args, *kwargs.values()]
    splits = [value for value in operands if isinstance(value, Split)]
    most = max([split.dim() for split in splits])
    first = next(split for split in splits if split.dim() == most)
    behind = first.dim() - first.division.dim
    for other in splits:
        if (other.dim() - other.division.dim, other.division.sections) != (behind, first.division.sections):
            if any(split.along_sequence for split in splits):
                return parts_of(*_whole_sequences(args, kwargs, splits))
            raise SplitLostError(f"its operands are split differently, {first.division} and {other.division}")
        if other.shape[other.division.dim] != first.shape[first.division.dim]:
            raise SplitLostError("its operands have different sizes at the split dim")
    plain = [value for value in operands if isinstance(value, TENSORS) and not isinstance(value, Split)]
    cut = dict(zip(map(id, plain), _cut_all(plain, first, behind), strict=True)) if plain else {}

    def local(value: Any) -> Any:
        if isinstance(value, Split):
            return value.local
        return cut[id(value)] if isinstance(value, TENSORS) else value

    return first, [local(value) for value in args], {key: local(value) for key, value in kwargs.items()}


def _whole_sequences(args: Any, kwargs: Any, splits: list[Split]) -> tuple[Any, Any]:
    """Return the arguments with one split left: what is split along the sequence gives way to what is split otherwise."""
    kept = min(splits, key=lambda split: split.along_sequence)

    def changed(value: Any) -> Any:
        gives_way = isinstance(value, Split) and value.along_sequence and value is not kept
        return gathered(value) if gives_way else value

    return tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()}


def _cut_all(plain: list[Tensor], first: Split, behind: int) -> list[Tensor]:
    size, sections, axis = first.shape[first.division.dim], first.division.sections, first.axis
    cut: list[Tensor] = []
    shared: list[int] = []
    for place, tensor in enumerate(plain):
        dim = tensor.dim() - behind
        if dim < 0 or tensor.shape[dim] == 1:
            shared.append(place)
        elif tensor.shape[dim] != size:
            raise SplitLostError("its operands have different sizes at the split dim")
        elif tensor.requires_grad and not axis.exchanges:
            raise SplitLostError("it meets a whole tensor that has a gradient")
        else:
            tensor = part(tensor, Layout(dim, sections), axis)
        cut.append(tensor)
    for place, entered in zip(shared, enter(axis, *(plain[place] for place in shared)), strict=True):
        cut[place] = entered
    return cut


@rule("dropout")
def dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Drop what one process would drop: the mask is drawn for the whole tensor, on every rank from the same random state.

    Of a turned tensor with one element a rank along the split dim, it may be another process's mask, as good as any: torch
    draws in the order of memory, which the part does not tell then (`whole_strides`).
    """
    names = ("input", "p", "training", "inplace") if func is F.dropout else ("input", "p", "train")
    given = named(names, args, kwargs)
    split, probability = given["input"], given.get("p", 0.5)
    if not isinstance(split, Split) or not 0 <= probability <= 1:
        raise SplitLostError("its arguments are not a tensor and a probability")
    if not given.get("training", given.get("train", True)) or probability == 0:
        return split
    noise = drawn_noise(split.local, split.division, split.axis, probability)
    if given.get("inplace"):
        split.local.mul_(noise)
        return split
    return like(split, split.local * noise)


def drawn_noise(local: Tensor, layout: Layout, axis: Axis, probability: float) -> Tensor:
    """Return this rank's part of what dropout multiplies a whole tensor with.

    Args:
        local: this rank's part of the tensor.
        layout: of the whole.
        axis: the ranks.
        probability: of being dropped.
    """
    shape = whole_shape(local.shape, layout, axis.size)
    strides = whole_strides(local.shape, local.stride(), layout, axis.size)
    # Drawn is in the order of memory, which torch knows for its own copies of a tensor.
    strides = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    noise = torch.empty_strided(shape, strides, dtype=local.dtype, device=local.device)
    if probability == 1:
        noise.zero_()
    elif noise.is_cuda:
        # There, torch draws in a way of its own.
        kept = torch.native_dropout(noise.zero_(), probability, True)[1]
        return own_part(kept, layout, axis).to(noise.dtype).div_(1 - probability)
    else:
        noise.bernoulli_(1 - probability).div_(1 - probability)
    return own_part(noise, layout, axis)
