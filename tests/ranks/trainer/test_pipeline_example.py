"""The batch by which a model is cut is one of the run's, and the run gets all of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.testing import RankFailure, run_ranks

SAMPLES = 24


class Net(pl.LightningModule):
    """Notes which samples it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch if isinstance(batch, (list, tuple)) else [batch]
        return self.layers(x).square().mean()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch if isinstance(batch, (list, tuple)) else [batch]
        self.seen += x[:, 0].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)

    def example(self) -> Tensor:
        return torch.ones(8, 4)


class Stream(IterableDataset[Tensor]):
    """Gives the samples anew whenever it is asked."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(samples())


class Once(IterableDataset[Tensor]):
    """Gives each sample once, whoever asks."""

    def __init__(self) -> None:
        self._left = iter(samples())

    def __iter__(self) -> Iterator[Tensor]:
        return self._left


class Batches:
    """A loader of the user's own."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(samples().split(8))

    def __len__(self) -> int:
        return SAMPLES // 8


def samples() -> Tensor:
    return torch.arange(SAMPLES).float().unsqueeze(1).expand(SAMPLES, 4)


LOADERS = {
    "samples": lambda: DataLoader(TensorDataset(samples()), batch_size=8),
    "a stream": lambda: DataLoader(Stream(), batch_size=8),
    "batches of its own": Batches,
    "samples that are given once": lambda: DataLoader(Once(), batch_size=8),
}


def fit(loader: str, example: str | None) -> list[float]:
    pipeline = PipelineParallel(2, microbatches=2, blocks="layers", example_batch=example)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=MeshStrategy(zero=0, pipeline_parallel=pipeline),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net()
    trainer.fit(module, LOADERS[loader]())
    return module.seen


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "samples that are given once"])
def test_the_first_samples_are_looked_at_and_trained_on(loader: str) -> None:
    assert run_ranks(fit, 2, loader, None, timeout=60) == [list(map(float, range(SAMPLES)))] * 2


def test_samples_that_are_given_once_need_a_batch_from_the_module() -> None:
    assert (
        run_ranks(fit, 2, "samples that are given once", "example", timeout=60)
        == [list(map(float, range(SAMPLES)))] * 2
    )
    with pytest.raises(
        RankFailure, match=r"ConfigError: pipeline_parallel has to see a batch .*Once gives each sample once"
    ):
        run_ranks(fit, 2, "samples that are given once", None, timeout=60)


def test_a_batch_that_the_module_does_not_have_is_refused() -> None:
    with pytest.raises(RankFailure, match=r"ConfigError: .*example_batch='nothing'\): Net has no such attribute"):
        run_ranks(fit, 2, "samples", "nothing", timeout=60)
