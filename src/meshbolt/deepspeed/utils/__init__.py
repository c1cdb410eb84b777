"""`deepspeed.utils`: a logger, loaders that repeat, and single parameters with their gradient and state, whole."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.deepspeed.accelerator import get_accelerator
from meshbolt.deepspeed.data import RepeatingLoader
from meshbolt.deepspeed.engine import engine_of
from meshbolt.deepspeed.utils.logging import log_dist, logger
from meshbolt.deepspeed.zero import GatheredParameters
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.units import format_bytes

__all__ = [
    "RepeatingLoader",
    "log_dist",
    "logger",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "see_memory_usage",
    "set_random_seed",
    "set_z3_leaf_modules",
]


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log how much memory this rank uses, on rank 0, where it is asked for.

    Args:
        message: what to say before it.
        force: False does nothing.
    """
    if force and (not dist.is_initialized() or dist.get_rank() == 0):
        accelerator = get_accelerator()
        now, peak = accelerator.memory_allocated(), accelerator.max_memory_allocated()
        logger.info("%s: %s now, %s at most", message, format_bytes(now), format_bytes(peak))


def set_random_seed(seed: int) -> None:
    """Seed Python's and torch's generators on this rank."""
    random.seed(seed)
    torch.manual_seed(seed)


def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """Return a copy of the whole parameter as it is kept, in float32; a collective of all ranks.

    Args:
        param: of a module that `initialize` has sharded; of others None.
    """
    if engine_of([param]) is None:
        return None
    with GatheredParameters([param]):
        return param.detach().float().clone()


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Set the whole parameter; a collective of all ranks.

    Args:
        param: of a module that `initialize` has sharded.
        value: of its shape; rank 0's counts.

    Raises:
        ConfigError: the shape is another one, or the parameter is of no engine.
    """
    if engine_of([param]) is None or param.shape != value.shape:
        raise ConfigError(
            f"safe_set_full_fp32_param was given a parameter of shape {tuple(param.shape)} and a value of shape "
            f"{tuple(value.shape)}. Give a parameter of the engine's module, and a value of its shape."
        )
    with GatheredParameters([param], modifier_rank=0), torch.no_grad():
        param.copy_(value)


def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """Return the whole gradient of a parameter, of all ranks, before `engine.step()` drops it; a collective of all ranks.

    Args:
        param: of a module that `initialize` has sharded; None where it has no gradient.
    """
    engine = engine_of([param])
    gradient = param.grad if engine is None else engine.shard_of(param).grad
    if gradient is None:
        return None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """Return one of the optimizer's states of a parameter, whole; a collective of all ranks.

    Args:
        param: that the engine's optimizer trains; None where it has no such state yet.
        optim_state_key: such as "exp_avg".
    """
    engine = engine_of([param])
    if engine is None or engine.optimizer is None:
        return None
    name = engine.names_by_id()[id(param)]
    with engine.fabric.strategy.gathered([engine.module.get_parameter(name)], optimizer=engine.optimizer) as state:  # type: ignore[attr-defined]
        found = state.get(name, {}).get(optim_state_key)
        return None if found is None else found.detach().clone()


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[Any]) -> NoReturn:
    """Refuse: which modules are gathered together is said in the JSON.

    Raises:
        UnsupportedError: always.
    """
    names = [each if isinstance(each, str) else each.__name__ for each in leaf_module_classes]
    raise UnsupportedError(
        f"set_z3_leaf_modules({names}): say it in the JSON, before the model is sharded: "
        f'"zero_optimization": {{"leaf_module": {{"classes": {names}}}}}.'
    )
