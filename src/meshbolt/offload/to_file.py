"""How updated parameters come to the file in which the model's shards lie: piece by piece, from the columns of their chunk."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
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
from meshbolt.offload.traffic import Observer, Ways
from meshbolt.offload.transfers import GpuToHost, Gradients, SameDevice, Transfers, Visit

# Of how many chunks writes are remembered: whose memory is another one's again, they have ended.
_KEPT = 3


class HostToFile:
    """Gradients are in host memory, updated parameters go to the file of shards; chunks are laid out in pages for that."""

    writes_shards = False

    def __init__(self, parameters: ParameterFile) -> None:
        """Choose the file.

        Args:
            parameters: that has the shards of all parameters with a copy in the columns.
        """
        self._parameters = parameters
        self._writing: deque[list[tuple[int, Request]]] = deque()
        self._lock = threading.Lock()

    def is_writing(self, start: int, stop: int) -> bool:
        """Return whether something is on its way to a part of the file.

        Args:
            start: its first byte.
            stop: behind its last one.
        """
        with self._lock:
            return any(start <= place < stop and not each.done for some in self._writing for place, each in some)

    def begin(self, visit: Visit) -> None:
        """Do nothing: gradients are there."""

    def gradients(self, visit: Visit) -> Gradients:
        """Return a function that finds gradients in those that were given."""
        return lambda piece, part: visit.live[piece.slot].gradient[part]

    def computing(self) -> AbstractContextManager[Any]:
        """Run what is inside as it is: it computes on the host."""
        return contextlib.nullcontext()

    def end(self, visit: Visit, columns: Columns, *, resident: bool) -> Sequence[Request]:
        """Start to write the chunk's parameters."""
        requests = []
        for piece in visit.pieces if MASTER in columns else ():
            if piece.start < piece.stop:
                requests.append(self._write(visit, piece, columns))
        with self._lock:
            self._writing.append(requests)
        while len(self._writing) > _KEPT:
            self._wait_for_one()
        return [request for _, request in requests]

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
        """Return that nothing of the state has moved: parameters are in the counts of their file."""
        return Ways()

    def observe(self, observer: Observer | None) -> None:
        """Do nothing: writes are in the file's own counters."""

    def _write(self, visit: Visit, piece: Piece, columns: Columns) -> tuple[int, Request]:
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
        place += piece.start * itemsize
        return place, self._parameters.write(data, place)

    def _wait_for_one(self) -> None:
        # The thread of updates and the caller may wait for the same ones; they stay here until they have ended.
        with self._lock:
            requests = self._writing[0] if self._writing else []
        try:
            for _, request in requests:
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
