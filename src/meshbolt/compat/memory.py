"""What FSDP2 holds of a unit beside its shards, and what a GPU's allocator knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from meshbolt.compat.units import groups_of


def gathered_tensors(unit: FSDPModule) -> Iterator[torch.Tensor]:
    """Yield what holds the unit's whole parameters, now or later: memory that is freed has a storage without bytes."""
    for group in groups_of(unit):
        for result in (group._all_gather_result, getattr(group.comm_ctx.all_gather_state, "all_gather_result", None)):
            if result is not None:
                yield result.all_gather_output
        for fsdp_param in group.fsdp_params:
            yield from fsdp_param.all_gather_outputs
            yield from fsdp_param._unsharded_inner_tensors


def cast_dtype(unit: FSDPModule) -> torch.dtype | None:
    """Return the dtype in which the unit's parameters are gathered; None: their own."""
    return unit._get_fsdp_state()._mp_policy.param_dtype


def whole_gradients(unit: FSDPModule) -> Iterator[tuple[torch.nn.Parameter | None, torch.Tensor]]:
    """Yield the unit's gradients that are not reduced yet, with their shards; None: they are on their way between ranks."""
    for group in groups_of(unit):
        context = group.comm_ctx
        # torch < 2.13 keeps a single one.
        states = getattr(context, "reduce_scatter_states", None) or [getattr(context, "reduce_scatter_state", None)]
        for state in states:
            if state is not None:
                yield None, state.reduce_scatter_input
        if group._partial_reduce_output is not None:
            yield None, group._partial_reduce_output
        for fsdp_param in group.fsdp_params:
            if fsdp_param.unsharded_accumulated_grad is not None:
                yield fsdp_param.sharded_param, fsdp_param.unsharded_accumulated_grad
            whole = getattr(fsdp_param, "_unsharded_param", None)
            if whole is not None and whole.grad is not None:
                yield fsdp_param.sharded_param, whole.grad


@dataclass(frozen=True)
class AllocatorFigures:
    """What torch's allocator of a GPU has.

    Attributes:
        allocated_bytes: in use by tensors.
        peak_bytes: the most of that since the peak was reset.
        reserved_bytes: taken from the GPU, in use or not.
        retries: how often it had to give everything back and ask again.
    """

    allocated_bytes: int
    peak_bytes: int
    reserved_bytes: int
    retries: int


def allocator_figures(device: torch.device) -> AllocatorFigures:
    """Return what a GPU's allocator has; the GPU is not waited for."""
    # The plain form of these numbers takes ten times as long.
    found: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(device)
    allocated, reserved = found["allocated_bytes"]["all"], found["reserved_bytes"]["all"]
    return AllocatorFigures(
        allocated_bytes=allocated["current"],
        peak_bytes=allocated["peak"],
        reserved_bytes=reserved["current"],
        retries=found["num_alloc_retries"],
    )


# By number of the GPU, the highest peaks that resets of this process have ended.
_peaks: dict[int, int] = {}


def reset_peak(device: torch.device) -> None:
    """Let the allocator's peak of a GPU begin anew, for `allocator_figures`; `peak_allocated` still knows it."""
    _peaks[_number(device)] = peak_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device) -> int:
    """Return the most that tensors of this process have taken on a GPU, whoever has had the peak begin anew by `reset_peak`."""
    return max(_peaks.get(_number(device), 0), allocator_figures(device).peak_bytes)


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def dump_allocator(path: Path) -> None:
    """Write what the allocators of all GPUs hold, block by block, in the form that https://pytorch.org/memory_viz shows."""
    torch.cuda.memory._dump_snapshot(str(path))
