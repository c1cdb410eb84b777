"""What else a run can begin from: a single file that Lightning wrote, and optimizer state in the form of a checkpoint."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.engine.state import load_optimizer_state
from meshbolt.errors import CheckpointError, UnsupportedError


def load_file(path: str, *, weights_only: bool | None, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Read a single file of Lightning's, without copying its tensors into memory.

    Args:
        path: the same on every rank.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: it cannot be read on some rank, or holds what `weights_only` does not allow; on every rank.
    """
    found: dict[str, Any] = {}

    def read() -> None:
        try:
            found.update(torch.load(path, map_location="cpu", weights_only=weights_only is not False, mmap=True))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds objects of classes, and to build them is to run their code: {error}. If you trust this file, "
                "give weights_only=False to what loads it (trainer.fit, trainer.validate; --weights_only=false of a command), or "
                "allow the classes by torch.serialization.add_safe_globals."
            ) from error
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            # Of other files torch says how to save them, which nobody can do who has something else, or a part.
            known = isinstance(error, (FileNotFoundError, PermissionError)) or zipfile.is_zipfile(path)
            why = str(error) if known else "it is none that torch.save has written, or not the whole of one"
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint file: {why}. Give another ckpt_path."
            ) from error
        if missing := sorted({"state_dict", "pytorch-lightning_version"} - found.keys()):
            raise CheckpointError(
                f"{path} is not a checkpoint of Lightning: it has no {' and no '.join(missing)}. If it is a bare state dict, "
                "give it to the module's load_state_dict before fit or validate, instead of ckpt_path."
            )

    agree_on_error(read, group=group)
    return found


def agree_on_path(path: str | None, *, group: dist.ProcessGroup | None) -> str:
    """Return rank 0's path; each rank has chosen by what it saw on its file system, before it could ask the others.

    Args:
        path: what this rank is to load; None for nothing.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: some ranks are to load a checkpoint, and others nothing; on every rank.
    """
    _, paths = same_on_all_ranks(path, group=group)
    if None in paths and any(paths):
        raise CheckpointError(
            f"Ranks are to resume from different checkpoints: {paths} by rank, where None is a rank that found none. All "
            "ranks must see the same directory: put it on a file system that they share, or give a full ckpt_path."
        )
    return str(paths[0])


def load_optimizer_states(
    optimizers: Sequence[Optimizer], saved: Sequence[Mapping[str, Any]], names: Mapping[nn.Parameter, str]
) -> None:
    """Give every optimizer its state back.

    Args:
        optimizers: this run's, made on the sharded parameters.
        saved: the states, in the order of the optimizers.
        names: of all parameters.

    Raises:
        CheckpointError: there are more or fewer states than optimizers, or their groups differ.
        UnsupportedError: the state is that of a plain Lightning file.
    """
    if len(saved) != len(optimizers):
        raise CheckpointError(
            f"The checkpoint has the state of {len(saved)} optimizers, this run has {len(optimizers)}. Configure as many as "
            "when it was written, or load only the weights."
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        if any(not isinstance(key, str) for key in state["state"]):
            raise UnsupportedError(
                "The checkpoint holds optimizer state by number, as a plain Lightning file does, not by parameter name. Take "
                "its weights only: build the module with load_from_checkpoint, and fit without ckpt_path."
            )
        load_optimizer_state(optimizer, state, names)
