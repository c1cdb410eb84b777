"""What the engine asks of the operating system: a seam at which a test, or another system, puts its own answers."""

from __future__ import annotations

import os
from typing import Protocol


class SystemFace(Protocol):
    """The operations on an open file that can fail in the middle of a run; each raises OSError as the system does."""

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Reserve the space of a file's first bytes, which read as zeros until they are written.

        Args:
            fd: of a file open for reading and writing.
            num_bytes: the file has at least this length afterwards.
        """

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """Read bytes.

        Args:
            fd: of a file open for reading.
            into: where they go.
            offset: of the first one in the file.

        Returns:
            How many were read: fewer than fit, if the system likes; 0 at the end of the file.
        """

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write bytes.

        Args:
            fd: of a file open for writing.
            data: what to write.
            offset: of the first one in the file.

        Returns:
            How many were written: fewer than were given, if the system likes.
        """


class SystemCalls:
    """The system itself; nothing here holds the interpreter's lock while a disk works."""

    def allocate(self, fd: int, num_bytes: int) -> None:
        """Reserve space with `posix_fallocate`."""
        os.posix_fallocate(fd, 0, num_bytes)

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        """Read with `preadv`."""
        return os.preadv(fd, [into], offset)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Write with `pwritev`."""
        return os.pwritev(fd, [data], offset)
