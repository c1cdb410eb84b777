"""Which elements of which parameter lie where, in the state that an optimizer keeps outside of the model.

The parameters of one unit that need the same columns (a master copy, moments) in the same dtype form a *section*: one after the
other, each beginning at a multiple of 64 bytes. A section is cut into *chunks* of bounded size, which are updated, and read and
written where they lie in a file, one at a time; a parameter larger than a chunk is cut as well, at a multiple of 64 bytes, where
a cut changes no bit of what torch's kernels compute.

Large columns have an odd length, so that those that are walked through side by side begin at different places in a page: of
columns that begin alike, in huge pages, the update was 7 % slower.

In memory each column of a section lies in one run, so that a parameter's part of it is one tensor however many chunks it spans.
In a file each chunk lies in one run, one column after the other: `StateChunk.columns_in`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from meshbolt.errors import ConfigError

CHUNK_BYTES = 64 * 2**20
VECTOR_BYTES = 64
"""Parameters begin at multiples of this, and are cut there: a cache line, and the longest vector of a CPU."""
PAGE_BYTES = 4096
"""What a chunk's bytes are rounded up to, for files that are read past the page cache."""
_LARGE_BYTES = 16 * PAGE_BYTES
_ODD_BYTES = PAGE_BYTES // 4 + VECTOR_BYTES


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one parameter needs.

    Attributes:
        unit: parameters of a unit are updated together.
        numel: elements of this rank's part.
        dtype: that it is updated in.
        columns: names of the tensors of its size that lie outside of the model.
        stays: the columns are kept on the parameter's own device.
    """

    unit: str
    numel: int
    dtype: torch.dtype
    columns: tuple[str, ...]
    stays: bool = False

    @property
    def num_bytes(self) -> int:
        """Of all its columns, without what is between parameters."""
        return self.numel * self.dtype.itemsize * len(self.columns)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of one parameter's elements in a chunk.

    Attributes:
        slot: the parameter's number in the layout.
        number: counts the parameter's pieces.
        start: first of its elements, one dim, that the piece has.
        stop: behind the last one.
        offset: where the piece begins in each column of the chunk, in elements.
    """

    slot: int
    number: int
    start: int
    stop: int
    offset: int

    def span(self, start: int, stop: int) -> slice:
        """Return where some of the parameter's elements lie in a column of the chunk.

        Args:
            start: not before the piece's.
            stop: not behind the piece's.
        """
        return slice(self.offset + start - self.start, self.offset + stop - self.start)


@dataclass(frozen=True, kw_only=True, eq=False)
class StateChunk:
    """A run of a section that is updated at once.

    Attributes:
        number: counts the chunks of the layout.
        section: the number of its section.
        first: where it begins in the columns of its section, in elements.
        elements: of each column, padding included.
        dtype: of all columns.
        columns: their names.
        pieces: of parameters, in the order in which they lie.
        stays: it is kept on the parameters' own device.
        file_offset: where it begins in a file that has the chunks that do not stay, in bytes.
    """

    number: int
    section: int
    first: int
    elements: int
    dtype: torch.dtype
    columns: tuple[str, ...]
    pieces: tuple[Piece, ...]
    stays: bool
    file_offset: int

    @property
    def column_bytes(self) -> int:
        """Of one column."""
        return self.elements * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Of all columns in one run, in whole pages."""
        return -(-self.column_bytes * len(self.columns) // PAGE_BYTES) * PAGE_BYTES

    def columns_in(self, run: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the columns of a chunk that lies in one run, as tensors that share its memory.

        Args:
            run: uint8, one dim, `num_bytes` long or longer.

        Returns:
            By name, tensors of `elements`.
        """
        return {
            name: run[place * self.column_bytes : (place + 1) * self.column_bytes].view(self.dtype)
            for place, name in enumerate(self.columns)
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """Parameters of one unit whose state lies together.

    Attributes:
        number: counts the sections of the layout.
        unit: theirs.
        dtype: of all columns.
        columns: their names.
        elements: of each column, padding included.
        places: where each parameter begins in the columns, by its number in the layout.
        chunks: in their order.
        stays: it is kept on the parameters' own device.
    """

    number: int
    unit: str
    dtype: torch.dtype
    columns: tuple[str, ...]
    elements: int
    places: Mapping[int, int]
    chunks: tuple[StateChunk, ...]
    stays: bool

    @property
    def num_bytes(self) -> int:
        """Of all columns."""
        return self.elements * self.dtype.itemsize * len(self.columns)


class Layout:
    """The places of all parameters; more can be added, which move nothing.

    Attributes:
        slots: by number, as they were added.
        sections: by number.
        chunks: by number.
        file_bytes: of a file that has all chunks that do not stay.
    """

    def __init__(self, slots: Sequence[Slot] = (), *, chunk_bytes: int = CHUNK_BYTES, in_pages: bool = False) -> None:
        """Lay parameters out.

        Args:
            slots: what each parameter needs.
            chunk_bytes: the most that a chunk has, all columns together, rounded down to whole vectors.
            in_pages: parameters begin, and are cut, at pages, so that a piece can be written to a file by itself.

        Raises:
            ConfigError: a chunk would have no room.
        """
        if chunk_bytes < PAGE_BYTES:
            raise ConfigError(f"Chunks of {chunk_bytes} bytes are too small to work on: give at least {PAGE_BYTES}.")
        self._chunk_bytes, self._in_pages = chunk_bytes, in_pages
        self.slots: list[Slot] = []
        self.sections: list[Section] = []
        self.chunks: list[StateChunk] = []
        self.file_bytes = 0
        self._chunks_of: dict[int, list[StateChunk]] = {}
        self.add(slots)

    def add(self, slots: Sequence[Slot]) -> list[Section]:
        """Add parameters behind those that are there; return the sections that were made for them.

        Args:
            slots: what each needs; they get the next numbers.
        """
        alike: dict[tuple[str, torch.dtype, tuple[str, ...], bool], list[int]] = {}
        for slot in slots:
            alike.setdefault((slot.unit, slot.dtype, slot.columns, slot.stays), []).append(len(self.slots))
            self.slots.append(slot)
        count = len(self.sections)
        for numbers in alike.values():
            self.sections.append(self._section(numbers))
        return self.sections[count:]

    def bytes_of(self, *, stays: bool) -> int:
        """Return the bytes of all columns that stay on the parameters' device, or of those that do not."""
        return sum(section.num_bytes for section in self.sections if section.stays is stays)

    @property
    def largest_chunk_bytes(self) -> int:
        """The most that a chunk has which does not stay, in whole pages."""
        return max((chunk.num_bytes for chunk in self.chunks if not chunk.stays), default=0)

    def chunks_of(self, slots: Sequence[int]) -> list[StateChunk]:
        """Return the chunks that have a piece of a parameter, in their order.

        Args:
            slots: numbers of parameters.
        """
        found = {chunk.number: chunk for slot in slots for chunk in self._chunks_of[slot]}
        return [found[number] for number in sorted(found)]

    def pieces_of(self, slot: int) -> int:
        """Return in how many pieces a parameter is, at least one.

        Args:
            slot: its number.
        """
        return len(self._chunks_of[slot])

    def _section(self, numbers: Sequence[int]) -> Section:
        kind = self.slots[numbers[0]]
        places, end = {}, 0
        for number in numbers:
            places[number] = end
            end = self._padded(end + self.slots[number].numel, kind.dtype)
        # A rank may hold nothing of a parameter, and still counts its steps.
        elements = self._length(max(end, 1), kind.dtype)
        number = len(self.sections)
        chunks = tuple(
            self._chunk(number, kind, self._pieces(places, first=first, elements=count, total=elements), first, count)
            for first, count in self._cuts(elements, kind)
        )
        return Section(
            number=number,
            unit=kind.unit,
            dtype=kind.dtype,
            columns=kind.columns,
            elements=elements,
            places=places,
            chunks=chunks,
            stays=kind.stays,
        )

    def _cuts(self, elements: int, kind: Slot) -> Iterator[tuple[int, int]]:
        """Yield (first, elements) of chunks that are about as large as each other."""
        # Without columns there is nothing to bound, but the work of an update still comes in pieces.
        row_bytes = kind.dtype.itemsize * max(1, len(kind.columns))
        limit = self._length(self._chunk_bytes // row_bytes, kind.dtype, at_most=True)
        count = -(-elements // limit)
        each = min(limit, self._length(-(-elements // count), kind.dtype))
        for first in range(0, elements, each):
            yield first, min(each, elements - first)

    def _padded(self, elements: int, dtype: torch.dtype) -> int:
        """Return a number of elements, rounded up to where the next parameter may begin."""
        unit = (PAGE_BYTES if self._in_pages else VECTOR_BYTES) // dtype.itemsize
        return -(-elements // unit) * unit

    def _length(self, elements: int, dtype: torch.dtype, *, at_most: bool = False) -> int:
        """Return a number of elements, rounded up to the length of a column or of a chunk of it.

        Args:
            elements: that it has to hold.
            dtype: its.
            at_most: round down.
        """
        if not self._in_pages:
            return _with_odd_length(elements, dtype, at_most=at_most)
        page = PAGE_BYTES // dtype.itemsize
        return max(page, elements // page * page if at_most else -(-elements // page) * page)

    def _pieces(self, places: Mapping[int, int], *, first: int, elements: int, total: int) -> tuple[Piece, ...]:
        """Return the pieces in a run of a section."""
        pieces = []
        for slot, place in places.items():
            numel = self.slots[slot].numel
            start, stop = max(0, first - place), min(numel, first + elements - place)
            is_empty_here = numel == 0 and first <= min(place, total - 1) < first + elements
            if is_empty_here:
                start = stop = 0
            if start < stop or is_empty_here:
                number = len(self._chunks_of.get(slot, ()))
                pieces.append(Piece(slot=slot, number=number, start=start, stop=stop, offset=place + start - first))
        return tuple(pieces)

    def _chunk(self, section: int, kind: Slot, pieces: tuple[Piece, ...], first: int, elements: int) -> StateChunk:
        chunk = StateChunk(
            number=len(self.chunks),
            section=section,
            first=first,
            elements=elements,
            dtype=kind.dtype,
            columns=kind.columns,
            pieces=pieces,
            stays=kind.stays,
            file_offset=self.file_bytes,
        )
        self.chunks.append(chunk)
        for piece in pieces:
            self._chunks_of.setdefault(piece.slot, []).append(chunk)
        if not kind.stays:
            self.file_bytes += chunk.num_bytes
        return chunk


def which_stay(num_bytes: Sequence[int], *, budget: int) -> list[bool]:
    """Choose parameters whose state stays on their device: the first ones that fit, in the order given.

    Whole parameters are chosen, so that none has its state in two places. In the order of the forward pass the first ones are
    those whose gradients come last, and whose update no backward pass hides.

    Args:
        num_bytes: of each parameter's state.
        budget: the most bytes that stay.

    Returns:
        For each parameter, whether it stays.
    """
    chosen, left = [], budget
    for size in num_bytes:
        stays = 0 < size <= left
        left -= size if stays else 0
        chosen.append(stays)
    return chosen


def _with_odd_length(elements: int, dtype: torch.dtype, *, at_most: bool = False) -> int:
    """Return a number of elements in whole vectors, and if it is large of a length that puts columns out of step.

    Args:
        elements: of a column.
        dtype: its.
        at_most: round down, to one vector at least.
    """
    num_bytes = elements * dtype.itemsize
    odd, unit = (_ODD_BYTES, PAGE_BYTES) if num_bytes >= _LARGE_BYTES else (0, VECTOR_BYTES)
    units = (num_bytes - odd) // unit if at_most else -(-(num_bytes - odd) // unit)
    return max(VECTOR_BYTES, units * unit + odd) // dtype.itemsize
