"""Many data-parallel ranks played by one process, without sharding and without communication.

Each simulated rank has what a real one has of its own: copies of the parameters in the dtype they are used in, buffers,
and the state of the random generators. What real ranks do together is written out in `SimulatedRanks.reduce`: a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meshbolt.engine.random_state import collect_random_state, restore_random_state

Copies = dict[nn.Parameter, nn.Parameter]
UsedDtypes = Callable[[nn.Parameter], torch.dtype]
_CPU = torch.device("cpu")


class _Rank:
    """What one rank has of its own."""

    def __init__(self, buffers: Mapping[tuple[nn.Module, str], torch.Tensor | None], random: dict[str, Any]) -> None:
        self.buffers = {slot: None if buffer is None else buffer.clone() for slot, buffer in buffers.items()}
        self.random = random
        self.copies: Copies = {}
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}  # of the window so far


class SimulatedRanks:
    """The ranks of one module."""

    def __init__(
        self,
        module: nn.Module,
        *,
        ranks: int,
        seed: Callable[[int], object],
        used_dtype: UsedDtypes,
        sharded: set[nn.Parameter],
    ) -> None:
        """Take a module as it is before its first batch.

        Args:
            module: whole, on the CPU; its parameters are what the optimizer updates.
            ranks: how many to play.
            seed: starts the random generators of the rank it is given.
            used_dtype: of a parameter in forward and backward.
            sharded: parameters whose gradients are summed in at least float32 within a window; others' are summed in
                the dtype they come in, as autograd does it.
        """
        self._module, self._used_dtype, self._sharded = module, used_dtype, sharded
        self._slots = [
            (child, name, parameter)
            for child in module.modules()
            for name, parameter in child.named_parameters(recurse=False)
        ]
        buffers = {(child, name): buffer for child in module.modules() for name, buffer in child._buffers.items()}
        self._ranks = []
        for rank in range(ranks):
            seed(rank)
            self._ranks.append(_Rank(buffers, collect_random_state(_CPU)))

    def new_batch(self) -> None:
        """Give every rank fresh copies of the parameters, rounded to the dtype they are used in."""
        parameters = {parameter for _, _, parameter in self._slots}
        for one in self._ranks:
            one.copies = {p: self._copy(p) for p in parameters}

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        rounded = parameter.detach().to(self._used_dtype(parameter), copy=True)
        return nn.Parameter(rounded, requires_grad=parameter.requires_grad)

    @contextmanager
    def playing(self, rank: int) -> Iterator[None]:
        """Let the module be that of one rank."""
        one = self._ranks[rank]
        restore_random_state(one.random, _CPU)
        for (child, name), buffer in one.buffers.items():
            child._buffers[name] = buffer
        for child, name, parameter in self._slots:
            setattr(child, name, one.copies[parameter])
        try:
            yield
        finally:
            for child, name, parameter in self._slots:
                setattr(child, name, parameter)
            one.buffers = {(child, name): child._buffers[name] for child, name in one.buffers}
            one.random = collect_random_state(_CPU)

    def buffers(self, rank: int) -> list[tuple[str, torch.Tensor]]:
        """Return the buffers of one rank."""
        with self.playing(rank):
            return list(self._module.named_buffers())

    def reduce(self, *, last: bool, rounded: bool) -> None:
        """Turn the ranks' gradients of one batch into gradients of the parameters, in the window's way.

        Args:
            last: the batch is the window's last.
            rounded: each batch's mean over the ranks is rounded to the parameter's dtype and added up in that; else every
                rank adds up its own gradients, and the mean is taken at the window's end.
        """
        for parameter in {parameter for _, _, parameter in self._slots}:
            at_once = rounded and parameter in self._sharded
            for one in self._ranks:
                self._accumulate(one, parameter)
            if not (at_once or last):
                continue
            held = [one.gradients.pop(parameter, None) for one in self._ranks]
            if (mean := _mean(held)) is None:
                continue
            mean = mean.to(parameter.dtype)
            parameter.grad = mean if parameter.grad is None else parameter.grad + mean

    def _accumulate(self, one: _Rank, parameter: nn.Parameter) -> None:
        gradient = one.copies[parameter].grad
        if gradient is None:
            return
        wide = _wide(gradient.dtype) if parameter in self._sharded else gradient.dtype
        before = one.gradients.get(parameter)
        one.gradients[parameter] = gradient.to(wide) if before is None else before + gradient.to(wide)


def _mean(gradients: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the mean over ranks, in float32 or wider; a rank without a gradient counts as zero, all of them as none."""
    given = [gradient for gradient in gradients if gradient is not None]
    if not given:
        return None
    total = torch.zeros_like(given[0], dtype=_wide(given[0].dtype))
    for gradient in given:
        total = total + gradient
    return total / len(gradients)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
