"""The run that is proved: on several ranks, under a meshbolt strategy, in a Trainer or a Fabric loop."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.fabric as lf
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.utils.data import DataLoader, default_collate

from meshbolt.engine import Engine
from meshbolt.engine.state import optimizer_state
from meshbolt.errors import ConfigError
from meshbolt.strategies import FabricMeshStrategy, MeshStrategy
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.record import Record, whole


def run_meshed(case: Case) -> Record:
    """Train on this rank, one of the case's, and return what it saw; whole tensors are complete on every rank.

    Args:
        case: with as many ranks as there are.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    seed(case.seed)
    return _with_trainer(case) if case.loop == "trainer" else _with_fabric(case)


def seed(value: int) -> None:
    """Seed all generators without a word."""
    pl.seed_everything(value, verbose=False)


def watch_losses(module: pl.LightningModule, record: Record, *, rank: int) -> None:
    """Note every loss that the module's training_step returns."""
    method, count = module.training_step, len(record.losses)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        output = method(*args, **kwargs)
        if (loss := loss_of(output)) is not None:
            record.add_loss(loss, batch=count, rank=rank)
        count += 1
        return output

    module.__dict__["training_step"] = watched


def loss_of(output: Any) -> torch.Tensor | None:
    """Return the loss in what a training_step returned."""
    loss: torch.Tensor | None = output.get("loss") if isinstance(output, Mapping) else output
    return loss


# With a Trainer ---------------------------------------------------------------------------------------------------------


def _with_trainer(case: Case) -> Record:
    record, rank = Record(), dist.get_rank()
    module = case.module()
    watch_losses(module, record, rank=rank)
    plugin = case.plugin()
    precision = {"precision": case.precision} if plugin is None else {"plugins": [plugin]}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=_strategy(case, MeshStrategy),
        callbacks=[_Recorder(record)],
        use_distributed_sampler=not case.has_batches,
        **trainer_arguments(case),
        **precision,
    )
    trainer.fit(module, _loader(case, rank))
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
        _start(self._record, _engine(trainer.strategy))

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer) -> None:
        self._record.add_gradients(_engine(trainer.strategy).parameters_by_name, step=self._steps)
        self._steps += 1

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        _finish(self._record, _engine(trainer.strategy), trainer.optimizers[0])


# With Fabric ------------------------------------------------------------------------------------------------------------


def _with_fabric(case: Case) -> Record:
    record, rank = Record(), dist.get_rank()
    plugin = case.plugin()
    precision = {"precision": case.precision} if plugin is None else {"plugins": [plugin]}
    fabric = lf.Fabric(accelerator="cpu", devices=case.ranks, strategy=_strategy(case, FabricMeshStrategy), **precision)
    fabric.launch()
    module = case.module()
    watch_losses(module, record, rank=rank)
    wrapped, optimizer = _set_up(fabric, module)
    loader = _loader(case, rank)
    batches = iter(loader if case.has_batches else fabric.setup_dataloaders(loader))
    _start(record, _engine(fabric.strategy))
    _fabric_loop(fabric, wrapped, optimizer, case=case, batches=batches, record=record)
    _finish(record, _engine(fabric.strategy), optimizer.optimizer)
    return record


def _set_up(fabric: lf.Fabric, module: pl.LightningModule) -> tuple[Any, Any]:
    """Set a module up both ways that Fabric has: with its optimizer, or before it where it is built late."""
    if pl.utilities.model_helpers.is_overridden("configure_model", module):
        with fabric.init_module(empty_init=True):
            module.configure_model()
        wrapped = fabric.setup_module(module, move_to_device=False)
        return wrapped, fabric.setup_optimizers(_only_optimizer(module))
    wrapped, optimizer = fabric.setup(module, _only_optimizer(module))
    return wrapped, optimizer


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
    window, engine = case.accumulate_grad_batches, _engine(fabric.strategy)
    for index in range(case.num_batches):
        batch = next(batches)
        last = (index + 1) % window == 0
        with fabric.no_backward_sync(module, enabled=not last):
            loss = loss_of(module.training_step(batch, index))
            if loss is None:
                raise ConfigError(f"training_step returned no loss for batch {index}, and the Fabric loop needs one.")
            fabric.backward(torch.div(loss, window))
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


# With both --------------------------------------------------------------------------------------------------------------


def _strategy(case: Case, kind: type[Any]) -> Any:
    if isinstance(case.strategy, Mapping):
        return kind(**case.strategy)
    return case.strategy() if callable(case.strategy) else case.strategy


def _loader(case: Case, rank: int) -> DataLoader[Any]:
    """Return the loader of a rank; for a dataset, as a user writes it, before Lightning divides it among ranks."""
    if case.has_batches:
        batches = [case.batch(index, rank) for index in range(case.num_batches)]
        return loader_of(batches, collate=_SeedFirst(as_it_is, case.seed + rank))
    collate = _SeedFirst(default_collate, case.seed + rank)
    return DataLoader(case.data, batch_size=case.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


def loader_of(batches: list[Any], *, collate: Callable[[Any], Any]) -> DataLoader[Any]:
    """Return a loader that yields ready batches.

    Args:
        batches: in order.
        collate: called with each of them.
    """
    return DataLoader(batches, batch_size=None, collate_fn=collate)  # type: ignore[arg-type]


def as_it_is(batch: Any) -> Any:
    """Return a batch as it is, where a loader would make tensors of its numbers."""
    return batch


class _SeedFirst:
    """Starts the rank's random generators with its first batch, after all that loops draw when they start."""

    def __init__(self, collate: Callable[[Any], Any], value: int) -> None:
        self._collate, self._value, self._is_first = collate, value, True

    def __call__(self, batch: Any) -> Any:
        if self._is_first:
            seed(self._value)
            self._is_first = False
        return self._collate(batch)


def _engine(strategy: Any) -> Engine:
    if not isinstance(strategy, (MeshStrategy, FabricMeshStrategy)):
        raise ConfigError(f"{type(strategy).__name__} is not a MeshStrategy, and only that can be compared.")
    return strategy.engine


def _start(record: Record, engine: Engine) -> None:
    record.initial = {name: whole(parameter) for name, parameter in engine.parameters_by_name.items()}


def _finish(record: Record, engine: Engine, optimizer: Optimizer) -> None:
    engine.settle()
    names = {parameter: name for name, parameter in engine.parameters_by_name.items()}
    saved = optimizer_state(optimizer, names)
    record.parameters = {name: whole(parameter) for name, parameter in engine.parameters_by_name.items()}
    record.add_optimizer(saved["state"], saved["param_groups"])
    record.add_buffers(engine.module.named_buffers(), rank=dist.get_rank())
    record.optimizer = type(optimizer).__name__
    record.accumulates_rounded = engine.plan.stage.reduces_every_batch and engine.plan.mesh.dp_replicate == 1
