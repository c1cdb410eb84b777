"""Debug mode: catch ranks that take different branches, before they gather each other's weights.

When ranks run different units of equal size, their all-gathers match by accident and every rank computes with a mixture of
weights; no error, no hang, no sign of it but a bad model. With `MESHBOLT_DEBUG=1` every rank announces, over a group of its
own, which unit it is about to use, and all stop with one error where the announcements differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from meshbolt.collectives import same_on_all_ranks
from meshbolt.errors import TopologyError


class BranchWatch:
    """Announces every event of a rank to all others and compares."""

    def __init__(self, units: Mapping[str, nn.Module], *, timeout: timedelta | None) -> None:
        """Watch the forwards of the units.

        Args:
            units: by name; equal on every rank.
            timeout: how long a rank waits for the others' announcements; None: torch's default.
        """
        # Its own group: ranks that have diverged wait in different collectives of the default one.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._count = 0
        for name, unit in units.items():
            unit.register_forward_pre_hook(self._announcer(f"the forward of {name!r}"), prepend=True)

    def announce(self, event: str) -> None:
        """Compare what this rank does next with the others.

        Args:
            event: in words, for the message.

        Raises:
            TopologyError: ranks do different things; raised on every rank.
        """
        self._count += 1
        same, events = same_on_all_ranks(event, group=self._group)
        if same:
            return
        described = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(events))
        raise TopologyError(
            f"Ranks took different branches at event {self._count}: {described}. Every rank must run the same units in the "
            "same order: do not choose layers by the rank, by local data or by unseeded randomness, or name those layers "
            "so that they share one unit: zero=Zero(unit=[...])."
        )

    def _announcer(self, event: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.announce(event)

        return hook
