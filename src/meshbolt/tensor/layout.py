"""Where a tensor is split, and the arithmetic of views: nothing here needs a tensor or a process group.

One dim of a tensor is divided among the ranks of the `tp` axis. In memory order that dim is `sections` runs of equal length,
and each rank has its share of every run: one section for a plain split, three where queries, keys and values lie in one
projection and each is to be divided by heads.

    dim of 12, 2 ranks, 1 section:    rank 0 has 0 1 2 3 4 5           rank 1 has 6 7 8 9 10 11
    dim of 12, 2 ranks, 3 sections:   rank 0 has 0 1, 4 5, 8 9         rank 1 has 2 3, 6 7, 10 11
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from meshbolt.errors import MeshboltError


class SplitLostError(MeshboltError):
    """A split cannot be kept through an operation.

    Attributes:
        sections: of how many sections the dim would have to be; None where that does not help.
    """

    def __init__(self, reason: str, *, sections: int | None = None) -> None:
        """Say why.

        Args:
            reason: in words, without the name of the operation.
            sections: as the attribute.
        """
        super().__init__(reason)
        self.sections = sections


@dataclass(frozen=True)
class Layout:
    """How a tensor is split.

    Attributes:
        dim: the dim that is divided, counted from the front.
        sections: runs of equal length that each are divided among the ranks.
    """

    dim: int
    sections: int = 1

    def moved(self, dim: int) -> Layout:
        """Return the same split of another dim."""
        return self if dim == self.dim else Layout(dim, self.sections)


def local_shape(shape: Sequence[int], layout: Layout, ranks: int) -> tuple[int, ...]:
    """Return the shape of each rank's part.

    Raises:
        SplitLostError: the ranks do not divide a section.
    """
    size = shape[layout.dim]
    if size % (layout.sections * ranks):
        raise SplitLostError(f"{size} cannot be divided into {layout.sections} x {ranks} equal parts")
    return (*shape[: layout.dim], size // ranks, *shape[layout.dim + 1 :])


def whole_shape(shape: Sequence[int], layout: Layout, ranks: int) -> tuple[int, ...]:
    """Return the shape of the whole, of which a part has this shape."""
    sizes = list(shape)
    sizes[layout.dim] *= ranks
    return tuple(sizes)


def whole_strides(part: Sequence[int], strides: Sequence[int], layout: Layout, ranks: int) -> tuple[int, ...]:
    """Return the strides of the whole, were it in memory as a part is: dims that lie outside of the split one are wider apart.

    Of a split dim with one element a rank, torch may have forgotten where it lay; then it is taken to lie right inside of the
    dim that has the same stride, as it does in views of a contiguous tensor.

    Args:
        part: shape of a rank's part.
        strides: of that part.
        layout: how the whole is split.
        ranks: of the axis.
    """
    own = strides[layout.dim]
    outside = [s > own or (s == own and dim != layout.dim and part[dim] > 1) for dim, s in enumerate(strides)]
    return tuple(s * ranks if is_outside else s for s, is_outside in zip(strides, outside, strict=True))


def dim_from_front(dim: int, dims: int) -> int:
    """Return a dim, which may be counted from the back, counted from the front.

    Args:
        dim: as the caller of an operation wrote it.
        dims: how many there are.

    Raises:
        SplitLostError: there is no such dim.
    """
    if not -dims <= dim < dims:
        raise SplitLostError(f"there is no dim {dim} among {dims}")
    return dim % dims


def resolved_shape(shape: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Return a shape that may have one -1 in it with its value there.

    Args:
        shape: what is to be viewed.
        wanted: as the caller of `view` wrote it.
    """
    if -1 not in wanted:
        return tuple(wanted)
    rest = math.prod([size for size in wanted if size != -1])
    inferred = math.prod(shape) // rest if rest else 0
    return tuple(inferred if size == -1 else size for size in wanted)


def viewed(shape: Sequence[int], layout: Layout, wanted: Sequence[int], ranks: int) -> Layout:
    """Return how a tensor is split after a view.

    The dims of both shapes fall into groups of equal numbers of elements; only the group with the split dim matters. Flat,
    that group is `sections` runs again, of as many as there are elements before the split dim, times its own.

    Args:
        shape: of the whole tensor.
        layout: how it is split.
        wanted: the whole shape after the view, without -1.
        ranks: of the axis.

    Raises:
        SplitLostError: no dim of the result is split evenly.
    """
    group = _group_of(shape, layout.dim, wanted)
    first = group.old.index(layout.dim)
    sections = layout.sections * math.prod([shape[dim] for dim in group.old[:first]])
    prefix = 1
    for dim in group.new:
        own, rest = divmod(sections, prefix)
        if not rest and own and wanted[dim] and wanted[dim] % (own * ranks) == 0:
            return Layout(dim, own)
        prefix *= wanted[dim]
    raise SplitLostError(
        f"a view as {tuple(wanted)} of {tuple(shape)}, split at dim {layout.dim} over {ranks} ranks, has no dim that "
        f"{ranks} ranks can divide",
        sections=_better_sections(wanted, group, layout, ranks),
    )


@dataclass(frozen=True)
class _Group:
    old: tuple[int, ...]
    new: tuple[int, ...]


def _group_of(shape: Sequence[int], dim: int, wanted: Sequence[int]) -> _Group:
    """Return the dims of both shapes that hold the same elements as the dim asked for."""
    start_old = start_new = 0
    while start_old < len(shape):
        end_old, end_new = start_old + 1, start_new
        old, new = shape[start_old], 1
        while old != new:
            if new < old and end_new < len(wanted):
                new *= wanted[end_new]
                end_new += 1
            elif end_old < len(shape):
                old *= shape[end_old]
                end_old += 1
            else:
                raise SplitLostError(f"{tuple(wanted)} is not a view of {tuple(shape)}")
        if dim < end_old:
            while end_new < len(wanted) and wanted[end_new] == 1:
                end_new += 1
            return _Group(tuple(range(start_old, end_old)), tuple(range(start_new, end_new)))
        start_old, start_new = end_old, end_new
    raise SplitLostError(f"a tensor of shape {tuple(shape)} has no dim {dim}")


def _better_sections(wanted: Sequence[int], group: _Group, layout: Layout, ranks: int) -> int | None:
    """Return with how many sections the split dim could be followed into one of the dims behind the first."""
    if group.old != (layout.dim,):
        return None
    sections = 1
    for dim in group.new:
        if sections > 1 and sections != layout.sections and wanted[dim] % ranks == 0 and wanted[dim] > 1:
            return sections
        sections *= wanted[dim]
    return None


def narrowed(size: int, layout: Layout, start: int, length: int, ranks: int) -> tuple[Layout, int, int]:
    """Return how a range of the split dim is split, and where the part of a rank begins and how long it is.

    Args:
        size: of the whole dim.
        layout: how it is split.
        start: of the range, in the whole.
        length: of the range, in the whole.
        ranks: of the axis.

    Raises:
        SplitLostError: the range is not of whole sections, or not in the dim.
    """
    if (start, length) == (0, size):
        return layout, 0, size // ranks
    if start < 0 or start + length > size:
        raise SplitLostError(f"there are no elements {start} to {start + length} in a dim of {size}")
    section = size // layout.sections
    if start % section or length % section or not length:
        step = math.gcd(math.gcd(start, length), size)
        better = size // step if step and (size // step) != layout.sections and step % ranks == 0 else None
        raise SplitLostError(
            f"elements {start} to {start + length} of the split dim of {size} are not shared evenly among {ranks} ranks",
            sections=better,
        )
    return replace(layout, sections=length // section), start // ranks, length // ranks
