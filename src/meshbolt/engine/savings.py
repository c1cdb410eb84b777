"""What other settings would save of a rank's memory, estimated from what it holds: advice for a run that has too little."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.optim import Optimizer

from meshbolt.compat import local_tensor
from meshbolt.config import Plan
from meshbolt.errors import UnsupportedError
from meshbolt.offload.rules import rule_of, settings_of
from meshbolt.offload.setting import CPU, NVME, Offload
from meshbolt.offload.stream import BUFFERS, CHUNK_BYTES

ADVISED = 3


@dataclass(frozen=True)
class Saving:
    """A setting, and what it would save.

    Attributes:
        setting: as it is written.
        num_bytes: less on the device, about.
        reason: what of it is no longer there.
    """

    setting: str
    num_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a rank holds in a step, in bytes of its device.

    Attributes:
        parameters: its parts.
        gradients: of them, after the backward pass.
        optimizer: state of the optimizers, made or to be made.
        activations: kept for the backward pass.
        units: whole parameters of each unit as they are gathered, without the root's.
        root: the root's, which stays gathered for the whole step.
        block_input: what goes into a block.
        window: batches of an optimizer step.
        samples: in a batch of this rank; None: not known.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    units: tuple[int, ...]
    root: int
    block_input: int
    window: int
    samples: int | None


def savings(plan: Plan, load: Load, *, most: int = ADVISED) -> list[Saving]:
    """Return the settings that would save most, the best first.

    Args:
        plan: what is run.
        load: what a rank of it holds.
        most: how many to return.
    """
    found = [saving for saving in _all(plan, load) if saving.num_bytes > 0]
    return sorted(found, key=lambda saving: -saving.num_bytes)[:most]


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return how much state optimizers will have for the parameters of this rank, once they have taken a step."""
    return sum(_state_bytes(optimizer) for optimizer in optimizers)


def _state_bytes(optimizer: Optimizer) -> int:
    rule, total = rule_of(optimizer), 0
    for group in optimizer.param_groups:
        try:
            columns = len(rule.columns(settings_of(optimizer, group)))
        except UnsupportedError:
            continue
        total += columns * sum(local_tensor(p).nbytes for p in group["params"] if p.requires_grad)
    return total


def _all(plan: Plan, load: Load) -> Iterator[Saving]:
    yield from _by_stage(plan, load)
    yield from _by_recomputing(plan, load)
    yield from _by_offloading(plan, load)
    if load.samples is None or load.samples > 1:
        yield Saving(
            f"half as many samples in a batch, with accumulate_grad_batches={2 * load.window}",
            load.activations // 2,
            "half of the activations",
        )


def _by_stage(plan: Plan, load: Load) -> Iterator[Saving]:
    ranks = plan.mesh.data_parallel_size if not plan.stage.shards else plan.mesh.dp_shard
    if ranks == 1:
        return
    if not plan.stage.shards:
        whole = load.parameters + load.gradients + load.optimizer
        saved = whole * (ranks - 1) // ranks
        yield Saving("zero=1", saved, f"parameters, gradients and state are shared by {ranks} ranks")
        return
    whole = load.root + sum(load.units)
    in_window = 0 if plan.stage.reduces_every_batch or load.window == 1 else whole - load.gradients
    if in_window:
        yield Saving("zero=2", in_window, "gradients of a window are shards, and no longer whole")
    if not plan.stage.reshards_after_forward:
        # The unit that computes, and the one that is gathered for it.
        kept = load.root + sum(sorted(load.units, reverse=True)[:2])
        yield Saving("zero=3", whole - kept + in_window, "units are gathered one after the other")


def _by_recomputing(plan: Plan, load: Load) -> Iterator[Saving]:
    blocks = len(load.units)
    if plan.settings.recompute.mode != "none" or blocks < 2:
        return
    kept = blocks * load.block_input + load.activations // blocks
    yield Saving("recompute='full'", load.activations - kept, f"{blocks} blocks keep their inputs only")


def _by_offloading(plan: Plan, load: Load) -> Iterator[Saving]:
    setting, on_gpu = plan.settings.offload, plan.device_type == "cuda"
    if setting.optimizer == NVME:
        if setting.fraction != 1.0:
            yield Saving(f"offload={_written(setting)}", load.optimizer, "all of the optimizers' state lies in files")
    elif on_gpu and (setting.optimizer is None or setting.fraction != 1.0):
        whole = dataclasses.replace(setting, optimizer=CPU, fraction=1.0)
        yield Saving(f"offload={_written(whole)}", load.optimizer, "the optimizers' state lies in host memory")
    elif not on_gpu:
        buffers = min(BUFFERS * CHUNK_BYTES, load.optimizer)
        yield Saving(
            "offload=Offload('nvme', path=...)", load.optimizer - buffers, "the optimizers' state lies in files"
        )


def _written(setting: Offload) -> str:
    if setting.optimizer == CPU:
        return repr(CPU)
    return f"Offload({NVME!r}, path={str(setting.path)!r})"
