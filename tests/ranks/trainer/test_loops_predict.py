"""Every sample is predicted once, as under Lightning's ddp, also where ranks have different numbers of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from meshbolt import MeshStrategy, TopologyError, UnsupportedError
from meshbolt.strategies import predicting
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE


class Predictor(Regressor):
    """Says which loader a prediction is from, and draws a random number for each."""

    def predict_step(self, batch: Any, _index: int, dataloader_idx: int = 0) -> Tensor:
        torch.rand(1)
        return self(batch[0]).double() + dataloader_idx


def predict(strategy: Any, loaders: list[tuple[int, int]], limit: float, watched: int = 64) -> dict[str, Any]:
    predicting.MOST_RANKS_WATCHED = watched
    torch.manual_seed(dist.get_rank())
    owner, module = trainer(strategy, limit_predict_batches=limit), Predictor()
    for number, parameter in enumerate(module.parameters()):
        torch.nn.init.constant_(parameter, 0.01 * number)
    data = [batches(samples, batch_size=size) for samples, size in loaders]
    found = owner.predict(module, data if len(data) > 1 else data[0])
    return {"found": found if len(data) > 1 else [found], "random": torch.rand(1), "counted": owner.num_predict_batches}


SIZES: dict[str, tuple[int, list[tuple[int, int]], float]] = {
    "a batch less on one rank": (2, [(7, 1)], 1.0),
    "batches less on two ranks of three": (3, [(13, 2)], 1.0),
    "a smaller last batch": (2, [(7, 2)], 1.0),
    "up to what only one rank has": (2, [(7, 1)], 4),
    "a share": (2, [(14, 2)], 0.5),
    "two loaders": (2, [(5, 2), (3, 1)], 1.0),
}


@pytest.mark.parametrize("strategy", ["zero0", "zero3"])
@pytest.mark.parametrize("case", SIZES)
def test_predictions_are_those_of_ddp_on_every_rank(case: str, strategy: str) -> None:
    ranks, loaders, limit = SIZES[case]
    ours = run_ranks(predict, ranks, strategy, loaders, limit, timeout=15)
    theirs = run_ranks(predict, ranks, "ddp", loaders, limit, timeout=15)

    for mine, other in zip(ours, theirs, strict=True):
        assert [len(each) for each in mine["found"]] == [len(each) for each in other["found"]]
        torch.testing.assert_close(mine["found"], other["found"], rtol=1e-12, atol=1e-12)
        assert torch.equal(mine["random"], other["random"]), "standing in leaves no trace in the random state"


def test_ranks_are_evened_out_also_where_they_are_too_many_to_be_watched() -> None:
    first, second = run_ranks(predict, 2, "zero3", [(7, 1)], 1.0, 1, timeout=15)

    assert (len(first["found"][0]), len(second["found"][0])) == (4, 3)


class Nothing(Predictor):
    """Fetches its batches itself."""

    def predict_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError("a step was made")


class Stream(IterableDataset[Any]):
    """Four samples on each rank."""

    def __iter__(self) -> Iterator[Any]:
        yield from (batches().dataset[index] for index in range(4))


@pytest.mark.filterwarnings(
    "ignore:Found `dataloader_iter` argument", "ignore:You are using the `dataloader_iter` step"
)
@pytest.mark.parametrize(
    ("module", "more", "why"),
    [(Nothing, [], "takes a dataloader_iter"), (Predictor, [Stream()], "another loader has no length")],
)
def test_what_cannot_be_evened_out_is_refused_by_every_rank(module: type[Predictor], more: list[Any], why: str) -> None:
    def attempt() -> None:
        data = [batches(7, batch_size=1), *(DataLoader(each) for each in more)]
        trainer("zero3").predict(module(), data if more else data[0])

    run_ranks_expecting(attempt, 2, error=UnsupportedError, match=rf"\[4, 3\] by rank.*{why}", timeout=10)


def without_batches() -> None:
    data = batches(4 * dist.get_rank(), batch_size=1, sampler=range(4 * dist.get_rank()))
    trainer(MeshStrategy(zero=2), use_distributed_sampler=False).predict(Predictor(), data)


def test_a_rank_with_nothing_to_predict_is_refused_by_every_rank() -> None:
    run_ranks_expecting(without_batches, 2, error=TopologyError, match=r"nothing to predict: \[0, 4\]", timeout=10)


def one_sample() -> None:
    trainer("zero2").predict(Predictor(), batches(1))


def test_fewer_samples_than_ranks_are_refused_by_every_rank() -> None:
    run_ranks_expecting(one_sample, 2, error=TopologyError, match="1 samples for 2 ranks", timeout=10)


def one_validation_sample() -> None:
    trainer("zero2", max_epochs=1).fit(Regressor(), batches(16), batches(1))


def test_too_few_samples_to_validate_are_not_said_to_be_trained_on() -> None:
    messages = run_ranks_expecting(
        one_validation_sample, 2, error=TopologyError, match="has 1 samples for 2", timeout=10
    )

    assert not any("train" in message for message in messages)
