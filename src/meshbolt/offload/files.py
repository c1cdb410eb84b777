"""A file that holds state while a run lasts, read and written in the background past the page cache.

Blocks of a few MiB, several at once, are what a disk is fastest with: on the machine this was written on 2 MiB from four
threads. Where the package liburing is installed, io_uring moves them instead (`benchmarks/run_file_engine.py` measures both).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from functools import partial

import torch

from meshbolt.errors import ConfigError, StorageError
from meshbolt.offload.buffers import ALIGNMENT_BYTES, aligned_bytes, bytes_of
from meshbolt.offload.counters import Counters, Direction, Traffic
from meshbolt.offload.faces import SystemCalls, SystemFace
from meshbolt.offload.requests import Request, Workers
from meshbolt.offload.scratch import Disk, Scratch, failure, grow_scratch, make_scratch
from meshbolt.offload.uring import Block, Ring, Steps, find_library

BLOCK_BYTES = 2 * 2**20
THREADS = 4
TIMEOUT_SECONDS = 600.0
_DOING = {"read": "Reading", "write": "Writing"}


class StateFile:
    """One file of one rank: reserved as a whole, nameless, gone with the process.

    Bytes that were never written read as zeros. Transfers of different threads may be under way at once; of two that
    overlap in the file, the caller waits for one before asking for the other.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_bytes: int,
        *,
        name: str = "meshbolt",
        threads: int = THREADS,
        block_bytes: int = BLOCK_BYTES,
        timeout_seconds: float = TIMEOUT_SECONDS,
        face: SystemFace | None = None,
        engine: str = "auto",
        say: Callable[[str], None] = warnings.warn,
    ) -> None:
        """Reserve the space, and start the threads.

        Args:
            folder: on the disk to use; created where only its last part is missing.
            num_bytes: how much it will hold; rounded up to whole units of alignment.
            name: what its name begins with in messages, such as the run and the rank.
            threads: how many blocks move at once.
            block_bytes: of one request to the disk, in whole units of alignment.
            timeout_seconds: after which one transfer that does not end counts as stuck.
            face: what asks the operating system; the system itself by default.
            engine: "threads" that wait in system calls, "io_uring" through the package liburing; "auto": that, where it works.
            say: is told, once, that the disk is memory or cannot do without the page cache.

        Raises:
            ConfigError: a number is not positive, or blocks are not in whole units of alignment.
            StorageError: there is no room, or the system refuses; nothing is left behind.
        """
        if min(num_bytes, threads, block_bytes) < 1 or block_bytes % ALIGNMENT_BYTES or timeout_seconds <= 0:
            raise ConfigError(
                f"A file of {num_bytes} bytes with threads={threads}, block_bytes={block_bytes} and timeout_seconds="
                f"{timeout_seconds} cannot be made: all are to be positive, and block_bytes a multiple of {ALIGNMENT_BYTES}."
            )
        self._face = face or SystemCalls()
        self._scratch = make_scratch(folder, aligned_bytes(num_bytes), name=name, face=self._face)
        self._block_bytes, self._timeout_seconds = block_bytes, timeout_seconds
        self._counters, self._say = Counters(), say
        self._closed, self._unusable = False, ""
        self._tells_changes: bool | None = None
        # Of a face of somebody else's, each call is asked for.
        library = find_library() if face is None and engine != "threads" else None
        if engine == "io_uring" and library is None:
            raise ConfigError(
                "engine='io_uring' needs the package liburing (pip install liburing), and a system that allows rings. Use 'auto'."
            )
        self._workers: Workers | Ring = (
            Workers(threads, f"meshbolt: {name}") if library is None else Ring(library, depth=2 * threads, name=name)
        )
        # No transfer is under way when a file that nobody closed is forgotten, for each holds it.
        self._close_fd = weakref.finalize(self, os.close, self._scratch.fd)
        # At the end of the process one may be, and would go on with a number that is soon another file's.
        self._close_fd.atexit = False
        _say_what_it_lies_on(self._scratch, say)

    @property
    def num_bytes(self) -> int:
        """How much it holds, all of it reserved."""
        return self._scratch.num_bytes

    @property
    def path(self) -> str:
        """The name it had for an instant, for messages."""
        return self._scratch.path

    @property
    def direct(self) -> bool:
        """Whether transfers go past the page cache."""
        return self._scratch.direct

    @property
    def disk(self) -> Disk:
        """What it lies on, as that was before the space was reserved."""
        return self._scratch.disk

    @property
    def engine(self) -> str:
        """What moves blocks: "threads" or "io_uring"."""
        return "io_uring" if isinstance(self._workers, Ring) else "threads"

    @property
    def closed(self) -> bool:
        """Whether it was closed, and what it held is gone."""
        return self._closed

    @property
    def traffic(self) -> Traffic:
        """What it has moved so far."""
        return self._counters.snapshot()

    def grow(self, num_bytes: int) -> None:
        """Reserve more space behind what there is; nothing is under way meanwhile.

        Args:
            num_bytes: how much it will hold; rounded up to whole units of alignment, and never less than before.

        Raises:
            StorageError: there is no room for it, or the system refuses; the file is as it was.
        """
        self._scratch = grow_scratch(self._scratch, aligned_bytes(num_bytes), face=self._face)

    def mapped(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Return a part of the file as memory: it is read where it is looked at, and written when the system likes.

        What `write` has written is seen there, and what was changed there is read by `read`, one after the other. A disk that
        fails ends the process that looks at it (SIGBUS), so it is for what is rarely looked at.

        Args:
            offset: of its first byte in the file, in whole units of alignment.
            num_bytes: its length.

        Returns:
            uint8, one dim; it outlives the file's other users.
        """
        memory = mmap.mmap(self._scratch.fd, num_bytes, flags=mmap.MAP_SHARED, offset=offset)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def clean(self, *, flushes: bool) -> None:
        """Begin to watch for changes in what is mapped; no transfer is under way.

        Args:
            flushes: there may have been some, which are written first: a change is noticed once before a page is written.
        """
        fd = self._scratch.fd
        if flushes:
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise failure(f"Writing what was changed in {self.path!r} failed", error) from error
        os.utime(fd, (0, 0))
        if self._tells_changes is None:
            self._tells_changes = _tells_changes(fd)

    def was_touched(self) -> bool:
        """Return whether anything was written, in memory or by `write`, since the last `clean`; True where nobody can tell."""
        return not self._tells_changes or os.fstat(self._scratch.fd).st_mtime_ns != 0

    def read(self, into: torch.Tensor, offset: int) -> Request:
        """Begin to fill a buffer from the file.

        Args:
            into: on the CPU, contiguous, in whole units of alignment (`aligned_empty`); untouched by others until it is done.
            offset: of its first byte in the file, in whole units of alignment.

        Returns:
            The transfer, to wait for.

        Raises:
            ConfigError: the buffer or the offset does not fit.
            StorageError: the file is closed, or something written to it has not arrived.
        """
        return self._begin("read", into, offset)

    def write(self, data: torch.Tensor, offset: int) -> Request:
        """Begin to write a buffer to the file; as `read` in all else.

        A write that fails takes the file out of use: all that is asked of it later raises, whether the write was waited
        for or not.
        """
        return self._begin("write", data, offset)

    def condemn(self, reason: str) -> None:
        """Take the file out of use: all that is asked of it from now on raises, until it is closed.

        Args:
            reason: a sentence, which those errors give; the first one stands.
        """
        self._unusable = self._unusable or reason

    def close(self) -> None:
        """Wait for what is under way, end the threads, and give the space back; again, it does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._workers.close(self._timeout_seconds):
            self._close_fd()
            return
        # The descriptor stays open: its number would soon name another file, and a thread goes on with it if it wakes up.
        self._close_fd.detach()
        self._say(
            f"{self.path!r} could not be closed: transfers are stuck in the system. Its space is free when the process ends."
        )

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, direction: Direction, buffer: torch.Tensor, offset: int) -> Request:
        view = bytes_of(buffer)
        if offset < 0 or offset % ALIGNMENT_BYTES or offset + len(view) > self.num_bytes:
            raise ConfigError(
                f"{len(view)} bytes at offset {offset} are no part of a file of {self.num_bytes} bytes that begins at a multiple "
                f"of {ALIGNMENT_BYTES}."
            )
        name = f"{_DOING[direction]} {len(view)} bytes at offset {offset} of {self.path!r}"
        if self._closed or self._unusable:
            raise StorageError(f"{name} was refused, for the file is out of use. {self._unusable or 'It was closed.'}")
        starts = range(0, len(view), self._block_bytes)
        request = Request(direction, name, buffer, blocks=len(starts), timeout_seconds=self._timeout_seconds)
        for start in starts:
            block = view[start : start + self._block_bytes]
            if isinstance(self._workers, Ring):
                steps = request.wanted(self._steps(direction, block, offset + start))
                self._workers.submit(Block(direction, self._scratch.fd, steps, request.end_block))
            else:
                self._workers.submit(partial(request.run, partial(self._move, direction, block, offset + start)))
        return request

    def _move(self, direction: Direction, block: memoryview, offset: int) -> None:
        """Move a block by system calls of this thread."""
        steps, call = (
            self._steps(direction, block, offset),
            self._face.read if direction == "read" else self._face.write,
        )
        with contextlib.suppress(StopIteration):
            part, at = next(steps)
            while True:
                try:
                    moved = call(self._scratch.fd, part, at)
                except OSError as error:
                    part, at = steps.throw(error)
                else:
                    part, at = steps.send(moved)

    def _steps(self, direction: Direction, block: memoryview, offset: int) -> Steps:
        """Yield what of a block is to be moved next, and check what became of it."""
        self._counters.begin(direction)
        moved = 0
        try:
            while moved < len(block):
                rest, at = block[moved:], offset + moved
                name = f"{_DOING[direction]} {len(rest)} bytes at offset {at} of {self.path!r}"
                self._require_whole(name)
                try:
                    count = yield rest, at
                except OSError as error:
                    raise failure(f"{name} failed", error) from error
                self._require_whole(name)
                moved += _whole_units(count, len(rest), name)
            if not self.direct:
                self._leave_no_copy(offset, len(block))
        except StorageError as error:
            if direction == "write":
                self.condemn(str(error))
            raise
        finally:
            self._counters.end(direction, moved)

    def _require_whole(self, name: str) -> None:
        # Written to behind its new end, a file that was cut short would grow again, with zeros for what was lost.
        size = os.fstat(self._scratch.fd).st_size
        if size != self.num_bytes:
            raise StorageError(
                f"{name} failed: the file was cut from {self.num_bytes} to {size} bytes by somebody else."
            )

    def _leave_no_copy(self, offset: int, num_bytes: int) -> None:
        """Have the page cache write a range out, and drop what of it is written."""
        with contextlib.suppress(OSError):  # advice only
            os.posix_fadvise(self._scratch.fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def _whole_units(count: int, asked: int, name: str) -> int:
    """Return how many bytes count as moved: whole units of alignment, or all.

    Args:
        count: that the system says it moved.
        asked: that it was to move.
        name: for the message.

    Raises:
        StorageError: none.
    """
    moved = count if count >= asked else count - count % ALIGNMENT_BYTES
    if moved <= 0:
        raise StorageError(
            f"{name} failed: the system moves no more of them and gives no reason. See its log (`dmesg`)."
        )
    return moved


def _tells_changes(fd: int) -> bool:
    """Return whether a change in mapped memory changes the file's time, also after an earlier one was written."""
    memory = mmap.mmap(fd, ALIGNMENT_BYTES, flags=mmap.MAP_SHARED)
    told = []
    for _ in range(2):
        os.utime(fd, (0, 0))
        memory[0] = memory[0]
        told.append(os.fstat(fd).st_mtime_ns != 0)
        os.fdatasync(fd)
    os.utime(fd, (0, 0))
    memory.close()
    return all(told)


def _say_what_it_lies_on(scratch: Scratch, say: Callable[[str], None]) -> None:
    disk = scratch.disk
    if disk.in_memory:
        say(
            f"{disk.folder!r} lies on {disk.filesystem}, which is host memory: what is put there saves none. Give a path on "
            "a disk, or keep the state in host memory, which is faster."
        )
    elif not scratch.direct:
        say(
            f"The {disk.filesystem} file system of {disk.folder!r} has no direct I/O (O_DIRECT): state goes through the "
            "page cache, which is slower and takes memory from others. Give a path on a local disk (ext4, xfs)."
        )
