"""The fast path: what makes gloo on CPUs faster than torch's own path, with the same numbers.

Gathers ahead of the forward, reductions that finish behind the backward, and hooks that rest where they would only look around.
`MESHBOLT_FAST_PATH=0` turns all of it off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from meshbolt import compat
from meshbolt.collectives import DeferredReductions, Prefetch, usable_fast_path
from meshbolt.config import Plan


def wants_fast_path(plan: Plan) -> bool:
    """Return whether the plan runs where the fast path is proved, and has not turned it off."""
    backend = str(dist.get_backend())
    proved = usable_fast_path(device_type=plan.device_type, backend=backend, shards=plan.mesh.dp_shard > 1)
    return proved and plan.environment.fast_path and plan.mesh.pp == 1


class FastPath:
    """Follows the engine's batches; one for an engine."""

    def __init__(self, module: nn.Module, *, units: Mapping[str, FSDPModule], root: FSDPModule, plan: Plan) -> None:
        """Watch the module's forwards.

        Args:
            module: the user's.
            units: all but the root, by name.
            root: the unit that owns the rest.
            plan: what the engine runs.
        """
        self._everything = everything = [*units.values(), root]
        self._reductions = DeferredReductions(everything)
        self._prefetch = Prefetch(units, keeps_gathered=not plan.stage.reshards_after_forward)
        self._forward_is_due = self._has_run = self._quiet = False
        self._can_be_quiet = not (plan.stage.reduces_every_batch or any(compat.casts(unit) for unit in everything))
        for unit in everything if self._can_be_quiet else ():
            compat.make_hooks_skippable(unit, lambda: self._quiet)
        for child in _outside_of_units(module, frozenset(units.values())):  # type: ignore[arg-type]
            child.register_forward_pre_hook(self._begin_forward, prepend=True)

    def enter_forward(self, *, keeps_gradients: bool) -> None:
        """Prepare a forward that a backward may follow.

        Args:
            keeps_gradients: that backward is its only one, and belongs to a window that goes on after it.
        """
        self._forward_is_due = True
        # The first forward is torch's, which sets itself up there.
        self._quiet = self._can_be_quiet and self._has_run and keeps_gradients
        self._has_run = True

    def before_backward(self) -> None:
        """Prepare a backward."""
        for unit in self._everything if self._quiet else ():
            # Hooks that rest do not gather again what somebody has freed after the forward.
            unit.unshard()
        self._prefetch.end_forward()
        self._reductions.before_backward()

    def after_backward(self) -> None:
        """Finish the reductions of a backward: afterwards gradients are as torch's own path leaves them."""
        self._reductions.after_backward()

    def drop(self) -> None:
        """Throw away gathers that no forward has taken."""
        self._prefetch.drop()

    def reset(self) -> None:
        """Forget what an exception in backward has left behind."""
        self._reductions.reset()

    def _begin_forward(self, *_: object) -> None:
        """Gather ahead from the first layer that runs, not before: `training_step` may change parameters before that."""
        if self._forward_is_due:
            self._forward_is_due = False
            self._prefetch.enter_step()


def _outside_of_units(module: nn.Module, units: frozenset[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules inside a module down to its units, and those, but nothing inside of them."""
    for child in module.children():
        yield child
        if child not in units:
            yield from _outside_of_units(child, units)
