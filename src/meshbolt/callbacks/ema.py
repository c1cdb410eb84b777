"""An exponential moving average of the weights, sharded as the weights are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from meshbolt.compat import local_tensor
from meshbolt.engine import Engine
from meshbolt.engine.gathered import as_sharded, local_part
from meshbolt.engine.placeholders import entries_of_all_stages, held_elsewhere
from meshbolt.engine.state import AVERAGE
from meshbolt.errors import CheckpointError, ConfigError, UnsupportedError
from meshbolt.plugins import MeshPrecision


class ExponentialMovingAverage(pl.Callback):
    """Keeps an exponential moving average of the weights, and puts it in their place for validation, test and prediction.

    After every `every_n_steps` optimizer steps, average = decay × average + (1 - decay) × weights, number by number on
    each rank's own shards, so that it costs no communication and only the memory of one more shard. The first update
    takes the weights as they are. Weights of 16 bits are averaged in float32, since a step of the average would be lost
    in their rounding. Frozen weights are their own average and are not kept; what is unfrozen later joins the average
    with the update that follows. Buffers are not averaged. Under pipeline parallelism each rank keeps the average of its
    own stages.

    Checkpoints hold both the weights and the average, by name, so that any layout of ranks can go on with them.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.callbacks import ExponentialMovingAverage
        >>> average = ExponentialMovingAverage(0.999)
        >>> trainer = Trainer(strategy="zero3", callbacks=[average], accelerator="cpu", devices=2)
    """

    def __init__(self, decay: float = 0.999, *, every_n_steps: int = 1, start_step: int = 0) -> None:
        """Check the settings.

        Args:
            decay: how much of the average an update keeps, `0 <= decay < 1`.
            every_n_steps: optimizer steps from one update to the next.
            start_step: optimizer steps before the averaging begins.

        Raises:
            ConfigError: a setting is out of range.
        """
        if not 0 <= decay < 1:
            raise ConfigError(
                f"ExponentialMovingAverage(decay={decay!r}): give a number from 0 to below 1, such as 0.999."
            )
        if every_n_steps < 1 or start_step < 0:
            raise ConfigError(
                f"ExponentialMovingAverage(every_n_steps={every_n_steps!r}, start_step={start_step!r}): the first must be "
                "at least 1, and the second at least 0."
            )
        self.decay, self.every_n_steps, self.start_step = decay, every_n_steps, start_step
        self._engine: Engine | None = None
        self._average: dict[str, torch.Tensor] = {}
        self._periods = 0
        self._weights: dict[str, torch.Tensor] | None = None  # while the average is in their place
        self._names: dict[str, str] = {}  # the first name of each parameter, by all of them
        self._was_restored = False

    @contextmanager
    def averaged(self, trainer: pl.Trainer) -> Iterator[None]:
        """Put the average in the place of the weights for a while: to generate, to export, to look at.

        All ranks must enter and leave together; what is done to the weights inside is lost.

        Args:
            trainer: whose module it is.
        """
        self._swap_in(trainer)
        try:
            yield
        finally:
            self._swap_out()

    # Training ---------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything starts."""
        if not isinstance(trainer.strategy.precision_plugin, MeshPrecision):
            raise UnsupportedError(
                f"ExponentialMovingAverage averages shards of meshbolt, and this Trainer's strategy is "
                f"{type(trainer.strategy).__name__}. Use strategy='zero3' (or another of meshbolt's), or Lightning's "
                "EMAWeightAveraging."
            )
        self._was_restored = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew where the weights came from a checkpoint without an average."""
        self._attach(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take the weights in, if enough steps were made since the last time."""
        periods = max(0, trainer.global_step - self.start_step) // self.every_n_steps
        if periods > self._periods:
            self._periods = periods
            self._update(self._attach(trainer))

    @torch.no_grad()
    def _update(self, engine: Engine) -> None:
        trained = {name: p for name, p in engine.parameters_by_name.items() if p.requires_grad}
        shards = {name: local_tensor(p) for name, p in trained.items() if not held_elsewhere(p)}
        known = [name for name in shards if name in self._average]
        for name in shards.keys() - self._average.keys():
            wide = torch.promote_types(shards[name].dtype, torch.float32)
            self._average[name] = shards[name].to(wide, copy=True)
        if known:
            averages = [self._average[name] for name in known]
            weights = [shards[name].to(self._average[name].dtype) for name in known]
            torch._foreach_lerp_(averages, weights, 1 - self.decay)

    # Evaluation -------------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        self._swap_in(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights."""
        self._swap_out()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test the average."""
        self._swap_in(trainer)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights."""
        self._swap_out()

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict with the average."""
        self._swap_in(trainer)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights."""
        self._swap_out()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the weights behind, not the average."""
        self._swap_out()

    @torch.no_grad()
    def _swap_in(self, trainer: pl.Trainer) -> None:
        engine = self._attach(trainer)
        if self._weights is not None:
            return
        engine.settle()
        first = {parameter: name for name, parameter in engine.parameters_by_name.items()}
        self._names = {n: first[p] for n, p in engine.module.named_parameters(remove_duplicate=False) if p in first}
        shards = {name: local_tensor(engine.parameters_by_name[name]) for name in self._average}
        self._weights = {name: shard.clone() for name, shard in shards.items()}
        for name, shard in shards.items():
            shard.copy_(self._average[name])

    @torch.no_grad()
    def _swap_out(self) -> None:
        if self._weights is None or self._engine is None:
            return
        self._engine.settle()
        for name, weight in self._weights.items():
            local_tensor(self._engine.parameters_by_name[name]).copy_(weight)
        self._weights = None

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the settings; the average itself is saved as shards."""
        return {"decay": self.decay, "every_n_steps": self.every_n_steps, "start_step": self.start_step}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average beside the weights, and the weights themselves where the average is in their place."""
        if self._engine is None or not checkpoint["state_dict"]:
            return  # the ranks do not save together, after an exception on some of them
        average, stages = _named(self._engine, self._average), trainer.strategy.pipeline  # type: ignore[attr-defined]
        if stages is not None:
            average = entries_of_all_stages(average, order=self._engine.parameters_by_name, group=stages.group)
        checkpoint[AVERAGE] = {"periods": self._periods, "weights": average}
        if self._weights is not None:
            held = _named(self._engine, self._weights)
            names = {name: first for name, first in self._names.items() if first in held}
            checkpoint["state_dict"].update({name: held[first] for name, first in names.items()})

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take back the average that was saved."""
        if AVERAGE not in checkpoint:
            return
        self._was_restored = True
        engine, saved = self._attach(trainer), checkpoint[AVERAGE]
        parameters = engine.parameters_by_name
        for name, value in saved["weights"].items():
            if name not in parameters or value.shape != parameters[name].shape:
                raise CheckpointError(
                    f"The checkpoint has an average of {name!r} {tuple(value.shape)}, which is no parameter of this module. "
                    "Build the module as it was when it was saved, or train without ExponentialMovingAverage."
                )
        self._periods = saved["periods"]
        self._average = {
            name: _own_part(value, like=parameters[name])
            for name, value in saved["weights"].items()
            if not held_elsewhere(parameters[name])
        }

    def _attach(self, trainer: pl.Trainer) -> Engine:
        """Return the engine; forget an average that does not belong to the weights that it holds now."""
        engine: Engine = trainer.strategy.engine  # type: ignore[attr-defined]
        replaced = trainer.ckpt_path is not None and not self._was_restored
        if replaced and self._average and trainer.state.fn != TrainerFn.FITTING:
            rank_zero_warn(
                f"{trainer.ckpt_path} holds no average of the weights: the weights are evaluated as they are."
            )
        if replaced or engine is not self._engine:
            self._average, self._weights, self._periods = {}, None, 0
            self._engine, self._was_restored = engine, True
        return engine


def _named(engine: Engine, shards: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return shards of parameters under their names, as DTensors where the parameters are."""
    parameters = {name: engine.parameters_by_name[name] for name in shards}
    return {
        name: as_sharded(shards[name], like=parameter) if isinstance(parameter, DTensor) else shards[name]
        for name, parameter in parameters.items()
    }


def _own_part(value: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    """Return what this rank keeps of a saved average, which is laid out as the parameter is, or whole."""
    if isinstance(like, DTensor) and not isinstance(value, DTensor):
        value = local_part(value, like=like).clone()
    return local_tensor(value).to(local_tensor(like).device)
