"""What a checkpoint holds of an optimizer, by name.

Names are those of the user's module, never of a unit or a wrapper, and optimizer state is keyed by the parameter's name, so
that any layout can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt.compat import local_tensor
from meshbolt.engine.gathered import as_sharded
from meshbolt.errors import CheckpointError


def optimizer_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Return an optimizer's state keyed by parameter name; tensors of a parameter's layout are DTensors.

    A fresh optimizer has no state, and gets none: no step is faked.

    Args:
        optimizer: made on the sharded parameters.
        names: of all parameters of the module.
    """
    state = {}
    for parameter, values in cast("Mapping[nn.Parameter, dict[str, Any]]", optimizer.state).items():
        state[names[parameter]] = {key: _saved(value, parameter) for key, value in values.items()}
    groups = []
    for group in optimizer.param_groups:
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
    return {"state": state, "param_groups": groups}


def load_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> None:
    """Give an optimizer the state that `optimizer_state` returned, here or on another layout.

    Args:
        optimizer: made on the sharded parameters.
        saved: its tensors are in the layout of this run's parameters.
        names: of all parameters of the module.

    Raises:
        CheckpointError: the groups of parameters differ.
    """
    ours = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    theirs = [list(group["params"]) for group in saved["param_groups"]]
    if ours != theirs:
        raise CheckpointError(
            f"The checkpoint's {type(optimizer).__name__} has parameter groups of {[len(g) for g in theirs]} parameters, this "
            f"run's has {[len(g) for g in ours]}{_first_difference(ours, theirs)}. Make the optimizer as it was made when the "
            "checkpoint was written, or load only the weights."
        )
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in other.items() if key != "params"})
    parameters = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for name, values in saved["state"].items():
        optimizer.state[parameters[name]] = {
            key: local_tensor(value) if isinstance(value, torch.Tensor) else value for key, value in values.items()
        }


def empty_like_saved(key_shape: torch.Size, dtype: torch.dtype, parameter: nn.Parameter | None) -> torch.Tensor:
    """Return a tensor for a saved one to be read into: sharded like its parameter where it has the parameter's shape.

    Args:
        key_shape: whole shape of the saved tensor.
        dtype: of the saved tensor.
        parameter: the parameter that the state belongs to, if any.
    """
    if isinstance(parameter, DTensor) and parameter.shape == key_shape and key_shape != torch.Size([]):
        local = torch.empty_like(local_tensor(parameter), dtype=dtype)
        return as_sharded(local, like=parameter)
    device = parameter.device if parameter is not None and key_shape == parameter.shape and parameter.dim() else "cpu"
    return torch.empty(key_shape, dtype=dtype, device=device)


def _saved(value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(parameter, DTensor):
        return as_sharded(value, like=parameter)
    return value


def _first_difference(ours: list[list[str]], theirs: list[list[str]]) -> str:
    mine, other = {n for g in ours for n in g}, {n for g in theirs for n in g}
    extra, missing = sorted(mine - other)[:3], sorted(other - mine)[:3]
    return f" (only here: {extra}; only there: {missing})" if extra or missing else ""
