"""The run that is proved, in a plain Fabric loop on several ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import lightning.fabric as lf
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from meshbolt.errors import ConfigError
from meshbolt.strategies import FabricMeshStrategy
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.loaders import loader_of_rank
from meshbolt.testing.parity.observed import engine_of, loss_of, note_end, note_start, watch_losses
from meshbolt.testing.parity.record import Record


def run_fabric(case: Case) -> Record:
    """Train on this rank, one of the case's, and return what it saw."""
    record, rank = Record(), case.data_rank(dist.get_rank())
    fabric = lf.Fabric(
        accelerator="cpu",
        devices=case.ranks,
        strategy=case.make_strategy(FabricMeshStrategy),
        **case.precision_arguments(),
    )
    fabric.launch()
    module = case.module()
    watch_losses(module, record, rank=rank)
    _divide_losses(module, case.accumulate_grad_batches)
    wrapped, optimizer = _set_up(fabric, module)
    loader = loader_of_rank(case, rank)
    batches = iter(loader if case.has_batches else fabric.setup_dataloaders(loader))
    note_start(record, engine_of(fabric.strategy))
    _fabric_loop(fabric, wrapped, optimizer, case=case, batches=batches, record=record)
    note_end(record, engine_of(fabric.strategy), optimizer.optimizer)
    return record


def _set_up(fabric: lf.Fabric, module: pl.LightningModule) -> tuple[Any, Any]:
    """Set a module up both ways that Fabric has: with its optimizer, or before it where it is built late."""
    if is_overridden("configure_model", module):
        with fabric.init_module(empty_init=True):
            module.configure_model()
        wrapped = fabric.setup_module(module, move_to_device=False)
        return wrapped, fabric.setup_optimizers(_only_optimizer(module))
    wrapped, optimizer = fabric.setup(module, _only_optimizer(module))
    return wrapped, optimizer


def _divide_losses(module: pl.LightningModule, window: int) -> None:
    """Divide the loss inside the module, in the dtype it was computed in: what Fabric hands out is float32 at most."""
    method = module.training_step

    @functools.wraps(method)
    def divided(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        loss = loss_of(method(*args, **kwargs))
        return None if loss is None else torch.div(loss, window)

    module.__dict__["training_step"] = divided


def _only_optimizer(module: pl.LightningModule) -> Optimizer:
    made = module.configure_optimizers()
    if not isinstance(made, Optimizer):
        raise ConfigError(
            f"configure_optimizers of {type(module).__name__} returns {type(made).__name__}, and a Fabric loop is compared "
            "with a single optimizer. Return one without a scheduler, or use loop='trainer'."
        )
    return made


def _fabric_loop(
    fabric: lf.Fabric, module: Any, optimizer: Any, *, case: Case, batches: Iterator[Any], record: Record
) -> None:
    window, engine = case.accumulate_grad_batches, engine_of(fabric.strategy)
    for index in range(case.num_batches):
        batch = next(batches)
        last = (index + 1) % window == 0
        with fabric.no_backward_sync(module, enabled=not last):
            loss = module.training_step(batch, index)
            if loss is None:
                raise ConfigError(f"training_step returned no loss for batch {index}, and the Fabric loop needs one.")
            fabric.backward(loss)
        if not last:
            continue
        fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
        record.add_gradients(engine.parameters_by_name, step=index // window)
        if case.gradient_clip_val is not None:
            argument = "max_norm" if case.gradient_clip_algorithm == "norm" else "clip_val"
            bound = {argument: case.gradient_clip_val}
            fabric.clip_gradients(module, optimizer, **bound)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
