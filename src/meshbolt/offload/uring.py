"""Transfers by io_uring, where the package `liburing` is installed and the system allows it.

One thread gives blocks to the system and hears of their end, where otherwise several wait in system calls. Of the package only
the C library is used: its Python functions take no memory of others, and hold the interpreter's lock while they wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib.util
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshbolt.offload.counters import Direction

Steps = Generator[tuple[memoryview, int], int, None]
"""Yields what to move next and where that lies in the file, is sent how many bytes were moved or thrown the system's error, and
ends when all of a block has been moved, or raises."""
_TRY_AGAIN = (errno.EAGAIN, errno.EBUSY, errno.EINTR)
_PAUSE_SECONDS = 1e-3
_RING_BYTES = 4096  # of a `struct io_uring`, and more


class _Completion(ctypes.Structure):
    """The system's word on one transfer."""

    _fields_ = (("number", ctypes.c_uint64), ("result", ctypes.c_int32), ("flags", ctypes.c_uint32))


class Library:
    """The C functions, with their types."""

    def __init__(self, path: str) -> None:
        """Load them.

        Args:
            path: of the shared object.

        Raises:
            OSError: it cannot be loaded.
            AttributeError: a function is missing.
        """
        library = ctypes.CDLL(path, use_errno=True)
        ring, entry = ctypes.c_void_p, ctypes.c_void_p
        moving = [entry, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64]
        self.init = _typed(library.io_uring_queue_init, ctypes.c_int, [ctypes.c_uint, ring, ctypes.c_uint])
        self.exit = _typed(library.io_uring_queue_exit, None, [ring])
        self.entry = _typed(library.io_uring_get_sqe, ctypes.c_void_p, [ring])
        self.move: dict[Direction, Any] = {
            "read": _typed(library.io_uring_prep_read, None, moving),
            "write": _typed(library.io_uring_prep_write, None, moving),
        }
        self.label = _typed(library.io_uring_sqe_set_data64, None, [entry, ctypes.c_uint64])
        self.submit = _typed(library.io_uring_submit, ctypes.c_int, [ring])
        completion = ctypes.POINTER(_Completion)
        self.wait = _typed(library.io_uring_wait_cqe, ctypes.c_int, [ring, ctypes.POINTER(completion)])
        self.seen = _typed(library.io_uring_cqe_seen, None, [ring, completion])


def _typed(function: Any, result: Any, arguments: list[Any]) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


@functools.lru_cache(maxsize=1)
def find_library() -> Library | None:
    """Return the C library if it is installed and works here: reads and writes a page; None otherwise."""
    spec = importlib.util.find_spec("liburing")
    folders = [] if spec is None else [*(spec.submodule_search_locations or ())]
    for path in (found for folder in folders for found in sorted(Path(folder).glob("liburing*.so"))):
        with contextlib.suppress(OSError, AttributeError):
            library = Library(str(path))
            if _works(library):
                return library
    return None


def _works(library: Library) -> bool:
    """Return whether what is written by a ring is read by it; containers often forbid rings."""
    told, fd = [], os.memfd_create("meshbolt-probe")
    ring = Ring(library, depth=2, name="probe")

    def steps(view: memoryview) -> Steps:
        told.append((yield view, 0))

    try:
        os.ftruncate(fd, 4096)
        there, back = memoryview(bytearray(b"meshbolt" * 512)), memoryview(bytearray(4096))
        for direction, view in (("write", there), ("read", back)):
            over = threading.Event()
            ring.submit(Block(direction, fd, steps(view), lambda _, over=over: over.set()))  # type: ignore[arg-type, misc]
            over.wait(1.0)
        return told == [4096, 4096] and back == there
    finally:
        ring.close(1.0)
        os.close(fd)


@dataclass(frozen=True, eq=False)
class Block:
    """What is to be moved.

    Attributes:
        direction: "read" or "write".
        fd: of the file.
        steps: what to move next.
        ended: is called with what went wrong, or None.
    """

    direction: Direction
    fd: int
    steps: Steps
    ended: Callable[[BaseException | None], None]


class Ring:
    """Moves several blocks at once; it ends with this object, closed or forgotten."""

    def __init__(self, library: Library, *, depth: int, name: str) -> None:
        """Make the ring, and start its thread.

        Args:
            library: the C functions.
            depth: how many blocks move at once.
            name: of the thread.

        Raises:
            OSError: the system makes no ring.
        """
        memory = ctypes.create_string_buffer(_RING_BYTES)
        code = library.init(max(2, depth), ctypes.addressof(memory), 0)
        if code < 0:
            raise OSError(-code, os.strerror(-code))
        self._jobs: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        work = _Work(library, memory, depth, self._jobs)
        # A daemon: a broken disk must not hold up the end of the process.
        self._thread = threading.Thread(target=work.run, name=f"meshbolt: {name} ring", daemon=True)
        self._thread.start()
        self._dismiss = weakref.finalize(self, self._jobs.put, None)

    def submit(self, block: Block) -> None:
        """Have a block moved, soon.

        Args:
            block: whose memory lives until it has ended.
        """
        self._jobs.put(block)

    def close(self, timeout_seconds: float) -> bool:
        """Let it finish what it was given, and end.

        Args:
            timeout_seconds: the longest wait.

        Returns:
            Whether it has ended.
        """
        self._dismiss()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()


class _Work:
    """What the thread of a ring does."""

    def __init__(self, library: Library, memory: Any, depth: int, jobs: queue.SimpleQueue[Block | None]) -> None:
        self._library, self._memory, self._depth, self._jobs = library, memory, depth, jobs
        self._ring = ctypes.addressof(memory)
        self._under_way: dict[int, Block] = {}
        self._numbers = itertools.count(1)
        self._is_over = False

    def run(self) -> None:
        """Move blocks until the ring is dismissed."""
        while self._under_way or not self._is_over:
            self._take()
            if self._under_way and self._submit():
                self._hear()
        self._library.exit(self._ring)

    def _submit(self) -> bool:
        """Hand over what was asked for; return whether anything is under way afterwards."""
        code = self._library.submit(self._ring)
        while -code in _TRY_AGAIN:
            time.sleep(_PAUSE_SECONDS)
            code = self._library.submit(self._ring)
        if code >= 0:
            return True
        under_way, self._under_way = self._under_way, {}
        for block in under_way.values():
            self._fail(block, OSError(-code, os.strerror(-code)))
        return False

    @staticmethod
    def _fail(block: Block, error: OSError) -> None:
        """End a block with an error of the system."""
        try:
            block.steps.throw(error)
        except BaseException as meant:  # is told
            block.ended(meant)

    def _take(self) -> None:
        """Begin blocks as long as there is room; wait for one where nothing else is to be done."""
        while len(self._under_way) < self._depth and not self._is_over:
            try:
                block = self._jobs.get(block=not self._under_way)
            except queue.Empty:
                return
            if block is None:
                self._is_over = True
                return
            self._go_on(block, None)

    def _go_on(self, block: Block, result: int | None) -> None:
        """Ask for what a block moves next, or end it.

        Args:
            block: it.
            result: the system's word on what it moved last; None: nothing yet.
        """
        try:
            if result is None:
                view, offset = next(block.steps)
            elif result < 0:
                self._fail(block, OSError(-result, os.strerror(-result)))
                return
            else:
                view, offset = block.steps.send(result)
        except StopIteration:
            block.ended(None)
            return
        except BaseException as error:  # is told
            block.ended(error)
            return
        entry = self._library.entry(self._ring)
        if not entry:
            raise AssertionError(f"A ring of {self._depth} has no room for {len(self._under_way)} blocks.")
        number = next(self._numbers)
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self._library.move[block.direction](entry, block.fd, address, len(view), offset)
        self._library.label(entry, number)
        self._under_way[number] = block

    def _hear(self) -> None:
        """Wait for the end of one block."""
        completion = ctypes.POINTER(_Completion)()
        code = self._library.wait(self._ring, ctypes.byref(completion))
        if code < 0:  # a signal, at most: try again
            return
        number, result = completion.contents.number, completion.contents.result
        self._library.seen(self._ring, completion)
        self._go_on(self._under_way.pop(number), result)
