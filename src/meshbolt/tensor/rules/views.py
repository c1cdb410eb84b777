"""Operations that move elements and compute nothing: the split is followed to where it goes."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meshbolt.tensor.exchange import part, total
from meshbolt.tensor.layout import (
    Layout,
    SplitLostError,
    dim_from_front,
    local_shape,
    narrowed,
    resolved_shape,
    viewed,
)
from meshbolt.tensor.part import Split
from meshbolt.tensor.split import TENSORS, like, named, rule

_MOVES = ("input", "source", "destination")
_RANGE = ("input", "dim", "start", "length")


@rule("view", "reshape")
def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look at the same elements in another shape."""
    split, *sizes = args
    sizes = sizes or [kwargs.get("shape", kwargs.get("size"))]
    if kwargs.get("dtype") is not None or isinstance(sizes[0], torch.dtype):
        raise SplitLostError("it looks at the elements as another dtype")
    return _viewed(func, split, _sizes(sizes))


@rule("flatten")
def flatten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join dims."""
    given = {"start_dim": 0, "end_dim": -1} | named(("input", "start_dim", "end_dim"), args, kwargs)
    split = given["input"]
    start, end = (dim_from_front(given[key], split.dim()) for key in ("start_dim", "end_dim"))
    sizes = list(split.shape)
    return _viewed(torch.reshape, split, (*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]))


@rule("unflatten")
def unflatten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide a dim into several."""
    given = named(("input", "dim", "sizes"), args, kwargs)
    split = given["input"]
    dim = dim_from_front(given["dim"], split.dim())
    inner = resolved_shape([split.shape[dim]], tuple(given["sizes"]))
    if math.prod(inner) != split.shape[dim]:
        raise SplitLostError(f"{inner} are not the sizes of a dim of {split.shape[dim]}")
    return _viewed(torch.reshape, split, (*split.shape[:dim], *inner, *split.shape[dim + 1 :]))


@rule("view_as", "reshape_as")
def view_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look at the same elements in another tensor's shape."""
    split, other = named(("self", "other"), args, kwargs).values()
    if not isinstance(split, Split):
        raise SplitLostError("a whole tensor would take the shape of a split one")
    own = torch.Tensor.view if func is torch.Tensor.view_as else torch.reshape
    return _viewed(own, split, tuple(other.shape))


def _viewed(func: Any, split: Split, sizes: tuple[int, ...]) -> Split:
    # What is compiled is asked once, and a compiler does not see through caches.
    plan = _view_plan.__wrapped__ if torch.compiler.is_compiling() else _view_plan
    layout, shape = plan(split.shape, split.division, sizes, split.axis.size)
    return like(split, func(split.local, shape), layout)


@functools.lru_cache(maxsize=4096)
def _view_plan(shape: torch.Size, layout: Layout, sizes: tuple[int, ...], ranks: int) -> tuple[Layout, tuple[int, ...]]:
    wanted = resolved_shape(shape, sizes)
    found = viewed(shape, layout, wanted, ranks)
    return found, local_shape(wanted, found, ranks)


def _sizes(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes, or numbers of dims, that are given one by one or as a sequence."""
    listed = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if listed is None or (len(sizes) == 1 and listed[0] is None):
        raise SplitLostError("its arguments are written in a way that is not followed")
    return tuple(map(int, listed))


@rule("transpose", "swapaxes", "swapdims")
def transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Exchange two dims."""
    if not kwargs and len(args) == 3:
        return _transposed(*args)
    kwargs = {key.replace("axis", "dim"): value for key, value in kwargs.items()}
    split, *dims = named(("input", "dim0", "dim1"), args, kwargs).values()
    return _transposed(split, *dims)


@rule("t", "adjoint")
def turned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Exchange the dims of a matrix, or of matrices."""
    split = args[0]
    if split.dim() < 2 or split.is_complex() or (split.dim() > 2 and "adjoint" not in getattr(func, "__name__", "")):
        raise SplitLostError("it is more or less than to exchange two dims")
    return _transposed(split, -2, -1)


def _transposed(split: Split, first: int, second: int) -> Split:
    dim, dims = split.division.dim, split.dim()
    first, second = dim_from_front(first, dims), dim_from_front(second, dims)
    moved = second if dim == first else first if dim == second else dim
    return like(split, split.local.transpose(first, second), split.division.moved(moved))


@rule("permute")
def permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Order the dims anew."""
    split, *dims = args
    order = [dim_from_front(dim, split.dim()) for dim in _sizes(dims or [kwargs.get("dims")])]
    if len(order) != split.dim():
        raise SplitLostError("it does not name every dim")
    return like(split, split.local.permute(order), split.division.moved(order.index(split.division.dim)))


@rule("movedim", "moveaxis")
def movedim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move dims elsewhere."""
    split, source, destination = (named(_MOVES, args, kwargs)[key] for key in _MOVES)
    # A tensor whose sizes are the numbers of its dims shows where each goes.
    numbered = torch.empty([*range(1, split.dim() + 1)], device="meta").movedim(source, destination)
    moved = split.local.movedim(source, destination)
    return like(split, moved, split.division.moved(numbered.shape.index(split.division.dim + 1)))


@rule("unsqueeze")
def unsqueeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Insert a dim of one element."""
    given = named(("input", "dim"), args, kwargs)
    return _unsqueezed(given["input"], dim_from_front(given["dim"], given["input"].dim() + 1))


def _unsqueezed(split: Split, dim: int) -> Split:
    moved = split.division.moved(split.division.dim + (dim <= split.division.dim))
    return like(split, split.local.unsqueeze(dim), moved)


@rule("squeeze")
def squeeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Remove dims of one element."""
    given = named(("input", "dim"), args, kwargs)
    split, dims = given["input"], given.get("dim", range(given["input"].dim()))
    dims = [dims] if isinstance(dims, int) else dims
    gone = sorted({dim for dim in (dim_from_front(dim, split.dim()) for dim in dims) if split.shape[dim] == 1})
    kept = split.local.squeeze(gone) if gone else split.local.view_as(split.local)
    return like(split, kept, split.division.moved(split.division.dim - sum(dim < split.division.dim for dim in gone)))


@rule("expand", "broadcast_to")
def expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat dims of one element without copies."""
    split, *sizes = args
    return _expanded(split, _sizes(sizes or [kwargs.get("size")]))


@rule("expand_as")
def expand_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat dims of one element as another tensor has them."""
    split, other = named(("self", "other"), args, kwargs).values()
    if not isinstance(split, Split):
        raise SplitLostError("a whole tensor would take the shape of a split one")
    return _expanded(split, tuple(other.shape))


def _expanded(split: Split, sizes: tuple[int, ...]) -> Split:
    dim = split.division.dim + len(sizes) - split.dim()
    if len(sizes) < split.dim() or sizes[dim] not in (-1, split.shape[split.division.dim]):
        raise SplitLostError("it gives the split dim another size")
    own = (*sizes[:dim], -1, *sizes[dim + 1 :])
    return like(split, split.local.expand(own), split.division.moved(dim))


@rule("repeat_interleave")
def repeat_interleave(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat each element along a dim."""
    given = named(("input", "repeats", "dim", "output_size"), args, kwargs)
    split, repeats, dim = given["input"], given["repeats"], given.get("dim")
    if not isinstance(split, Split) or not isinstance(repeats, int) or dim is None:
        raise SplitLostError("only one number of repeats along a dim keeps a split")
    return like(split, split.local.repeat_interleave(repeats, dim=dim_from_front(dim, split.dim())))


@rule("repeat", "tile")
def repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat a whole tensor along dims."""
    split, *times = args
    repeats = _sizes(times or [kwargs.get("repeats", kwargs.get("dims"))])
    dim = split.division.dim + len(repeats) - split.dim()
    if len(repeats) < split.dim() or repeats[dim] != 1:
        raise SplitLostError("it repeats the split dim")
    return like(split, split.local.repeat(repeats), split.division.moved(dim))


@rule("flip", "roll")
def other_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Order the elements of dims anew."""
    split, *others = args
    if getattr(func, "__name__", "") == "flip":
        dims = _sizes(others or [kwargs.get("dims")])
    else:
        dims = _sizes([named(("input", "shifts", "dims"), args, kwargs).get("dims")])
    if not dims or split.division.dim in [dim_from_front(dim, split.dim()) for dim in dims]:
        raise SplitLostError("it orders the split dim anew")
    return like(split, func(split.local, *others, **kwargs))


@rule("pad")
def pad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Put elements around those of the last dims."""
    given = named(("input", "pad", "mode", "value"), args, kwargs)
    split, around = given["input"], given["pad"]
    reached = split.dim() - len(around) // 2
    if split.division.dim >= reached or given.get("mode", "constant") != "constant":
        raise SplitLostError("it puts elements around those of the split dim")
    return like(split, func(split.local, *args[1:], **kwargs))


@rule("index_select")
def index_select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the numbered elements of a dim."""
    given = named(("input", "dim", "index"), args, kwargs)
    split, index = given["input"], given["index"]
    if not isinstance(split, Split) or isinstance(index, Split):
        raise SplitLostError("its index is split")
    if dim_from_front(given["dim"], split.dim()) == split.division.dim:
        raise SplitLostError("it takes elements of the split dim")
    return like(split, split.local.index_select(given["dim"], index))


@rule("narrow")
def narrow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take a range of a dim."""
    split, dim, start, length = (named(_RANGE, args, kwargs)[key] for key in _RANGE)
    dim, start = dim_from_front(dim, split.dim()), int(start)
    return _narrowed(split, dim, start + split.shape[dim] if start < 0 else start, int(length))


def _narrowed(split: Split, dim: int, start: int, length: int) -> Split:
    if dim != split.division.dim:
        return like(split, split.local.narrow(dim, start, length))
    layout, own_start, own_length = narrowed(split.shape[dim], split.division, start, length, split.axis.size)
    return like(split, split.local.narrow(dim, own_start, own_length), layout)


@rule("chunk", "split", "unsafe_chunk", "unsafe_split", "split_with_sizes", "tensor_split")
def divide(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide a dim into several tensors."""
    given = named(
        ("input", "how", "dim"), args, {key if key == "dim" else "how": value for key, value in kwargs.items()}
    )
    split, how = given["input"], given["how"]
    dim = dim_from_front(given.get("dim", 0), split.dim())
    if isinstance(how, TENSORS):
        raise SplitLostError("it divides at places that a tensor says")
    ranges = _ranges(func, split.shape[dim], how if isinstance(how, int) else tuple(how))
    return tuple(_narrowed(split, dim, start, length) for start, length in ranges)


@functools.lru_cache(maxsize=1024)
def _ranges(func: Any, size: int, how: Any) -> list[tuple[int, int]]:
    """Return where the pieces begin, and how long they are; torch itself says so, for every function that there is."""
    lengths = [len(piece) for piece in func(torch.empty(size, device="meta"), how)]
    return [(sum(lengths[:number]), length) for number, length in enumerate(lengths)]


@rule("unbind", also=(torch.Tensor.__iter__,))
def unbind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the slices along a dim, which is lost."""
    given = named(("input", "dim"), args, kwargs)
    split = given["input"]
    dim = dim_from_front(given.get("dim", 0), split.dim())
    pieces = tuple(_selected(split, dim, index) for index in range(split.shape[dim]))
    return iter(pieces) if func is torch.Tensor.__iter__ else pieces


@rule("select")
def select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return one slice along a dim, which is lost."""
    given = named(("input", "dim", "index"), args, kwargs)
    return _selected(given["input"], dim_from_front(given["dim"], given["input"].dim()), int(given["index"]))


def _selected(split: Split, dim: int, index: int) -> Split:
    if dim == split.division.dim:
        raise SplitLostError("it takes single elements of the split dim", sections=split.shape[dim])
    return like(
        split, split.local.select(dim, index), split.division.moved(split.division.dim - (dim < split.division.dim))
    )


@rule("__getitem__")
def getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Index with whole numbers, slices, None and Ellipsis."""
    split, index = args
    if not isinstance(split, Split):
        raise SplitLostError("its index is split")
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(
        entry is None or entry is Ellipsis or isinstance(entry, slice) or _is_number(entry) for entry in entries
    ):
        raise SplitLostError("it indexes with tensors")
    given = sum(entry is not None and entry is not Ellipsis for entry in entries)
    places = [place for place, entry in enumerate(entries) if entry is Ellipsis]
    if given > split.dim() or len(places) > 1:
        raise SplitLostError("it has too many indices")
    at = places[0] if places else len(entries)
    entries = [*entries[:at], *[slice(None)] * (split.dim() - given), *entries[at + 1 :]]
    if (moved := _kept_by(entries, split.division.dim)) is not None:
        return like(split, split.local[tuple(entries)], split.division.moved(moved))
    own = _entry_of(entries, split.division.dim)
    if split.along_sequence and split.division.sections == 1 and _is_number(entries[own]):
        return _element(split, int(entries[own]))[tuple(entries[:own] + entries[own + 1 :])]
    out, dim = split, 0
    for entry in entries:
        if entry is None:
            out, dim = _unsqueezed(out, dim), dim + 1
        elif isinstance(entry, slice):
            out, dim = _sliced(out, dim, entry), dim + 1
        else:
            out = _selected(out, dim, int(entry))
    return out


def _entry_of(entries: Sequence[Any], dim: int) -> int:
    """Return which entry of an index is that of a dim."""
    return [place for place, entry in enumerate(entries) if entry is not None][dim]


def _element(split: Split, index: int) -> Tensor:
    """Return one place of the sequence, such as that of a class token; only that travels."""
    dim, axis = split.division.dim, split.axis
    owner, place = divmod(dim_from_front(index, split.shape[dim]), split.local.shape[dim])
    mine = split.local.select(dim, place)
    if axis.rank != owner:
        # Still a part of the graph, so that every rank's backward sends the same messages.
        mine = mine.masked_fill(torch.ones((), dtype=torch.bool, device=mine.device), 0)
    return total(mine, axis)


def _kept_by(entries: Sequence[Any], dim: int) -> int | None:
    """Return where a dim is after indexing that takes all of it; None where it takes less."""
    given = after = 0
    for entry in entries:
        if entry is not None:
            if given == dim:
                return after if isinstance(entry, slice) and entry == slice(None) else None
            given += 1
        after += entry is None or isinstance(entry, slice)
    return None


def _is_number(entry: Any) -> bool:
    return type(entry) is int or (isinstance(entry, numbers.Integral) and not isinstance(entry, bool))


def _sliced(split: Split, dim: int, entry: slice) -> Split:
    if entry == slice(None):
        return split
    start, stop, step = entry.indices(split.shape[dim])
    if step == 1:
        return _narrowed(split, dim, start, max(stop - start, 0))
    if dim == split.division.dim:
        raise SplitLostError("it takes some elements of the split dim and leaves others")
    index = (*[slice(None)] * dim, entry)
    return like(split, split.local[index])


@rule("cat", "concat", "concatenate")
def cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join tensors along a dim."""
    given = named(("tensors", "dim"), args, kwargs)
    # torch lets flat tensors without elements be among others, as empty caches are.
    tensors = [tensor for tensor in given["tensors"] if tensor.dim() != 1 or tensor.numel()]
    pieces = _splits(tensors)
    if not pieces or any(piece.dim() != pieces[0].dim() for piece in tensors):
        raise SplitLostError("it joins tensors of different numbers of dims")
    first, dim = pieces[0], dim_from_front(given.get("dim", 0), pieces[0].dim())
    if dim != first.division.dim:
        return like(first, torch.cat(_alike(tensors, first), dim))
    if len(pieces) < len(tensors) or any(piece.division.dim != dim for piece in pieces):
        raise SplitLostError("it joins, at the split dim, what is not split alike")
    if len({piece.shape[dim] // piece.division.sections for piece in pieces}) > 1:
        raise SplitLostError("it joins, at the split dim, sections of different lengths")
    sections = sum(piece.division.sections for piece in pieces)
    return like(first, torch.cat([piece.local for piece in pieces], dim), Layout(dim, sections))


@rule("stack")
def stack(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join tensors along a new dim."""
    given = named(("tensors", "dim"), args, kwargs)
    tensors = list(given["tensors"])
    first = _splits(tensors)[0]
    dim = dim_from_front(given.get("dim", 0), first.dim() + 1)
    layout = first.division.moved(first.division.dim + (dim <= first.division.dim))
    return like(first, torch.stack(_alike(tensors, first), dim), layout)


def _splits(tensors: Sequence[Any]) -> list[Split]:
    return [tensor for tensor in tensors if isinstance(tensor, Split)]


def _alike(tensors: Sequence[Any], first: Split) -> list[Tensor]:
    """Return the parts of tensors that are split alike, or whole."""
    parts = []
    for tensor in tensors:
        if tensor.dim() != first.dim() or tensor.shape[first.division.dim] != first.shape[first.division.dim]:
            raise SplitLostError("it joins tensors of different sizes")
        if not isinstance(tensor, Split):
            parts.append(part(tensor, first.division, first.axis))
        elif tensor.division == first.division:
            parts.append(tensor.local)
        else:
            raise SplitLostError("it joins what is split differently")
    return parts


@rule("view_as_complex", "view_as_real")
def as_complex(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take pairs for complex numbers, or the other way round; the last dim is the pairs'."""
    split = args[0]
    if split.division.dim == split.dim() - 1 and func is torch.view_as_complex:
        raise SplitLostError("the pairs are split")
    return like(split, func(split.local))


@rule("tril", "triu")
def triangle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keep a triangle of matrices."""
    split = args[0]
    if split.division.dim >= split.dim() - 2:
        raise SplitLostError("the matrices are split")
    return like(split, func(split.local, *args[1:], **kwargs))
