"""Tensors that DeepSpeed has cut into pieces, seen whole: nothing is read or joined before somebody asks for values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from meshbolt.compat import StoredTensor
from meshbolt.errors import CheckpointError


class Row:
    """Flat tensors one after the other, some of which may not be there: what is asked for is cut from them."""

    def __init__(self, parts: Sequence[torch.Tensor | None], *, lengths: Sequence[int] | None = None) -> None:
        """Take the parts in their order.

        Args:
            parts: of any shape, each read in row-major order; None: not there.
            lengths: how many elements of each count; None: all.
        """
        self._parts = [None if part is None else part.detach().reshape(-1) for part in parts]
        counted = lengths or [0 if part is None else part.numel() for part in self._parts]
        self._ends = list(accumulate(counted))
        self._begins = [0, *self._ends[:-1]] if self._ends else []

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return self._ends[-1] if self._ends else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the parts."""
        return next((part.dtype for part in self._parts if part is not None), torch.float32)

    def at(self, start: int) -> int:
        """Return the number of the part that has an element."""
        return bisect_right(self._ends, start)

    def holds(self, start: int, count: int) -> bool:
        """Return whether no element of some is in a part that is not there.

        Args:
            start: the first element.
            count: how many.
        """
        for number in range(self.at(start), len(self._parts)):
            part, begin, end = self._parts[number], self._begins[number], self._ends[number]
            last = min(start + count, end)
            if max(start, begin) >= last:
                break
            if part is None or part.numel() < last - begin:
                return False
        return True

    def count(self, start: int, count: int) -> int:
        """Return how many of some elements there are."""
        return max(0, min(start + count, self.numel) - start)

    def cut(self, start: int, count: int) -> Iterator[torch.Tensor]:
        """Yield the pieces that some elements lie in.

        Args:
            start: the first element.
            count: how many.
        """
        for number in range(self.at(start), len(self._parts)):
            part, begin, end = self._parts[number], self._begins[number], self._ends[number]
            first, last = max(start, begin), min(start + count, end)
            if first >= last:
                return
            if part is not None:
                yield part[first - begin : last - begin]


class Pieces:
    """Values of one tensor in row-major order: of each of several rows the same elements, one after the other."""

    def __init__(self, rows: Sequence[Row], *, start: int, count: int, dtype: torch.dtype) -> None:
        """Take the place; it is cut when it is read, since there may be as many pieces as tensors and ranks.

        Args:
            rows: in the order of the pieces.
            start: the first element in each row.
            count: how many in each row.
            dtype: to which values are cast when they are read.
        """
        self._rows, self._start, self._count, self._dtype = rows, start, count, dtype

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return sum(row.count(self._start, self._count) for row in self._rows)

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield what of each row lies between."""
        begin = 0
        for row in self._rows:
            end = begin + row.count(self._start, self._count)
            first, last = max(start, begin), min(stop, end)
            if first < last:
                for piece in row.cut(self._start + first - begin, last - first):
                    yield piece.to(self._dtype)
            begin = end


def joined(rows: Sequence[Row], *, start: int, count: int, shape: Sequence[int], name: str) -> StoredTensor | None:
    """Return the tensor that the same elements of several rows make up; None where one of them is in a part that is not there.

    Args:
        rows: in the order of the pieces.
        start: the first element in each row.
        count: how many in each row; of the last ones, those behind the end are not used.
        shape: of the whole.
        name: of the tensor, for the message.

    Raises:
        CheckpointError: there are too few elements.
    """
    if not all(row.holds(start, count) for row in rows):
        return None
    dtype = rows[0].dtype
    whole, numel = Pieces(rows, start=start, count=count, dtype=dtype), torch.Size(shape).numel()
    if whole.numel < numel:
        raise CheckpointError(
            f"the parts of {name!r} have {whole.numel} elements, and its shape {tuple(shape)} has {numel}: a file is damaged, or "
            "of another save"
        )
    return StoredTensor(whole, shape=shape, dtype=dtype, keeps_parts=False)


def as_stored(tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> StoredTensor:
    """Return a tensor that lies in a file as one that is read in runs.

    Args:
        tensor: as it was read.
        dtype: to which values are cast when they are read; None: their own.
    """
    dtype = dtype or tensor.dtype
    if isinstance(tensor, StoredTensor):
        if tensor.dtype == dtype:
            return tensor
        store: _Cast | Pieces | _Strided = _Cast(tensor, dtype)
    else:
        tensor = tensor.detach()
        whole = tensor.is_contiguous()
        store = (
            Pieces([Row([tensor])], start=0, count=tensor.numel(), dtype=dtype) if whole else _Strided(tensor, dtype)
        )
    return StoredTensor(store, shape=tensor.shape, dtype=dtype, keeps_parts=False)


class _Cast:
    """The values of a tensor in another dtype."""

    def __init__(self, tensor: StoredTensor, dtype: torch.dtype) -> None:
        self._tensor, self._dtype = tensor, dtype

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Cast each run."""
        for run in self._tensor.runs(start, stop):
            yield run.to(self._dtype)


class _Strided:
    """The values of a tensor that does not lie in row-major order."""

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self._tensor, self._dtype = tensor, dtype

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Put all of them in order, and yield what is asked for."""
        yield self._tensor.reshape(-1)[start:stop].to(self._dtype)
