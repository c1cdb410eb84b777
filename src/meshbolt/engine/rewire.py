"""Point an optimizer that was made on whole parameters at the shards that took their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt.engine.gathered import local_part
from meshbolt.errors import ConfigError


def names_by_parameter(module: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of every parameter; to be asked before a module is sharded."""
    return {parameter: name for name, parameter in module.named_parameters()}


def rewire_optimizer(
    optimizer: Optimizer, names: Mapping[nn.Parameter, str], sharded: Mapping[str, nn.Parameter]
) -> None:
    """Replace whole parameters by shards in an optimizer's groups and state; shards are left alone.

    Args:
        optimizer: made before or after sharding.
        names: by whole parameter, from before sharding.
        sharded: by name.

    Raises:
        ConfigError: the optimizer holds a parameter of neither kind.
    """
    known = {id(parameter) for parameter in sharded.values()}
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            if id(parameter) in known:
                continue
            if parameter not in names:
                raise ConfigError(
                    f"{type(optimizer).__name__} holds a parameter of shape {tuple(parameter.shape)} that is not in the module "
                    "it is set up with. Make the optimizer from that module's parameters."
                )
            shard = sharded[names[parameter]]
            group["params"][index] = shard
            if parameter in optimizer.state:
                state = optimizer.state.pop(parameter)
                optimizer.state[shard] = {key: _sharded_state(value, shard) for key, value in state.items()}


def _sharded_state(value: Any, shard: nn.Parameter) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(shard, DTensor) and value.shape == shard.shape:
        return local_part(value, like=shard).clone()
    return value
