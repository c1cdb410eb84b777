"""Offload as the user writes it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from meshbolt.errors import ConfigError, did_you_mean

CPU, NVME, AUTO = "cpu", "nvme", "auto"
_TIERS = (CPU, NVME)


@dataclass(frozen=True)
class Offload:
    """What of a run lies outside of the memory of its devices.

    Attributes:
        optimizer: where the state of optimizers lies and is updated: None for the device, "cpu" for host memory, "nvme" for a
            file of each rank under `path`, read and written piece by piece in every step.
        parameters: where sharded parameters lie while nobody computes with them, with ZeRO stage 3: None for the device, "cpu"
            for host memory, "nvme" for a file of each rank under `path`, of which each unit is read before it is gathered.
        path: a directory on a fast local disk; each rank makes a file in it that is gone when the run ends, however it ends.
            Environment variables in it ("$SCRATCH/run") are replaced.
        fraction: of the bytes of the optimizers' state leaves the device, 0.0 to 1.0; the rest is updated there at the same time.
            "auto": after the first step as much comes back to the device as its memory has left.
        pin_memory: lock host memory, so that a GPU copies while it computes. It cannot be swapped out.
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
        if not isinstance(self.pin_memory, bool):
            raise ConfigError(f"Offload(pin_memory={self.pin_memory!r}) is a switch. Use True or False.")
        if self.overlap != AUTO and not isinstance(self.overlap, bool):
            raise ConfigError(f"Offload(overlap={self.overlap!r}) is a switch. Use True, False or 'auto'.")
        if not self.is_used and (self.overlap is True or not self.pin_memory):
            asked = f"overlap={self.overlap!r}" if self.overlap is True else f"pin_memory={self.pin_memory!r}"
            raise ConfigError(f"Offload({asked}) is about what lies elsewhere, and nothing does. Add optimizer='cpu'.")
        self._check_parameters()
        self._check_fraction()
        self._check_path()

    @property
    def is_used(self) -> bool:
        """Whether anything lies elsewhere."""
        return self.optimizer is not None or self.parameters is not None

    def _check_parameters(self) -> None:
        if self.parameters is None:
            return
        asked = f"Offload(parameters={self.parameters!r}, optimizer={self.optimizer!r})"
        if self.optimizer is None:
            raise ConfigError(
                f"{asked} leaves the optimizer's state on the device, and updates run where parameters lie. Add optimizer='cpu' "
                "or 'nvme'."
            )
        if self.parameters == NVME and self.optimizer == CPU:
            raise ConfigError(
                f"{asked} would read parameters from a disk several times a step to save a third of what the state takes in host "
                "memory. Use Offload(parameters='cpu', optimizer='nvme', path=...), or both in 'nvme'."
            )
        if self.fraction != 1.0:
            raise ConfigError(
                f"Offload(parameters={self.parameters!r}, fraction={self.fraction!r}) would keep state on the device without its "
                "parameters. Leave fraction out."
            )

    def _check_fraction(self) -> None:
        value = self.fraction
        is_number = not isinstance(value, bool) and isinstance(value, (int, float))
        if value != AUTO and not (is_number and 0.0 <= float(value) <= 1.0):
            raise ConfigError(
                f"Offload(fraction={value!r}) is the part of the optimizer's state that leaves the device. Use 0.0 to 1.0, or "
                "'auto'."
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
