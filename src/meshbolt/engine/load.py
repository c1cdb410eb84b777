"""Read whole or sharded tensors into the sharded module, whatever layout they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import distributed_tensor, local_tensor
from meshbolt.engine.gathered import local_part
from meshbolt.errors import CheckpointError, UnsupportedError


def check_names(live: Mapping[str, Any], saved: Mapping[str, Any] | set[str], *, strict: bool, source: str) -> None:
    """Compare the names of a checkpoint's weights with the module's.

    Args:
        live: the module's state dict.
        saved: names in the checkpoint.
        strict: refuse any difference.
        source: where the weights come from, for the message.

    Raises:
        CheckpointError: the names differ; lists them.
    """
    missing, unexpected = sorted(set(live) - set(saved)), sorted(set(saved) - set(live))
    if strict and (missing or unexpected):
        raise CheckpointError(
            f"The weights in {source} do not fit this module. Missing there: {_some(missing)}. Unknown here: "
            f"{_some(unexpected)}. Build the module as it was when they were saved, or load what fits with "
            "strict_loading=False on the LightningModule (strict=False in Fabric)."
        )


@torch.no_grad()
def load_model(module: nn.Module, state: Mapping[str, Any], *, strict: bool, source: str) -> None:
    """Copy a state dict of whole tensors, or of this module's own shards, into the sharded module.

    Args:
        module: sharded, with nothing gathered.
        state: by name; tensors that are the module's own already are left alone.
        strict: refuse missing and unknown names.
        source: for messages.

    Raises:
        CheckpointError: names or shapes differ.
    """
    live = module.state_dict()
    check_names(live, state, strict=strict, source=source)
    both = {name: (live[name], state[name]) for name in live if name in state}
    tensors = {name: pair for name, pair in both.items() if isinstance(pair[0], torch.Tensor)}
    wrong = [f"{n} is {tuple(v.shape)}, here {tuple(t.shape)}" for n, (t, v) in tensors.items() if t.shape != v.shape]
    if wrong:
        raise CheckpointError(
            f"The weights in {source} have other shapes: {_some(wrong)}. Build the module in its old sizes."
        )
    for target, value in tensors.values():
        if target is not value and not _share_storage(target, value):
            local_tensor(target).copy_(_own_part(target, value))


def follow_state_dicts(module: nn.Module, *, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Let `state_dict` and `load_state_dict`, of the module and of every part of it, work on shards at any time.

    Args:
        module: sharded, with nothing gathered, before its first forward.
        before: called before anything is read or written; leaves nothing gathered.
        after: called after it.
    """
    for child in module.modules():
        if not any(isinstance(parameter, DTensor) for parameter in child._parameters.values()):
            continue
        child.register_state_dict_pre_hook(lambda *_: before())
        child.register_state_dict_post_hook(lambda *_: after())
        child.register_load_state_dict_pre_hook(lambda *args: _divide(*args[:4], before=before))
        child.register_load_state_dict_post_hook(lambda *_: after())


def _divide(
    child: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *, before: Callable[[], None]
) -> None:
    """Put this rank's part in the place of every whole tensor that is to be loaded into one of the child's shards."""
    if metadata.get("assign_to_params_buffers", False):
        raise UnsupportedError(
            f"load_state_dict(assign=True) would put its tensors in the place of the shards of {type(child).__name__}, which "
            "would not be used. Leave assign out: the values are copied into the shards."
        )
    before()
    for key, parameter in child._parameters.items():
        value = state.get(prefix + key)
        is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
        # torch itself says which values are of another shape.
        if isinstance(parameter, DTensor) and is_whole and value.shape == parameter.shape:
            part = local_part(value.detach(), like=parameter).to(local_tensor(parameter).device)
            state[prefix + key] = distributed_tensor(part, like=parameter, placements=parameter.placements)


def _own_part(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, DTensor):
        return local_tensor(value)
    return local_part(value, like=target) if isinstance(target, DTensor) else value


def _share_storage(target: torch.Tensor, value: torch.Tensor) -> bool:
    mine, other = local_tensor(target), local_tensor(value)
    return mine.numel() > 0 and mine.device == other.device and mine.data_ptr() == other.data_ptr()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "nothing"
