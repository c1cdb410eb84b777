"""What travels between the ranks of a tensor-parallel group, as steps of autograd.

Each name says what the forward does; the backward is its mirror image, such that a tensor which is whole on every rank has the
same, whole gradient on every rank (Shoeybi et al., "Megatron-LM" (2019), section 3; Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models" (2022), section 4).

| forward | backward |
|---|---|
| `enter`: nothing; what follows computes a part on every rank | `total` |
| `total`: sum over the ranks of what each computed | `enter` |
| `whole`: gather the parts | `part` |
| `part`: this rank's part of what is whole | `whole` |
| `whole_for_parts`: gather the parts, of which each rank computes a part of the result | `total_in_parts` |
| `total_in_parts`: sum over the ranks, each its part | `whole_for_parts` |

Backward is made of the same steps, so that gradients of gradients are right too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.layout import Layout, local_shape


def own_part(whole: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return this rank's part of a whole tensor, outside of any gradient's bookkeeping of its own; a view where it can be.

    Raises:
        SplitLostError: the ranks do not divide it.
    """
    if layout.sections == 1 and whole.shape[layout.dim] % axis.size == 0:
        length = whole.shape[layout.dim] // axis.size
        return whole.narrow(layout.dim, axis.rank * length, length)
    local_shape(whole.shape, layout, axis.size)  # which raises where they cannot
    split: Tensor = whole.unflatten(layout.dim, (layout.sections, axis.size, -1))
    part = split.select(layout.dim + 1, axis.rank)
    # A copy in the order of memory of the whole, in which dropout draws; flattening alone would turn it into rows.
    return part.clone(memory_format=torch.preserve_format).flatten(layout.dim, layout.dim + 1)


def all_parts(whole: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """Return every rank's part, (ranks, *part)."""
    split: Tensor = whole.unflatten(layout.dim, (layout.sections, axis.size, -1))
    return split.movedim(layout.dim + 1, 0).flatten(layout.dim + 1, layout.dim + 2)


def joined(parts: Tensor, layout: Layout) -> Tensor:
    """Return the whole of the parts that `all_parts` returns."""
    dim = layout.dim + 1
    split: Tensor = parts.unflatten(dim, (layout.sections, -1))
    return split.movedim(0, dim).flatten(layout.dim, layout.dim + 2).contiguous()


def enter(axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Let whole tensors into a computation of which every rank does a part; their gradients are added up, in one message."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return tensors
    entered = iter(_Enter.apply(axis, *(t for t in tensors if t.requires_grad)))  # type: ignore[no-untyped-call]
    return tuple(next(entered) if tensor.requires_grad else tensor for tensor in tensors)


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
    """Return this rank's part of a whole tensor.

    Raises:
        SplitLostError: the ranks do not divide it.
    """
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return own_part(tensor, layout, axis)
    out: Tensor = _Part.apply(tensor, layout, axis)  # type: ignore[no-untyped-call]
    return out


class _Enter(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Change nothing."""
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Add the gradients up."""
        # What was entered is not read again once its gradient is here.
        ctx.axis.forget()
        if len(gradients) == 1:
            return None, total(gradients[0], ctx.axis)
        flat = total(torch.cat([gradient.reshape(-1) for gradient in gradients]), ctx.axis)
        pieces = flat.split([gradient.numel() for gradient in gradients])
        return (None, *(p.view(g.shape).to(g.dtype) for p, g in zip(pieces, gradients, strict=True)))


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:
        """Add up; a tensor that autograd may use elsewhere is not written to."""
        ctx.axis = axis
        return axis.sum(part.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Hand the gradient to every rank's addend."""
        return enter(ctx.axis, gradient)[0], None


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, layout: Layout, axis: Axis, partial: bool) -> Tensor:
        """Gather."""
        ctx.layout, ctx.axis, ctx.partial = layout, axis, partial
        return joined(axis.gather(part), layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Take this rank's part, of the sum where each rank has computed with its own."""
        if ctx.partial:
            ctx.axis.forget()
            return total_in_parts(gradient, ctx.layout, ctx.axis), None, None, None
        return part(gradient, ctx.layout, ctx.axis), None, None, None


class _TotalInParts(Function):
    @staticmethod
    def forward(ctx: Any, addend: Tensor, layout: Layout, axis: Axis) -> Tensor:
        """Add up and keep this rank's part."""
        ctx.layout, ctx.axis = layout, axis
        return axis.sum_parts(all_parts(addend, layout, axis))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gather."""
        return whole_for_parts(gradient, ctx.layout, ctx.axis), None, None


class _Part(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, layout: Layout, axis: Axis) -> Tensor:
        """Keep this rank's part."""
        ctx.layout, ctx.axis = layout, axis
        return own_part(tensor, layout, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gather."""
        return whole(gradient, ctx.layout, ctx.axis), None, None
