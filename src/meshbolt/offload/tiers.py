"""Where the state of an optimizer lies: in host memory, on the device, or in a file. `Tier` is what they have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from meshbolt.compat import unpin_host_memory
from meshbolt.offload.buffers import ALIGNMENT_BYTES, aligned_bytes, aligned_empty, lock
from meshbolt.offload.counters import Traffic
from meshbolt.offload.files import StateFile
from meshbolt.offload.layout import Layout, Section, StateChunk
from meshbolt.offload.reports import StreamReport
from meshbolt.offload.requests import Request
from meshbolt.offload.stream import BUFFERS, Chunk, ChunkStream
from meshbolt.offload.traffic import Moved, Observer, Ways

Columns = Mapping[str, torch.Tensor]
Work = Callable[[StateChunk, Columns], "Sequence[Request] | None"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A part of a column of a chunk.

    Attributes:
        chunk: that has it.
        column: its name.
        start: the first element, of those that the chunk has of the column.
        stop: behind the last one.
    """

    chunk: StateChunk
    column: str
    start: int
    stop: int

    @property
    def reach(self) -> tuple[int, int]:
        """Where its bytes begin and end in a chunk that lies in one run."""
        first = self.chunk.columns.index(self.column) * self.chunk.column_bytes
        itemsize = self.chunk.dtype.itemsize
        return first + self.start * itemsize, first + self.stop * itemsize


class Tier(Protocol):
    """A place for columns, which are zero at first. One thread uses it at a time.

    Attributes:
        resident: columns are in memory all the time, at the same place.
    """

    resident: bool

    def add(self, sections: Sequence[Section]) -> None:
        """Make room for sections.

        Args:
            sections: new ones.
        """

    def whole(self, section: Section) -> Columns | None:
        """Return the columns of a whole section, which stay where they are; None where they are in memory only for a visit.

        Args:
            section: one that was added.
        """

    def visit(
        self,
        chunks: Sequence[StateChunk],
        work: Work,
        *,
        writes: bool = True,
        then: Sequence[StateChunk] = (),
    ) -> None:
        """Call a function with each chunk and its columns in memory, one after the other.

        Args:
            chunks: of sections that were added; each only once.
            work: takes a chunk and its columns, tensors of the chunk's elements, which it may change; it may return transfers
                that read them until they end.
            writes: False: it changes nothing.
            then: what the next visit probably begins with.
        """

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody of each transfer.

        Args:
            observer: who; None: nobody any more.
        """

    def read(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """Yield parts of columns, which are there until the next one is asked for, and are not changed.

        Args:
            runs: of chunks of one section, in the order of the chunks.
        """

    def close(self) -> None:
        """Give everything back; nothing is in use any more."""


class MemoryTier:
    """Memory of the host or of a device."""

    resident = True

    def __init__(self, device: torch.device | str = "cpu", *, pin: bool = False) -> None:
        """Choose the memory.

        Args:
            device: whose memory.
            pin: lock host memory in place, for a GPU to read and write by itself.
        """
        self._device, self._pin = torch.device(device), pin
        self._columns: dict[int, dict[str, torch.Tensor]] = {}
        self._pinned: list[torch.Tensor] = []

    def add(self, sections: Sequence[Section]) -> None:
        """Allocate the sections, each column in one run, all in one piece of memory."""
        total = sum(section.num_bytes for section in sections)
        if not total:
            self._columns.update((section.number, {}) for section in sections)
            return
        memory = self.allocate(total)
        start = 0
        for section in sections:
            self._columns[section.number] = {}
            for name in section.columns:
                stop = start + section.elements * section.dtype.itemsize
                self._columns[section.number][name] = memory[start:stop].view(section.dtype)
                start = stop

    def whole(self, section: Section) -> Columns:
        """Return the columns of a section."""
        return self._columns[section.number]

    def visit(
        self,
        chunks: Sequence[StateChunk],
        work: Work,
        *,
        writes: bool = True,
        then: Sequence[StateChunk] = (),
    ) -> None:
        """Call the function with parts of the memory."""
        for chunk in chunks:
            columns = self._columns[chunk.section]
            work(chunk, {name: column.narrow(0, chunk.first, chunk.elements) for name, column in columns.items()})

    def read(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """Yield parts of the memory."""
        for run in runs:
            first = run.chunk.first
            yield self._columns[run.chunk.section][run.column][first + run.start : first + run.stop]

    def close(self) -> None:
        """Let go of the memory."""
        self._columns.clear()
        for memory in self._pinned:
            unpin_host_memory(memory)
        self._pinned.clear()

    def observe(self, observer: Observer | None) -> None:
        """Do nothing: there are no transfers."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return memory of zeros, which is given back by `close`.

        Args:
            num_bytes: of the result (uint8, one dim), or a little more.
        """
        if self._device.type != "cpu":
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        # Huge pages: an update reads and writes several columns at once, and walks through them a third faster than in
        # small ones.
        memory = aligned_empty(num_bytes)
        if self._pin:
            lock(memory)
            self._pinned.append(memory)
        return memory


class FileTier:
    """A file, of which a few chunks are in memory at a time."""

    resident = False

    def __init__(
        self, layout: Layout, make_file: Callable[[int], StateFile], *, buffers: int = BUFFERS, pin: bool = False
    ) -> None:
        """Choose the file.

        Args:
            layout: whose chunks it has: those that do not stay on the device.
            make_file: makes a file of so many bytes, which this tier closes.
            buffers: how many chunks are in memory at once.
            pin: lock these in their place, for a GPU to read and write by itself.
        """
        self._pin, self._pinned = pin, list[torch.Tensor]()
        self._layout, self._make_file, self._buffers = layout, make_file, buffers
        # With the number of bytes before each file; parameters that are added later have a file of their own.
        self._files: list[tuple[int, StateFile, ChunkStream]] = []
        self._taken_bytes = self._put_bytes = 0
        self.read_wait_seconds = self.room_wait_seconds = 0.0
        self._observer: Observer | None = None

    def moved(self) -> Ways:
        """Return what visits have taken from the files and put there, and what has arrived."""
        traffic = sum((file.traffic for file in self.files), Traffic())
        return Ways(
            read=Moved(self._taken_bytes, traffic.read_bytes, traffic.read_seconds),
            written=Moved(self._put_bytes, traffic.written_bytes, traffic.write_seconds),
        )

    @property
    def files(self) -> list[StateFile]:
        """The files, for what they have moved."""
        return [file for _, file, _ in self._files]

    def add(self, sections: Sequence[Section]) -> None:
        """Make a file for sections, which are the layout's last."""
        chunks = [chunk for section in sections for chunk in section.chunks if chunk.num_bytes]
        if not chunks:
            return
        start = chunks[0].file_offset
        file = self._make_file(chunks[-1].file_offset + chunks[-1].num_bytes - start)
        largest = max(chunk.num_bytes for chunk in chunks)
        stream = ChunkStream(file, chunk_bytes=largest, buffers=self._buffers)
        self._files.append((start, file, stream))
        if self._pin:
            for buffer in stream.memory:
                lock(buffer)
                self._pinned.append(buffer)

    def whole(self, section: Section) -> None:
        """Return None: only chunks are ever in memory."""
        return

    def visit(
        self,
        chunks: Sequence[StateChunk],
        work: Work,
        *,
        writes: bool = True,
        then: Sequence[StateChunk] = (),
    ) -> None:
        """Read each chunk, call the function, and write it, while others are read and written.

        What comes then is read already, and the last chunks are written while that is updated.
        """
        for chunk in chunks:
            if not chunk.num_bytes:
                work(chunk, {})
        for start, file, stream in self._files:
            own, later = ([each for each in some if _is_in(each, start, file)] for some in (chunks, then))
            if own:
                self._run(stream, own, start, work, writes=writes, then=later)

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody of transfers, and of waiting for them, when a visit ends."""
        self._observer = observer

    def read(self, runs: Sequence[Run]) -> Iterator[torch.Tensor]:
        """Read the pages that the parts lie in, one ahead."""
        for start, file, stream in self._files:
            own = [run for run in runs if _is_in(run.chunk, start, file)]
            reaches = [run.reach for run in own]
            pages = [(first - first % ALIGNMENT_BYTES, aligned_bytes(last)) for first, last in reaches]
            places = [
                Chunk(run.chunk.file_offset - start + first, last - first)
                for run, (first, last) in zip(own, pages, strict=True)
            ]
            found = stream.read(places) if own else ()
            for run, (first, last), (begin, _), content in zip(own, reaches, pages, found, strict=True):
                yield content[first - begin : last - begin].view(run.chunk.dtype)

    def close(self) -> None:
        """Close the files."""
        for _, file, _ in self._files:
            file.close()
        for buffer in self._pinned:
            unpin_host_memory(buffer)
        self._pinned.clear()
        self._files.clear()

    def _run(
        self,
        stream: ChunkStream,
        chunks: Sequence[StateChunk],
        start: int,
        work: Work,
        *,
        writes: bool,
        then: Sequence[StateChunk],
    ) -> None:
        def update(number: int, run: torch.Tensor) -> Sequence[Request] | None:
            self._taken_bytes += chunks[number].num_bytes
            reading = work(chunks[number], chunks[number].columns_in(run))
            self._put_bytes += chunks[number].num_bytes if writes else 0
            return reading

        places, later = (
            [Chunk(chunk.file_offset - start, chunk.num_bytes) for chunk in some] for some in (chunks, then)
        )
        begun = time.perf_counter()
        self._note(stream.run(places, update, writes=writes, then=later), begun)

    def _note(self, report: StreamReport, begun: float) -> None:
        self.read_wait_seconds += report.read_wait_seconds
        self.room_wait_seconds += report.write_wait_seconds
        if self._observer is None:
            return
        for span in report.spans:
            if span.what in _LANES:
                self._observer(*_LANES[span.what], begun + span.start_seconds, begun + span.end_seconds)


_LANES: Mapping[str, tuple[str, str]] = {
    "read": ("file: read", "read"),
    "write": ("file: write", "write"),
    "wait_read": ("updates: waits", "wait for the file to be read"),
    "wait_write": ("updates: waits", "wait for room: a buffer is being written"),
}


def _is_in(chunk: StateChunk, start: int, file: StateFile) -> bool:
    return chunk.num_bytes > 0 and 0 <= chunk.file_offset - start < file.num_bytes
