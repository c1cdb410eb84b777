"""How gradients come to where updates run, and parameters go back.

On one device they are used where they are (`SameDevice`). From a GPU to the host (`GpuToHost`) the gradients of a chunk are
gathered into one run on the GPU, copied to locked memory by one copy, and the updated parameters come back the same way: many
small copies would cost more than the bytes. Copies run on two streams of their own, made once; gradients of the next chunks are
on their way while one is updated.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from meshbolt.offload.entries import MASTER, Entry
from meshbolt.offload.layout import Piece, StateChunk
from meshbolt.offload.requests import Request
from meshbolt.offload.rules import Settings
from meshbolt.offload.tiers import Columns, MemoryTier
from meshbolt.offload.traffic import Moved, Observer, Ways

Gradients = Callable[[Piece, slice], torch.Tensor]


@dataclass(slots=True, kw_only=True)
class Live:
    """A parameter that is updated in this step.

    Attributes:
        entry: the parameter.
        shard: this rank's part of it, one dim, in the order of its memory.
        gradient: likewise.
        group: number of its settings.
        is_first: its columns hold no values of an earlier step.
        count: of steps, this one included, on the CPU; None where the optimizer's rule has no need of it.
    """

    entry: Entry
    shard: torch.Tensor
    gradient: torch.Tensor
    group: int
    is_first: bool
    count: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A chunk that is to be updated.

    Attributes:
        chunk: it.
        live: the parameters in it that are updated, by number in the layout.
        pieces: of those parameters in the chunk.
        settings: of the optimizer's groups, by number.
        scale: gradients are multiplied by it in their own place; None: they are as they should be.
        ready: gradients are there when this event has passed; None: they are there.
    """

    chunk: StateChunk
    live: Mapping[int, Live]
    pieces: Sequence[Piece]
    settings: Mapping[int, Settings]
    scale: float | None
    ready: torch.cuda.Event | None


class Transfers(Protocol):
    """What an update calls around a chunk, always in one thread."""

    writes_shards: bool
    """Whether the update itself writes the model's parameters."""

    def begin(self, visit: Visit) -> None:
        """Start to bring the gradients of a chunk.

        Args:
            visit: one that `gradients` and `end` are called for later.
        """

    def gradients(self, visit: Visit) -> Gradients:
        """Wait for the gradients of a chunk, and return a function that finds them.

        Args:
            visit: one that was begun.

        Returns:
            Takes a piece and a slice of its parameter, one dim, and returns the gradient there, until `end`.
        """

    def computing(self) -> AbstractContextManager[Any]:
        """Return a context for the update, which puts it on the right stream."""

    def end(self, visit: Visit, columns: Columns, *, resident: bool) -> Sequence[Request]:
        """Bring updated parameters back.

        Args:
            visit: the chunk.
            columns: of the chunk.
            resident: they stay as they are until the chunk is updated again.

        Returns:
            Transfers that read the columns until they end.
        """

    def looking(self, ready: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """Return a context for looking at parameters before an update.

        Args:
            ready: an event after which nothing on a GPU changes them; None: nothing does.
        """

    def arriving(self) -> AbstractContextManager[Any]:
        """Return a context for looking at parameters behind what brings them back."""

    def join(self) -> None:
        """Let the caller's stream wait for parameters that are on their way back."""

    def settle(self) -> None:
        """Wait for parameters that are on their way back, so that any stream may use them."""

    def apart(self) -> AbstractContextManager[Any]:
        """Return a context for work on columns outside of an update: before it all updates have ended with them."""

    def moved(self) -> Ways:
        """Return what has gone between the memories so far; nothing is waited for."""

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody of each copy, when it has ended; on a GPU this waits for it once.

        Args:
            observer: who; None: nobody any more.
        """

    def close(self) -> None:
        """Give memory back; nothing is under way."""


class SameDevice:
    """Gradients and parameters are used where they are; on a GPU, on a stream beside the caller's."""

    writes_shards = True

    def __init__(self, device: torch.device) -> None:
        """Choose the device.

        Args:
            device: of gradients, parameters and columns.
        """
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, visit: Visit) -> None:
        """Do nothing: gradients are there."""

    def gradients(self, visit: Visit) -> Gradients:
        """Return a function that finds gradients in those that were given."""
        if self._stream is not None and visit.ready is not None:
            self._stream.wait_event(visit.ready)
        return lambda piece, part: visit.live[piece.slot].gradient[part]

    def computing(self) -> AbstractContextManager[Any]:
        """Run what is inside on the stream."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def end(self, visit: Visit, columns: Columns, *, resident: bool) -> Sequence[Request]:
        """Keep gradients until they are used."""
        if self._stream is not None:
            for live in visit.live.values():
                live.gradient.record_stream(self._stream)
        return ()

    def looking(self, ready: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """Look at parameters on the stream of updates."""
        if self._stream is not None and ready is not None:
            self._stream.wait_event(ready)
        return self.computing()

    def arriving(self) -> AbstractContextManager[Any]:
        """Look at parameters on the stream of updates."""
        return self.computing()

    def join(self) -> None:
        """Let the caller's stream wait for the updates."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def settle(self) -> None:
        """Wait for the updates."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Work on the stream of updates, between what the caller's stream does before and after."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self.computing():
            yield
        self.join()

    def moved(self) -> Ways:
        """Return that nothing has moved."""
        return Ways()

    def observe(self, observer: Observer | None) -> None:
        """Do nothing: there are no copies."""

    def close(self) -> None:
        """Do nothing: there is no memory."""


class _Copies:
    """Counts the copies of one stream, with their times as the GPU took them, once it says that they have ended."""

    def __init__(self, lane: str, device: torch.device) -> None:
        self._lane, self._device = lane, device
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self._lock = threading.Lock()
        self._num_bytes, self._done_bytes, self._seconds = 0, 0, 0.0
        self._observer: Observer | None = None
        # A moment on both clocks.
        self._anchor: tuple[torch.cuda.Event, float] | None = None

    @contextlib.contextmanager
    def one(self, num_bytes: int) -> Iterator[None]:
        """Count what is put on the current stream inside as one copy.

        Args:
            num_bytes: of it.
        """
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        ended.record()
        with self._lock:
            self._num_bytes += num_bytes
            self._under_way.append((begun, ended, num_bytes))
        self.moved()

    def moved(self) -> Moved:
        """Return what has moved so far."""
        with self._lock:
            while self._under_way and self._under_way[0][1].query():
                self._note(*self._under_way.popleft())
            return Moved(self._num_bytes, self._done_bytes, self._seconds)

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody of each copy; waits for the current stream once, to set the GPU's clock."""
        self.moved()
        if observer is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            event.synchronize()
            self._anchor = event, time.perf_counter()
        self._observer = observer

    def _note(self, begun: torch.cuda.Event, ended: torch.cuda.Event, num_bytes: int) -> None:
        seconds = begun.elapsed_time(ended) / 1e3
        self._done_bytes += num_bytes
        self._seconds += seconds
        if self._observer is not None and self._anchor is not None:
            start = self._anchor[1] + self._anchor[0].elapsed_time(begun) / 1e3
            self._observer(self._lane, "copy", start, start + seconds)


class _Incoming:
    """Locked memory for the gradients of one chunk, and the event after which they are there."""

    def __init__(self) -> None:
        self.memory = MemoryRun()
        self.arrived = torch.cuda.Event()
        self.run = torch.empty(0)


class MemoryRun:
    """Locked host memory that grows to what is asked."""

    def __init__(self) -> None:
        self._tier: MemoryTier | None = None
        self._run = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return so many bytes; what was taken before is lost.

        Args:
            num_bytes: uint8, one dim.
        """
        if self._run.numel() < num_bytes:
            self.close()
            self._tier = MemoryTier(pin=True)
            self._run = self._tier.allocate(num_bytes)
        return self._run[:num_bytes]

    @property
    def num_bytes(self) -> int:
        """How much it has."""
        return self._run.nbytes

    def close(self) -> None:
        """Give the memory back."""
        if self._tier is not None:
            self._tier.close()
        self._tier, self._run = None, torch.empty(0, dtype=torch.uint8)


class GpuToHost:
    """Gradients come to locked host memory, parameters go back to the GPU from the master copy."""

    writes_shards = False

    def __init__(self, device: torch.device) -> None:
        """Make the streams.

        Args:
            device: the GPU.
        """
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free: list[_Incoming] = []
        self._coming: dict[int, _Incoming] = {}
        # On the GPU, one run each way: the copies of a stream take turns.
        self._stages: dict[str, torch.Tensor] = {}
        self._sent = torch.cuda.Event()
        self._to_host, self._to_device = _Copies("to the host", device), _Copies("to the device", device)

    def begin(self, visit: Visit) -> None:
        """Start the copy of the gradients to the host."""
        incoming = self._coming[visit.chunk.number] = self._free.pop() if self._free else _Incoming()
        pieces = visit.pieces
        dtypes = {visit.live[piece.slot].gradient.dtype for piece in pieces}
        wire = dtypes.pop() if len(dtypes) == 1 else visit.chunk.dtype
        if visit.ready is not None:
            self._down.wait_event(visit.ready)
        first, last = _reach(pieces)
        incoming.run = incoming.memory.take(visit.chunk.elements * wire.itemsize).view(wire)
        with torch.cuda.stream(self._down), self._to_host.one((last - first) * wire.itemsize):
            stage = self._stage("down", visit.chunk.elements, wire)
            gradients = [visit.live[piece.slot].gradient[piece.start : piece.stop] for piece in pieces]
            torch._foreach_copy_([stage[piece.span(piece.start, piece.stop)] for piece in pieces], gradients)
            incoming.run[first:last].copy_(stage[first:last], non_blocking=True)
            incoming.arrived.record()

    def gradients(self, visit: Visit) -> Gradients:
        """Wait for the copy, and return a function that finds gradients in it."""
        incoming = self._coming[visit.chunk.number]
        incoming.arrived.synchronize()
        run = incoming.run
        return lambda piece, part: run[piece.span(part.start, part.stop)]

    def computing(self) -> AbstractContextManager[Any]:
        """Run what is inside as it is: it computes on the host."""
        return contextlib.nullcontext()

    def end(self, visit: Visit, columns: Columns, *, resident: bool) -> Sequence[Request]:
        """Start the copy of the parameters to the GPU, which casts them there."""
        self._free.append(self._coming.pop(visit.chunk.number))
        pieces = visit.pieces
        first, last = _reach(pieces)
        master = columns[MASTER]
        num_bytes = (last - first) * visit.chunk.dtype.itemsize
        with torch.cuda.stream(self._up), self._to_device.one(num_bytes):
            stage = self._stage("up", visit.chunk.elements, visit.chunk.dtype)
            stage[first:last].copy_(master[first:last], non_blocking=True)
            shards = [visit.live[piece.slot].shard[piece.start : piece.stop] for piece in pieces]
            torch._foreach_copy_(shards, [stage[piece.span(piece.start, piece.stop)] for piece in pieces])
            self._sent.record()
        if not resident:
            self._sent.synchronize()  # the columns' memory is another chunk's next
        return ()

    def looking(self, ready: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """Look at parameters on the stream that brings gradients to the host."""
        if ready is not None:
            self._down.wait_event(ready)
        return torch.cuda.stream(self._down)

    def arriving(self) -> AbstractContextManager[Any]:
        """Look at parameters on the stream that brings them back."""
        return torch.cuda.stream(self._up)

    def join(self) -> None:
        """Let the caller's stream wait for the parameters."""
        torch.cuda.current_stream(self._device).wait_stream(self._up)

    def settle(self) -> None:
        """Wait for the copies."""
        self._up.synchronize()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Wait until nothing is read from the columns."""
        self._up.synchronize()
        yield

    def moved(self) -> Ways:
        """Return the gradients that went to the host, and the parameters that went back."""
        return Ways(to_host=self._to_host.moved(), to_device=self._to_device.moved())

    def observe(self, observer: Observer | None) -> None:
        """Tell somebody of each copy, with the times of the GPU."""
        for copies in (self._to_host, self._to_device):
            copies.observe(observer)

    def close(self) -> None:
        """Give the locked memory back."""
        self._down.synchronize()
        self._up.synchronize()
        for incoming in (*self._free, *self._coming.values()):
            incoming.memory.close()

    def _stage(self, way: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = elements * dtype.itemsize
        run = self._stages.get(way)
        if run is None or run.numel() < num_bytes:
            # Allocated on the stream that uses it, which orders its end before the next one's beginning.
            run = self._stages[way] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        return run[:num_bytes].view(dtype)


def _reach(pieces: Sequence[Piece]) -> tuple[int, int]:
    """Return where the first piece begins and the last one ends, in a column of their chunk."""
    return pieces[0].offset, pieces[-1].offset + pieces[-1].stop - pieces[-1].start
