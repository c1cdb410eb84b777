"""What is put on a LightningModule or a callback for the time of a run, because Lightning has no hook for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint

from meshbolt.collectives import agree_on_error
from meshbolt.engine import Engine
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.compat import file_is_there, link_instead
from meshbolt.strategies.saving import Saving


def report_norm(module: pl.LightningModule) -> Callable[[torch.Tensor], None]:
    """Return a function that logs the norm of the gradients as `grad_norm` whenever they are clipped."""

    def report(norm: torch.Tensor) -> None:
        module.log("grad_norm", norm.detach().float(), on_step=True, on_epoch=False)

    return report


def follow_requires_grad(module: pl.LightningModule, engine: Engine) -> None:
    """Let `toggle_optimizer` and `untoggle_optimizer` reach parameters that are gathered at that moment.

    Args:
        module: in manual optimisation.
        engine: holds its shards.
    """
    for name in ("toggle_optimizer", "untoggle_optimizer"):
        if name in vars(module):
            continue
        method = getattr(module, name)

        @functools.wraps(method)
        def followed(*args: Any, _method: Callable[..., Any] = method, **kwargs: Any) -> Any:
            result = _method(*args, **kwargs)
            engine.sync_requires_grad()
            return result

        module.__dict__[name] = followed


def hold_schedulers_on_skips(module: pl.LightningModule, precision: MeshPrecision) -> None:
    """Leave schedulers where they are after a step that was skipped because gradients overflowed.

    Args:
        module: its `lr_scheduler_step` is called for every scheduler.
        precision: knows whether the last step was skipped.
    """
    if "lr_scheduler_step" in vars(module):
        return
    method = module.lr_scheduler_step

    @functools.wraps(method)
    def held(*args: Any, **kwargs: Any) -> Any:
        return None if precision.skipped_last_step else method(*args, **kwargs)

    module.__dict__["lr_scheduler_step"] = held


def let_finetuning_catch_up(trainer: pl.Trainer) -> None:
    """Let finetuning callbacks put the parameter groups of a checkpoint into the optimizers.

    They do so when fit starts, where they expect a checkpoint to be read already; here it is read later. Without a
    checkpoint of theirs it is nothing.

    Args:
        trainer: with its callbacks restored and its optimizers made.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            callback.on_fit_start(trainer, trainer.lightning_module)


def optimizers_regrouped_by(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> set[int]:
    """Return the numbers of the optimizers whose parameter groups finetuning callbacks take from a checkpoint.

    Args:
        checkpoint: Lightning's dictionary.
        trainer: with its callbacks.
    """
    states = checkpoint.get("callbacks", {})
    regrouped: set[int] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning) and callback.state_key in states:
            regrouped |= set(states[callback.state_key].get("internal_optimizer_metadata", {}))
    return regrouped


def look_at_files_as_when_saved(trainer: pl.Trainer, saving: Saving) -> None:
    """Let every ModelCheckpoint choose names, and make links, as if the checkpoint that is being written were whole already.

    Else it would give the same name twice, and lead its link of the last checkpoint to one that may never be.

    Args:
        trainer: with its callbacks.
        saving: knows what is being written.
    """
    strategy: Any = trainer.strategy

    def link(path: str, to: str) -> None:
        if strategy._reachable() is not None:  # else an exception has ended the run, and nothing was saved
            make = functools.partial(saving.link, path, to) if trainer.is_global_zero else lambda: None
            agree_on_error(make, group=strategy._control_group)

    for callback in _model_checkpoints(trainer):
        link_instead(callback, link)
        if type(callback).file_exists is not ModelCheckpoint.file_exists:
            continue  # the user's own idea of it

        def exists(path: Any, _trainer: pl.Trainer, *, _callback: ModelCheckpoint = callback) -> bool:
            found = False
            if trainer.is_global_zero:
                coming = saving.will_exist(path)
                found = file_is_there(_callback, path) if coming is None else coming
            return bool(strategy.reduce_boolean_decision(found, all=False))

        vars(callback)["file_exists"] = exists


def look_at_files_as_now(trainer: pl.Trainer) -> None:
    """Take back what `look_at_files_as_when_saved` has put on the callbacks."""
    for callback in _model_checkpoints(trainer):
        vars(callback).pop("file_exists", None)
        link_instead(callback, None)


def _model_checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
