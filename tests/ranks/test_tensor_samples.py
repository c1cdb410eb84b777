"""Samples are counted by data-parallel ranks: if these fail, ranks that share layers count, see or predict a sample twice."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric, seed_everything
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, EarlyStopping
from tests.ranks.tensor_support import WIDTH, Net, loader, strategy, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, SumMetric

from meshbolt import TopologyError
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


class Counting(Net):
    """Logs the numbers of the samples that it sees, in all ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.average = SumMetric(), MeanMetric()

    def validation_step(self, batch: Any, _index: int) -> None:
        numbers = batch[1].double()
        self.log("sum", numbers.sum(), reduce_fx="sum", sync_dist=True)
        self.log("mean", numbers.mean(), sync_dist=True, batch_size=len(numbers))
        self.log("largest", numbers.max(), reduce_fx="max", sync_dist=True)
        self.total.update(numbers)
        self.average.update(numbers)
        self.log("total", self.total)
        self.log("average", self.average)
        self.seen += numbers.tolist()


def count(size: int) -> dict[str, Any]:
    owner, module = trainer(strategy(size=size)), Counting()
    (logged,) = owner.validate(module, loader(8, shuffle=False), verbose=False)
    own = owner.strategy
    gathered = module.all_gather(torch.tensor(own.data_parallel_rank))
    return {
        "logged": logged,
        "seen": module.seen,
        "place": (own.data_parallel_rank, own.data_parallel_size, own.data_parallel_group.size()),
        "gathered": gathered.tolist(),
        "all": own.reduce_boolean_decision(dist.get_rank() == 1),
        "any": own.reduce_boolean_decision(dist.get_rank() == 1, all=False),
        "everyone": own.reduce_boolean_decision(True),
        "pickled": pickle.loads(pickle.dumps(module.total.dist_sync_fn)),
        "copied": copy.deepcopy(module.total.dist_sync_fn) is module.total.dist_sync_fn,
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_sample_counts_once_in_logs_metrics_and_what_is_gathered(size: int) -> None:
    for rank, found in enumerate(run_ranks(count, 4, size)):
        wanted = {"sum": 36.0, "mean": 4.5, "largest": 8.0, "total": 36.0, "average": 4.5}
        assert found["logged"] == pytest.approx(wanted, abs=1e-12)
        assert found["place"] == (rank // size, 4 // size, 4 // size)
        assert found["gathered"] == list(range(4 // size))
        assert sorted(found["seen"]) == [n for n in range(1, 9) if (n - 1) % (4 // size) == rank // size]
        assert (found["all"], found["any"], found["everyone"]) == (False, True, True)
        assert (found["pickled"], found["copied"]) == (None, True)


def group_of_my_own() -> tuple[bool, Any]:
    module, everybody = Counting(), dist.new_group()
    module.total.process_group = everybody
    owner = trainer()
    (logged,) = owner.validate(module, loader(8), verbose=False)
    return module.total.process_group is everybody, logged["total"]


def test_a_metric_that_was_given_a_group_keeps_it() -> None:
    assert run_ranks(group_of_my_own, 4) == [(True, 72.0)] * 4


def one_metric_after_the_other() -> list[float]:
    module = Counting()
    found = [trainer(strategy(size=size)).validate(module, loader(8), verbose=False)[0]["total"] for size in (2,)]
    ours = module.total.dist_sync_fn
    other = Counting()
    other.total = module.total
    found.append(trainer("zero1").validate(other, loader(8), verbose=False)[0]["total"])
    return [*found, ours is not None, module.total.dist_sync_fn is None]


def test_a_metric_that_is_used_without_tensor_parallelism_next_looks_at_all_ranks_again() -> None:
    assert run_ranks(one_metric_after_the_other, 4) == [[36.0, 36.0, True, True]] * 4


# Prediction -----------------------------------------------------------------------------------------------------------


class Predictor(Net):
    def predict_step(self, batch: Any, _index: int) -> Tensor:
        return batch[1] + 0 * self(batch[0])[:, 0].long()


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("epoch")
        self.found: Any = None

    def write_on_epoch_end(self, _trainer: Any, _module: Any, predictions: Any, batch_indices: Any) -> None:
        self.found = (torch.cat(list(predictions)).tolist(), list(itertools.chain.from_iterable(batch_indices[0])))


def predict(count: int) -> Any:
    writer = Writer()
    owner = trainer(callbacks=[writer])
    predictions = owner.predict(Predictor(), loader(count))
    assert predictions is not None
    return torch.cat(list(predictions)).tolist(), writer.found


@pytest.mark.parametrize("count", [8, 7, 5])
def test_every_sample_is_predicted_once_by_a_data_parallel_rank_and_in_order(count: int) -> None:
    by_rank = run_ranks(predict, 4, count)
    for rank, (predictions, written) in enumerate(by_rank):
        mine = list(range(1 + rank // 2, count + 1, 2))
        assert predictions == mine
        assert written == (mine, [number - 1 for number in mine])


def predict_few(count: int) -> None:
    trainer().predict(Predictor(), loader(count))


def test_as_many_samples_as_data_parallel_ranks_are_enough() -> None:
    run_ranks(predict_few, 4, 2)
    run_ranks_expecting(predict_few, 4, 1, error=TopologyError, match="1 samples for 2 ranks")


def fit(count: int) -> int:
    module = Net()
    owner = trainer()
    owner.fit(module, loader(count, batch_size=1))
    return owner.global_step


def test_a_training_set_needs_a_sample_for_each_data_parallel_rank() -> None:
    assert run_ranks(fit, 4, 2) == [1] * 4
    run_ranks_expecting(fit, 4, 1, error=TopologyError, match="1 samples for 2 data-parallel ranks")


# Random numbers -------------------------------------------------------------------------------------------------------


class Drawing(Dataset[Any]):
    """Draws every sample anew, in a worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.randn(WIDTH), float(np.random.rand()) + random.random()


class Watching(Net):
    def training_step(self, batch: Any, _index: int) -> Tensor:
        self.seen.append((batch[0].sum().item(), batch[1].sum().item(), torch.rand(1).item()))
        return super().training_step(batch, _index)


def draw(workers: int, seed: int | None, fabric: bool) -> Any:
    if seed is not None:
        seed_everything(seed, workers=True, verbose=False)
    else:
        for one in (torch.manual_seed, np.random.seed, random.seed):
            one(dist.get_rank())
    data = DataLoader(Drawing(), batch_size=2, shuffle=True, num_workers=workers)
    module = Watching(dropout=0.5)
    if not fabric:
        trainer(strategy(zero=0)).fit(module, data)
        return module.seen
    own = Fabric(accelerator="cpu", devices=4, strategy=_in_fabric())
    own.launch()
    called, optimizer = own.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    found = []
    for batch in own.setup_dataloaders(data):
        loss = called(batch[0]).square().mean()
        own.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append((batch[0].sum().item(), batch[1].sum().item(), torch.rand(1).item()))
    return found


def _in_fabric() -> FabricStrategy:
    made = strategy(zero=0)
    return FabricStrategy(zero=made.settings.zero, tensor_parallel=made.settings.tensor_parallel)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("fabric", [False, True], ids=["trainer", "fabric"])
@pytest.mark.parametrize(("workers", "seed"), [(0, None), (0, 1), (1, 1), (1, None)])
def test_ranks_that_share_layers_draw_the_same_numbers_and_others_their_own(
    workers: int, seed: int | None, fabric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(variable, raising=False)
    first, second, third, fourth = run_ranks(draw, 4, workers, seed, fabric)
    assert first == second
    assert third == fourth
    if seed is None or workers:
        # Without workers a seed is Lightning's word that all ranks draw alike.
        assert [item[:2] for item in first] != [item[:2] for item in third]


def draw_on_rank_zero_before() -> list[float]:
    torch.manual_seed(3)
    owner, module = trainer(), Watching(dropout=0.5)
    owner.fit(module, loader(4))
    if dist.get_rank() == 0:
        torch.rand(5)
    owner.fit_loop.max_epochs = 2
    owner.fit(module, loader(4))
    return module.seen


def test_what_one_rank_drew_between_two_fits_does_not_part_ranks_that_share_layers() -> None:
    first, second, *_ = run_ranks(draw_on_rank_zero_before, 4)
    assert first == second


def stop_early() -> int:
    class Worse(Net):
        def validation_step(self, _batch: Any, _index: int) -> None:
            # Rank 3 alone finds it getting worse.
            self.log("val", float(self.current_epoch if dist.get_rank() == 3 else -self.current_epoch))

    module = Worse()
    owner = trainer(max_epochs=5, callbacks=[EarlyStopping("val", patience=0)])
    owner.fit(module, loader(4), loader(4))
    return owner.current_epoch


def test_what_one_rank_decides_all_ranks_do() -> None:
    assert len(set(run_ranks(stop_early, 4))) == 1


def after_an_exception() -> list[float]:
    class Summing(Callback):
        found: list[float]

        def on_exception(self, trainer: Any, *_: Any) -> None:
            rank = float(trainer.strategy.data_parallel_rank)
            self.found = [
                float(trainer.strategy.reduce(torch.tensor(rank), reduce_op="mean")),
                float(trainer.strategy.reduce(torch.tensor(rank), reduce_op="sum")),
                int(trainer.strategy.reduce(torch.tensor(1), reduce_op=dist.ReduceOp.SUM)),
                float(trainer.strategy.reduce(torch.tensor(rank), reduce_op=dist.ReduceOp.MAX)),
            ]

    class Failing(Net):
        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == 1:
                raise ValueError("told to")
            return super().training_step(batch, index)

    summing = Summing()
    with contextlib.suppress(ValueError):
        trainer(callbacks=[summing]).fit(Failing(), loader(8))
    return summing.found


def test_samples_count_once_also_after_an_exception() -> None:
    assert run_ranks(after_an_exception, 4) == [[0.5, 1.0, 2, 1.0]] * 4


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.own = nn.SyncBatchNorm(WIDTH), nn.SyncBatchNorm(WIDTH)

    def validation_step(self, batch: Any, _index: int) -> None:
        self(self.own(self.norm(batch[0])))


def synchronise(size: int) -> tuple[Any, bool]:
    module, everybody = Normalised(), dist.new_group()
    module.own.process_group = everybody
    trainer(strategy(size=size)).validate(module, loader(8), verbose=False)
    return module.norm.process_group and module.norm.process_group.size(), module.own.process_group is everybody


def test_synchronised_statistics_are_those_of_data_parallel_ranks() -> None:
    assert run_ranks(synchronise, 4, 2) == [(2, True)] * 4
    assert run_ranks(synchronise, 4, 1) == [(None, True)] * 4


# Fabric ---------------------------------------------------------------------------------------------------------------


def in_fabric() -> dict[str, Any]:
    fabric = Fabric(accelerator="cpu", devices=4, strategy=_in_fabric())
    fabric.launch()
    rank = torch.tensor(float(fabric.strategy.data_parallel_rank))
    ones = torch.tensor(1)
    seen = [batch[1].tolist() for batch in fabric.setup_dataloaders(loader(8))]
    return {
        "gathered": fabric.all_gather(rank).tolist(),
        "mean": fabric.all_reduce(rank.clone()).item(),
        "sum": fabric.all_reduce(ones, reduce_op="sum").item(),
        "seen": list(itertools.chain.from_iterable(seen)),
    }


def test_fabric_gathers_and_reduces_over_data_parallel_ranks() -> None:
    for rank, found in enumerate(run_ranks(in_fabric, 4)):
        assert found["gathered"] == [0, 1]
        assert (found["mean"], found["sum"]) == (0.5, 2)
        assert found["seen"] == list(range(1 + rank // 2, 9, 2))


def gather_with_gradient() -> list[float]:
    fabric = Fabric(accelerator="cpu", devices=4, strategy=_in_fabric())
    fabric.launch()
    own = torch.tensor([1.0 + fabric.strategy.data_parallel_rank], requires_grad=True)
    everybodys = fabric.all_gather(own, sync_grads=True)
    (everybodys.square().sum()).backward()
    assert own.grad is not None
    return own.grad.tolist()


def test_a_gradient_flows_back_through_what_is_gathered() -> None:
    assert run_ranks(gather_with_gradient, 4) == [[4.0]] * 2 + [[8.0]] * 2
