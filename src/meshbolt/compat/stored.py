"""Tensors whose values stay where they lie, such as in a file, and are read in runs by whoever copies or writes them.

To everybody else such a tensor is one on the CPU: it has shape and dtype, and any operation on it sees its values, all of them
in memory for as long as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map
from typing_extensions import Self

from meshbolt.compat.tensors import aliased_arguments, written_arguments
from meshbolt.compat.units import untouched_by_functions

RUN_BYTES = 8 * 2**20
"""What is read at once where a store has to bring values together."""

Box = tuple[tuple[int, int], ...]
"""A part of an array: (first, behind the last) along each dim."""

_DETACHING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Store(Protocol):
    """Values of one tensor in row-major order, outside of memory."""

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield some of the values in runs, one dim; each is there until the next one is asked for.

        Args:
            start: the first element.
            stop: behind the last one.
        """


class StoredTensor(torch.Tensor):
    """A tensor whose values are in a store.

    Where its values are changed in place they are written back, if somebody takes them, and kept in memory otherwise; they are
    also kept for an operation that returns a part of it, since that part may be changed, unless `keeps_parts` is False.

    Attributes:
        store: has the values.
    """

    store: Store
    _kept: list[torch.Tensor]  # none or one; aliases share it
    _write: Callable[[torch.Tensor], None] | None
    _keeps_parts: bool

    __torch_function__ = untouched_by_functions  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        store: Store,
        *,
        shape: Sequence[int],
        dtype: torch.dtype,
        write: Callable[[torch.Tensor], None] | None = None,
        keeps_parts: bool = True,
    ) -> Self:
        """Make one; nothing is read.

        Args:
            store: has the values.
            shape: of the tensor.
            dtype: of what the store reads.
            write: takes all values after a change in place.
            keeps_parts: False where nobody changes values by a part or alias of the tensor, so that none are kept.
        """
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"))
        made.store, made._kept, made._write, made._keeps_parts = store, [], write, keeps_parts
        return made

    @property
    def kept(self) -> torch.Tensor | None:
        """The values, once they are in memory for good."""
        return self._kept[0] if self._kept else None

    def let_go(self) -> torch.Tensor | None:
        """Return the values that are kept, and read them from the store again from now on."""
        return self._kept.pop() if self._kept else None

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Yield values in row-major order in runs, one dim; each is there until the next one is asked for.

        Args:
            start: the first element.
            stop: behind the last one; None: all.
        """
        stop = self.numel() if stop is None else stop
        if self.kept is not None:
            yield self.kept.reshape(-1)[start:stop]
        elif start < stop:
            yield from self.store.read(start, stop)

    def value(self) -> torch.Tensor:
        """Return the values, as an ordinary tensor."""
        if self.kept is not None:
            return self.kept
        whole = torch.empty(self.shape, dtype=self.dtype)
        copy_runs(self, into=whole.view(-1))
        return whole

    def part(self, place: Sequence[slice]) -> StoredTensor:
        """Return a part of it; nothing is read.

        Args:
            place: a slice with a start and a stop along each dim.
        """
        box = tuple((each.start, each.stop) for each in place)
        if all(each == (0, size) for each, size in zip(box, self.shape, strict=True)):
            return self
        return StoredTensor(_Part(self, box), shape=_lengths(box), dtype=self.dtype)

    def as_dtype(self, dtype: torch.dtype) -> StoredTensor:
        """Return it in another dtype; nothing is read.

        Args:
            dtype: to which values are cast when they are read.
        """
        return self if dtype == self.dtype else StoredTensor(_Cast(self, dtype), shape=self.shape, dtype=dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the values."""
        if operation is torch.ops.aten.is_pinned.default:  # asked of every tensor by who plans to write it
            return False
        if operation in _DETACHING:
            return args[0]._detached()
        kwargs = kwargs or {}
        written = [each for each in written_arguments(operation, args, kwargs) if isinstance(each, StoredTensor)]
        for each in aliased_arguments(operation, args, kwargs):
            if isinstance(each, StoredTensor) and each._keeps_parts and not any(each is other for other in written):
                each._keep(each.value())
        values: dict[int, torch.Tensor] = {}

        def value_of(leaf: Any) -> Any:
            return values.setdefault(id(leaf), leaf.value()) if isinstance(leaf, StoredTensor) else leaf

        plain_args, plain_kwargs = tree_map(value_of, (args, dict(kwargs)))
        result = operation(*plain_args, **plain_kwargs)
        for each in written:
            each._take(values[id(each)])
        return written[0] if written else result

    def _detached(self) -> StoredTensor:
        alias = StoredTensor(
            self.store, shape=self.shape, dtype=self.dtype, write=self._write, keeps_parts=self._keeps_parts
        )
        alias._kept = self._kept
        return alias

    def _keep(self, values: torch.Tensor) -> None:
        self._kept[:] = [values]

    def _take(self, values: torch.Tensor) -> None:
        if self.kept is None and self._write is not None:
            self._write(values)
        else:
            self._keep(values)

    def tolist(self) -> Any:
        """Return the values as lists; torch asks no operation for them."""
        return self.value().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as an array, which shares the memory that they are kept in from now on."""
        values = self.value()
        self._keep(values)
        return values.numpy(force=force)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Return the values in a tensor of their own."""
        return self.value().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled as the values."""
        return self.value().__reduce_ex__(protocol)


def copy_runs(tensor: StoredTensor, *, into: torch.Tensor, start: int = 0) -> None:
    """Copy values to memory, run by run, in the dtype that this has.

    Args:
        tensor: whose values.
        into: one dim.
        start: the first of its elements that are copied; as many follow as fit.
    """
    at = 0
    with torch.no_grad():
        for run in tensor.runs(start, start + into.numel()):
            into[at : at + run.numel()].copy_(run)
            at += run.numel()


def boxes_of(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that some elements of an array are, in their order.

    Args:
        shape: of the array.
        start: number of the first element, in row-major order.
        stop: behind the last one.

    Example:
        >>> list(boxes_of((4, 5), 3, 16))
        [((0, 1), (3, 5)), ((1, 3), (0, 5)), ((3, 4), (0, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row, inner = math.prod(shape[1:]), shape[1:]
    first, last = start // row, (stop - 1) // row
    head, tail = start - first * row, stop - last * row
    if first == last and (head, tail) != (0, row):
        yield from (((first, first + 1), *rest) for rest in boxes_of(inner, head, tail))
        return
    if head:
        yield from (((first, first + 1), *rest) for rest in boxes_of(inner, head, row))
    begin, end = first + bool(head), last + (tail == row)
    if begin < end:
        yield ((begin, end), *((0, size) for size in inner))
    if tail != row:
        yield from (((last, last + 1), *rest) for rest in boxes_of(inner, 0, tail))


def cut_box(box: Box, shape: Sequence[int], limit: int) -> Iterator[Box]:
    """Yield the parts of a box that lie within so many elements of an array each, in their order.

    Args:
        box: a part of the array, with elements.
        shape: of the array.
        limit: the most elements from the first to the last of a part, those between that are not in it among them.

    Example:
        >>> list(cut_box(((0, 4), (0, 2)), (4, 5), 8))
        [((0, 2), (0, 2)), ((2, 4), (0, 2))]
    """
    first, last = box_span(box, shape)
    if last - first <= limit:
        yield box
        return
    dim = next(number for number, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[dim]
    rest = last - first - (stop - start - 1) * math.prod(shape[dim + 1 :])
    count = 1 + (limit - rest) // math.prod(shape[dim + 1 :]) if rest <= limit else 0
    for at in range(start, stop, max(1, count)):
        part = (*box[:dim], (at, min(at + max(1, count), stop)), *box[dim + 1 :])
        yield from (part,) if count else cut_box(part, shape, limit)


def box_span(box: Box, shape: Sequence[int]) -> tuple[int, int]:
    """Return the first element of a box, and what is behind its last one, in row-major order of an array.

    Args:
        box: a part of the array, with elements.
        shape: of the array.
    """
    strides = _strides(shape)
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    last = sum((stop - 1) * stride for (_, stop), stride in zip(box, strides, strict=True))
    return first, last + 1


def box_view(run: torch.Tensor, box: Box, shape: Sequence[int]) -> torch.Tensor:
    """Return a box of an array as a view.

    Args:
        run: the elements that `box_span` says, one dim.
        box: a part of the array.
        shape: of the array.
    """
    return run.as_strided(_lengths(box), _strides(shape), run.storage_offset())


class _Part:
    """The values of a box of a tensor."""

    def __init__(self, tensor: StoredTensor, box: Box) -> None:
        self._tensor, self._box = tensor, box

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Read what lies between, and leave it out."""
        shape, limit = self._tensor.shape, max(1, RUN_BYTES // self._tensor.dtype.itemsize)
        for inner in boxes_of(_lengths(self._box), start, stop):
            moved = tuple((at + a, at + b) for (at, _), (a, b) in zip(self._box, inner, strict=True))
            for block in cut_box(moved, shape, limit):
                first, last = box_span(block, shape)
                run = torch.empty(last - first, dtype=self._tensor.dtype)
                copy_runs(self._tensor, into=run, start=first)
                yield box_view(run, block, shape).reshape(-1)


class _Cast:
    """The values of a tensor in another dtype."""

    def __init__(self, tensor: StoredTensor, dtype: torch.dtype) -> None:
        self._tensor, self._dtype = tensor, dtype

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Cast each run."""
        for run in self._tensor.runs(start, stop):
            yield run.to(self._dtype)


def _lengths(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
