"""Which samples a rank sees, what random numbers its workers draw, and what is logged of them, against one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.loops_support import (
    ADVICE,
    BATCH,
    SAMPLES,
    Regressor,
    alone,
    batches,
    dataset,
    difference,
    in_order,
    metrics,
    strategy_of,
    trainer,
    weights,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanSquaredError, PearsonCorrCoef

from meshbolt import MeshStrategy, Zero
from meshbolt.testing import run_ranks

pytestmark = ADVICE
FIRST_NUMBERS = sorted(round(float(x[0]), 5) for x, _ in dataset())


class Showing(Regressor):
    """Keeps what it was shown: the first number of each sample, by which it can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, list[float]] = {"train": [], "val": []}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.shown["train"] += [round(value, 5) for value in batch[0][:, 0].tolist()]
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        self.shown["val"] += [round(value, 5) for value in batch[0][:, 0].tolist()]
        super().validation_step(batch, index)


def shown_to_a_rank(replicate: int) -> dict[str, Any]:
    module = Showing()
    owner = trainer(MeshStrategy(zero=Zero(3, replicate=replicate)), max_epochs=1, num_sanity_val_steps=0)
    owner.fit(module, batches(batch_size=2), batches(batch_size=2))
    return {**module.shown, "sampler": strategy_of(owner).distributed_sampler_kwargs}


@pytest.mark.parametrize(("ranks", "replicate"), [(3, 1), (4, 2)])
def test_every_sample_is_seen_by_one_rank_whatever_the_mesh(ranks: int, replicate: int) -> None:
    found = run_ranks(shown_to_a_rank, ranks, replicate)

    assert [rank["sampler"] for rank in found] == [{"num_replicas": ranks, "rank": rank} for rank in range(ranks)]
    for loop in ("train", "val"):
        assert sorted(number for rank in found for number in rank[loop]) == FIRST_NUMBERS
    assert found[0]["train"] != sorted(found[0]["train"], key=FIRST_NUMBERS.index)


class Stream(IterableDataset[Any]):
    """Samples without a length; each rank of several takes every n-th."""

    def __iter__(self) -> Iterator[Any]:
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        data = dataset()
        return (data[index] for index in range(rank, SAMPLES, size))


def fit_on_a_stream(make: Callable[..., pl.Trainer], batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module, owner = Regressor(), make(precision="64-true", **options)
    owner.fit(module, DataLoader(Stream(), batch_size=batch_size), DataLoader(Stream(), batch_size=batch_size))
    return {"weights": weights(module), "logs": metrics(owner), "steps": owner.global_step}


def test_an_iterable_that_the_user_divides_trains_as_one_process() -> None:
    ours = run_ranks(fit_on_a_stream, 2, trainer, BATCH, {"strategy": "zero3"})
    (theirs,) = run_ranks(fit_on_a_stream, 1, alone, 2 * BATCH, {})

    assert theirs["steps"] == 8
    for rank in ours:
        assert rank["steps"] == 8
        assert difference(rank["weights"], theirs["weights"]) <= 1e-12
        assert rank["logs"] == pytest.approx(theirs["logs"], abs=1e-12, rel=0)


class Noisy(Dataset[Any]):
    """Every item is a random number that a worker of the loader draws, as an augmentation would."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.full((7,), float(torch.rand(()))), torch.zeros(1)


def drawn_by_workers() -> list[list[float]]:
    runs = []
    for _ in range(2):
        pl.seed_everything(5, workers=True, verbose=False)
        module = Showing()
        owner = trainer("zero2", max_epochs=1, limit_train_batches=3)
        owner.fit(module, DataLoader(Noisy(), batch_size=BATCH, num_workers=1))
        runs.append(module.shown["train"])
    return runs


def test_workers_draw_other_numbers_on_each_rank_and_the_same_in_each_run() -> None:
    (first, again), (second, second_again) = run_ranks(drawn_by_workers, 2)

    assert first == again
    assert second == second_again
    assert len(set(first) | set(second)) == 2 * 3 * BATCH


class Measured(Regressor):
    """Logs metric objects, and a sum over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.correlation = PearsonCorrCoef()

    def validation_step(self, batch: Any, index: int) -> None:
        prediction, wanted = self(batch[0]).squeeze(1), batch[1].squeeze(1)
        self.error(prediction, wanted)
        self.correlation(prediction, wanted)
        self.log("error", self.error)
        self.log("correlation", self.correlation, on_epoch=True)
        self.log("samples", float(len(prediction)), reduce_fx="sum", sync_dist=True)
        self.log("largest", prediction.max(), reduce_fx="max", sync_dist=True)
        super().validation_step(batch, index)


def measured(make: Callable[..., pl.Trainer], batch_size: int, options: dict[str, Any]) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    owner = make(precision="64-true", **options)
    owner.fit(Measured().double(), in_order(batch_size=batch_size), batches(batch_size=batch_size))
    return metrics(owner)


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_metric_objects_and_reductions_are_those_of_one_process(strategy: str) -> None:
    ours = run_ranks(measured, 2, trainer, BATCH, {"strategy": strategy})
    (theirs,) = run_ranks(measured, 1, alone, 2 * BATCH, {})

    assert theirs["samples"] == SAMPLES
    for rank in ours:
        # torchmetrics keeps its sums in float32, and adds them up in the order of the ranks.
        assert rank.pop("correlation") == pytest.approx(theirs["correlation"], rel=1e-6)
        assert rank.pop("error") == pytest.approx(theirs["error"], rel=1e-6)
        assert rank == pytest.approx({name: theirs[name] for name in rank}, rel=1e-12)


def stopped_early(make: Callable[..., pl.Trainer], batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    stopping = pl.callbacks.EarlyStopping("val", patience=2, min_delta=0.5)
    module = Regressor(lr=0.3)
    owner = make(precision="64-true", max_epochs=20, callbacks=[stopping], **options)
    owner.fit(module, in_order(batch_size=batch_size), batches(batch_size=batch_size))
    return {"epoch": stopping.stopped_epoch, "best": float(stopping.best_score), "weights": weights(module)}


def test_early_stopping_ends_all_ranks_in_the_epoch_in_which_one_process_ends() -> None:
    ours = run_ranks(stopped_early, 2, trainer, BATCH, {"strategy": "zero3"})
    (theirs,) = run_ranks(stopped_early, 1, alone, 2 * BATCH, {})

    assert 2 <= theirs["epoch"] < 19
    for rank in ours:
        assert rank["epoch"] == theirs["epoch"]
        assert rank["best"] == pytest.approx(theirs["best"], rel=1e-12)
        assert difference(rank["weights"], theirs["weights"]) <= 1e-9  # 24 steps at a large rate
