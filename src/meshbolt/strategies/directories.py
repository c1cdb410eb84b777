"""A state dict of any shape as a checkpoint directory: tensors sharded as they are, everything else beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint import Checkpoint, load_objects, load_tensors, saved_tensors
from meshbolt.config import Plan
from meshbolt.engine.random_state import collect_random_state
from meshbolt.engine.state import empty_like_saved, join_tensors, markers, split_tensors

# A key of our own among the user's: which of the tensors were sharded when they were saved.
_OWN = "meshbolt"


@dataclass(frozen=True, kw_only=True)
class LoadInto:
    """What a checkpoint is read into.

    Attributes:
        live: tensors to fill, by key; the checkpoint's other tensors are read into new ones.
        parameters: by the beginning of keys, the parameters by name that sharded tensors under these keys belong to.
        leave_out: entries at the top of the tree that are not read.
    """

    live: Mapping[str, torch.Tensor]
    parameters: Mapping[str, Mapping[str, nn.Parameter]]
    leave_out: frozenset[str] = field(default=frozenset())


def savable(tree: Mapping[str, Any], *, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return what `save_directory` takes to write a state dict: of this rank, its shards and its random state.

    Args:
        tree: of rank 0 everything is saved, of the others the sharded tensors.
        plan: what the run does.
        device: this rank's.
    """
    tensors: dict[str, torch.Tensor] = {}
    objects = {key: split_tensors(value, key, tensors) for key, value in tree.items()}
    sharded = sorted(key for key, value in tensors.items() if isinstance(value, DTensor))
    held = tensors if dist.get_rank() == 0 else {key: tensors[key] for key in sharded}
    random_state = {_random_key(key): value for key, value in collect_random_state(device).items()}
    return {
        "tensors": {**held, **random_state},
        "objects": {**objects, _OWN: {"sharded": sharded}},
        "plan": dict(plan.rows()),
        "versions": {"lightning": lightning.__version__},
        "keep_partial": plan.settings.checkpoint.keep_partial,
    }


def load_tree(
    path: str, into: LoadInto, *, weights_only: bool | None, policy: Checkpoint, group: dist.ProcessGroup | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a checkpoint directory, whatever layout it was written in.

    Args:
        path: the same on every rank.
        into: what to fill.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.
        policy: how checkpoints are read.
        group: of all ranks, for tensors on the CPU.

    Returns:
        The tree that was saved, with tensors in their places; and this rank's random state, empty if none was saved.
    """
    objects = load_objects(path, weights_only=weights_only, verify=policy.verify, group=group)
    sharded = set(objects.pop(_OWN, {}).get("sharded", ()))
    objects = {key: value for key, value in objects.items() if key not in into.leave_out}
    saved = saved_tensors(path)
    tensors = {}
    for key in markers(objects):
        shape, dtype = torch.Size(saved[key].shape), saved[key].dtype
        owner = _owner(key, shape, into.parameters) if key in sharded else None
        tensors[key] = into.live[key] if key in into.live else empty_like_saved(shape, dtype, owner)
    prefix = _random_key("")
    random_state = {
        key: torch.empty(saved[key].shape, dtype=saved[key].dtype) for key in saved if key.startswith(prefix)
    }
    # The files have just been compared with the manifest; nothing is unexpected, since the objects name what is read.
    load_tensors(path, {**tensors, **random_state}, prefix=(), verify=False, group=group)
    tree = {key: join_tensors(value, tensors) for key, value in objects.items()}
    return tree, {key.removeprefix(prefix): value for key, value in random_state.items()}


def _random_key(name: str) -> str:
    return f"random.{dist.get_rank()}.{name}"


def _owner(key: str, shape: torch.Size, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> nn.Parameter | None:
    """Return the parameter that a tensor belongs to: its name ends the key, or stands before the last part of it."""
    for prefix, named in parameters.items():
        parts = key.split(".") if key.startswith(prefix) else []
        for start in range(len(parts)):
            for end in (len(parts), len(parts) - 1):
                found = named.get(".".join(parts[start:end]))
                if found is not None and found.shape == shape:
                    return found
    return None
