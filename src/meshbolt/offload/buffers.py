"""Host memory that a disk reads and writes by itself, past the page cache: it begins and ends at a page."""

from __future__ import annotations

import contextlib
import mmap
import resource

import torch

from meshbolt.compat import pin_host_memory
from meshbolt.errors import ConfigError, StorageError
from meshbolt.units import format_bytes

# What O_DIRECT asks of addresses, offsets and lengths; no disk in use asks for more than a page of 4 KiB.
ALIGNMENT_BYTES = 4096
_HUGE_PAGE_BYTES = 2 * 2**20


def aligned_bytes(num_bytes: int) -> int:
    """Return a number of bytes, rounded up to whole units of alignment.

    Example:
        >>> aligned_bytes(1), aligned_bytes(8192)
        (4096, 8192)
    """
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def aligned_empty(num_bytes: int) -> torch.Tensor:
    """Return memory for transfers, of zeros that take no memory before they are written to.

    It lies in huge pages where the kernel has them, since a disk takes a block of few large pieces faster than one of
    many small ones. It is not there in processes forked later: what a disk writes meanwhile could reach the wrong one.

    Args:
        num_bytes: at least 1; rounded up to whole units of alignment.

    Returns:
        A tensor of bytes (uint8, one dim) that begins at a multiple of `ALIGNMENT_BYTES`.
    """
    num_bytes = aligned_bytes(max(1, num_bytes))
    slack = _HUGE_PAGE_BYTES if num_bytes >= _HUGE_PAGE_BYTES else 0
    memory = mmap.mmap(-1, num_bytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel may be built without either
        memory.madvise(mmap.MADV_DONTFORK)
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES if slack else 0
    return whole[start : start + num_bytes]


def lock(memory: torch.Tensor) -> None:
    """Lock host memory in its place, for a GPU to read and write by itself, until `unpin_host_memory`.

    Args:
        memory: on the CPU, contiguous.

    Raises:
        StorageError: the system refuses.
    """
    if not pin_host_memory(memory):
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        allowed = "no limit" if limit == resource.RLIM_INFINITY else f"a limit of {format_bytes(limit)}"
        raise StorageError(
            f"{format_bytes(memory.nbytes)} of host memory could not be locked for the GPU, with {allowed} (`ulimit -l`). Raise "
            "it, or use Offload(pin_memory=False): then the GPU waits for its copies."
        )


def bytes_of(buffer: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor to read from or write to, without a copy.

    Args:
        buffer: on the CPU, contiguous, of any dtype and shape, beginning and ending at a page.

    Raises:
        ConfigError: it is not.
    """
    at, size = buffer.data_ptr() % ALIGNMENT_BYTES, buffer.nbytes % ALIGNMENT_BYTES
    if buffer.device.type != "cpu" or not buffer.is_contiguous() or at or size or not buffer.nbytes:
        raise ConfigError(
            f"A buffer for a file is to be contiguous, on the CPU and in whole units of {ALIGNMENT_BYTES} bytes. This one is "
            f"on {buffer.device}, {'' if buffer.is_contiguous() else 'not '}contiguous, has {buffer.nbytes} bytes and begins "
            f"{at} bytes after a unit. Take it from aligned_empty()."
        )
    return buffer.detach().reshape(-1).view(torch.uint8).numpy().data
