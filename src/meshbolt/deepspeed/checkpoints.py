"""Checkpoints of the engine: `save_dir/tag/`, which a crash cannot spoil, and `save_dir/latest`, which names the last whole one.

The directory of a tag is a checkpoint of meshbolt's: any number of ranks reads it under any stage, and `meshbolt checkpoint`
looks into it. `latest` is replaced in one step after all of it is on the disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from meshbolt.checkpoint.directory import is_remote
from meshbolt.deepspeed.answers import Answers
from meshbolt.deepspeed.weights import whole_entries
from meshbolt.engine.random_state import collect_random_state, restore_random_state
from meshbolt.errors import CheckpointError, ConfigError, UnsupportedError

_log = logging.getLogger(__name__)
LATEST = "latest"
MODULE, OPTIMIZER, SCHEDULER, SCALE = "module", "optimizer", "lr_scheduler", "loss_scale"
COUNTERS, CLIENT = "engine", "client_state"
_COUNTED = ("global_steps", "global_samples", "skipped_steps")


def save_checkpoint(
    engine: Answers,
    save_dir: str | Path,
    tag: str | None,
    client_state: Mapping[str, Any],
    *,
    save_latest: bool,
    exclude_frozen_parameters: bool,
) -> None:
    """Save everything that a run goes on from; on every rank.

    Gradients of a window that is not at its end are not saved: who loads it begins that window again.

    Args:
        engine: whose.
        save_dir: there is a directory in it for each tag.
        tag: of this checkpoint, the same on all ranks; None: "global_step" and the number of it.
        client_state: the caller's own values, of rank 0.
        save_latest: let the file `latest` name it, once it is whole.
        exclude_frozen_parameters: leave out parameters without gradients.

    Raises:
        ConfigError: a name is not one, or the state is no dictionary.
        CheckpointError: it was not saved; the same on every rank.
    """
    if not str(save_dir):
        raise ConfigError("save_checkpoint was given an empty save_dir. Give a directory.")
    _refuse_url(save_dir)
    if not isinstance(client_state, Mapping):
        raise ConfigError(f"save_checkpoint(client_state={client_state!r}): give a dictionary of your own values.")
    name = _name_of(f"global_step{engine.global_steps}" if tag is None else str(tag))
    state: dict[str, Any] = {
        MODULE: engine.module,
        OPTIMIZER: engine.optimizer,
        SCHEDULER: engine.lr_scheduler,
        SCALE: engine.fabric.strategy.precision,
        CLIENT: dict(client_state),
    }
    state = {key: value for key, value in state.items() if value is not None}
    state[COUNTERS] = {**{key: getattr(engine, key) for key in _COUNTED}, "holds": sorted(state)}
    frozen = _frozen(engine) if exclude_frozen_parameters else frozenset()
    keep = {MODULE: lambda entry, _value: entry not in frozen}
    strategy: Any = engine.fabric.strategy
    folder, name = strategy.broadcast((str(save_dir), name))
    strategy.save_checkpoint(Path(folder) / name, state, filter=keep if frozen else None)
    if save_latest and engine.global_rank == 0:
        strategy.after_save(lambda: _write_latest(Path(folder), name), makes=str(Path(folder) / LATEST))
    strategy.barrier()


def load_checkpoint(
    engine: Answers,
    load_dir: str | Path,
    tag: str | None,
    *,
    strict: bool,
    optimizer: bool,
    scheduler: bool,
    counters: bool,
    weights_only: bool | None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load a checkpoint into the engine; on every rank.

    Args:
        engine: what to load into.
        load_dir: with a directory for each tag, of meshbolt's or of DeepSpeed's.
        tag: of the checkpoint; None: what `latest` says.
        strict: refuse missing and unknown weights.
        optimizer: also the state of the optimizer, and the loss scale.
        scheduler: also that of the scheduler.
        counters: also the counters and the random state.
        weights_only: False builds objects of any class that the caller's state has.

    Returns:
        The path, and the caller's state; None and None without a file `latest`.

    Raises:
        CheckpointError: it cannot be read, does not fit, or has not what is asked for.
    """
    _refuse_url(load_dir)
    strategy: Any = engine.fabric.strategy
    strategy.wait_for_checkpoint()
    folder, name = strategy.broadcast((str(load_dir), tag if tag is not None else _latest(Path(load_dir), engine)))
    if name is None:
        if engine.global_rank == 0:
            _log.warning(
                "load_checkpoint: there is no file %r in %s, so that nothing is loaded. Give the tag of a checkpoint, or another "
                "directory.",
                LATEST,
                folder,
            )
        return None, None
    place = Path(folder) / _name_of(str(name))
    wanted: dict[str, Any] = {MODULE: engine.module}
    if optimizer and engine.optimizer is not None:
        wanted |= {OPTIMIZER: engine.optimizer, SCALE: strategy.precision}
    if scheduler and engine.lr_scheduler is not None:
        wanted[SCHEDULER] = engine.lr_scheduler
    before = None if counters else collect_random_state(engine.device)
    rest = strategy.load_checkpoint(place, wanted, strict=strict, weights_only=weights_only)
    if before is not None:
        restore_random_state(before, engine.device)
    saved = _saved(rest, wanted, place)
    if scheduler and not optimizer:
        _take_rates(engine)
    if counters:
        for key in _COUNTED:
            setattr(engine, key, saved[key])
    return str(place), dict(saved[CLIENT])


def _saved(rest: Mapping[str, Any], wanted: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Return the counters and the caller's state of a checkpoint, ours or DeepSpeed's.

    Raises:
        CheckpointError: it is none of an engine, or has not what is asked for.
    """
    if COUNTERS not in rest:
        if not all(key in rest for key in _COUNTED):
            raise CheckpointError(
                f"{place} is a checkpoint that engine.save_checkpoint has not saved. Load it as it was saved, such as by "
                "fabric.load."
            )
        # DeepSpeed's own, which has the caller's entries beside its counters.
        theirs = {key: value for key, value in rest.items() if key not in _COUNTED}
        return {**{key: rest[key] for key in _COUNTED}, CLIENT: theirs}
    counters = rest[COUNTERS]
    if lacking := sorted(set(wanted) - set(counters["holds"])):
        raise CheckpointError(
            f"{place} has {', '.join(counters['holds'])}, and no {' and no '.join(lacking)}, which this engine has. Load it with "
            "load_optimizer_states=False or load_lr_scheduler_states=False."
        )
    return {**counters, CLIENT: rest[CLIENT]}


def _take_rates(engine: Answers) -> None:
    """Give the optimizer the rates of a scheduler that was loaded without it."""
    scheduler, optimizer = engine.lr_scheduler, engine.optimizer
    if optimizer is None or not hasattr(scheduler, "get_last_lr"):
        return
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def save_16bit_model(engine: Answers, path: Path, *, exclude_frozen_parameters: bool) -> None:
    """Save the whole weights in one file of `torch.save`, or of safetensors where its name ends in that; on every rank.

    Args:
        engine: whose.
        path: of the file; it appears when it is whole.
        exclude_frozen_parameters: leave out parameters without gradients.
    """
    strategy: Any = engine.fabric.strategy
    place = Path(strategy.broadcast(str(path)))
    weights: dict[str, torch.Tensor] = {}
    is_first = engine.global_rank == 0
    for name, value in whole_entries(
        engine, call="save_16bit_model", exclude_frozen_parameters=exclude_frozen_parameters
    ):
        if is_first and isinstance(value, torch.Tensor):
            weights[name] = value.to("cpu", copy=True)
    if is_first:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        _write_weights(weights, beside, is_safe=place.suffix == ".safetensors")
        beside.replace(place)
    strategy.barrier()


def _write_weights(weights: dict[str, torch.Tensor], path: Path, *, is_safe: bool) -> None:
    if not is_safe:
        torch.save(weights, path)
        return
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in weights.items()}, path)


def _frozen(engine: Answers) -> frozenset[str]:
    named = engine.module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


def _name_of(tag: str) -> str:
    if not tag or Path(tag).name != tag or tag in (LATEST, "..", "."):
        raise ConfigError(
            f"tag={tag!r} is no name of a checkpoint's directory. Give a name without slashes, such as 'step100'."
        )
    return tag


def _refuse_url(place: str | Path) -> None:
    if is_remote(place):
        raise UnsupportedError(
            f"{str(place)!r} is a URL, where the file {LATEST!r} cannot be replaced in one step. Give a directory, or save by "
            "engine.fabric.save(url, {...})."
        )


def _latest(folder: Path, engine: Answers) -> str | None:
    names = [f"{LATEST}_universal", LATEST] if engine.load_universal_checkpoint() else [LATEST]
    for name in names:
        with suppress(FileNotFoundError, NotADirectoryError):
            return (folder / name).read_text(encoding="utf-8").strip() or None
    return None


def _write_latest(folder: Path, tag: str) -> None:
    """Let `latest` name a checkpoint: all of it, or what it said before."""
    beside = folder / f".{LATEST}.{os.getpid()}"
    with beside.open("w", encoding="utf-8") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / LATEST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
