"""Values that are verified and wait until every rank has its own: in the page cache where that can be, else in memory.

A local file is mapped: what a load reads to compare its checksum is in the system's cache of the file then, and is copied
from there, so that waiting takes no memory which the system could not take back. Where a file cannot be mapped, as on an
object store, values wait in memory of their own.
"""

from __future__ import annotations

import errno
import mmap
from dataclasses import dataclass
from typing import IO

import torch

from meshbolt.checkpoint.chunks import flat_bytes

# Of Linux 5.14: bring pages in, and answer with an error, where a look at them would end the process.
_MADV_POPULATE_READ = 22


@dataclass(frozen=True)
class Mapped:
    """Values in a mapped file.

    Attributes:
        content: their bytes, at any address.
        shape: of what was saved there.
        dtype: of it.
    """

    content: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    def fill(self, target: torch.Tensor, narrow: tuple[slice, ...]) -> None:
        """Copy a part of the values to a tensor of its shape."""
        alike = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        if alike and target.shape == self.shape:
            flat_bytes(target).copy_(self.content)
        else:  # through memory that is aligned as the dtype wants it
            target.copy_(self.content.clone().view(self.dtype).view(self.shape)[narrow])


def mapping_of(stream: IO[bytes]) -> mmap.mmap | None:
    """Return all of an open file as memory; None where that cannot be."""
    try:
        # Copy on write, since torch takes no memory that cannot be written; nobody writes.
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except (AttributeError, OSError, ValueError):  # no file of the system's, of a kind it cannot map, or an empty one
        return None


def mapped(mapping: mmap.mmap, *, offset: int, shape: torch.Size, dtype: torch.dtype) -> Mapped:
    """Return values at an offset of a mapped file, brought in from the storage.

    Raises:
        OSError: the storage cannot read them any more.
    """
    num_bytes = shape.numel() * dtype.itemsize
    if not num_bytes:
        return Mapped(torch.empty(0, dtype=torch.uint8), shape, dtype)
    start = offset - offset % mmap.PAGESIZE
    try:
        mapping.madvise(_MADV_POPULATE_READ, start, offset - start + num_bytes)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older Linux, which brings them in when they are looked at
            raise
    return Mapped(torch.frombuffer(mapping, dtype=torch.uint8, count=num_bytes, offset=offset), shape, dtype)
