"""How updated parameters come to the file in which the model's shards lie: piece by piece, from the columns of their chunk."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from meshbolt.errors import ConfigError
from meshbolt.offload.buffers import aligned_bytes
from meshbolt.offload.entries import MASTER
from meshbolt.offload.layout import Piece
from meshbolt.offload.parameters import ParameterFile
from meshbolt.offload.requests import Request
from meshbolt.offload.tiers import Columns
from meshbolt.offload.traffic import Moved, Observer, Ways
from meshbolt.offload.transfers import GpuToHost, Gradients, SameDevice, Transfers, Visit


class HostToFile:
    """Gradients are in host memory, updated parameters go to the file of shards; chunks are laid out in pages for that.

    A chunk's writes end before its memory is another one's: a stream has three buffers, and of these the chunk before the last
    one is overwritten next.
    """

    writes_shards = False

    def __init__(self, parameters: ParameterFile) -> None:
        """Choose the file.

        Args:
            parameters: that has the shards of all parameters with a copy in the columns.
        """
        self._parameters = parameters
        # Of the last chunk, and of the one before it.
        self._writing: deque[list[Request]] = deque()
        self._lock = threading.Lock()
        self._written_bytes = 0

    @property
    def is_writing(self) -> bool:
        """Whether something is on its way to the file."""
        return bool(self._writing)

    def begin(self, visit: Visit) -> None:
        """Do nothing: gradients are there."""

    def gradients(self, visit: Visit) -> Gradients:
        """Return a function that finds gradients in those that were given."""
        return lambda piece, part: visit.live[piece.slot].gradient[part]

    def computing(self) -> AbstractContextManager[Any]:
        """Run what is inside as it is: it computes on the host."""
        return contextlib.nullcontext()

    def end(self, visit: Visit, columns: Columns, *, resident: bool) -> None:
        """Start to write the chunk's parameters, and wait for those of the one before it."""
        requests = []
        for piece in visit.pieces if MASTER in columns else ():
            if piece.start < piece.stop:
                requests.append(self._write(visit, piece, columns))
        with self._lock:
            self._writing.append(requests)
        while len(self._writing) > 1:
            self._wait_for_one()

    def looking(self, ready: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """Run what is inside as it is."""
        return contextlib.nullcontext()

    def arriving(self) -> AbstractContextManager[Any]:
        """Run what is inside as it is."""
        return contextlib.nullcontext()

    def rest(self) -> None:
        """Wait until all parameters are in the file; who changes it from now on is somebody else."""
        self.join()
        self._parameters.note_own_writes()

    def join(self) -> None:
        """Wait until all parameters are in the file."""
        while self._writing:
            self._wait_for_one()

    def settle(self) -> None:
        """Wait until all parameters are in the file."""
        self.join()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Wait until nothing is written from the columns."""
        self.join()
        yield

    def close(self) -> None:
        """Wait until nothing is written from the columns; what could not be written is known already."""
        while self._writing:
            with contextlib.suppress(Exception):
                self._wait_for_one()

    def moved(self) -> Ways:
        """Return the parameters that were written; their times are those of the file, which reads others meanwhile."""
        traffic = self._parameters.traffic
        return Ways(written=Moved(self._written_bytes, traffic.written_bytes, traffic.write_seconds))

    def observe(self, observer: Observer | None) -> None:
        """Do nothing: writes are in the file's own counters."""

    def _write(self, visit: Visit, piece: Piece, columns: Columns) -> Request:
        shard, column = visit.live[piece.slot].shard, columns[MASTER]
        place = self._parameters.place_of(shard)
        if place is None or shard.dtype != column.dtype:
            raise ConfigError(
                f"A parameter of {shard.numel()} {shard.dtype} was to be written to the file of shards, where it does "
                f"not lie, or not in the dtype of its update, {column.dtype}."
            )
        itemsize = column.element_size()
        num_bytes = aligned_bytes((piece.stop - piece.start) * itemsize)
        data = column[piece.offset : piece.offset + num_bytes // itemsize]
        self._written_bytes += num_bytes
        return self._parameters.write(data, place + piece.start * itemsize)

    def _wait_for_one(self) -> None:
        # The thread of updates and the caller may wait for the same ones; they stay here until they have ended.
        with self._lock:
            requests = self._writing[0] if self._writing else []
        try:
            for request in requests:
                request.wait()
        finally:
            with self._lock:
                if self._writing and self._writing[0] is requests:
                    self._writing.popleft()


def ways_between(device: torch.device, *, is_far: bool, parameters: ParameterFile | None) -> dict[bool, Transfers]:
    """Return the ways between the model and its state, by whether that stays on the device.

    Args:
        device: where it stays.
        is_far: parameters lie there too, while their state leaves it.
        parameters: the file in which shards lie; None: they lie in memory.
    """
    same = SameDevice(device)
    if parameters is not None:
        return {True: same, False: HostToFile(parameters)}
    if is_far:
        return {True: same, False: GpuToHost(device)}
    return {True: same, False: same if device.type == "cpu" else SameDevice(torch.device("cpu"))}
