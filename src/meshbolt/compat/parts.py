"""Where the parts of a DTensor lie in the whole, and the whole of them.

torch's own arithmetic knows parts that are one run of the whole, and warns of, or fails on, those that are several: a dim that
is divided section by section, as where queries, keys and values lie in one projection. So it stands here, for every placement,
and alike on every version of torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from meshbolt.compat.tensors import gather_into

Place = tuple[slice, ...]
# (start, length) of neighbouring elements, along one dim of the whole.
_Run = tuple[int, int]

_SUMS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def divided_placement(dim: int, sections: int) -> Placement:
    """Return the placement of a tensor that is divided along a dim, each of several sections of it by itself.

    Args:
        dim: that is divided.
        sections: equal runs of the dim; 1 for the plain shard.
    """
    return Shard(dim) if sections == 1 else _StridedShard(dim, split_factor=sections)


def own_pieces(tensor: DTensor) -> list[tuple[Place, Place]]:
    """Return where this rank's part of a tensor lies: pairs of a place in the part, and the same one's in the whole.

    Args:
        tensor: divided in any way, which may leave several runs on a rank, or none.
    """
    return _pieces(_runs(tensor, tensor.device_mesh.get_coordinate() or ()))


def sections_of(tensor: DTensor) -> dict[int, int]:
    """Return, by axis of the mesh, into how many sections the dim falls that this axis divides; all axes that divide one.

    FSDP2 writes the same placement for another thing: a dim that a later axis divides first. That is one section.
    """
    placements = tensor.placements
    sections: dict[int, int] = {}
    for axis, placement in enumerate(placements):
        if isinstance(placement, (Shard, _StridedShard)):
            is_later = any(_divides(placement, later) for later in placements[axis + 1 :])
            sections[axis] = 1 if is_later else int(getattr(placement, "split_factor", 1))
    return sections


@torch.no_grad()
def whole_of(tensor: DTensor) -> torch.Tensor:
    """Return a sharded tensor as a plain one with all of its values, outside autograd; a collective of the tensor's mesh.

    Args:
        tensor: divided in any way, or a sum that is not reduced yet.
    """
    part = _reduced(tensor)
    mesh = tensor.device_mesh
    axes = [axis for axis in sections_of(tensor) if mesh.size(axis) > 1]
    if not axes:
        return part
    own = cast("list[int]", list(mesh.get_coordinate() or ()))
    coordinates = list(itertools.product(*(range(mesh.size(axis)) for axis in axes)))
    runs = []
    for coordinate in coordinates:
        for axis, at in zip(axes, coordinate, strict=True):
            own[axis] = at
        runs.append(_runs(tensor, own))
    whole = part.new_empty(tensor.shape)
    room = max(math.prod(_shape(each)) for each in runs)
    for number, parts in enumerate(_gathered(part, room, [mesh.get_group(axis) for axis in axes]) if room else ()):
        shape = _shape(runs[number])
        values = parts[: math.prod(shape)].view(shape)
        for here, there in _pieces(runs[number]):
            whole[there] = values[here]
    return whole


def _reduced(tensor: DTensor) -> torch.Tensor:
    """Return this rank's part in memory of its own, summed where it is a sum over ranks."""
    local = tensor._local_tensor.detach()
    part = torch.empty(local.shape, dtype=local.dtype, device=_device(tensor)).copy_(local)
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Partial):
            continue
        dist.all_reduce(part, op=_SUMS[placement.reduce_op], group=tensor.device_mesh.get_group(axis))
        if placement.reduce_op == "avg":
            part /= tensor.device_mesh.size(axis)
    return part


def _device(tensor: DTensor) -> torch.device:
    """Return where a tensor's ranks communicate: its part may lie on the host while they do on GPUs."""
    kind = tensor.device_mesh.device_type
    local = tensor._local_tensor.device
    return local if local.type == kind or kind == "cpu" else torch.device(kind, torch.cuda.current_device())


def _gathered(part: torch.Tensor, room: int, groups: Sequence[dist.ProcessGroup]) -> torch.Tensor:
    """Return the parts of all ranks, (ranks, room), the last group's ranks next to each other."""
    flat = part.new_zeros(room)
    flat[: part.numel()] = part.view(-1)
    # As bytes: backends know few of the dtypes.
    content = flat.view(torch.uint8)
    for group in reversed(groups):
        parts = content.new_empty(group.size() * content.numel())
        gather_into(parts, content, group)
        content = parts
    return content.view(part.dtype).view(-1, room)


def _comes_last(placements: Sequence[Any], axis: int) -> bool:
    """Return whether FSDP2 has divided along an axis what a later one had divided already."""
    later = [other for other in placements[axis + 1 :] if _divides(placements[axis], other)]
    # torch 2.11 writes a plain shard where the later axis divides section by section.
    return bool(later) and any(isinstance(placement, _StridedShard) for placement in (placements[axis], *later))


def _divides(placement: Any, other: Placement) -> bool:
    return isinstance(other, (Shard, _StridedShard)) and other.dim == placement.dim


def _runs(tensor: DTensor, coordinate: Sequence[int]) -> list[list[_Run]]:
    """Return, for each dim, which runs of it a rank holds.

    Args:
        tensor: whose part it is.
        coordinate: of the rank in the tensor's mesh.
    """
    runs: list[list[_Run]] = [[(0, size)] for size in tensor.shape]
    sections = sections_of(tensor)
    placements: Sequence[Any] = tensor.placements
    for axis in sorted(sections, key=lambda axis: _comes_last(placements, axis)):
        dim = placements[axis].dim
        runs[dim] = _share(runs[dim], sections[axis], rank=coordinate[axis], ranks=tensor.device_mesh.size(axis))
    return runs


def _share(runs: Sequence[_Run], sections: int, *, rank: int, ranks: int) -> list[_Run]:
    """Return a rank's share of every section of some runs, as `torch.chunk` divides."""
    section = sum(length for _, length in runs) // sections
    own = -(-section // ranks)
    share: list[_Run] = []
    for start in range(0, section * sections, section) if section else ():
        first, last = start + min(rank * own, section), start + min((rank + 1) * own, section)
        position = 0
        for at, length in runs:
            begin, end = max(first - position, 0), min(last - position, length)
            if begin < end:
                share.append((at + begin, end - begin))
            position += length
    return share


def _shape(runs: Sequence[Sequence[_Run]]) -> tuple[int, ...]:
    return tuple(sum(length for _, length in of_dim) for of_dim in runs)


def _pieces(runs: Sequence[Sequence[_Run]]) -> list[tuple[Place, Place]]:
    """Return the pairs of places that runs along each dim make."""
    pairs: list[list[tuple[slice, slice]]] = []
    for of_dim in runs:
        position, along = 0, []
        for start, length in of_dim:
            along.append((slice(position, position + length), slice(start, start + length)))
            position += length
        pairs.append(along)
    return [
        (tuple(here for here, _ in chosen), tuple(there for _, there in chosen)) for chosen in itertools.product(*pairs)
    ]
