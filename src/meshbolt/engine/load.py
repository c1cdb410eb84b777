"""Read whole or sharded tensors into the sharded module, whatever layout they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import local_tensor
from meshbolt.engine.gathered import local_part
from meshbolt.errors import CheckpointError


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
