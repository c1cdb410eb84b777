"""The run to compare with: a plain Trainer on one process, whose every batch is the batches of all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from meshbolt.errors import UnsupportedError
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.in_trainer import trainer_arguments
from meshbolt.testing.parity.loaders import as_it_is, loader_of, seed
from meshbolt.testing.parity.observed import loss_of
from meshbolt.testing.parity.record import Record, whole
from meshbolt.testing.parity.rounding import Rounding
from meshbolt.testing.parity.simulated import SimulatedRanks
from meshbolt.zero import POLICIES, Zero

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def run_reference(case: Case, *, zero: Zero) -> Record:
    """Train in this process alone on what all ranks of the case train on, and return what it saw.

    Args:
        case: its strategy is not looked at.
        zero: how the ranks divide the module; in 16 bits it decides where they round.

    Raises:
        UnsupportedError: the module optimizes manually.
    """
    seed(case.seed)
    module = case.module()
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{type(module).__name__} optimizes manually, and one process cannot play several ranks in the middle of a "
            "training_step. Compare a module with automatic optimization that has the same layers and loss."
        )
    reference = _Reference(case, module, zero)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SingleDeviceStrategy(device="cpu"),
        callbacks=[reference],
        plugins=[reference.rounding.plugin(reference.backward)],
        **trainer_arguments(case),
    )
    batches = [[case.batch(index, rank) for rank in range(case.data_ranks)] for index in range(case.num_batches)]
    trainer.fit(module, loader_of(batches, collate=as_it_is))
    return reference.record


class _Reference(pl.Callback):
    """Plays the ranks in turn wherever a rank would see a batch."""

    def __init__(self, case: Case, module: pl.LightningModule, zero: Zero) -> None:
        self._case, self._module = case, module
        # Replicas exchange their parts once a window, before anything is rounded.
        self._rounds_every_batch = POLICIES[zero.stage].reduces_every_batch and zero.replicate == 1
        self.record = Record(zero=zero)
        self.rounding = Rounding(case, zero)
        self._ranks: SimulatedRanks | None = None
        self._losses: list[torch.Tensor] = []
        self._batches = self._steps = 0
        self._training_step = module.training_step
        instead = functools.partial(self._all_training_steps)
        module.__dict__["training_step"] = functools.update_wrapper(instead, self._training_step)
        for name in _TRANSFER_HOOKS:
            if is_overridden(name, module):
                module.__dict__[name] = self._per_rank(getattr(module, name))

    @property
    def ranks(self) -> SimulatedRanks:
        """The simulated ranks; from the first epoch on."""
        if self._ranks is None:
            raise AssertionError("The ranks are simulated from the start of the epoch.")
        return self._ranks

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start where the ranks start."""
        self.record.initial = {name: whole(parameter) for name, parameter in module.named_parameters()}
        sharded = self.rounding.prepare(module)
        self._ranks = SimulatedRanks(
            module,
            ranks=self._case.data_ranks,
            seed=lambda rank: seed(self._case.seed + rank),
            used_dtype=self.rounding.used_dtype,
            sharded=sharded,
        )
        self.ranks.new_batch()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Note the gradients before they are clipped."""
        self.record.add_gradients(dict(module.named_parameters()), step=self._steps)
        self._steps += 1

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the results."""
        optimizer = trainer.optimizers[0]
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self.record.parameters = {name: whole(parameter) for name, parameter in module.named_parameters()}
        self.record.add_optimizer({names[p]: values for p, values in optimizer.state.items()}, optimizer.param_groups)
        self.record.optimizer = type(optimizer).__name__
        for rank in range(self._case.data_ranks):
            self.record.add_buffers(self.ranks.buffers(rank), rank=rank)

    def backward(self, plugin: Any) -> None:
        """Run the backward of every rank, and reduce.

        Args:
            plugin: may have a gradient scaler.
        """
        window = self._case.accumulate_grad_batches
        for rank, loss in enumerate(self._losses):
            with self.ranks.playing(rank):
                divided = loss / window
                scaler = getattr(plugin, "scaler", None)
                self._module.backward(divided if scaler is None else scaler.scale(divided))
        self._losses.clear()
        self.ranks.reduce(last=self._batches % window == 0, rounded=self._rounds_every_batch)

    def _all_training_steps(self, batches: list[Any], batch_idx: int) -> torch.Tensor | None:
        self.ranks.new_batch()
        for rank, batch in enumerate(batches):
            with self.ranks.playing(rank):
                loss = loss_of(self._training_step(batch, batch_idx))
            if loss is not None:
                self.record.add_loss(loss, batch=self._batches, rank=rank)
                self._losses.append(self.rounding.loss(loss))
        self._batches += 1
        # Lightning divides it, logs it and hands it to `backward`, which has the losses themselves.
        return torch.stack(self._losses).mean() if self._losses else None

    def _per_rank(self, hook: Callable[..., Any]) -> Callable[..., list[Any]]:
        @functools.wraps(hook)
        def each(batches: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
            results = []
            for rank, batch in enumerate(batches):
                with self.ranks.playing(rank):
                    results.append(hook(batch, *args, **kwargs))
            return results

        return each
