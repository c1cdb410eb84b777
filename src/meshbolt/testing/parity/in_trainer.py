"""The run that is proved, in a Trainer on several ranks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.optim import Optimizer

from meshbolt.strategies import MeshStrategy
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.loaders import loader_of_rank
from meshbolt.testing.parity.observed import engine_of, note_end, note_start, watch_losses
from meshbolt.testing.parity.record import Record


def run_trainer(case: Case) -> Record:
    """Train on this rank, one of the case's, and return what it saw."""
    record, rank = Record(), case.data_rank(dist.get_rank())
    module = case.module()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=case.make_strategy(MeshStrategy),
        callbacks=[_Recorder(record)],
        use_distributed_sampler=not case.has_batches,
        **trainer_arguments(case),
        **case.precision_arguments(),
    )
    # Under pipeline parallelism the module's own step runs once per microbatch.
    watch_losses(trainer.strategy if case.is_pipelined else module, record, rank=rank)
    trainer.fit(module, loader_of_rank(case, rank))
    return record


def trainer_arguments(case: Case) -> dict[str, Any]:
    """Return the Trainer's arguments that are the same on one process, but for the length of the window."""
    return {
        "max_epochs": 1,
        "limit_train_batches": case.num_batches,
        "limit_val_batches": 0,
        "accumulate_grad_batches": case.accumulate_grad_batches,
        "gradient_clip_val": case.gradient_clip_val,
        "gradient_clip_algorithm": case.gradient_clip_algorithm,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


class _Recorder(pl.Callback):
    """Notes the gradients and results of a Trainer's run."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._steps = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the weights that training starts from."""
        note_start(self._record, engine_of(trainer.strategy))

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Note the gradients before they are clipped."""
        self._record.add_gradients(engine_of(trainer.strategy).parameters_by_name, step=self._steps)
        self._steps += 1

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note the results."""
        note_end(self._record, engine_of(trainer.strategy), trainer.optimizers[0])
