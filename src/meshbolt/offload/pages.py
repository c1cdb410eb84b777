"""Huge pages for memory that somebody else has allocated."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_COLLAPSE = 25  # Linux 6.1; the standard library has no name for it yet


def use_huge_pages(memory: torch.Tensor) -> bool:
    """Ask the kernel to move memory into huge pages, where it is; addresses and values stay.

    An update walks through several columns at once, and is a sixth faster where a parameter that is updated in its own memory
    lies in huge pages as the columns do.

    Args:
        memory: on the CPU, contiguous.

    Returns:
        Whether all whole huge pages in it are such now; False on systems that cannot, where everything is as it was.
    """
    start = -(-memory.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    num_bytes = (memory.data_ptr() + memory.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES - start
    advise: Any = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if num_bytes <= 0 or advise is None:
        return False
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return int(advise(start, num_bytes, _MADV_COLLAPSE)) == 0
