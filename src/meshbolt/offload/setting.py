"""Offload as the user writes it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from meshbolt.errors import ConfigError, UnsupportedError, did_you_mean

CPU, NVME, AUTO = "cpu", "nvme", "auto"
_TIERS = (CPU, NVME)


@dataclass(frozen=True)
class Offload:
    """What of a run lies outside of the memory of its devices.

    Attributes:
        optimizer: where the state of optimizers lies and is updated: None for the device, "cpu" for host memory, "nvme" for a
            file of each rank under `path`, read and written piece by piece in every step.
        parameters: where sharded parameters lie while nobody computes with them; only None in this version.
        path: a directory on a fast local disk; each rank makes a file in it that is gone when the run ends, however it ends.
        fraction: of the bytes of the optimizers' state leaves the device, 0.0 to 1.0; the rest is updated there at the same time.
            "auto" is not in this version.
        pin_memory: lock host memory, so that a GPU copies while it computes. It cannot be swapped out.
            Pieces that are read from a file are not locked in this version.
        overlap: updates begin in the backward pass, where nothing is to be done with gradients before a step, and go on under the
            next forward pass; "auto": on GPUs. False: a step begins and ends where the loop takes it.

    Source: Ren et al., "ZeRO-Offload" (2021); Rajbhandari et al., "ZeRO-Infinity" (2021).
    """

    optimizer: str | None = None
    parameters: str | None = None
    path: str | Path | None = None
    fraction: float | str = 1.0
    pin_memory: bool = True
    overlap: bool | str = AUTO

    def __post_init__(self) -> None:
        for name in ("optimizer", "parameters"):
            value = getattr(self, name)
            if value is not None and value not in _TIERS:
                raise ConfigError(
                    f"Offload({name}={value!r}): there is no such place{did_you_mean(str(value), _TIERS)}."
                )
        if self.parameters is not None:
            raise UnsupportedError(
                f"Offload(parameters={self.parameters!r}) is not available in this version of meshbolt. Offload the optimizer's "
                "state, and shard parameters with zero=3."
            )
        if not isinstance(self.pin_memory, bool):
            raise ConfigError(f"Offload(pin_memory={self.pin_memory!r}) is a switch. Use True or False.")
        if self.overlap != AUTO and not isinstance(self.overlap, bool):
            raise ConfigError(f"Offload(overlap={self.overlap!r}) is a switch. Use True, False or 'auto'.")
        self._check_fraction()
        self._check_path()

    @property
    def is_used(self) -> bool:
        """Whether anything lies elsewhere."""
        return self.optimizer is not None or self.parameters is not None

    def _check_fraction(self) -> None:
        value = self.fraction
        if value == AUTO:
            raise UnsupportedError(
                "Offload(fraction='auto') is not available in this version of meshbolt. Give the fraction of the state that "
                "leaves the device, such as 0.5."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise ConfigError(
                f"Offload(fraction={value!r}) is the part of the optimizer's state that leaves the device. Use 0.0 to 1.0."
            )
        if value != 1.0 and self.optimizer is None:
            raise ConfigError(
                f"Offload(fraction={value!r}) divides the optimizer's state, and that stays on the device. Add optimizer='cpu', "
                "or leave fraction out."
            )

    def _check_path(self) -> None:
        if self.path is not None and not (isinstance(self.path, (str, Path)) and str(self.path)):
            raise ConfigError(
                f"Offload(path={self.path!r}) is no directory. Give the path of one on a fast local disk."
            )
        on_disk = [each.name for each in fields(self) if getattr(self, each.name) == NVME]
        if on_disk and self.path is None:
            raise ConfigError(
                f"Offload({on_disk[0]}='nvme') needs a directory on a fast local disk. Use Offload({on_disk[0]}='nvme', "
                "path='/local/nvme')."
            )
        if self.path is not None and not on_disk:
            raise ConfigError(
                f"Offload(path={str(self.path)!r}) is for what lies in files, and nothing does. Add optimizer='nvme', or leave "
                "path out."
            )
