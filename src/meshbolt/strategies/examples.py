"""How a run would call its module, shown on a first batch: for plans that are found by looking at the forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from meshbolt.compat import tree_map
from meshbolt.engine.random_state import Snapshot
from meshbolt.errors import ConfigError
from meshbolt.strategies.compat import loader_of_run

Example = Callable[[nn.Module], Any]
Convert = Callable[[Any], Any]
_NO_EXAMPLE = (
    "{name} has no registered plan and none of its own, and to find one its forward has to be called. Set example_input_array on "
    "the module (a tensor, or a tuple or dictionary of the forward's arguments), or give a plan: TensorParallel(plan={{pattern: "
    "style}})."
)
_NOT_SEEN = (
    "pipeline_parallel has to see a forward of the module before training, to find out how it is cut. Set example_input_array on "
    "the module (a tensor, or a tuple or dictionary of the forward's arguments), or name a method of it that returns such: "
    'PipelineParallel(example_batch="example_batch").'
)
_LOGGING = ("log", "log_dict", "print")


def example_of(
    module: nn.Module, convert: Convert, *, values: Any = None, device: torch.device | None = None
) -> Example:
    """Return a call of a module's forward, on the inputs that it says itself are examples.

    Args:
        module: with `example_input_array`, as Lightning has it, or `dummy_inputs`, as Hugging Face does.
        convert: gives a batch the dtypes of the run's precision.
        values: such inputs, where the user has named others.
        device: where the inputs are to be, with their values; None: they are shown without values.

    Raises:
        ConfigError: at the call, where it has neither.
    """

    def prepared(inputs: Any) -> Any:
        return convert(_without_values(inputs) if device is None else move_data_to_device(inputs, device))

    def call(called: nn.Module) -> Any:
        array = values if values is not None else getattr(module, "example_input_array", None)
        if array is not None:
            inputs = prepared(array)
            if isinstance(inputs, Mapping):
                return called(**inputs)
            return called(*inputs) if isinstance(inputs, tuple) else called(inputs)
        dummy = getattr(module, "dummy_inputs", None)
        if isinstance(dummy, Mapping) and dummy:
            return called(**prepared(dummy))
        raise ConfigError(_NO_EXAMPLE.format(name=type(module).__name__) if device is None else _NOT_SEEN)

    return call


def example_of_run(trainer: pl.Trainer, module: pl.LightningModule, convert: Convert) -> Example:
    """Return a call of the training_step on a batch like those of the run; without such, as `example_of`.

    Args:
        trainer: about to run; its loaders are not touched, only a dataset's first samples are read, at the call.
        module: its own.
        convert: as for `example_of`.
    """

    def call(called: nn.Module) -> Any:
        # What optimizes by itself would step optimizers that do not exist yet.
        has_own = getattr(module, "example_input_array", None) is not None or not module.automatic_optimization
        batch = None if has_own or trainer.state.fn != TrainerFn.FITTING else first_batch(loader_of_run(trainer))
        if batch is None:
            return example_of(module, convert)(called)
        with _silent(module):
            # The class's own: what somebody has put in its place, to watch, is not to see what has no values.
            return type(module).training_step(module, convert(_without_values(batch)), 0)

    return call


def first_batch(loader: Any) -> Any:
    """Return the collated first samples of a loader's data, or None where that is not a plain loader over a dataset.

    Args:
        loader: any; it is not iterated over.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    # Whatever is drawn or counted to make a batch, is to be drawn and counted again for the first one of the run.
    before, collate = Snapshot.take(torch.device("cpu")), copy.copy(loader.collate_fn)
    try:
        if loader.batch_sampler is None:
            return collate(loader.dataset[0])
        if loader.batch_size is None:
            return collate([loader.dataset[index] for index in next(iter(loader.batch_sampler))])
        count = min(loader.batch_size, len(loader.dataset))  # type: ignore[arg-type]
        return collate([loader.dataset[index] for index in range(count)])
    finally:
        before.restore()


def _without_values(tree: Any) -> Any:
    """Return tensors like those in a batch; to be called where tensors have no memory."""
    return tree_map(lambda leaf: torch.empty_like(leaf, device="cpu") if isinstance(leaf, torch.Tensor) else leaf, tree)


@contextmanager
def _silent(module: pl.LightningModule) -> Any:
    """Let nothing be logged for a while."""
    held = {name: module.__dict__.get(name) for name in _LOGGING}
    module.__dict__.update(dict.fromkeys(_LOGGING, _nothing))
    try:
        yield
    finally:
        for name, value in held.items():
            if value is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value


def _nothing(*_: Any, **__: Any) -> None:
    return None
