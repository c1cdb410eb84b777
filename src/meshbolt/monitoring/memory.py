"""What memory holds: names, and how much of it there is on a device and in a process.

On a GPU it is what torch's allocator has, on a CPU the anonymous memory of the process: its heap and its tensors, without the
files that are mapped into it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

try:
    import resource
except ImportError:  # of Unix only
    resource = None  # type: ignore[assignment]

from meshbolt.compat import allocator_figures, peak_allocated, reset_peak
from meshbolt.monitoring.heap import Heap
from meshbolt.monitoring.metric import Metric

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_RESETS_PEAK = b"5"


@dataclass(frozen=True)
class Usage:
    """What is in use, in bytes.

    Attributes:
        used_bytes: now.
        peak_bytes: the most since the peak was reset.
        reserved_bytes: taken from the device, in use or not; None on a CPU.
        retries: how often the allocator had to give everything back and ask again; None on a CPU.
    """

    used_bytes: int
    peak_bytes: int
    reserved_bytes: int | None = None
    retries: int | None = None


class Gauge(Protocol):
    """Reads what is in use where tensors of a run lie; nothing is waited for."""

    limit_bytes: int
    """How much there is."""

    def read(self) -> Usage:
        """Return what is in use."""

    def reset_peak(self) -> None:
        """Let the peak begin anew, at what is in use; what it was is to be read before."""

    def heap_bytes(self) -> int | None:
        """Return what is allocated, where `read` counts freed memory that is kept for later too; None: nobody can tell."""


def gauge_of(device: torch.device) -> Gauge:
    """Return what reads the memory of a device: its own, or the process's on a CPU."""
    return DeviceGauge(device) if device.type == "cuda" else ProcessGauge()


# The highest peak of this process that resets have ended, which would be missed by others who read it.
_highest = [0]


def peak_before_resets(device: torch.device) -> int:
    """Return the most that this rank has held before a gauge's resets: of tensors on a GPU, of the whole process on a CPU."""
    return peak_allocated(device) if device.type == "cuda" else _highest[0]


class DeviceGauge:
    """Reads torch's allocator of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.limit_bytes = int(torch.cuda.get_device_properties(device).total_memory)

    def read(self) -> Usage:
        """Return what tensors take."""
        found = allocator_figures(self._device)
        return Usage(found.allocated_bytes, found.peak_bytes, found.reserved_bytes, found.retries)

    def reset_peak(self) -> None:
        """Let the allocator's peak begin anew."""
        reset_peak(self._device)

    def heap_bytes(self) -> int | None:
        """Return None: `read` counts no freed memory."""
        return None


class ProcessGauge:
    """Reads the anonymous memory of the process that makes it, which a fork of that does not inherit."""

    def __init__(self) -> None:
        self._highest_seen = self._peak_bytes = 0
        # Opened once: opening takes twenty times as long as reading.
        self._status, self._clear = _opened(_STATUS, os.O_RDONLY), _opened(_CLEAR, os.O_WRONLY)
        self.limit_bytes = memory_limit_bytes()
        self._heap = Heap()

    def __del__(self) -> None:
        for file in (self._status, self._clear):
            if file is not None:
                os.close(file)

    def read(self) -> Usage:
        """Return what the process takes, with the kernel's own peak where it has one."""
        text = self._text()
        used = _field(text, b"RssAnon:")
        if not used:  # of Linux only
            used = int(psutil.Process().memory_info().rss)
            self._highest_seen = max(self._highest_seen, used)
            return Usage(used, self._highest_seen)
        mapped, self._peak_bytes = _field(text, b"VmRSS:") - used, _field(text, b"VmHWM:")
        return Usage(used, max(used, self._peak_bytes - mapped))

    def reset_peak(self) -> None:
        """Let the kernel's peak begin anew; `read` comes before it."""
        self._highest_seen = 0
        _highest[0] = max(_highest[0], self._peak_bytes)  # as it was just read
        if self._clear is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._clear, _RESETS_PEAK, 0)

    def heap_bytes(self) -> int | None:
        """Return what the process has allocated and not freed."""
        return self._heap.allocated_bytes()

    def _text(self) -> bytes:
        return b"" if self._status is None else os.pread(self._status, 8192, 0)


def _field(text: bytes, name: bytes) -> int:
    """Return a size of a process's status in bytes; 0 where it has none of that name."""
    start = text.find(name)
    return 0 if start < 0 else int(text[start + len(name) : text.index(b"kB", start)]) * 1024


def _opened(path: Path, flags: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.open(path, flags | os.O_CLOEXEC)
    return None


def process_bytes() -> int:
    """Return the anonymous memory of this process."""
    return ProcessGauge().read().used_bytes


def memory_limit_bytes() -> int:
    """Return how much memory this machine, or this container of it, has."""
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError):
        limit = _LIMIT.read_text().strip()
        return min(total, int(limit)) if limit.isdigit() else total
    return total


def address_limit_bytes() -> int | None:
    """Return how much this process may reserve, in use or not; None: as much as it likes, or the system has no such limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


_WHAT = {
    "parameters": ("This rank's parts of parameters", "after the step"),
    "gradients": (
        "Gradients, whole ones of a window too",
        "when the last backward pass of the step begins or when its last update does, the larger",
    ),
    "optimizer": ("State of the optimizers, with copies of parameters that they update", "after the step"),
    "gathered": (
        "Whole parameters that were gathered from other ranks",
        "when the last backward pass of the step begins",
    ),
    "buffers": ("The module's buffers", "after the step"),
}


def _of_category(name: str) -> Metric:
    what, when = _WHAT[name]
    return Metric(
        f"memory/{name}_bytes", "bytes", f"{what}, on the device.", f"sum of their storages, with padding, {when}"
    )


def _elsewhere(tier: str, name: str) -> Metric:
    where = {"host": "in host memory, of a run on GPUs", "file": "in this rank's files"}[tier]
    return Metric(
        f"memory/{tier}_{name}_bytes", "bytes", f"{_WHAT[name][0]}, {where}.", "sum of their storages, after the step"
    )


def _over_ranks(name: str, what: str) -> tuple[Metric, ...]:
    each = (("least", "lowest"), ("mean", "mean"), ("most", "highest"))
    return tuple(
        Metric(
            f"memory/{name}_{key}_bytes",
            "bytes",
            f"{what}: the {word} of all ranks.",
            f"{word} {name}_bytes of all ranks",
        )
        for key, word in each
    )


METRICS = (
    *(_of_category(name) for name in _WHAT),
    Metric(
        "memory/activations_bytes",
        "bytes",
        "What forward passes keep for the backward pass; on a CPU an upper bound where its C library does not tell what is "
        "allocated.",
        "in use when the last backward pass of the step begins - what is known then - the lowest other_bytes so far; on a CPU "
        "with glibc 2.33 and later: allocated - known when that pass begins, less the same after the step",
    ),
    Metric(
        "memory/other_bytes",
        "bytes",
        "What nobody has claimed between two steps: interpreter and libraries on a CPU, tensors of the user's, freed memory.",
        "used_bytes - what is known after the step",
    ),
    *(_elsewhere(tier, name) for tier in ("host", "file") for name in ("parameters", "gradients", "optimizer")),
    Metric(
        "memory/used_bytes",
        "bytes",
        "What is in use on the device after the step: by tensors on a GPU, by the process on a CPU, without mapped files.",
        "torch's allocated bytes, or RssAnon",
    ),
    Metric(
        "memory/reserved_bytes",
        "bytes",
        "What torch's allocator has taken from the GPU after the step, in use or not.",
        "torch's reserved bytes",
    ),
    Metric(
        "memory/limit_bytes",
        "bytes",
        "How much the device has.",
        "memory of the GPU, or of the machine or its container",
    ),
    Metric(
        "memory/step_peak_bytes",
        "bytes",
        "The most that was in use in this step.",
        "torch's peak of allocated bytes, or VmHWM without mapped files, since the step before; a process keeps much of what "
        "it has freed, so that on a CPU this may be little more than used_bytes",
    ),
    Metric(
        "memory/step_peak_phase",
        "text",
        "The phase of the step in which that was.",
        "the phase at whose end the peak was seen first",
    ),
    Metric(
        "memory/peak_bytes",
        "bytes",
        "The most that was in use since the last log.",
        "highest step_peak_bytes since then",
    ),
    Metric(
        "memory/peak_phase",
        "text",
        "The phase in which that was; null where it was in a step that is not logged.",
        "step_peak_phase of that step",
    ),
    Metric("memory/peak_step", "number", "The step in which that was.", "Lightning's global_step when it began"),
    *_over_ranks("used", "In use after the step"),
    *_over_ranks("peak", "The most in use since the last log"),
    Metric(
        "memory/peak_most_rank",
        "rank",
        "The rank with the highest peak since the last log.",
        "rank of the highest peak_bytes",
    ),
    Metric(
        "memory/host_used_bytes",
        "bytes",
        "What the process takes of host memory, of a run on GPUs, without mapped files.",
        "RssAnon",
    ),
    Metric(
        "memory/allocation_retries",
        "number",
        "How often torch's allocator had to give all its free memory back to the GPU to go on; each one is slow.",
        "torch's num_alloc_retries since the process began",
    ),
)
