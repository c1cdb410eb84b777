"""Operations that move elements and compute nothing: the split is followed to where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meshbolt.tensor.exchange import part
from meshbolt.tensor.layout import Layout, SplitLostError, local_shape, narrowed, resolved_shape, viewed
from meshbolt.tensor.split import SplitTensor, like, rule


@rule("view", "reshape")
def view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look at the same elements in another shape."""
    split, *sizes = args
    if kwargs.get("dtype") is not None or (sizes and isinstance(sizes[0], torch.dtype)):
        raise SplitLostError("it looks at the elements as another dtype")
    return _viewed(func, split, _sizes(sizes or [kwargs.get("shape", kwargs.get("size"))]))


@rule("flatten")
def flatten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join dims."""
    named = {"start_dim": 0, "end_dim": -1} | dict(zip(("input", "start_dim", "end_dim"), args, strict=False)) | kwargs
    split = named["input"]
    start, end = named["start_dim"] % split.dim(), named["end_dim"] % split.dim()
    sizes = list(split.shape)
    return _viewed(torch.reshape, split, (*sizes[:start], _product(sizes[start : end + 1]), *sizes[end + 1 :]))


@rule("unflatten")
def unflatten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide a dim into several."""
    named = dict(zip(("input", "dim", "sizes"), args, strict=False)) | kwargs
    split, dim = named["input"], named["dim"] % named["input"].dim()
    inner = resolved_shape([split.shape[dim]], tuple(named["sizes"]))
    return _viewed(torch.reshape, split, (*split.shape[:dim], *inner, *split.shape[dim + 1 :]))


@rule("view_as", "reshape_as")
def view_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look at the same elements in another tensor's shape."""
    return _viewed(torch.reshape, args[0], tuple(args[1].shape))


def _viewed(func: Any, split: SplitTensor, sizes: Sequence[int]) -> SplitTensor:
    wanted = resolved_shape(split.shape, sizes)
    layout = viewed(split.shape, split.division, wanted, split.axis.size)
    return like(split, func(split.local, local_shape(wanted, layout, split.axis.size)), layout)


def _sizes(sizes: Sequence[Any]) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)) else tuple(sizes)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


@rule("transpose", "swapaxes", "swapdims", "t", "adjoint")
def transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Exchange two dims."""
    split, *dims = args
    if getattr(func, "__name__", "") in ("t", "adjoint"):
        dims = [-2, -1]
    for names in (("dim0", "dim1"), ("axis0", "axis1")):
        dims += [kwargs[name] for name in names if name in kwargs]
    first, second = (dim % split.dim() for dim in dims)
    moved = {first: second, second: first}.get(split.division.dim, split.division.dim)
    return like(split, split.local.transpose(first, second), split.division.moved(moved))


@rule("permute")
def permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Order the dims anew."""
    split, *dims = args
    order = [dim % split.dim() for dim in _sizes(dims or [kwargs["dims"]])]
    return like(split, split.local.permute(order), split.division.moved(order.index(split.division.dim)))


@rule("movedim", "moveaxis")
def movedim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move dims elsewhere."""
    split, source, destination = (*args, *kwargs.values())
    # A tensor whose sizes are the numbers of its dims shows where each goes.
    numbered = torch.empty([*range(1, split.dim() + 1)], device="meta").movedim(source, destination)
    moved = split.local.movedim(source, destination)
    return like(split, moved, split.division.moved(numbered.shape.index(split.division.dim + 1)))


@rule("unsqueeze")
def unsqueeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Insert a dim of one element."""
    split, dim = (*args, *kwargs.values())
    at = dim % (split.dim() + 1)
    return like(split, split.local.unsqueeze(at), split.division.moved(split.division.dim + (at <= split.division.dim)))


@rule("squeeze")
def squeeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Remove dims of one element."""
    split, *given = (*args, *kwargs.values())
    dims = range(split.dim()) if not given else given[0] if isinstance(given[0], (tuple, list)) else [given[0]]
    gone = sorted({dim % split.dim() for dim in dims if split.shape[dim] == 1})
    kept = split.local.squeeze(gone) if gone else split.local.view_as(split.local)
    return like(split, kept, split.division.moved(split.division.dim - sum(dim < split.division.dim for dim in gone)))


@rule("expand", "broadcast_to")
def expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat dims of one element without copies."""
    split, *sizes = args
    wanted = list(_sizes(sizes or [kwargs.get("size")]))
    dim = split.division.dim + len(wanted) - split.dim()
    if wanted[dim] not in (-1, split.shape[split.division.dim]):
        raise SplitLostError("it gives the split dim another size")
    wanted[dim] = -1
    return like(split, split.local.expand(wanted), split.division.moved(dim))


@rule("expand_as")
def expand_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat dims of one element as another tensor has them."""
    if not isinstance(args[0], SplitTensor):
        raise SplitLostError("a whole tensor would take the shape of a split one")
    return expand(torch.Tensor.expand, (args[0], *args[1].shape), {})


@rule("repeat_interleave")
def repeat_interleave(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Repeat each element along a dim."""
    named = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
    split, dim = named["input"], named.get("dim")
    if not isinstance(named["repeats"], int) or dim is None:
        raise SplitLostError("only one number of repeats along a dim keeps a split")
    return like(split, split.local.repeat_interleave(named["repeats"], dim=dim))


@rule("narrow")
def narrow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take a range of a dim."""
    split, dim, start, length = (*args, *(kwargs[key] for key in ("dim", "start", "length") if key in kwargs))
    return _narrowed(split, dim % split.dim(), int(start), int(length))


def _narrowed(split: SplitTensor, dim: int, start: int, length: int) -> SplitTensor:
    if dim != split.division.dim:
        return like(split, split.local.narrow(dim, start, length))
    layout, own_start, own_length = narrowed(split.shape[dim], split.division, start, length, split.axis.size)
    return like(split, split.local.narrow(dim, own_start, own_length), layout)


@rule("chunk", "split", "unsafe_chunk", "unsafe_split", "split_with_sizes", "tensor_split")
def divide(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Divide a dim into several tensors."""
    keys = ("input", "how", "dim")
    named = dict(zip(keys, args, strict=False))
    named.update({"dim" if key == "dim" else "how": value for key, value in kwargs.items()})
    split, how, dim = named["input"], named["how"], named.get("dim", 0)
    dim %= split.dim()
    if isinstance(how, Tensor):
        raise SplitLostError("it divides at places that a tensor says")
    # torch itself says where, for every function that there is.
    lengths = [len(piece) for piece in func(torch.empty(split.shape[dim], device="meta"), how)]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return tuple(_narrowed(split, dim, start, length) for start, length in zip(starts, lengths, strict=True))


@rule("unbind", also=(torch.Tensor.__iter__,))
def unbind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the slices along a dim, which is lost."""
    split, dim = (*args, *kwargs.values()) if len(args) + len(kwargs) > 1 else (args[0], 0)
    pieces = tuple(_selected(split, dim % split.dim(), index) for index in range(split.shape[dim]))
    return iter(pieces) if getattr(func, "__name__", "") == "__iter__" else pieces


@rule("select")
def select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return one slice along a dim, which is lost."""
    split, dim, index = (*args, *(kwargs[key] for key in ("dim", "index") if key in kwargs))
    return _selected(split, dim % split.dim(), int(index))


def _selected(split: SplitTensor, dim: int, index: int) -> SplitTensor:
    if dim == split.division.dim:
        raise SplitLostError("it takes single elements of the split dim", sections=split.shape[dim])
    return like(
        split, split.local.select(dim, index), split.division.moved(split.division.dim - (dim < split.division.dim))
    )


@rule("__getitem__")
def getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Index with whole numbers, slices, None and Ellipsis."""
    split, index = args
    if not isinstance(split, SplitTensor):
        raise SplitLostError("its index is split")
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(entry, (Tensor, list, bool)) for entry in entries):
        raise SplitLostError("it indexes with tensors")
    given = sum(entry is not None and entry is not Ellipsis for entry in entries)
    rest = [slice(None)] * (split.dim() - given)
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries = [*entries[:at], *rest, *entries[at + 1 :]]
    out, dim = split, 0
    for entry in entries:
        if entry is None:
            out, dim = unsqueeze(None, (out, dim), {}), dim + 1
        elif isinstance(entry, slice):
            out, dim = _sliced(out, dim, entry), dim + 1
        else:
            out = _selected(out, dim, int(entry))
    return out


def _sliced(split: SplitTensor, dim: int, entry: slice) -> SplitTensor:
    if entry == slice(None):
        return split
    start, stop, step = entry.indices(split.shape[dim])
    if step == 1:
        return _narrowed(split, dim, start, max(stop - start, 0))
    if dim == split.division.dim:
        raise SplitLostError("it takes some elements of the split dim and leaves others")
    return like(split, split.local[(*[slice(None)] * dim, entry)])


@rule("cat", "concat", "concatenate")
def cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join tensors along a dim."""
    tensors, dim = _joining(args, kwargs)
    first = next(tensor for tensor in tensors if isinstance(tensor, SplitTensor))
    dim %= first.dim()
    if dim != first.division.dim:
        return like(first, torch.cat(_alike(tensors, first), dim), of=_splits(tensors))
    pieces = _splits(tensors)
    runs = {piece.shape[dim] // piece.division.sections for piece in pieces if piece.division.dim == dim}
    if len(pieces) < len(tensors) or len(runs) > 1 or any(piece.division.dim != dim for piece in pieces):
        raise SplitLostError("it joins, at the split dim, what is not split alike")
    sections = sum(piece.division.sections for piece in pieces)
    return like(first, torch.cat([piece.local for piece in pieces], dim), Layout(dim, sections), of=pieces)


@rule("stack")
def stack(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join tensors along a new dim."""
    tensors, dim = _joining(args, kwargs)
    first = next(tensor for tensor in tensors if isinstance(tensor, SplitTensor))
    dim %= first.dim() + 1
    layout = first.division.moved(first.division.dim + (dim <= first.division.dim))
    return like(first, torch.stack(_alike(tensors, first), dim), layout, of=_splits(tensors))


def _joining(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], int]:
    named = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    # torch takes an empty tensor without further dims for nothing.
    tensors = [tensor for tensor in named["tensors"] if isinstance(tensor, SplitTensor) or tensor.shape != (0,)]
    return tensors, named.get("dim", 0)


def _splits(tensors: Sequence[Any]) -> list[SplitTensor]:
    return [tensor for tensor in tensors if isinstance(tensor, SplitTensor)]


def _alike(tensors: Sequence[Any], first: SplitTensor) -> list[Tensor]:
    """Return the parts of tensors that are split alike, or whole."""
    parts = []
    for tensor in tensors:
        if not isinstance(tensor, SplitTensor):
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
