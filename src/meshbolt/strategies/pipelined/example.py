"""A batch like those of a run, to find out how its steps are cut before the first one comes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from meshbolt.engine.random_state import Snapshot
from meshbolt.errors import ConfigError
from meshbolt.pipeline import PipelineParallel
from meshbolt.strategies.compat import loader_of_run, transferred
from meshbolt.strategies.examples import first_batch


def example_batch(trainer: pl.Trainer, setting: PipelineParallel) -> Any:
    """Return a batch as a step of the run will get it.

    What is drawn or counted to make it, is drawn and counted again for the first one of the run.

    Args:
        trainer: about to run; of its loader's data only the first samples are read.
        setting: may name what gives a batch.

    Raises:
        ConfigError: there is none to be had without taking it from the run.
    """
    before = Snapshot.take(trainer.strategy.root_device)
    try:
        named = _named(trainer.lightning_module, setting)
        return transferred(trainer, _found(loader_of_run(trainer)) if named is None else named)
    finally:
        before.restore()


def _named(module: pl.LightningModule, setting: PipelineParallel) -> Any:
    if setting.example_batch is None:
        return None
    found = getattr(module, setting.example_batch, None)
    if found is None:
        raise ConfigError(
            f"PipelineParallel(example_batch={setting.example_batch!r}): {type(module).__name__} has no such attribute. Define "
            "a method of that name, which returns a batch as the training loader gives it."
        )
    return found() if callable(found) else found


def _found(loader: Any) -> Any:
    if isinstance(loader, CombinedLoader):
        loader = loader.iterables
    if isinstance(loader, Mapping):
        return {key: _found(each) for key, each in loader.items()}
    if isinstance(loader, (list, tuple)) and any(isinstance(each, DataLoader) for each in loader):
        return [_found(each) for each in loader]
    batch = first_batch(loader)
    if batch is not None:
        return batch
    is_plain = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    source = loader.dataset if is_plain else loader
    iterator = iter(source) if hasattr(source, "__iter__") else None
    if iterator is None or iterator is source or iterator is iter(source):
        raise ConfigError(
            "pipeline_parallel has to see a batch before training, to find out how the model is cut, and "
            f"{type(source).__name__} gives each sample once. Name a method of the module that returns a batch: "
            'PipelineParallel(example_batch="example_batch").'
        )
    if not is_plain:
        return next(iterator)
    if loader.batch_size is None:
        return loader.collate_fn(next(iterator))
    return loader.collate_fn(list(itertools.islice(iterator, loader.batch_size)))
