"""Whether user code could see that an offloaded optimizer's updates run beside other work."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.utilities.model_helpers import is_overridden

from meshbolt.engine import Engine
from meshbolt.errors import ConfigError
from meshbolt.plugins import Onlooker
from meshbolt.strategies.announcing import say_what_is_offloaded

# Hooks between a backward pass and its step, where gradients are final and parameters those of the step before.
_BEFORE_STEP = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
# Hooks between a step and the next forward pass, which may look at parameters.
_AFTER_STEP = (
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "transfer_batch_to_device",
    "lr_scheduler_step",
    "optimizer_zero_grad",
)
# These do not look at tensors of a run, or ask the strategy for them, which waits.
_HARMLESS: tuple[type[pl.Callback], ...] = (
    callbacks.Checkpoint,
    callbacks.EarlyStopping,
    callbacks.GradientAccumulationScheduler,
    callbacks.LearningRateMonitor,
    callbacks.ModelSummary,
    callbacks.ProgressBar,
    callbacks.Timer,
    Onlooker,
)


def overlap_updates(trainer: pl.Trainer, engine: Engine) -> None:
    """Let updates of an offloaded optimizer begin before a step, and end after it, as far as nobody could notice.

    What lies where is said.

    Args:
        trainer: about to train.
        engine: of its module.

    Raises:
        ConfigError: they are asked to where the loop is the user's.
    """
    say_what_is_offloaded(engine)
    setting, module = engine.plan.settings.offload, trainer.lightning_module
    if setting.overlap is True and not module.automatic_optimization:
        raise ConfigError(
            "Offload(overlap=True) cannot be with manual optimisation, where steps begin and end where training_step takes them. "
            "Leave overlap out."
        )
    by_itself = engine.device.type == "cuda" and setting.overlap is not False
    if setting.optimizer is None or not module.automatic_optimization or not (by_itself or setting.overlap is True):
        engine.overlap_updates(early=False, late=False)
        return
    scales_loss = getattr(trainer.precision_plugin, "loss_scaler", None) is not None
    is_used_before = scales_loss or trainer.gradient_clip_val or any(_overridden(trainer, _BEFORE_STEP))
    engine.overlap_updates(early=not is_used_before, late=not any(_overridden(trainer, _AFTER_STEP)))


def _overridden(trainer: pl.Trainer, hooks: tuple[str, ...]) -> Iterator[str]:
    for name in hooks:
        if is_overridden(name, trainer.lightning_module, parent=pl.LightningModule):
            yield name
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name in hooks if not isinstance(callback, _HARMLESS) else ():
            if hasattr(pl.Callback, name) and is_overridden(name, callback, parent=pl.Callback):
                yield name
