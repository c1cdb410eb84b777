"""What a checkpoint holds of a module and an optimizer, by name.

Names are those of the user's module, never of a unit or a wrapper, and optimizer state is keyed by the parameter's name, so
that any layout can read what any other wrote. `placeholders.py` has what is different where ranks hold different parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt.compat import StoredTensor, local_tensor
from meshbolt.engine.gathered import as_sharded, local_part
from meshbolt.engine.optimizer import ELEMENTWISE
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.errors import CheckpointError

AVERAGE = "exponential_moving_average"
"""The entry of a checkpoint that holds a moving average of the weights: under "weights", by name."""

ONLY_WEIGHTS = (
    "load only the weights (in a Trainer by MeshStrategy(checkpoint=Checkpoint(load_weights_only=True)), in Fabric without the "
    "optimizer in what is loaded into)"
)
"""What to do, in an error's message, where weights fit and other state does not."""

_SHOWN = 3

# Settings of torch's optimizers that their first versions did not have.
_LATER_SETTINGS = frozenset({"capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"})


def optimizer_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """Return an optimizer's state keyed by parameter name; tensors of a parameter's layout are DTensors.

    A fresh optimizer has no state, and gets none: no step is faked. What it keeps for parameters that another stage holds is
    left out; `states_of_all_stages` adds what those ranks have for them.

    Args:
        optimizer: made on the sharded parameters.
        names: of all parameters of the module.
    """
    state = {}
    for parameter, values in cast("Mapping[nn.Parameter, dict[str, Any]]", optimizer.state).items():
        if held_elsewhere(parameter):
            continue
        state[names[parameter]] = {key: _saved(value, parameter) for key, value in values.items()}
    groups = []
    for group in optimizer.param_groups:
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
    return {"state": state, "param_groups": groups, "class": type(optimizer).__name__}


def keys_of_average(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return parameters by the keys under which a checkpoint has their moving average.

    Args:
        parameters: by name.
    """
    return {f"{AVERAGE}.weights.{name}": parameter for name, parameter in parameters.items()}


def trained_state(
    state: Mapping[str, Any],
    module: nn.Module,
    optimizers: Iterable[Optimizer],
    *,
    stages: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Return a module's state without the parameters that nobody trains, and the names of those.

    A parameter that some optimizer keeps state for has been trained, and stays, frozen or not; so do all buffers.

    Args:
        state: the module's state dict.
        module: sharded, with nothing gathered.
        optimizers: of this module.
        stages: the ranks that hold the parameters between them, which all call this; None where this one holds all.
    """
    trained = {parameter for optimizer in optimizers for parameter in optimizer.state if not held_elsewhere(parameter)}
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and parameter not in trained
    }
    if stages is not None:
        # Whether a parameter was trained, those know who hold it.
        each: list[set[str]] = [set()] * stages.size()
        dist.all_gather_object(each, frozen, group=stages)
        frozen = set.intersection(*each)
    return {name: value for name, value in state.items() if name not in frozen}, sorted(frozen & set(state))


def check_optimizer_state(
    optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[nn.Parameter, str], *, regrouped: bool = False
) -> None:
    """Compare saved optimizer state with an optimizer: its class, and its groups of parameters.

    Args:
        optimizer: made on the sharded parameters.
        saved: as `optimizer_state` returned it, or as the optimizer's own `state_dict` did, by number; its tensors are
            not looked at.
        names: of all parameters of the module.
        regrouped: the optimizer takes its groups from the checkpoint too, before it is loaded.

    Raises:
        CheckpointError: they differ; groups by name may have their parameters in another order, and lack those that are frozen.
    """
    _check_class(optimizer, saved)
    ours = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    theirs = [list(group["params"]) for group in saved["param_groups"]]
    if regrouped:
        ours = [[name for name in group if name in set(names.values())] for group in theirs]
    by_number = _is_by_number(saved)
    if not (_same_lengths(ours, theirs) if by_number else _same_names(ours, theirs, frozen=_frozen(optimizer, names))):
        difference = (
            _frozen_in(ours, theirs, optimizer, names)
            if by_number
            else _first_difference(ours, theirs, _frozen(optimizer, names))
        )
        raise CheckpointError(
            f"The checkpoint's {type(optimizer).__name__} has parameter groups of {[len(g) for g in theirs]} parameters, this "
            f"run's has {[len(g) for g in ours]}{difference}. Make the optimizer as it was made when the checkpoint was "
            f"written, or {ONLY_WEIGHTS}."
        )
    if strangers := sorted(set(saved["state"]) - {key for group in theirs for key in group}):
        raise CheckpointError(
            f"The checkpoint's {type(optimizer).__name__} has state for {strangers[:_SHOWN]}, which are in none of its parameter "
            f"groups: the checkpoint is damaged. You can {ONLY_WEIGHTS}."
        )
    if not regrouped and type(optimizer) in ELEMENTWISE:
        _check_shapes(optimizer, saved, names)


def load_optimizer_state(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    names: Mapping[nn.Parameter, str],
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: torch.device | None = None,
    moves: bool = False,
) -> None:
    """Give an optimizer the state that `optimizer_state` returned, here or on another layout.

    Args:
        optimizer: made on the sharded parameters.
        saved: its tensors are in the layout of this run's parameters, or whole; by name, or by number. What belongs to
            parameters that another stage holds is not looked at.
        names: of all parameters of the module.
        dtypes: of the saved parameters, by name. State in the dtype of its parameter then follows the parameter into
            this run's dtype; other state keeps its own.
        device: where state goes; None: to its parameter.
        moves: it is copied from there to another place next, so that tensors are the saved ones where they can be: nothing is
            read yet of those whose values are not in memory.

    Raises:
        CheckpointError: the class or the groups of parameters differ; the optimizer is as it was.
    """
    check_optimizer_state(optimizer, saved, names)
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        counts_on_device = bool(other.get("fused") or other.get("capturable"))
        for parameter, key in _keys_of(group, other, names):
            if key in saved["state"] and not held_elsewhere(parameter):
                place = _Place(
                    parameter=parameter,
                    saved_dtype=(dtypes or {}).get(names[parameter]),
                    counts_on_device=counts_on_device,
                    as_plain=type(optimizer) in ELEMENTWISE,
                    device=device or local_tensor(parameter).device,
                    stays_stored=moves,
                )
                state[parameter] = {name: place.take(name, value) for name, value in saved["state"][key].items()}
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in other.items() if key != "params"})
    optimizer.state.clear()
    optimizer.state.update(cast("dict[torch.Tensor, Any]", state))
    # What torch has added to groups and state since the checkpoint was written gets its default.
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def empty_like_saved(key_shape: torch.Size, dtype: torch.dtype, parameter: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor for a saved one to be read into: sharded like its parameter where it has the parameter's shape.

    Args:
        key_shape: whole shape of the saved tensor.
        dtype: of the saved tensor.
        parameter: the parameter that is saved, or that the state belongs to, if any; for one that another stage holds, a
            placeholder is returned, into which nothing can be read.
    """
    if parameter is not None and held_elsewhere(parameter):
        return torch.empty(key_shape, dtype=dtype, device="meta")
    if isinstance(parameter, DTensor) and parameter.shape == key_shape and key_shape != torch.Size([]):
        local = torch.empty_like(local_tensor(parameter), dtype=dtype)
        return as_sharded(local, like=parameter)
    device = parameter.device if parameter is not None and key_shape == parameter.shape and parameter.dim() else "cpu"
    return torch.empty(key_shape, dtype=dtype, device=device)


def _saved(value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(parameter, DTensor):
        return as_sharded(value, like=parameter)
    return value


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where saved state of one parameter goes.

    Attributes:
        parameter: this run's.
        saved_dtype: of the parameter when it was saved, if known.
        counts_on_device: step counts lie where the parameter does, as fused kernels need it.
        as_plain: the optimizer runs on plain shards, not on DTensors.
        device: where the state goes.
        stays_stored: nothing is copied, since the values are soon copied to where they are kept.
    """

    parameter: nn.Parameter
    saved_dtype: torch.dtype | None
    counts_on_device: bool
    as_plain: bool
    device: torch.device
    stays_stored: bool

    def take(self, key: str, value: Any) -> Any:
        """Return a saved value as the optimizer keeps it."""
        parameter = self.parameter
        if not isinstance(value, torch.Tensor):
            return value
        device = self.device
        if key == "step":
            return local_tensor(value).to(local_tensor(parameter).device if self.counts_on_device else "cpu", copy=True)
        dtype = parameter.dtype if (value.shape, value.dtype) == (parameter.shape, self.saved_dtype) else value.dtype
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            local = local_tensor(value)
            if isinstance(local, StoredTensor) and self.stays_stored:
                return local.as_dtype(dtype)
            return local.to(device, dtype, copy=not self.stays_stored)
        # A whole one may lie in a file: only this rank's part of it is read.
        own = local_tensor(value) if isinstance(value, DTensor) else local_part(value, like=parameter)
        if isinstance(own, StoredTensor) and self.stays_stored:
            own = own.as_dtype(dtype)
        else:
            is_shared = not (isinstance(value, DTensor) or self.stays_stored)
            own = own.to(device, dtype, copy=is_shared).contiguous()
        return own if self.as_plain else as_sharded(own, like=parameter)


def _keys_of(
    group: Mapping[str, Any], saved: Mapping[str, Any], names: Mapping[nn.Parameter, str]
) -> Iterable[tuple[nn.Parameter, Any]]:
    """Return the parameters of a group, each with the key of its saved state: its name, or its number."""
    if all(isinstance(key, str) for key in saved["params"]):
        return [(parameter, names[parameter]) for parameter in group["params"]]
    return zip(group["params"], saved["params"], strict=True)


def _same_lengths(ours: list[list[str]], theirs: list[list[Any]]) -> bool:
    return [len(group) for group in ours] == [len(group) for group in theirs]


def _same_names(ours: list[list[str]], theirs: list[list[str]], *, frozen: set[str]) -> bool:
    """Return whether groups have the same parameters, in any order; those that are not trained may be left out of saved ones."""
    return len(ours) == len(theirs) and all(
        set(mine) - set(their) <= frozen and set(their) <= set(mine) for mine, their in zip(ours, theirs, strict=True)
    )


def _frozen(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> set[str]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {names[parameter] for parameter in parameters if not parameter.requires_grad}


def _is_by_number(saved: Mapping[str, Any]) -> bool:
    return any(not isinstance(key, str) for group in saved["param_groups"] for key in group["params"])


def _check_class(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    own = type(optimizer).__name__
    if "class" in saved:
        differs, theirs = saved["class"] != own, saved["class"]
    else:
        # The optimizer's own form does not say the class, but its settings do.
        group = saved["param_groups"][0]
        if set(group) == {"params"}:
            return  # DeepSpeed's elastic saves have no settings at all
        lacking = sorted(set(optimizer.defaults) - set(group) - _LATER_SETTINGS)
        decoupled = [settings.get("decoupled_weight_decay", False) for settings in (optimizer.defaults, group)]
        differs = bool(lacking) or ("decoupled_weight_decay" in group and decoupled[0] != decoupled[1])
        theirs = f"an optimizer with the settings {sorted(set(group) - {'params'})}"
    if differs:
        raise CheckpointError(
            f"The checkpoint has the state of {theirs}, and this run's optimizer is {own}. Use the optimizer that the "
            f"checkpoint was written with, or {ONLY_WEIGHTS}."
        )


def _check_shapes(optimizer: Optimizer, saved: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> None:
    """Check that state has the shape of its parameter, or none."""
    wrong = []
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, key in _keys_of(group, other, names):
            shapes = [tuple(getattr(value, "shape", ())) for value in saved["state"].get(key, {}).values()]
            wrong += [f"{names[parameter]} {shape}" for shape in shapes if shape not in ((), tuple(parameter.shape))]
    if wrong:
        raise CheckpointError(
            f"The checkpoint's {type(optimizer).__name__} has state of other shapes than this run's parameters: "
            f"{wrong[:_SHOWN]}. {_by_order(saved)}Build the module in its old sizes, or {ONLY_WEIGHTS}."
        )


def _by_order(saved: Mapping[str, Any]) -> str:
    if not _is_by_number(saved):
        return ""
    return "The checkpoint has numbers for parameters, no names: groups and parameters must be in the order that they had. "


def _first_difference(ours: list[list[str]], theirs: list[list[str]], frozen: set[str]) -> str:
    other = {n for g in theirs for n in g}
    ours = [[name for name in group if name in other or name not in frozen] for group in ours]
    mine = {n for g in ours for n in g}
    extra, missing = sorted(mine - other)[:_SHOWN], sorted(other - mine)[:_SHOWN]
    if extra or missing:
        return f" (only here: {extra}; only there: {missing})"
    # A scheduler's state has its rates in the order of the groups: they are not put in another one behind its back.
    places = {name: number for number, group in enumerate(theirs) for name in group}
    order = [{places[name] for name in group} for group in ours]
    if len(ours) == len(theirs) and all(len(each) == 1 for each in order):
        return (
            f" (the same groups, in another order: those of this run are number {[min(each) for each in order]} there)"
        )
    moved = next(iter(_moved(ours, theirs)), "")
    return f" (divided among the groups in another way{moved})"


def _moved(ours: list[list[str]], theirs: list[list[str]]) -> Iterable[str]:
    here, there = ({name: number for number, g in enumerate(each) for name in g} for each in (ours, theirs))
    return (
        f": {name!r} is in group {here[name]} here and {there[name]} there"
        for name in here
        if here[name] != there[name]
    )


def _frozen_in(
    ours: list[list[str]], theirs: list[list[Any]], optimizer: Optimizer, names: Mapping[nn.Parameter, str]
) -> str:
    """Return what is said where groups of names and of numbers would be as long as each other without frozen parameters."""
    frozen = _frozen(optimizer, names)
    if not frozen or not _same_lengths([[name for name in group if name not in frozen] for group in ours], theirs):
        return ""
    return (
        f" (the checkpoint has numbers for parameters, no names, and none for frozen ones: give the optimizer only parameters "
        f"that are trained, without {sorted(frozen)[:_SHOWN]})"
    )
