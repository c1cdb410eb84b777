"""Shards of parameters in a file, of which each unit is read before it is gathered.

In between a shard is memory that is mapped from the file: whoever looks at it or changes it (checkpoints, averages, hooks) finds
what is in the file. The way of every step is another one: a unit is read past the page cache into a buffer, and the next ones in
the order of the pass before are read meanwhile; updates are written past the page cache as well (`to_file.py`).

What is read ahead could be changed meanwhile, so nothing is kept across `drop`, which is called wherever parameters may change,
nor where the file's time of change tells that somebody has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from meshbolt.compat import unpin_host_memory
from meshbolt.errors import StorageError
from meshbolt.offload.buffers import aligned_bytes, aligned_empty, lock
from meshbolt.offload.counters import Traffic
from meshbolt.offload.files import StateFile
from meshbolt.offload.requests import Request
from meshbolt.offload.traffic import Moved, Observer, Ways

AHEAD = 2
"""How many units are read before they are asked for."""
_LONGEST_PASS = 100_000


@dataclass(frozen=True, kw_only=True, eq=False)
class _Unit:
    """The shards of one unit.

    Attributes:
        name: of the unit.
        offset: where it begins in the file.
        num_bytes: in whole pages.
        memory: mapped from there.
        places: for each shard, its first byte in the unit.
        shards: views of the memory.
    """

    name: str
    offset: int
    num_bytes: int
    memory: torch.Tensor
    places: Sequence[int]
    shards: Sequence[torch.Tensor]


@dataclass(kw_only=True, eq=False)
class _Read:
    """A unit that is read into a buffer, or was.

    Attributes:
        unit: it.
        buffer: as long as the largest unit, or longer.
        request: the transfer.
        copied: on a GPU, an event after the last copy from the buffer.
    """

    unit: _Unit
    buffer: torch.Tensor
    request: Request
    copied: torch.cuda.Event | None = None


@dataclass
class _Order:
    """In which order units are asked for, pass by pass."""

    before: list[str] = field(default_factory=list)
    now: list[str] = field(default_factory=list)
    place: int = 0

    def after(self, name: str) -> list[str]:
        """Note that a unit is asked for; return which ones probably follow."""
        if len(self.now) < _LONGEST_PASS:
            self.now.append(name)
        found = next(
            (at for at in (*range(self.place, len(self.before)), *range(self.place)) if self.before[at] == name), None
        )
        if found is None:
            return []
        self.place = found + 1
        return self.before[self.place : self.place + AHEAD]

    def end(self) -> None:
        """Begin another pass."""
        if self.now:
            self.before, self.now = self.now, []
        self.place = 0


class ParameterFile:
    """The shards of one rank. One thread takes and fetches; any may ask where a shard lies."""

    def __init__(
        self,
        make_file: Callable[[int], StateFile],
        *,
        device: torch.device,
        pin_memory: bool,
    ) -> None:
        """Begin without shards.

        Args:
            make_file: makes a file of so many bytes, which is closed by `close`.
            device: where units are gathered.
            pin_memory: lock the buffers in their place if that is a GPU.
        """
        self._make_file, self._device = make_file, device
        self._pins = pin_memory and device.type == "cuda"
        self._file: StateFile | None = None
        self._largest = 0
        self._is_written = False
        self._asked_bytes = self._put_bytes = 0
        self._units: dict[str, _Unit] = {}
        self._offsets: dict[int, int] = {}
        self._free: list[torch.Tensor] = []
        self._count = 0
        self._ahead: dict[str, _Read] = {}
        self._current: _Read | None = None
        self._order = _Order()
        self.is_changing: Callable[[str], bool] = lambda _: False
        """Asked whether a unit, by name, may be changed meanwhile, so that it is not to be read ahead."""
        self.observer: Observer | None = None
        """Told of reads, and of waiting for them; None: nobody is."""
        self.waited_seconds = 0.0
        """How long gathers had to wait for the file."""

    # Shards -----------------------------------------------------------------------------------------------------------

    def take(self, name: str, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Put the shards of a unit behind those that are there.

        Args:
            name: of the unit, for `fetch`.
            shards: contiguous, on the CPU, one dim.

        Returns:
            Shards of the same values that lie in the file.

        Raises:
            StorageError: there is no room for them, or they cannot be written.
        """
        places, end = [], 0
        for shard in shards:
            places.append(end)
            end += aligned_bytes(shard.nbytes)
        start, end = self.num_bytes, aligned_bytes(max(1, end))
        if self._file is None:
            self._file = self._make_file(end)
        self._file.grow(start + end)
        memory = self._file.mapped(start, end)
        views = [memory[at : at + shard.nbytes].view(shard.dtype) for at, shard in zip(places, shards, strict=True)]
        unit = _Unit(name=name, offset=start, num_bytes=end, memory=memory, places=places, shards=views)
        self._fill(unit, shards)
        self._file.clean(flushes=False)
        self._units[name] = unit
        self._let_go_of_buffers()  # they may be too small
        self._largest = max(self._largest, end)
        self._offsets[memory.untyped_storage().data_ptr()] = start
        return views

    def prepare(self) -> None:
        """Make the buffers, when all units are there.

        Raises:
            StorageError: they cannot be locked.
        """
        while self._count <= AHEAD and self._units:
            self._count += 1
            self._free.append(self._made())

    def place_of(self, tensor: torch.Tensor) -> int | None:
        """Return where a part of a shard begins in the file, in bytes; None: it does not lie there.

        Args:
            tensor: contiguous.
        """
        offset = self._offsets.get(tensor.untyped_storage().data_ptr())
        return None if offset is None else offset + int(tensor.storage_offset()) * tensor.element_size()

    def place_of_unit(self, name: str) -> tuple[int, int]:
        """Return where a unit begins and ends in the file, in bytes.

        Args:
            name: of the unit.
        """
        unit = self._units[name]
        return unit.offset, unit.offset + unit.num_bytes

    def write(self, data: torch.Tensor, place: int) -> Request:
        """Begin to write a part of a shard past the page cache, as `StateFile.write` does.

        Args:
            data: in whole pages.
            place: as `place_of` tells.
        """
        self._is_written = True
        self._put_bytes += data.nbytes
        return self.file.write(data, place)

    def was_touched(self) -> bool:
        """Return whether somebody else may have changed shards in memory since the last `clean` or `note_own_writes`."""
        return not self._is_written and self._file is not None and self._file.was_touched()

    def clean(self) -> None:
        """Have what others have changed written, so that the next change is noticed."""
        self.file.clean(flushes=True)

    def note_own_writes(self) -> None:
        """Note that all writes have ended, so that the next change is somebody else's."""
        if self._is_written:
            self._is_written = False
            self.file.clean(flushes=False)

    @property
    def file(self) -> StateFile:
        """The file.

        Raises:
            StorageError: nothing was ever put there.
        """
        if self._file is None:
            raise StorageError("No parameter lies in a file.")
        return self._file

    @property
    def num_bytes(self) -> int:
        """Of all shards, in whole pages."""
        return sum(unit.num_bytes for unit in self._units.values())

    @property
    def buffer_bytes(self) -> int:
        """Of host memory, for units on their way."""
        return self._largest * (1 + AHEAD)

    def moved(self) -> Ways:
        """Return what gathers have asked for and updates have written, and what has come and gone."""
        traffic = self.traffic
        return Ways(
            read=Moved(self._asked_bytes, traffic.read_bytes, traffic.read_seconds),
            written=Moved(self._put_bytes, traffic.written_bytes, traffic.write_seconds),
        )

    @property
    def traffic(self) -> Traffic:
        """What was read and written so far."""
        return Traffic() if self._file is None else self._file.traffic

    def close(self) -> None:
        """Wait for what is under way, and give buffers back; shards stay readable, and their space is taken, while they live."""
        self._let_go_of_buffers()
        if self._file is not None:
            self._file.close()

    # Gathering --------------------------------------------------------------------------------------------------------

    def fetch(self, name: str, number: int) -> torch.Tensor:
        """Return a shard to gather from, on the device: on a CPU until another unit is asked for.

        Args:
            name: of its unit.
            number: of the shard in it.

        Raises:
            StorageError: it cannot be read.
        """
        is_there = self._current is not None and self._current.unit.name == name
        # Between two gathers of a unit others may have changed it.
        if not is_there or (number == 0 and not self._is_clean()):
            self._enter(self._units[name])
        read = self._current
        if read is None:
            raise AssertionError(f"{name!r} was entered")
        shard, place = read.unit.shards[number], read.unit.places[number]
        found = read.buffer[place : place + shard.nbytes].view(shard.dtype)
        if self._device.type == "cpu":
            return found
        found = found.to(self._device, non_blocking=True)
        read.copied = read.copied or torch.cuda.Event()
        read.copied.record()
        return found

    def drop(self) -> None:
        """Forget what was read: parameters may be changed now. The next pass begins."""
        self._order.end()
        self._leave()
        while self._ahead:
            self._put_back(self._ahead.popitem()[1])

    def _enter(self, unit: _Unit) -> None:
        self._leave()
        following = self._order.after(unit.name)
        read = self._ahead.pop(unit.name, None)
        is_clean = self._is_clean()
        if read is not None and not is_clean:
            self._put_back(read)
            read = None
        self._asked_bytes += unit.num_bytes
        start = time.perf_counter()
        self._current = read or self._begin(unit, self._buffer(keep=following))
        self._current.request.wait()
        self._note(self._current, start)
        for name in dict.fromkeys(following) if is_clean else ():
            if name not in self._ahead and name != unit.name and not self.is_changing(name):
                self._ahead[name] = self._begin(self._units[name], self._buffer(keep=following))

    def _note(self, read: _Read, start: float) -> None:
        """Count how long a read was waited for, and tell who observes it."""
        end = time.perf_counter()
        self.waited_seconds += end - start
        if self.observer is not None:
            self.observer("file: read parameters", read.unit.name, read.request.submitted, read.request.ended)
            self.observer("gathers: wait", f"wait for {read.unit.name}", start, end)

    def _is_clean(self) -> bool:
        """Return whether nobody else has changed shards: while updates write, nobody is to, see `is_changing`."""
        return self._is_written or not self.file.was_touched()

    def _leave(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._put_back(current)

    def _begin(self, unit: _Unit, buffer: torch.Tensor) -> _Read:
        request = self.file.read(buffer[: unit.num_bytes], unit.offset)
        return _Read(unit=unit, buffer=buffer, request=request)

    def _put_back(self, read: _Read) -> None:
        """Take back a buffer whose contents nobody needs."""
        read.request.abandon()
        if not read.request.settle():
            raise read.request.stuck_error()
        if read.copied is not None:
            read.copied.synchronize()
        self._free.append(read.buffer)

    def _buffer(self, *, keep: Sequence[str]) -> torch.Tensor:
        """Return a buffer that nobody needs.

        Args:
            keep: names of units that are wanted next.
        """
        if not self._free and self._count <= AHEAD:
            self._count += 1
            self._free.append(self._made())
        if not self._free:
            unwanted = next((name for name in self._ahead if name not in keep), next(reversed(self._ahead)))
            self._put_back(self._ahead.pop(unwanted))
        return self._free.pop()

    def _made(self) -> torch.Tensor:
        buffer = aligned_empty(self._largest)
        if self._pins:
            lock(buffer)
        return buffer

    def _let_go_of_buffers(self) -> None:
        self.drop()
        for buffer in self._free if self._pins else ():
            unpin_host_memory(buffer)
        self._free.clear()
        self._count = 0

    def _fill(self, unit: _Unit, shards: Sequence[torch.Tensor]) -> None:
        """Write the first values of a unit past the page cache, which would keep all of them in memory."""
        buffer = aligned_empty(unit.num_bytes)
        for place, shard in zip(unit.places, shards, strict=True):
            buffer[place : place + shard.nbytes].view(shard.dtype).copy_(shard.detach())
        self.file.write(buffer, unit.offset).wait()
