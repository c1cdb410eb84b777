"""Ranks that have trained different parameters in one backward: what they added up does not belong together."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from meshbolt.compat import meeting_store
from meshbolt.errors import TopologyError

# On a CPU all ranks have ended a backward when one has. Those of GPUs run ahead, and may wait for one that compiles.
_PATIENCE_SECONDS = {"cpu": 20.0}
_USUAL_PATIENCE_SECONDS = 300.0
_SHOWN = 5
_numbers = itertools.count()


class UsedParameters:
    """Compares which parameters have no gradient among ranks, wherever that changes on one of them.

    torch reduces what a rank has gradients for. Ranks that have them for different parameters of equal size add up gradients of
    different parameters, and nothing fails. As long as nothing changes nothing is said; a rank with a change says so in the
    store of the process group, and goes on when all have said the same.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, device: torch.device) -> None:
        """Begin where every parameter has a gradient.

        Args:
            parameters: by name; those of all ranks.
            device: of this rank.
        """
        self._parameters = list(parameters.items())
        self._patience_seconds = _PATIENCE_SECONDS.get(device.type, _USUAL_PATIENCE_SECONDS)
        self._key = f"meshbolt_used_{next(_numbers)}"
        self._backwards = 0
        self._unused: tuple[str, ...] = ()

    def compare(self) -> None:
        """Go on if all ranks lack the same gradients, after a backward that has reduced them.

        Raises:
            TopologyError: this rank lacks others than another one.
        """
        self._backwards += 1
        unused = tuple(name for name, each in self._parameters if each.requires_grad and each.grad is None)
        if unused == self._unused:
            return
        before, self._unused = self._unused, unused
        if dist.get_world_size() > 1:
            self._agree(before, unused)

    def _agree(self, before: tuple[str, ...], unused: tuple[str, ...]) -> None:
        store, ranks = meeting_store(), dist.get_world_size()
        digest = hashlib.sha256("\n".join(unused).encode()).hexdigest()[:16]
        of_all = f"{self._key}_{self._backwards}"
        own = f"{of_all}_{digest}"
        store.add(own, 1)
        store.add(of_all, 1)
        end, pause = time.monotonic() + self._patience_seconds, 0.0005
        # What has changed for all ranks in different ways needs no patience; own ones are counted last, so that none is missed.
        while (heard := store.add(of_all, 0), count := store.add(own, 0))[1] < ranks:
            if heard == ranks or time.monotonic() > end:
                raise _refusal(before, unused, others=ranks - count)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)


def _refusal(before: tuple[str, ...], unused: tuple[str, ...], *, others: int) -> TopologyError:
    lost, come = sorted(set(unused) - set(before)), sorted(set(before) - set(unused))
    parts = ((lost, "has no gradient any more for"), (come, "has a gradient now for"))
    said = " and ".join(f"{what} {_shown(names)}" for names, what in parts if names)
    return TopologyError(
        f"Ranks have used different parameters in one backward: rank {dist.get_rank()} {said}, and {others} of the "
        f"{dist.get_world_size()} ranks did not say the same. So gradients of different parameters were added up. Let every rank "
        "use the same parameters in each batch: draw what is random from one seed on all ranks, or add `0 * parameter.sum()` to "
        "the loss for those that a rank does not need."
    )


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
