"""What is noted of a run on ranks, whoever runs the loop."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from meshbolt.engine import Engine
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.engine.state import optimizer_state
from meshbolt.errors import ConfigError
from meshbolt.strategies import FabricMeshStrategy, MeshStrategy
from meshbolt.testing.parity.record import Record, whole


def watch_losses(stepping: Any, record: Record, *, rank: int) -> None:
    """Note every loss that a training_step returns.

    Args:
        stepping: has the method: a module, or the strategy that calls it.
        record: of this rank.
        rank: its place among those that see different samples.
    """
    method, count = stepping.training_step, len(record.losses)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        output = method(*args, **kwargs)
        if (loss := loss_of(output)) is not None:
            record.add_loss(loss, batch=count, rank=rank)
        count += 1
        return output

    stepping.__dict__["training_step"] = watched


def loss_of(output: Any) -> torch.Tensor | None:
    """Return the loss in what a training_step returned."""
    loss: torch.Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    return loss


def engine_of(strategy: Any) -> Engine:
    """Return the engine of a strategy.

    Raises:
        ConfigError: it is not one of meshbolt's.
    """
    if not isinstance(strategy, (MeshStrategy, FabricMeshStrategy)):
        raise ConfigError(f"{type(strategy).__name__} is not a MeshStrategy, and only that can be compared.")
    return strategy.engine


def note_start(record: Record, engine: Engine) -> None:
    """Note the parameters before the first step."""
    record.initial = {name: whole(parameter) for name, parameter in _held(engine).items()}


def _held(engine: Engine) -> dict[str, torch.Tensor]:
    """Return the parameters that this rank has, whole or in part: of a pipeline those of its stages."""
    return {name: parameter for name, parameter in engine.parameters_by_name.items() if not held_elsewhere(parameter)}


def note_end(record: Record, engine: Engine, optimizer: Optimizer) -> None:
    """Note all that is left after the last step."""
    engine.settle()
    names = {parameter: name for name, parameter in engine.parameters_by_name.items()}
    with engine.shown_state(optimizer):
        saved = optimizer_state(optimizer, names)
    record.parameters = {name: whole(parameter) for name, parameter in _held(engine).items()}
    record.add_optimizer(saved["state"], saved["param_groups"])
    record.add_buffers(engine.module.named_buffers(), rank=engine.plan.mesh.data_parallel_rank(dist.get_rank()))
    record.optimizer = type(optimizer).__name__
    record.zero = engine.plan.settings.zero
