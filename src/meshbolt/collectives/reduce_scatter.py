"""Reduce-scatter as a deferred all-to-all.

gloo's reduce-scatter moves the bytes of an all-reduce, twice what is needed, and waits for the slowest rank at every unit. An
all-to-all moves each gradient once to its owner, who sums; and since nobody reads the sum before the backward is over, the
wait moves there too, behind the computation of the units that follow.

Deferring is right only while torch merely takes views of the output (see `compat.gradients_land_in_place`). Where a unit's
gradients already exist, inside a window, they are set aside before the backward and added after it, so that this still holds.
What is in flight is bounded in bytes: beyond the bound the oldest transfer is finished first, and a unit larger than the bound
is never deferred, so that memory stays that of torch's own path where it matters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from meshbolt import compat
from meshbolt.compat import ReduceScatter, local_tensor
from meshbolt.units import MIB

IN_FLIGHT_BYTES = 16 * MIB


def usable_fast_path(*, device_type: str, backend: str, shards: bool) -> bool:
    """Return whether the fast path is proved for this kind of run: gloo on a CPU, with sharded state."""
    return device_type == "cpu" and backend == "gloo" and shards


@dataclass
class _Transfer:
    """One unit's gradients on their way to their owners."""

    work: dist.Work
    versions: Sequence[torch.Tensor]  # (chunk,) each: every rank's version of this rank's chunk
    sent: torch.Tensor  # (ranks * chunk,), kept alive until the transfer is done
    output: torch.Tensor  # (chunk,)
    divisor: int | None

    @property
    def num_bytes(self) -> int:
        """The bytes that one side of the transfer holds."""
        return self.sent.numel() * self.sent.element_size()

    def finish(self) -> None:
        """Wait for the transfer and sum what arrived into the output."""
        self.work.wait()
        first, second, *others = self.versions
        torch.add(first, second, out=self.output)
        for other in others:
            self.output.add_(other)
        if self.divisor is not None:
            # As gloo does it: times 1/3 is not a third, and the difference would show in 16 bits.
            self.output.div_(self.divisor)


class DeferredReductions:
    """The reductions of all units: launched in backward, finished by its end."""

    def __init__(self, units: Sequence[FSDPModule]) -> None:
        self._units = list(units)
        self._in_flight: deque[_Transfer] = deque()
        self._in_flight_bytes = 0
        self._set_aside: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._small = [unit for unit in self._units if compat.gathered_bytes(unit) <= IN_FLIGHT_BYTES]
        for unit in self._units:
            unit.set_custom_reduce_scatter(_AllToAllReduceScatter(unit, self))

    def before_backward(self) -> None:
        """Set gradients of earlier batches of the window aside, so that this batch's can be deferred as well."""
        for unit in self._small:
            parameters = compat.managed_parameters(unit)
            if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
                continue
            for parameter in parameters:
                if parameter.grad is not None:
                    self._set_aside.append((parameter, parameter.grad))
                    parameter.grad = None

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add what was set aside to the new gradients; after it, gradients are as torch's own path leaves them."""
        self._finish_all()
        older, newer = [], []
        for parameter, gradient in self._set_aside:
            if parameter.grad is not None:
                older.append(local_tensor(gradient))
                newer.append(local_tensor(parameter.grad))
            parameter.grad = gradient
        if older:
            torch._foreach_add_(older, newer)
        self._set_aside.clear()

    def reset(self) -> None:
        """Forget what an exception in backward left behind; gradients of the earlier batches come back."""
        for transfer in self._in_flight:
            transfer.work.wait()
        self._in_flight.clear()
        self._in_flight_bytes = 0
        for parameter, gradient in self._set_aside:
            parameter.grad = gradient
        self._set_aside.clear()

    def launch(self, transfer: _Transfer, *, defer: bool) -> None:
        """Take over a transfer that was started; finish it now unless it may be deferred."""
        if not defer or transfer.num_bytes > IN_FLIGHT_BYTES:
            transfer.finish()
            return
        if not self._in_flight:
            compat.queue_after_backward(self._finish_all)
        self._in_flight.append(transfer)
        self._in_flight_bytes += transfer.num_bytes
        while self._in_flight_bytes > IN_FLIGHT_BYTES:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        transfer = self._in_flight.popleft()
        self._in_flight_bytes -= transfer.num_bytes
        transfer.finish()

    def _finish_all(self) -> None:
        while self._in_flight:
            self._finish_oldest()


class _AllToAllReduceScatter(ReduceScatter):
    """torch's reduce-scatter interface for one unit."""

    def __init__(self, unit: FSDPModule, reductions: DeferredReductions) -> None:
        self._unit = unit
        self._reductions = reductions

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a buffer for the input or the output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        exchange = _swap if group.size() == 2 else _exchange
        work, versions = exchange(input_tensor.view(group.size(), -1), group)
        divisor = group.size() if op == dist.ReduceOp.AVG else None
        transfer = _Transfer(work, versions, input_tensor, output_tensor, divisor)
        self._reductions.launch(transfer, defer=compat.gradients_land_in_place(self._unit, output_tensor.dtype))


def _exchange(chunks: torch.Tensor, group: dist.ProcessGroup) -> tuple[dist.Work, Sequence[torch.Tensor]]:
    """Send every rank its chunk; return what to wait for, and all versions of this rank's chunk in the order of ranks.

    Args:
        chunks: (ranks, chunk), this rank's version of each rank's chunk.
        group: the ranks.
    """
    received = torch.empty_like(chunks)
    work = dist.all_to_all_single(received, chunks, group=group, async_op=True)
    return work, received.unbind()


def _swap(chunks: torch.Tensor, group: dist.ProcessGroup) -> tuple[dist.Work, Sequence[torch.Tensor]]:
    """Do the same for two ranks, where the own chunk can stay where it is: half the memory, and a copy less."""
    own, other = (chunks[group.rank()], chunks[1 - group.rank()])
    received = torch.empty_like(own)
    splits = [0, 0]
    splits[1 - group.rank()] = own.numel()
    work = dist.all_to_all_single(received, other, splits, splits, group=group, async_op=True)
    return work, (own, received) if group.rank() == 0 else (received, own)
