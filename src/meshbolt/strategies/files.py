"""What a run can begin from: agreed on by all ranks, a single file too, and compared with the run before it is used."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from meshbolt.checkpoint.deepspeed import is_deepspeed
from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.deepspeed_json.schedules import Schedule
from meshbolt.engine.state import ONLY_WEIGHTS, check_optimizer_state
from meshbolt.errors import CheckpointError, ConfigError

# The state of DeepSpeed's own schedules.
_DEEPSPEEDS = "last_batch_iteration"


def load_file(path: str, *, weights_only: bool | None, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Read a single file that torch.save wrote, without copying its tensors into memory.

    Args:
        path: the same on every rank.
        weights_only: False builds objects of any class, which runs code from the file; else plain data only.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: it cannot be read on some rank, or holds what `weights_only` does not allow; on every rank.
    """
    found: dict[str, Any] = {}

    def read() -> None:
        _check_is_whole(path)
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

    agree_on_error(read, group=group)
    return found


def _check_is_whole(path: str) -> None:
    """Check that a file is none of those of which DeepSpeed writes several for one save."""
    file = Path(path)
    if (file.name == "latest" or file.name.endswith("_states.pt")) and is_deepspeed(file.parent):
        raise CheckpointError(
            f"{path} is one of the files of a checkpoint that DeepSpeed has written. Give the directory: {file.parent}."
        )


def check_is_lightnings(checkpoint: Mapping[str, Any], path: str) -> None:
    """Check that a dictionary has what every checkpoint of a Trainer has.

    Raises:
        CheckpointError: it has not.
    """
    if missing := sorted({"state_dict", "pytorch-lightning_version"} - checkpoint.keys()):
        raise CheckpointError(
            f"{path} is not a checkpoint of Lightning's Trainer: it has no {' and no '.join(missing)}. If it is a bare state "
            "dict, give it to the module's load_state_dict before fit or validate, instead of ckpt_path; what Fabric has "
            "saved is loaded by Fabric."
        )


def agree_on_path(path: str | None, *, group: dist.ProcessGroup | None) -> tuple[str, bool]:
    """Return rank 0's path, and whether it is a single file; each rank has chosen by what it saw on its file system.

    Args:
        path: what this rank is to load; None for nothing.
        group: of all ranks, for tensors on the CPU.

    Raises:
        CheckpointError: some ranks are to load a checkpoint, and others nothing; or it is a file for some of them, and
            a directory or nothing for others; on every rank.
    """
    _, paths = same_on_all_ranks(path, group=group)
    if None in paths and any(paths):
        raise CheckpointError(
            f"Ranks are to resume from different checkpoints: {paths} by rank, where None is a rank that found none. All "
            "ranks must see the same directory: put it on a file system that they share, or give a full ckpt_path."
        )
    if paths[0] is None:
        return "", False
    found = os.path.expanduser(str(paths[0]))  # noqa: PTH111 - a Path would spoil a URL
    same, files = same_on_all_ranks(Path(found).is_file(), group=group)
    if not same:
        kinds = ["a file" if is_file else "a directory, or nothing" for is_file in files]
        raise CheckpointError(
            f"{found} is not the same on all ranks: {kinds} by rank. Put it on a file system that all ranks share."
        )
    return found, bool(files[0])


def check_training_state(
    checkpoint: Mapping[str, Any],
    optimizers: Sequence[Optimizer],
    names: Mapping[nn.Parameter, str],
    *,
    schedulers: Sequence[Any],
    max_epochs: int | None = None,
    regrouped: Collection[int] = (),
) -> None:
    """Compare what a checkpoint has beside weights with the run that is to go on from it.

    Args:
        checkpoint: Lightning's dictionary.
        optimizers: this run's, made on the sharded parameters.
        names: of all parameters.
        schedulers: this run's.
        max_epochs: after which this run ends; -1 or None for no such number.
        regrouped: numbers of the optimizers that take their groups from the checkpoint.

    Raises:
        CheckpointError: it has none of it, or for other optimizers or schedulers.
        ConfigError: it is further than this run would go.
    """
    if lacking := [key for key in ("optimizer_states", "lr_schedulers", "loops") if key not in checkpoint]:
        raise CheckpointError(
            f"The checkpoint cannot be resumed from: it has weights, but no {', no '.join(lacking)}. It was saved with "
            "save_weights_only=True, or is no checkpoint of a Trainer. Take a full one, or begin a new run with these "
            "weights: MeshStrategy(checkpoint=Checkpoint(load_weights_only=True))."
        )
    saved = checkpoint["optimizer_states"]
    for what, there, here in (
        ("optimizer", len(saved), len(optimizers)),
        ("learning rate scheduler", len(checkpoint["lr_schedulers"]), len(schedulers)),
    ):
        if there != here:
            raise CheckpointError(
                f"The checkpoint has the state of {there} {what}s, this run has {here}. Configure as many as when it was "
                f"written, or {ONLY_WEIGHTS}."
            )
    check_schedules(checkpoint["lr_schedulers"], schedulers)
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    if max_epochs not in (None, -1) and done > max_epochs:
        raise ConfigError(
            f"The checkpoint was saved after {done} epochs, and this run is to end after {max_epochs}. Raise "
            f"Trainer(max_epochs={max_epochs})."
        )
    for number, (optimizer, state) in enumerate(zip(optimizers, saved, strict=True)):
        check_optimizer_state(optimizer, state, names, regrouped=number in regrouped)


def check_schedules(saved: Sequence[Mapping[str, Any]], schedulers: Sequence[Any]) -> None:
    """Check that the state of DeepSpeed's own schedules goes to such schedules, and no other state to them.

    Others would take no notice of it, or of what they need.

    Args:
        saved: the state of each.
        schedulers: of this run.

    Raises:
        CheckpointError: one is another.
    """
    for state, scheduler in zip(saved, schedulers, strict=False):
        if isinstance(scheduler, Schedule) and state:
            scheduler.check_state(state)
        if set(state) == {_DEEPSPEEDS} and not isinstance(scheduler, Schedule):
            raise CheckpointError(
                "The checkpoint has the state of one of DeepSpeed's own learning rate schedules, and this run's "
                f"is {type(scheduler).__name__}, which cannot go on from it. Use that schedule, such as "
                f"meshbolt.deepspeed.WarmupLR, or {ONLY_WEIGHTS}."
            )


def without_training_state(checkpoint: Mapping[str, Any], *, states_of: Collection[type]) -> dict[str, Any]:
    """Return the part of Lightning's dictionary that is the module's; for the rest it is one of a run that has not begun.

    Args:
        checkpoint: Lightning's dictionary.
        states_of: classes under whose names Lightning keeps states that are not the module's.
    """
    training = {"callbacks", "loops", "optimizer_states", "lr_schedulers", "epoch", "global_step"}
    training |= {"native_amp_scaling_state", *(kind.__qualname__ for kind in states_of)}
    kept = {key: value for key, value in checkpoint.items() if key not in training}
    return {**kept, "epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
