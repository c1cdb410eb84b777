"""Ranks that share layers see the same batches: if these fail, gradients of different samples are added up in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.ranks.tensor_support import WIDTH, Net, loader, samples, strategy, trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from meshbolt import TopologyError
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
]
ALL_RANKS = "share layers or a pipeline .*, so they must see the same samples"


class Stream(IterableDataset[Any]):
    """Divided among the ranks by a rule."""

    def __init__(self, rule: str, *, batches: int = 4) -> None:
        self.rule, self.batches = rule, batches

    def __iter__(self) -> Iterator[Any]:
        rank = dist.get_rank()
        for number in range(self.batches * 2):
            part = {
                "by the global rank": rank,
                "by the data-parallel rank": rank // 2,
                "by the global rank from the second batch on": rank if number >= 2 else rank // 2,
                "in another order": 0,
                "in other shapes": 0,
            }[self.rule]
            if self.rule == "in another order" and rank == 1:
                number = number + 1 if number % 2 == 0 else number - 1
            width = WIDTH if self.rule != "in other shapes" or rank != 3 else 2 * WIDTH
            yield torch.full((width,), float(number * 10 + part)), torch.tensor(number)


class Evaluating(Net):
    def validation_step(self, batch: Any, _index: int) -> None:
        self.training_step(batch, 0)

    test_step = validation_step

    def predict_step(self, batch: Any, _index: int) -> Tensor:
        return self(batch[0])


class Indexless(Net):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


def run(what: str, rule: str) -> None:
    owner, data = trainer(), DataLoader(Stream(rule), batch_size=2)
    if what == "fit without an index":
        owner.fit(Indexless(), data)
    elif what == "fit":
        owner.fit(Net(), data)
    elif what == "validate in fit":
        owner.fit(Evaluating(), loader(8), data)
    elif what == "second loader":
        owner.validate(Two(), [loader(8), data], verbose=False)
    else:
        getattr(owner, what)(Evaluating(), data)


class Two(Net):
    def validation_step(self, batch: Any, _index: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


EVERYWHERE = ["fit", "fit without an index", "validate in fit", "validate", "test", "predict", "second loader"]


@pytest.mark.parametrize("what", EVERYWHERE)
def test_a_first_batch_that_differs_is_refused_on_every_rank_that_shares_layers(what: str) -> None:
    messages = run_ranks_expecting(run, 4, what, "by the global rank", error=TopologyError, match=ALL_RANKS)
    assert all(f"Ranks {[0, 1] if rank < 2 else [2, 3]}" in text for rank, text in enumerate(messages))
    assert all("strategy.data_parallel_rank" in text for text in messages)
    assert all("strategy.distributed_sampler_kwargs" in text for text in messages)


def test_a_dataset_that_is_divided_by_the_data_parallel_rank_is_taken() -> None:
    run_ranks(run, 4, "fit", "by the data-parallel rank")


def some_of_them(rule: str) -> str:
    try:
        run("fit", rule)
    except TopologyError as error:
        return str(error)
    except RuntimeError:
        return "the other ranks are gone"
    return "nothing"


def test_samples_in_another_order_are_found() -> None:
    first, second, *_ = run_ranks(some_of_them, 4, "in another order")
    assert first == second
    assert "other values: (2, 8) float32, (2,) int64" in first


def test_other_shapes_are_named_by_rank() -> None:
    *_, third, fourth = run_ranks(some_of_them, 4, "in other shapes")
    assert third == fourth
    assert "rank 2 has (2, 8) float32, (2,) int64; rank 3 has (2, 16) float32, (2,) int64" in third


def fit_in_debug_mode(rule: str, debug: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHBOLT_DEBUG", debug)
        run("fit", rule)


def test_debug_mode_looks_at_every_batch() -> None:
    later = "by the global rank from the second batch on"
    run_ranks(fit_in_debug_mode, 4, later, "0")
    run_ranks_expecting(fit_in_debug_mode, 4, later, "1", error=TopologyError, match="training_step at batch 1")
    run_ranks(fit_in_debug_mode, 4, "by the data-parallel rank", "1")


def own_sampler(right: bool) -> None:
    owner, data = trainer(use_distributed_sampler=False), samples(8)
    places = {"num_replicas": 4, "rank": dist.get_rank()}

    class Own(Net):
        def train_dataloader(self) -> Any:
            taken = self.trainer.strategy.distributed_sampler_kwargs if right else places
            return DataLoader(data, batch_size=1, sampler=DistributedSampler(data, **taken))

    owner.fit(Own())


def test_a_sampler_over_the_world_is_refused_and_over_data_parallel_ranks_taken() -> None:
    run_ranks(own_sampler, 4, True)
    run_ranks_expecting(own_sampler, 4, False, error=TopologyError, match=ALL_RANKS)


def drew_on_some_ranks(debug: str) -> None:
    class Drawing(Net):
        def on_train_batch_start(self, _batch: Any, index: int) -> None:
            if index == 1 and dist.get_rank() == 0:
                torch.rand(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHBOLT_DEBUG", debug)
        trainer().fit(Drawing(), loader(8))


def test_debug_mode_finds_random_states_that_have_parted() -> None:
    run_ranks(drew_on_some_ranks, 2, "0")
    run_ranks_expecting(
        drew_on_some_ranks, 2, "1", error=TopologyError, match="at training_step at batch 1 torch's random generators"
    )


def in_fabric(rule: str, debug: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHBOLT_DEBUG", debug)
        settings = strategy().settings
        own = FabricStrategy(zero=settings.zero, tensor_parallel=settings.tensor_parallel)
        fabric = Fabric(accelerator="cpu", devices=4, strategy=own)
        fabric.launch()
        module = Net()
        called, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        steps = 0
        for batch in fabric.setup_dataloaders(DataLoader(Stream(rule), batch_size=2)):
            fabric.backward(called(batch[0]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps


def test_fabric_looks_at_what_a_module_is_called_with() -> None:
    later = "by the global rank from the second batch on"
    assert run_ranks(in_fabric, 4, "by the data-parallel rank", "1") == [4] * 4
    run_ranks_expecting(
        in_fabric, 4, "by the global rank", "0", error=TopologyError, match="the forward of Net was given"
    )
    assert run_ranks(in_fabric, 4, later, "0") == [4] * 4
    run_ranks_expecting(in_fabric, 4, later, "1", error=TopologyError, match="the forward of Net was given")
