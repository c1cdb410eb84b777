"""`get_accelerator()`: the device of a script that names none, as DeepSpeed's scripts ask for it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch

from meshbolt.errors import ConfigError

_FORCED = "DS_ACCELERATOR"
_KINDS = ("cuda", "cpu")


class Accelerator:
    """GPUs, or the CPU where there are none: what `torch.cuda` answers, and for the CPU that there is nothing to do.

    Further names (`Stream`, `memory_stats`, ...) are those of `torch.cuda`.
    """

    def __init__(self, kind: str) -> None:
        """Take the kind of device: "cuda" or "cpu"."""
        self._name = kind
        self._has_gpu = kind == "cuda"

    # Devices ----------------------------------------------------------------------------------------------------------

    def device_name(self, device_index: int | None = None) -> str:
        """Return what `tensor.to` takes: "cuda", "cuda:1" or "cpu"."""
        return self._name if device_index is None or not self._has_gpu else f"{self._name}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        """Return a device, or the current one."""
        return torch.device(self.current_device_name() if device_index is None else self.device_name(device_index))

    def set_device(self, device_index: int) -> None:
        """Make a device the current one."""
        if self._has_gpu:
            torch.cuda.set_device(device_index)

    def current_device(self) -> int:
        """Return the number of the current device; of the CPU 0."""
        return torch.cuda.current_device() if self._has_gpu else 0

    def current_device_name(self) -> str:
        """Return what `tensor.to` takes for the current device."""
        return self.device_name(self.current_device() if self._has_gpu else None)

    def device_count(self) -> int:
        """Return the number of devices; without GPUs one for each rank of this machine."""
        return torch.cuda.device_count() if self._has_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def is_available(self) -> bool:
        """Return whether there is a device."""
        return True

    def is_synchronized_device(self) -> bool:
        """Return whether operations are done when they return."""
        return not self._has_gpu

    def communication_backend_name(self) -> str:
        """Return the backend of `torch.distributed` for these devices."""
        return "nccl" if self._has_gpu else "gloo"

    def is_bf16_supported(self) -> bool:
        """Return whether bfloat16 can be trained in."""
        return torch.cuda.is_bf16_supported() if self._has_gpu else True

    def is_fp16_supported(self) -> bool:
        """Return whether float16 can be trained in."""
        return True

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        """Return a tensor in memory that GPUs copy from without waiting; `align_bytes` is without effect."""
        return tensor.pin_memory() if self._has_gpu else tensor

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on such a device."""
        return tensor.device.type == self._name

    def manual_seed(self, seed: int) -> None:
        """Seed the device's generator."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def __getattr__(self, name: str) -> Any:
        """Return what `torch.cuda` has of a name; without GPUs what stands for it."""
        if name.startswith("__"):
            raise AttributeError(name)
        if self._has_gpu:
            if name == "total_memory":
                return lambda index=None: torch.cuda.get_device_properties(self.device(index)).total_memory
            if name == "available_memory":
                return lambda index=None: torch.cuda.mem_get_info(self.device(index))[0]
            return getattr(torch.cuda, name)
        if name in _ON_THE_CPU:
            return _ON_THE_CPU[name]
        raise AttributeError(
            f"get_accelerator().{name}: there is no such thing of the CPU. It has {sorted(_ON_THE_CPU)}."
        )


def _memory_bytes(*_: Any) -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _total_bytes(*_: Any) -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _available_bytes(*_: Any) -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: the CPU has none of it."""


_ON_THE_CPU: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("synchronize", "empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated"), _nothing
        ),
        **dict.fromkeys(("range_push", "range_pop", "ipc_collect"), _nothing),
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), _memory_bytes
        ),
        "total_memory": _total_bytes,
        "available_memory": _available_bytes,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "initial_seed": torch.initial_seed,
    }
)


@functools.cache
def get_accelerator() -> Accelerator:
    """Return what stands for the devices of this machine: its GPUs, or its CPU; DS_ACCELERATOR=cpu asks for the latter.

    Raises:
        ConfigError: DS_ACCELERATOR asks for what is not here.

    Example:
        >>> device = get_accelerator().device_name(int(os.environ["LOCAL_RANK"]))
    """
    wanted = os.environ.get(_FORCED)
    if wanted not in (None, *_KINDS) or (wanted == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(
            f"{_FORCED}={wanted!r}: here is {'cuda or ' if torch.cuda.is_available() else ''}cpu. Unset it."
        )
    return Accelerator(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
