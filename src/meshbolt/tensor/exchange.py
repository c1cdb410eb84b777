"""What travels between the ranks of a tensor-parallel group, as steps of autograd.

Each name says what the forward does; the backward is its mirror image, such that a tensor which is whole on every rank has the
same, whole gradient on every rank (Shoeybi et al., "Megatron-LM" (2019), section 3; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models" (2022), section 4).

| forward | backward |
|---|---|
| `enter`: nothing; what follows computes a part on every rank | sum over the ranks |
| `total`: sum over the ranks of what each computed | nothing |
| `whole`: gather the parts | this rank's part |
| `whole_for_parts`: gather the parts, of which each rank computes a part of the result | sum over the ranks, each its part |
| `total_in_parts`: sum over the ranks, each its part | gather the parts |
| `part`: this rank's part of what is whole | gather the parts |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.layout import Layout


def own_part(whole: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return this rank's part of a whole tensor, outside of any gradient's bookkeeping of its own; a view where it can be."""
    if layout.sections == 1:
        length = whole.shape[layout.dim] // axis.size
        return whole.narrow(layout.dim, axis.rank * length, length)
    split = whole.unflatten(layout.dim, (layout.sections, axis.size, -1))
    return split.select(layout.dim + 1, axis.rank).flatten(layout.dim, layout.dim + 1)


def all_parts(whole: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return every rank's part, (ranks, *part)."""
    split = whole.unflatten(layout.dim, (layout.sections, axis.size, -1))
    return split.movedim(layout.dim + 1, 0).flatten(layout.dim + 1, layout.dim + 2)


def joined(parts: Tensor, layout: Layout) -> Tensor:
    """Return the whole of the parts that `all_parts` returns."""
    dim = layout.dim + 1
    split = parts.unflatten(dim, (layout.sections, -1))
    return split.movedim(0, dim).flatten(layout.dim, layout.dim + 2).contiguous()


def enter(axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Let whole tensors into a computation of which every rank does a part; their gradients are added up, in one message."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return tensors
    entered: tuple[Tensor, ...] = _Enter.apply(axis, *tensors)  # type: ignore[no-untyped-call]
    return entered


def total(part: Tensor, axis: Axis) -> Tensor:
    """Return the sum over the ranks."""
    out: Tensor = _Total.apply(part, axis)  # type: ignore[no-untyped-call]
    return out


def whole(part: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return the whole tensor, for what every rank goes on to compute alike."""
    out: Tensor = _Whole.apply(part, layout, axis, False)  # type: ignore[no-untyped-call]
    return out


def whole_for_parts(part: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return the whole tensor, for a computation of which every rank does a part."""
    out: Tensor = _Whole.apply(part, layout, axis, True)  # type: ignore[no-untyped-call]
    return out


def total_in_parts(addend: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return this rank's part of the sum over the ranks."""
    out: Tensor = _TotalInParts.apply(addend, layout, axis)  # type: ignore[no-untyped-call]
    return out


def part(tensor: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return this rank's part of a whole tensor."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return own_part(tensor, layout, axis)
    out: Tensor = _Part.apply(tensor, layout, axis)  # type: ignore[no-untyped-call]
    return out


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        if len(gradients) == 1:
            # A gradient that autograd may use elsewhere is not written to.
            return None, ctx.axis.sum(gradients[0].clone(memory_format=torch.contiguous_format))
        flat = ctx.axis.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        return (None, *(s.view(g.shape) for s, g in zip(flat.split(sizes), gradients, strict=True)))


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:  # type: ignore[override]
        return axis.sum(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient, None


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, layout: Layout, axis: Axis, partial: bool) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.axis, ctx.partial = layout, axis, partial
        return joined(axis.gather(part), layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        if ctx.partial:
            return ctx.axis.sum_parts(all_parts(gradient, ctx.layout, ctx.axis)), None, None, None
        return own_part(gradient, ctx.layout, ctx.axis), None, None, None


class _TotalInParts(Function):
    @staticmethod
    def forward(ctx: Any, addend: Tensor, layout: Layout, axis: Axis) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.axis = layout, axis
        return axis.sum_parts(all_parts(addend, layout, axis))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return joined(ctx.axis.gather(gradient), ctx.layout), None, None


class _Part(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, layout: Layout, axis: Axis) -> Tensor:  # type: ignore[override]
        ctx.layout, ctx.axis = layout, axis
        return own_part(tensor, layout, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return joined(ctx.axis.gather(gradient), ctx.layout), None, None
