"""What a process has allocated and not freed, as its C library counts: without what it keeps of freed memory for later."""

from __future__ import annotations

import ctypes
import sys
from time import perf_counter
from typing import Any

import torch

_PROBE_BYTES = 2**20
# The library walks over all free pieces: of a heap in very many pieces that takes too long for a step.
_SLOW_SECONDS = 2e-3


class _Info(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


class Heap:
    """Asks glibc, from 2.33 on, as long as torch's tensors on CPUs come from it and its answers come quickly."""

    def __init__(self) -> None:
        self._ask = _found()
        if self._ask is not None and not self._has_tensors():
            self._ask = None  # another allocator is in its place, such as jemalloc by LD_PRELOAD

    def allocated_bytes(self) -> int | None:
        """Return what is allocated now; None: nobody can tell, from now on."""
        if self._ask is None:
            return None
        since = perf_counter()
        found = self._read()
        if perf_counter() - since > _SLOW_SECONDS:
            self._ask = None
        return found

    def _read(self) -> int:
        info = self._ask()
        return int(info.uordblks + info.hblkhd)

    def _has_tensors(self) -> bool:
        before = self._read()
        tensor = torch.empty(_PROBE_BYTES, dtype=torch.uint8)
        return bool(_PROBE_BYTES <= self._read() - before < 2 * tensor.nbytes)


def _found() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is not None:
        ask.restype = _Info
    return ask
