"""Whole parameters for a while, to read or to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt.compat import distributed_tensor, local_tensor, own_pieces, sections_of, whole_of
from meshbolt.errors import UnsupportedError


@dataclass
class _Gathered:
    """A tensor that stands in for a shard: the shard, and its whole copy."""

    shard: DTensor
    whole: torch.Tensor


@contextmanager
def gathered(
    module: nn.Module, *, names: dict[nn.Parameter, str], optimizers: list[Optimizer]
) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """Replace the sharded parameters of a module by whole ones; changes made in place are kept.

    Every rank enters and leaves together. A change counts where rank 0 makes it too; ranks that differ take rank 0's values.

    Args:
        module: a module, or one inside it; its units must not be gathered otherwise.
        names: names of all parameters, by sharded parameter.
        optimizers: also gather the state that these keep for the module's parameters.

    Yields:
        Optimizer state by parameter name and key, whole; empty without optimizers.
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    tensors: list[_Gathered] = []
    copies: dict[nn.Parameter, nn.Parameter] = {}
    state = _gather_state(module, names, optimizers, tensors)
    for child in module.modules():
        for key, parameter in list(child._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if parameter not in copies:
                copies[parameter] = nn.Parameter(whole_of(parameter), requires_grad=parameter.requires_grad)
                tensors.append(_Gathered(parameter, copies[parameter]))
            held.append((child, key, parameter))
            child._parameters[key] = copies[parameter]
    try:
        yield state
    finally:
        for child, key, parameter in held:
            child._parameters[key] = parameter
    for whole in copies.values():
        _refuse_gradient(whole)
    _write_back(tensors)


def _refuse_gradient(whole: nn.Parameter) -> None:
    """Let a backward fail that would leave a gradient on a parameter which nobody has any more."""

    def refuse(_: torch.Tensor) -> None:
        raise UnsupportedError(
            "A loss uses a parameter as it stood inside strategy.gathered(...), to where no gradient can flow back. Detach what "
            "you take from there. For a penalty on weights use the optimizer's weight_decay, or add its derivative to the "
            "gradients in on_before_optimizer_step."
        )

    if whole.requires_grad:
        whole.register_hook(refuse)


def _gather_state(
    module: nn.Module, names: dict[nn.Parameter, str], optimizers: list[Optimizer], tensors: list[_Gathered]
) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for optimizer in optimizers:
        for parameter in module.parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                state.setdefault(names[parameter], {})[key] = _whole_state(parameter, value, tensors)
    return state


def _whole_state(parameter: nn.Parameter, value: Any, tensors: list[_Gathered]) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor):
        return value
    shard = as_sharded(value, like=parameter)
    if not isinstance(shard, DTensor):
        return value
    whole = whole_of(shard)
    tensors.append(_Gathered(shard, whole))
    return whole


def as_sharded(value: torch.Tensor, *, like: DTensor) -> torch.Tensor:
    """Return optimizer state as a DTensor of the parameter's layout, where it has the shape of the parameter's shard.

    Args:
        value: state of one parameter: this rank's part in plain form, a DTensor, or a step count.
        like: the parameter.
    """
    if isinstance(value, DTensor) or value.shape != local_tensor(like).shape or (value.dim() == 0 and like.dim() > 0):
        return value
    return distributed_tensor(value, like=like, placements=like.placements)


@torch.no_grad()
def _write_back(tensors: list[_Gathered]) -> None:
    """Write the whole tensors that any rank changed into the shards, with rank 0's values."""
    if not tensors:
        return
    changed = torch.tensor([float(_differs(held)) for held in tensors], device=local_tensor(tensors[0].shard).device)
    dist.all_reduce(changed, op=dist.ReduceOp.MAX)
    for held, flag in zip(tensors, changed.tolist(), strict=True):
        if flag:
            whole = held.whole.detach()
            dist.broadcast(whole, src=0)
            local_tensor(held.shard).copy_(local_part(whole, like=held.shard))


def _differs(held: _Gathered) -> bool:
    return not torch.equal(local_part(held.whole.detach(), like=held.shard), local_tensor(held.shard))


def local_part(whole: torch.Tensor, *, like: DTensor) -> torch.Tensor:
    """Return the part of a whole tensor that this rank would hold, without communication.

    Args:
        whole: of the shape of `like`.
        like: a sharded tensor; its layout.
    """
    pieces = own_pieces(like)
    if len(pieces) == 1:
        return whole[pieces[0][1]].reshape(local_tensor(like).shape)
    part = whole.new_empty(local_tensor(like).shape)
    for here, there in pieces:
        part[here] = whole[there]
    return part


def own_part_of_copy(copy: torch.Tensor, *, like: DTensor) -> torch.Tensor:
    """Return the part of a gathered copy that this rank holds as a shard; a view.

    Args:
        copy: whole, or over the ranks that share a layer divided as the shard is.
        like: the shard.
    """
    if not isinstance(copy, DTensor):
        return local_part(copy, like=like)
    part, placements = local_tensor(copy), like.placements
    # Of a divided layer the copy has what this rank has of it: units share that among the data-parallel ranks only.
    names = like.device_mesh.mesh_dim_names or ()
    for axis in (axis for axis in sections_of(like) if names[axis].startswith("dp_")):
        dim: int = placements[axis].dim  # type: ignore[attr-defined]
        pieces = part.chunk(like.device_mesh.size(axis), dim)
        own = like.device_mesh.get_local_rank(axis)
        part = pieces[own] if own < len(pieces) else part.narrow(dim, 0, 0)
    return part
