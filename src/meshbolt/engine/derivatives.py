"""Derivatives that user code takes by hand, beside the backward of the loss.

`torch.autograd.grad` with respect to inputs (saliency, adversarial examples, forces, gradient penalties) runs through the same
units as the backward of the loss, and torch's hooks on them cannot tell: they would reduce what earlier batches of the window
have left, and free parameters that `training_step` goes on with. So every pass is looked at once. One that makes no gradient
of a parameter only borrows the units that it meets; one that does, and was not started by the engine, is refused.

A derivative that is to be derived again (`create_graph=True`) leaves a graph that uses parameters without a hook of any unit.
Units in such a graph stay gathered until the backward of the loss is over, and are reduced and freed at its end. So are units
whose parameters user code has used by itself where they were gathered, when their gradients come late.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshbolt import compat
from meshbolt.engine.misuse import used_outside_of_its_unit
from meshbolt.errors import UnsupportedError


class Derivatives:
    """Tells the passes of autograd apart, and what each may do to the units."""

    def __init__(
        self,
        units: Mapping[str, FSDPModule],
        *,
        root: FSDPModule,
        whole: Collection[nn.Parameter],
        frees_after_forward: bool,
    ) -> None:
        """Watch the passes through the units.

        Args:
            units: all but the root, by name.
            root: gathered for the whole of a call.
            whole: parameters that no unit shards.
            frees_after_forward: units are gathered for forward and backward only, each for itself.
        """
        self._all_units = [root, *units.values()]
        self._inner = set(units.values())
        self._whole = list(whole)
        self._frees_after_forward = frees_after_forward
        self._nodes: dict[nn.Parameter, Any] = {}
        # Of the pass that was looked at last.
        self._pass: int | None = None
        self._is_other = False
        # Units that a pass has come to: whether they were gathered before, and what undoes the coming.
        self._borrowed: dict[FSDPModule, tuple[bool, Callable[[], None]]] = {}
        self._borrower: int | None = None
        # Of the backward that the engine runs.
        self._is_running = self._is_ending = self._was_met = self._has_begun = False
        self._older: dict[nn.Parameter, tuple[int, int]] = {}
        self._watches_late = False
        # Units in a graph that is to be derived again, in the order of the passes, which is the same on every rank; and
        # whether a backward of the loss has been through since, so that the graph is likely to be gone.
        self._kept: dict[FSDPModule, bool] = {}
        for unit in self._all_units:
            compat.watch_passes(
                unit,
                is_other=self._runs_other,
                enter=self._enter,
                leave=self._leave,
                holds=self._holds,
                ending=self.ending,
            )
            for shard in compat.managed_parameters(unit):
                if isinstance(shard, DTensor):
                    self._refuse_gradient_of(shard)

    # The backward of the loss -----------------------------------------------------------------------------------------

    def before_backward(self, *, reduces: bool) -> None:
        """Take the next pass that makes gradients of parameters for the backward of the loss.

        Args:
            reduces: gradients are reduced in it, and not kept whole.
        """
        self._is_running, self._was_met, self._has_begun = True, False, False
        self._pass = None
        # In stage 3 nothing but the graphs of `_kept` uses a unit's parameters outside of its forward.
        self._watches_late = reduces and not self._frees_after_forward
        if self._watches_late:
            copies = (copy for unit in self._all_units for copy in compat.whole_copies(unit))
            # Not the gradients themselves, which would live on after they are reduced: one whole model in stage 1.
            self._older = {copy: compat.mark_of(copy.grad) for copy in copies if copy.grad is not None}
        for unit in self._kept:
            unit.unshard()

    def after_backward(self) -> None:
        """End it."""
        if self._was_met and not self._has_begun:
            # The loss depends on no parameter: what earlier batches of the window have left is to be reduced all the same.
            compat.end_backward(self._all_units[0])
        self._kept = dict.fromkeys(self._kept, True)
        self.reset()

    def reset(self) -> None:
        """Forget what is running."""
        self._is_running = self._is_ending = self._is_other = False
        self._pass = None
        self._older.clear()
        self._borrowed.clear()

    def kept(self) -> frozenset[FSDPModule]:
        """Return the units that are kept for a graph that is to be derived again."""
        return frozenset(self._kept)

    def release_used(self) -> None:
        """Let go of the units whose graphs a backward of the loss has been through."""
        self._release([unit for unit, is_used in self._kept.items() if is_used])

    def release_others(self, kept: frozenset[FSDPModule]) -> None:
        """Let go of the units that were not kept before; no backward of the loss will follow.

        Args:
            kept: those that were.
        """
        self._release([unit for unit in self._kept if unit not in kept])

    def release_changed(self, shards: Set[nn.Parameter]) -> None:
        """Let autograd refuse graphs that need old values of parameters which an optimizer has changed, as in one process.

        Those that are still to be derived would read the new values otherwise, or what is freed.

        Args:
            shards: the parameters.
        """
        for unit in self._all_units:
            compat.outdate([copy for shard, copy in compat.copies_by_shard(unit) if shard in shards])
        self._release([unit for unit in self._kept if not shards.isdisjoint(compat.managed_parameters(unit))])

    def refuse_strays(self) -> None:
        """Refuse to go on with whole gradients on the root that no backward of the engine has made.

        Raises:
            UnsupportedError: there are some.
        """
        if any(copy.grad is not None for copy in compat.whole_copies(self._all_units[0])):
            raise _called_by_itself()

    def drop_strays(self) -> None:
        """Forget whole gradients that a backward which was cut short has left."""
        for unit in self._all_units:
            for copy in compat.whole_copies(unit):
                copy.grad = None

    # What torch's hooks ask -------------------------------------------------------------------------------------------

    def _runs_other(self) -> bool:
        """Return whether the pass that runs now is not the backward of the loss, and only borrows units."""
        running = compat.current_pass()
        if running != self._pass:
            self._pass, self._is_other = running, self._look()
        return self._is_other

    def _enter(self, unit: FSDPModule) -> None:
        """Gather a unit that such a pass has come to."""
        self._was_met = True
        if self._borrower != self._pass:
            self._borrower = self._pass
            compat.queue_after_backward(self._give_back)
        twice = torch.is_grad_enabled()  # autograd runs hooks in the mode of create_graph
        if unit not in self._borrowed:
            self._borrowed[unit] = (compat.is_gathered(unit), compat.enter_pass(unit))
        if twice and unit in self._inner:
            self._kept[unit] = False
            if self._frees_after_forward:
                unit.set_reshard_after_forward(False, recurse=False)
        with torch.no_grad():
            unit.unshard()

    def _leave(self, unit: FSDPModule) -> None:
        """Free a unit that such a pass is through with, if the pass has gathered it."""
        if unit not in self._borrowed:
            return
        was_gathered, undo = self._borrowed.pop(unit)
        undo()
        if not was_gathered and unit not in self._kept:
            compat.reshard(unit)

    def _holds(self, unit: FSDPModule) -> bool:
        """Return whether the backward of the loss is to come back to a unit whose forward it is through with."""
        if self._is_ending:
            return False
        return unit in self._kept or (self._watches_late and any(self._is_late(p) for p in compat.whole_copies(unit)))

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Surround torch's own end of a backward, in which every unit is reduced that is not yet."""
        self._is_ending = True
        try:
            yield
        finally:
            self._is_ending = False

    # Inside -----------------------------------------------------------------------------------------------------------

    def _release(self, units: Iterable[FSDPModule]) -> None:
        for unit in units:
            del self._kept[unit]
            if self._frees_after_forward:
                unit.set_reshard_after_forward(True, recurse=False)
                compat.reshard(unit)

    def _look(self) -> bool:
        if not any(self._gets_gradient(p) for unit in self._all_units for p in compat.whole_copies(unit)) and not any(
            self._gets_gradient(p) for p in self._whole
        ):
            return True
        if not self._is_running:
            raise _called_by_itself()
        self._has_begun = True
        return False

    def _gets_gradient(self, parameter: nn.Parameter) -> bool:
        if not parameter.requires_grad:
            return False
        node = self._nodes.get(parameter)
        if node is None:
            node = self._nodes[parameter] = torch.autograd.graph.get_gradient_edge(parameter).node
        return compat.will_accumulate(node)

    def _is_late(self, copy: nn.Parameter) -> bool:
        gradient = copy.grad
        if gradient is None:
            return self._gets_gradient(copy)
        return self._older.get(copy) == compat.mark_of(gradient) and self._gets_gradient(copy)

    def _give_back(self) -> None:
        """End a pass: what it has not left, it has met from the side."""
        for unit in list(self._borrowed):
            self._leave(unit)

    def _refuse_gradient_of(self, shard: nn.Parameter) -> None:
        """Let autograd fail where it comes to a shard by itself."""

        def refuse(_: torch.Tensor) -> None:
            if self._gets_gradient(shard):
                raise used_outside_of_its_unit()

        wanted = shard.requires_grad
        shard.requires_grad_(True)  # only then torch takes a hook; it may be trained later
        shard.register_hook(torch.utils.hooks.unserializable_hook(refuse))
        shard.requires_grad_(wanted)


def _called_by_itself() -> UnsupportedError:
    return UnsupportedError(
        "loss.backward() was called by itself: the gradients that it makes of parameters would stay on this rank. Call "
        "self.manual_backward(loss) in manual optimisation, fabric.backward(loss) in Fabric, engine.backward(loss) after "
        "meshbolt.initialize. For the derivative with respect to inputs only, call torch.autograd.grad(loss, inputs) or "
        "loss.backward(inputs=[...])."
    )
