"""What user code changes in gathered parameters, carried over to the shards.

While a unit is gathered, its parameters are whole copies in the user's eyes: in `training_step`, and in the hooks between two
batches of a window. A change made there in place (weights that are clamped or normalised) would be freed with the copy, without
a word. So before copies are freed, this rank's part of each is compared with its shard, and what differs is taken over. Every
rank takes its own part, and nothing is communicated: like any code that changes parameters, the edit has to be the same on all.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshbolt import compat
from meshbolt.compat import local_tensor
from meshbolt.engine.gathered import local_part


class Edits:
    """Knows where in the user's module each parameter stands, and takes over what was changed there."""

    def __init__(self, module: nn.Module) -> None:
        """Note the places of all parameters.

        Args:
            module: sharded, with nothing gathered.
        """
        self._places: dict[nn.Parameter, tuple[nn.Module, str]] = {
            parameter: (child, key) for child in module.modules() for key, parameter in child._parameters.items() if parameter is not None
        }

    @torch.no_grad()
    def keep(self, units: Iterable[FSDPModule]) -> None:
        """Take over what differs from the shards in those of the units that are gathered.

        A copy is compared in the dtype in which it was gathered: what nobody has changed is not rounded.

        Args:
            units: to look at.
        """
        for unit in units:
            if compat.is_gathered(unit):
                for shard in compat.managed_parameters(unit):
                    self._keep(shard)

    def _keep(self, shard: nn.Parameter) -> None:
        child, key = self._places[shard]
        whole = child._parameters[key]
        if whole is None or whole is shard or whole.shape != shard.shape or not isinstance(shard, DTensor):
            return
        mine, part = local_tensor(shard), local_part(whole.detach(), like=shard)
        # One expression, so that a GPU is not waited for to learn whether anything differs.
        mine.copy_(torch.where(part == mine.to(part.dtype), mine, part.to(mine.dtype)))
