"""Update state that lies in a file, chunk by chunk: one is updated while the next is read and the last is written.

With three buffers no chunk waits for another one's transfer, so that all of it takes as long as the slower of the disk and
the updates, plus the first read and the last write. Between passes that follow each other these two are hidden as well.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from meshbolt.errors import ConfigError, StorageError
from meshbolt.offload.buffers import ALIGNMENT_BYTES, aligned_bytes, aligned_empty
from meshbolt.offload.files import StateFile
from meshbolt.offload.reports import Span, StreamReport, What
from meshbolt.offload.requests import Request

CHUNK_BYTES = 64 * 2**20
BUFFERS = 3
Update = Callable[[int, torch.Tensor], object]


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is updated at once.

    Attributes:
        offset: of its first byte in the file, in whole units of alignment.
        num_bytes: in whole units of alignment.
    """

    offset: int
    num_bytes: int

    def overlaps(self, other: Chunk) -> bool:
        """Return whether they have bytes in common."""
        return self.offset < other.offset + other.num_bytes and other.offset < self.offset + self.num_bytes


@dataclass(frozen=True)
class _Flight:
    """A chunk that is being read or written, in the buffer that belongs to it meanwhile.

    Attributes:
        chunk: it.
        number: in its pass.
        buffer: its memory.
        request: the transfer.
        others: transfers of somebody else that read the buffer too.
    """

    chunk: Chunk
    number: int
    buffer: torch.Tensor
    request: Request
    others: Sequence[Request] = ()


class ChunkStream:
    """Passes chunks of a file through a few buffers, made once. One thread uses it at a time."""

    def __init__(self, file: StateFile, *, chunk_bytes: int = CHUNK_BYTES, buffers: int = BUFFERS) -> None:
        """Make the buffers.

        Args:
            file: that has the chunks; it stays the caller's to close.
            chunk_bytes: the largest chunk; rounded up to whole units of alignment.
            buffers: how many chunks are in memory at once: with one nothing overlaps, with two no read does.

        Raises:
            ConfigError: a number is not positive.
        """
        if chunk_bytes < 1 or buffers < 1:
            raise ConfigError(f"chunk_bytes={chunk_bytes} and buffers={buffers} are to be positive.")
        self._file, self.chunk_bytes = file, aligned_bytes(chunk_bytes)
        self._buffers = [aligned_empty(self.chunk_bytes) for _ in range(buffers)]
        self._free = list(self._buffers)
        # Chunks that are being read for updates to come, in their order; and those being written, the oldest first.
        self._ahead: deque[_Flight] = deque()
        self._writing: deque[_Flight] = deque()
        self._report, self._start, self._stuck = StreamReport(), 0.0, False

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """The buffers."""
        return self._buffers

    @property
    def buffer_bytes(self) -> int:
        """The memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def chunks(self, num_bytes: int, *, offset: int = 0) -> list[Chunk]:
        """Return a range of the file in chunks as large as they may be.

        Args:
            num_bytes: of the range, rounded up to whole units of alignment.
            offset: of its first byte, in whole units of alignment.
        """
        end = offset + aligned_bytes(num_bytes)
        starts = range(offset, end, self.chunk_bytes)
        return [Chunk(start, min(self.chunk_bytes, end - start)) for start in starts]

    def run(
        self,
        chunks: Sequence[Chunk],
        update: Update,
        *,
        reads: bool = True,
        writes: bool = True,
        then: Sequence[Chunk] = (),
    ) -> StreamReport:
        """Read, update and write chunks, in their order; return when the last one is written.

        After an error the transfers under way have ended, and no other begins; if the pass was to write, the file is out of
        use, since some chunks are updated and others are not.

        Args:
            chunks: parts of the file that do not overlap.
            update: is called in this thread with each chunk's number and bytes (uint8, one dim), which it changes; it may wait
                for what it needs, while the next chunks are read. It keeps no reference to the bytes, but may return a
                sequence of transfers that read them until they end.
            reads: False: chunks are only written, and `update` gets bytes of any value to fill.
            writes: False: chunks are only read, and changes are lost.
            then: what the next pass begins with, if that is known: it is read while this pass ends, and the last chunks of
                this one are written while that one begins, or until `finish`. Those that overlap one of `chunks` are read once
                that is updated and written.

        Returns:
            What was done, and when.

        Raises:
            ConfigError: a chunk is larger than a buffer, not aligned, outside of the file, or overlaps another one.
            StorageError: something could not be read or written.
            BaseException: what `update` raised.
        """
        self._require_fitting(chunks)
        self._require_fitting(then)
        with self._one_pass(writes=writes) as report:
            # One buffer is updated and one is written; all others read ahead.
            ahead = max(0, len(self._buffers) - 2)
            order = [*chunks, *then] if reads else []
            order = order[: self._readable(chunks, order, ahead=ahead)]
            begun = self._adopt(order)
            for number in range(len(chunks)):
                while begun < len(order) and begun <= number + ahead:
                    self._begin_read(order[begun], begun)
                    begun += 1
                buffer = self._finish_read() if reads else self._take_buffer()
                with self._span("update", number):
                    others = update(number, buffer[: chunks[number].num_bytes])
                others = others if isinstance(others, Sequence) else ()
                self._put_back(chunks[number], number, buffer, writes=writes, others=others)
            if not then:
                self._finish_writes()
        return report

    def read(self, chunks: Sequence[Chunk]) -> Iterator[torch.Tensor]:
        """Yield the bytes of chunks, in their order, while the next ones are read.

        Args:
            chunks: parts of the file that do not overlap.

        Yields:
            Of each chunk its bytes (uint8, one dim), which are there until the next one is asked for.

        Raises:
            ConfigError: as for `run`.
            StorageError: something could not be read.
        """
        self._require_fitting(chunks)
        with self._one_pass(writes=False):
            self._adopt([])
            self._finish_writes()
            begun = 0
            for number, chunk in enumerate(chunks):
                while begun < len(chunks) and begun < number + len(self._buffers):
                    self._begin_read(chunks[begun], begun)
                    begun += 1
                buffer = self._finish_read()
                yield buffer[: chunk.num_bytes]
                self._free.append(buffer)

    def finish(self) -> StreamReport:
        """Wait until all is written that passes with `then` left under way, and forget what was read ahead.

        Returns:
            What was still done, and when.

        Raises:
            StorageError: something could not be written.
        """
        with self._one_pass(writes=True) as report:
            self._adopt([])
            self._finish_writes()
        return report

    @contextlib.contextmanager
    def _one_pass(self, *, writes: bool) -> Iterator[StreamReport]:
        if self._stuck:
            raise StorageError(
                "No chunk can be passed through: a transfer of an earlier pass is stuck, and has its buffer."
            )
        self._report, self._start = StreamReport(), time.perf_counter()
        self._writing = deque(replace(flight, number=-1) for flight in self._writing)
        try:
            yield self._report
        except BaseException as error:
            if writes:
                self._file.condemn(f"A pass over it ended half-way, and left chunks of two steps: {error!r}")
            self._settle()
            raise
        self._report.seconds = time.perf_counter() - self._start

    def _settle(self) -> None:
        """Cut short what is under way, wait for it and raise nothing."""
        under_way = [*self._ahead, *self._writing]
        for flight in under_way:
            for each in (flight.request, *flight.others):
                each.abandon()
        # A stuck disk may write to its buffer at any time, so there is no further pass.
        self._stuck = not all(each.settle() for flight in under_way for each in (flight.request, *flight.others))
        self._ahead.clear()
        self._writing.clear()
        self._free = list(self._buffers)

    @staticmethod
    def _readable(chunks: Sequence[Chunk], order: Sequence[Chunk], *, ahead: int) -> int:
        """Return how many chunks of an order may be read in this pass: all of its own, and some of those that follow."""
        for number in range(len(chunks), len(order)):
            # When it is read, chunks up to this one are updated.
            updated = max(0, number - ahead)
            if any(order[number].overlaps(chunk) for chunk in chunks[updated:]):
                return number
        return len(order)

    def _adopt(self, order: Sequence[Chunk]) -> int:
        """Return how many chunks of an order are being read already; let go of those that are read and not in it."""
        if [flight.chunk for flight in self._ahead] == list(order[: len(self._ahead)]):
            self._ahead = deque(replace(flight, number=number) for number, flight in enumerate(self._ahead))
            return len(self._ahead)
        for flight in self._ahead:
            flight.request.abandon()
        while self._ahead:
            if not self._ahead[0].request.settle():
                raise self._ahead[0].request.stuck_error()
            self._free.append(self._ahead.popleft().buffer)
        return 0

    def _begin_read(self, chunk: Chunk, number: int) -> None:
        while any(flight.chunk.overlaps(chunk) for flight in self._writing):
            self._finish_write()
        buffer = self._take_buffer()
        request = self._file.read(buffer[: chunk.num_bytes], chunk.offset)
        self._ahead.append(_Flight(chunk, number, buffer, request))

    def _finish_read(self) -> torch.Tensor:
        flight = self._ahead[0]
        with self._span("wait_read", flight.number):
            flight.request.wait()
        self._note(flight)
        self._report.read_bytes += flight.chunk.num_bytes
        return self._ahead.popleft().buffer

    def _put_back(
        self, chunk: Chunk, number: int, buffer: torch.Tensor, *, writes: bool, others: Sequence[Request]
    ) -> None:
        if not writes:
            self._free.append(buffer)
            return
        request = self._file.write(buffer[: chunk.num_bytes], chunk.offset)
        self._writing.append(_Flight(chunk, number, buffer, request, others))

    def _take_buffer(self) -> torch.Tensor:
        if not self._free:
            self._finish_write()
        return self._free.pop()

    def _finish_writes(self) -> None:
        while self._writing:
            self._finish_write()

    def _finish_write(self) -> None:
        flight = self._writing[0]
        with self._span("wait_write", flight.number):
            for request in (flight.request, *flight.others):
                request.wait()
        self._note(flight)
        self._report.written_bytes += flight.chunk.num_bytes
        self._free.append(self._writing.popleft().buffer)

    def _note(self, flight: _Flight) -> None:
        self._add(flight.request.direction, flight.number, flight.request.submitted, flight.request.ended)

    @contextlib.contextmanager
    def _span(self, what: What, number: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._add(what, number, start, time.perf_counter())

    def _add(self, what: What, number: int, start: float, end: float) -> None:
        self._report.spans.append(Span(what, number, start - self._start, end - self._start))

    def _require_fitting(self, chunks: Sequence[Chunk]) -> None:
        end = 0
        for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
            misaligned = chunk.offset % ALIGNMENT_BYTES or chunk.num_bytes % ALIGNMENT_BYTES
            if misaligned or not 0 < chunk.num_bytes <= self.chunk_bytes or chunk.offset < end:
                raise ConfigError(
                    f"{chunk} cannot be passed through: chunks begin and end at multiples of {ALIGNMENT_BYTES}, have at most "
                    f"{self.chunk_bytes} bytes, and do not overlap (the one before ends at {end})."
                )
            end = chunk.offset + chunk.num_bytes
        if end > self._file.num_bytes:
            raise ConfigError(f"Chunks end at {end}, behind the end of a file of {self._file.num_bytes} bytes.")
