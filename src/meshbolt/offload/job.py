"""Parameters that are updated together, and what their update needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from meshbolt.offload.rules import Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Parameters that were submitted together.

    Attributes:
        gradients: and the number of the group, by the number of the parameter.
        settings: of the optimizer's groups at that moment.
        scale: see `OffloadedOptimizer.submit`.
        found_inf: likewise.
        ready: an event after which the gradients are there.
    """

    gradients: dict[int, tuple[torch.Tensor, int]]
    settings: Mapping[int, Settings]
    scale: float | None
    found_inf: torch.Tensor | bool
    ready: torch.cuda.Event | None

    def is_skipped(self) -> bool:
        """Return whether it is to be left out, which on a GPU waits for the gradients."""
        if self.ready is not None and isinstance(self.found_inf, torch.Tensor):
            self.ready.synchronize()
        return bool(self.found_inf)


def scale_gradients(gradients: Iterable[torch.Tensor], scale: float | torch.Tensor) -> None:
    """Multiply gradients in their own place, those of a GPU without waiting for it.

    Args:
        gradients: on one GPU, or some of them on the host.
        scale: a number, or a scalar on any device.
    """
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, alike in by_device.items():
        torch._foreach_mul_(alike, scale.to(device) if isinstance(scale, torch.Tensor) else scale)
