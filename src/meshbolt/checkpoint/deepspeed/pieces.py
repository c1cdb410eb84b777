"""Tensors that DeepSpeed has cut into pieces, seen whole: nothing is read or joined before somebody asks for values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch

from meshbolt.compat import StoredTensor
from meshbolt.errors import CheckpointError


class Pieces:
    """Values of one tensor in row-major order, in parts of flat tensors that stay in their files."""

    def __init__(self, pieces: Iterable[torch.Tensor], *, dtype: torch.dtype) -> None:
        """Take the pieces in their order.

        Args:
            pieces: each with one dim.
            dtype: to which values are cast when they are read.
        """
        self._pieces, self._dtype = [piece for piece in pieces if piece.numel()], dtype
        self._ends = list(accumulate(piece.numel() for piece in self._pieces))

    @property
    def numel(self) -> int:
        """How many elements there are."""
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield what of each piece lies between."""
        for piece, end in zip(self._pieces, self._ends, strict=True):
            begin = end - piece.numel()
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield piece[first - begin : last - begin].to(self._dtype)


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

    def at(self, start: int) -> int:
        """Return the number of the part that has an element."""
        return bisect_right(self._ends, start)

    def cut(self, start: int, count: int) -> list[torch.Tensor] | None:
        """Return the pieces that some elements lie in; None where one of them is not there.

        Args:
            start: the first element.
            count: how many.
        """
        found: list[torch.Tensor] = []
        for number in range(self.at(start), len(self._parts)):
            part, begin, end = self._parts[number], self._begins[number], self._ends[number]
            first, last = max(start, begin), min(start + count, end)
            if first >= last:
                break
            if part is None or part.numel() < last - begin:
                return None
            found.append(part[first - begin : last - begin])
        return found


def joined(pieces: Sequence[torch.Tensor], *, shape: Sequence[int], name: str) -> StoredTensor:
    """Return the tensor that pieces make up, in order; nothing is read.

    Args:
        pieces: each with one dim; of those behind the end nothing is used.
        shape: of the whole.
        name: of the tensor, for the message.

    Raises:
        CheckpointError: there are too few elements.
    """
    dtype = pieces[0].dtype if pieces else torch.float32
    whole, numel = Pieces(pieces, dtype=dtype), torch.Size(shape).numel()
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
        store = Pieces([tensor.reshape(-1)], dtype=dtype) if tensor.is_contiguous() else _Strided(tensor, dtype)
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
