"""What is put on a LightningModule for the time of a run, because Lightning has no hook for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning

from meshbolt.engine import Engine
from meshbolt.plugins import MeshPrecision


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
