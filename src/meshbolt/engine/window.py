"""Gradients that a window keeps on a rank between its batches.

Stages 0 and 1 keep them whole and communicate after the window's last batch; with replicas stages 2 and 3 keep shards that
are summed inside a replica only. torch keeps both out of sight, where `zero_grad()` does not reach them: gradients that were
thrown away would come back. So they are shown on the shards, as what they are, partial sums: whoever takes them away there,
drops them, and whoever reads one as a DTensor gets the gradient of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from meshbolt import compat
from meshbolt.compat import local_tensor
from meshbolt.errors import UnsupportedError


class Window:
    """What the batches of one optimizer step leave behind, until the last of them."""

    def __init__(self, units: Mapping[str, FSDPModule], *, whole: Iterable[nn.Parameter], keeps_parts: bool) -> None:
        """Watch the units.

        Args:
            units: all of them, the root too, by name.
            whole: parameters that no unit shards; their gradients are averaged at the window's end.
            keeps_parts: shards are summed over the replicas at the window's end only.
        """
        self._units = dict(units)
        self._whole = list(whole)
        self._keeps_parts = keeps_parts
        self._watched: set[str] = set()
        self._shown: dict[nn.Parameter, DTensor] = {}
        # The last of each, which the next batch of a window shows again: torch adds to the same tensor.
        self._faces: dict[nn.Parameter, DTensor] = {}
        # What stood in a shown one's place: gradients of an earlier window that nobody has used or dropped.
        self._summed: dict[nn.Parameter, torch.Tensor] = {}
        self._is_open = False
        # In one batch, and in the first of the window.
        self._used: set[nn.Parameter] = set()
        self._used_first: set[nn.Parameter] | None = None

    @property
    def is_open(self) -> bool:
        """Whether gradients of a window wait for its end."""
        return self._is_open

    def before_backward(self, *, last: bool) -> None:
        """Take gradients back from where they were shown, and forget those that were dropped there.

        Args:
            last: whether the batch is the window's last, in whose backward each unit's gradients are freed once reduced.
        """
        dropped = {parameter for parameter, shown in self._shown.items() if parameter.grad is not shown}
        for parameter in self._shown.keys() - dropped:
            parameter.grad = self._summed.get(parameter)
        for unit in self._units.values() if dropped else ():
            compat.drop_kept_gradients(unit, dropped, self._used)
        if self._shown and len(dropped) == len(self._shown):
            self._used_first = None  # the window starts again
        self._shown.clear()
        self._summed.clear()
        self._used.clear()
        if last:
            self._faces.clear()  # they would hold the gradients
        for name, unit in self._units.items() if self._keeps_parts else ():
            if name not in self._watched and compat.was_gathered(unit):
                self._watched.add(name)
                compat.on_gradient(unit, self._used.add)

    def after_backward(self, *, last: bool) -> None:
        """Show what is kept; after the last batch nothing is.

        Args:
            last: whether the batch was the window's last.

        Raises:
            UnsupportedError: the batches of the window use different parameters, and shards are summed at its end only.
        """
        self._is_open = not last
        if self._keeps_parts:
            self._check_used()
        if last:
            self._used_first = None
            return
        self._show_all()

    def saw(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note parameters that a batch uses, whose gradients autograd has made without telling.

        Args:
            parameters: shards.
        """
        self._used.update(parameters)

    def after_error(self) -> None:
        """Show again what a backward that was cut short had taken back, so that it can be dropped or gone on with."""
        if self._shown:
            return  # it was a forward
        self._used |= self._used_first or set()
        self._show_all()
        self._is_open = self._is_open or bool(self._shown)

    def _show_all(self) -> None:
        for unit in self._units.values():
            for parameter, gradient in compat.kept_gradients(unit, self._used):
                self._show(parameter, gradient)

    def refuse_inside(self, parameters: Iterable[nn.Parameter], *, what: str) -> None:
        """Refuse to work with gradients that are not those of all ranks yet.

        Args:
            parameters: whose gradients are to be used.
            what: is to be done with them, for the message.

        Raises:
            UnsupportedError: gradients of one of them wait for the window's end.
        """
        if not self._is_open:
            return
        waiting = {*self._shown, *self._whole}
        if any(parameter in waiting and parameter.grad is not None for parameter in parameters):
            raise UnsupportedError(
                f"Gradients were to be {what} inside a window of accumulated batches, where this ZeRO stage has not summed them "
                "over the ranks yet. Do it after the window's last backward, which runs outside of accumulate() and "
                "no_backward_sync(); in Lightning's automatic optimisation, in on_before_optimizer_step."
            )

    def _show(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._summed[parameter] = parameter.grad
        face = self._faces.get(parameter)
        if face is None or local_tensor(face) is not gradient:
            face = self._faces[parameter] = self._face(cast("DTensor", parameter), gradient)
            if gradient.dtype != parameter.dtype:
                parameter.grad_dtype = None  # 16-bit parameters, whose gradients are summed in 32
        parameter.grad = self._shown[parameter] = face

    def _face(self, shard: DTensor, gradient: torch.Tensor) -> DTensor:
        is_part = gradient.shape == local_tensor(shard).shape and self._keeps_parts
        # What layers are divided over does not sum anything.
        names = shard.device_mesh.mesh_dim_names or ()
        waiting = 1 if is_part else sum(name.startswith("dp_") for name in names)
        placements = [Partial("avg")] * waiting + list(shard.placements[waiting:])
        return compat.distributed_tensor(gradient, like=shard, placements=placements)

    def _check_used(self) -> None:
        if self._used_first is None:
            self._used_first = set(self._used)
        odd = self._used_first ^ self._used
        for name, unit in self._units.items() if odd else ():
            if any(parameter in odd for parameter in compat.managed_parameters(unit)):
                raise UnsupportedError(
                    f"{name!r} has parameters that some batches of a window used and others did not. Copies of the sharded state "
                    "(zero=Zero(replicate=...)) sum their gradients at the window's end, and need the same parameters in every "
                    "batch. Use every layer in every batch, set accumulate_grad_batches=1, or train without replicate."
                )
