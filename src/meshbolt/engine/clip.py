"""Gradient norms and clipping over any mix of meshes, without gathering a gradient.

A parameter's gradient is a plain tensor (equal on every rank) or a DTensor. Along a mesh axis where it is replicated
all ranks hold the same numbers, and they are counted once; along an axis where it is sharded each rank holds a part. So
each rank sums what it holds, in one number for all gradients that are sharded over the same ranks, and adds that number
up over exactly those ranks. torch's `clip_grad_norm_` gives the same norm but cannot mix meshes.

Sums of powers are kept in float64 whatever the gradients are: it costs nothing for a few numbers, and makes the norm
nearly independent of how many ranks it was summed over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import device_of, local_tensor
from meshbolt.errors import ConfigError

_Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a rank counts of a norm, where ranks hold different parameters.

    Attributes:
        not_here: parameters that another rank counts, which holds them too.
        over: the ranks that hold different parameters; None where all hold the same.
    """

    not_here: frozenset[nn.Parameter] = frozenset()
    over: dist.ProcessGroup | None = None


EVERYTHING = Counted()


@torch.no_grad()
def global_norm(params: Iterable[nn.Parameter], *, norm_type: float = 2.0, counted: Counted = EVERYTHING) -> Tensor:
    """Return the norm of all gradients as if they were one vector on one device.

    Every rank has to call this with the same parameters in the same order, and gradients missing on one rank have to be
    missing on all. Communicates one all-reduce of a number for each mesh axis (or set of axes) that gradients are
    sharded over.

    Args:
        params: parameters, a repeated one counts once; those without a gradient count nothing.
        norm_type: order p of the norm, any positive number or infinity.
        counted: by this rank, where others hold other parameters.

    Returns:
        A plain 0-dim tensor with the same value on every rank: float64 if a gradient is, else float32.

    Raises:
        ConfigError: `norm_type` is not a positive number.
    """
    return _norm(_gradients(params), norm_type=norm_type, counted=counted)


@torch.no_grad()
def clip_norm_(
    params: Iterable[nn.Parameter],
    max_norm: float,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    counted: Counted = EVERYTHING,
) -> Tensor:
    """Scale all gradients down in place so that their global norm is at most `max_norm`.

    Args:
        params: as in `global_norm`.
        max_norm: the largest norm, >= 0. Gradients are multiplied by max_norm / (norm + 1e-6) where that is below 1.
        norm_type: as in `global_norm`.
        error_if_nonfinite: raise instead of clipping if the norm is inf or NaN; this waits for the device.
        counted: as in `global_norm`.

    Returns:
        The norm before clipping, as `global_norm` returns it.

    Raises:
        ConfigError: `max_norm` is negative or NaN, or `norm_type` not a positive number.
        RuntimeError: the norm is inf or NaN and `error_if_nonfinite` is set; on every rank.
    """
    if not max_norm >= 0:
        raise ConfigError(f"Gradients were to be clipped to a norm of {max_norm}; give a number that is not negative.")
    gradients = _gradients(params)
    norm = _norm(gradients, norm_type=norm_type, counted=counted)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(
            f"The gradients have a norm (order {norm_type:g}) of {norm.item()} and cannot be clipped to {max_norm:g}: "
            "some of them are inf or NaN. Look for the cause in the loss, or pass error_if_nonfinite=False to go on."
        )
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for tensors in _alike(map(local_tensor, gradients.values())):
        torch._foreach_mul_(tensors, coefficient.to(tensors[0].device))
    return norm


@torch.no_grad()
def clip_value_(params: Iterable[nn.Parameter], value: float) -> None:
    """Clamp every element of every gradient to [-value, value] in place; needs no communication.

    Args:
        params: parameters, those without a gradient are left alone.
        value: the largest magnitude, >= 0.

    Raises:
        ConfigError: `value` is negative or NaN.
    """
    if not value >= 0:
        raise ConfigError(f"Gradients were to be clipped to values of {value}; give a number that is not negative.")
    for tensors in _alike(map(local_tensor, _gradients(params).values())):
        torch._foreach_clamp_min_(tensors, -value)
        torch._foreach_clamp_max_(tensors, value)


def _gradients(params: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    return {param: param.grad for param in params if param.grad is not None}


def _alike(tensors: Iterable[Tensor]) -> Collection[list[Tensor]]:
    """Return the tensors in lists of one device and one dtype, which is what torch's foreach kernels are fast for."""
    lists: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return lists.values()


def _norm(gradients: Mapping[nn.Parameter, Tensor], *, norm_type: float, counted: Counted) -> Tensor:
    if not norm_type > 0:
        raise ConfigError(f"A norm of order {norm_type} was asked for; give a positive number or inf.")
    own = [gradient for param, gradient in gradients.items() if param not in counted.not_here]
    dtype = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients.values()) else torch.float32
    parts = [_sharded_part(tensors, groups, norm_type) for groups, tensors in _by_sharding(own).items()]
    if counted.over is not None:
        parts = [_over_stages(parts, norm_type, counted.over)]
    if not parts:
        return torch.zeros((), dtype=dtype)
    norm = _sum_of(parts, norm_type)
    return (norm if math.isinf(norm_type) else norm.pow(1.0 / norm_type)).to(dtype)


def _sum_of(parts: list[Tensor], norm_type: float) -> Tensor:
    total = torch.stack([part.to(parts[0].device) for part in parts])
    # amax, unlike a MAX all-reduce, keeps NaN.
    return total.amax() if math.isinf(norm_type) else total.sum()


def _over_stages(parts: list[Tensor], norm_type: float, group: dist.ProcessGroup) -> Tensor:
    """Return the part of all ranks of a group, each of which has another one, or none."""
    device = parts[0].device if parts else device_of(group)
    own = _sum_of([torch.zeros((), dtype=torch.float64, device=device), *parts], norm_type)
    every = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(every, own, group=group)
    return _sum_of(every, norm_type)


def _by_sharding(gradients: list[Tensor]) -> dict[_Groups, list[Tensor]]:
    """Return local gradients under the process groups they are sharded over; no group for those that are whole."""
    by_groups: dict[_Groups, list[Tensor]] = {}
    for gradient in gradients:
        by_groups.setdefault(_sharding_groups(gradient), []).append(local_tensor(gradient))
    return by_groups


def _sharding_groups(gradient: Tensor) -> _Groups:
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    if any(placement.is_partial() for placement in gradient.placements):
        raise AssertionError(
            f"A gradient of shape {tuple(gradient.shape)} was to be clipped before it was reduced: its placements are "
            f"{gradient.placements} on the mesh {mesh}"
        )
    axes = [axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(axis) for axis in axes)


def _sharded_part(tensors: list[Tensor], groups: _Groups, norm_type: float) -> Tensor:
    """Return what gradients sharded over the same groups add to the norm.

    That is the sum of |x|^p, or for the infinity norm the maximum of |x|, over all ranks of the groups; in float64.
    """
    norms = _tensor_norms(tensors, norm_type)
    if not math.isinf(norm_type):
        return _reduce(norms.pow(norm_type).sum(), groups, dist.ReduceOp.SUM)
    # Backends differ in what the maximum of NaN and a number is: NaN travels as a flag of its own.
    largest = norms.amax()
    pair = torch.stack([largest.nan_to_num(nan=0.0, posinf=math.inf), largest.isnan().double()])
    largest, has_nan = _reduce(pair, groups, dist.ReduceOp.MAX).unbind()
    return torch.where(has_nan > 0, math.nan, largest)


def _tensor_norms(tensors: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of each tensor and a zero, in one float64 vector; tensors without elements are left out."""
    norms = [torch.zeros((), dtype=torch.float64, device=tensors[0].device)]
    filled = [tensor for tensor in tensors if tensor.numel() > 0]  # an empty tensor has no infinity norm
    for alike in _alike(filled):
        wide = torch.promote_types(alike[0].dtype, torch.float32)
        norms.extend(norm.to(norms[0]) for norm in torch._foreach_norm(alike, norm_type, dtype=wide))
    return torch.stack(norms)


def _reduce(number: Tensor, groups: _Groups, op: dist.ReduceOp.RedOpType) -> Tensor:
    for group in groups:
        # Gradients of parameters that lie on the host are there too, while ranks talk from their GPUs.
        number = number.to(device_of(group)) if number.device.type == "cpu" else number
        dist.all_reduce(number, op=op, group=group)
    return number
