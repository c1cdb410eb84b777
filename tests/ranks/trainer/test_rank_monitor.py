"""The rank that others wait for is named, and why, while training goes on."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.ranks.trainer.loops_support import ADVICE, Regressor, dataset, trainer
from tests.rows import full
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.callbacks import RankMonitor, ThroughputMonitor
from meshbolt.errors import ConfigError
from meshbolt.monitoring import CATALOGUE, read_records
from meshbolt.testing import run_ranks

pytestmark = [
    *ADVICE,
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]

SLOW, SECONDS, EVERY, STEPS = 1, 0.1, 3, 19


class SlowAt(Regressor):
    """Takes longer in one place on one rank."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def pause(self, place: str) -> None:
        if place == self.place and dist.get_rank() == SLOW:
            time.sleep(SECONDS)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.pause("forward")
        loss = super().training_step(batch, index)
        loss.register_hook(lambda _gradient: self.pause("backward"))
        return loss


class SlowData(Dataset[Any]):
    """Samples that take their time on one rank."""

    def __init__(self, module: SlowAt, batch: int) -> None:
        self.module, self.samples, self.batch = module, dataset(), batch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if self.module.place == "data" and dist.get_rank() == SLOW:
            time.sleep(SECONDS / self.batch)
        return self.samples[index]


def train(place: str, folder: str, strategy: Any, others: bool) -> tuple[dict[str, Any], list[str]]:
    module = SlowAt(place)
    monitor = RankMonitor(every=EVERY, directory=folder)
    callbacks = [monitor, ThroughputMonitor(every=EVERY, directory=folder)] if others else [monitor]
    owner = trainer(strategy, callbacks=callbacks, max_steps=STEPS, max_epochs=-1)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        owner.fit(module, DataLoader(SlowData(module, 3), batch_size=3))
    return monitor.latest, [str(each.message) for each in heard if "keeps the others waiting" in str(each.message)]


@pytest.mark.parametrize(
    ("place", "part", "strategy", "others"),
    [
        ("forward", "compute", "zero2", True),
        ("data", "data wait", "zero3", False),
        full("backward", "compute", "zero0", False),
        full("data", "data wait", MeshStrategy(zero=0, pipeline_parallel=PipelineParallel(2, microbatches=3)), False),
    ],
    ids=["forward-beside-another-monitor", "data", "backward", "data-of-a-pipeline"],
)
def test_the_slow_rank_is_named_with_its_part_and_by_how_much(
    place: str, part: str, strategy: Any, others: bool, tmp_path: Path
) -> None:
    results = run_ranks(train, 2, place, str(tmp_path), strategy, others)
    for latest, _ in results:
        assert (latest["ranks/slowest_rank"], latest["ranks/slowest_part"]) == (SLOW, part)
        # On a machine with more to do than it can, either rank takes longer for the rest of the step, too.
        assert SECONDS * 0.4 < latest["ranks/behind_seconds"] < SECONDS * 2.5
        assert latest.keys() <= CATALOGUE.keys()
    assert results[0][0] == results[1][0]
    (warned,), others_warned = results[0][1], results[1][1]
    assert warned.startswith(f"Rank {SLOW} (")
    assert f"It differs in {part}." in warned
    assert others_warned == []
    records = [each for each in read_records(tmp_path) if each["rank"] == 0]
    assert [each["step"] for each in records if each["kind"] == "ranks"] == [*range(EVERY, STEPS, EVERY)]
    assert [each["values"]["text"] for each in records if each["kind"] == "event"] == [warned]


def even(folder: str) -> list[str]:
    return train("nowhere", folder, "zero2", False)[1]


@pytest.mark.full
def test_ranks_that_are_alike_are_not_warned_of(tmp_path: Path) -> None:
    """On a busy machine one may be behind now and then, but not the same one again and again."""
    assert run_ranks(even, 2, str(tmp_path))[1] == []


def test_a_part_of_a_step_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="warn=0"):
        RankMonitor(warn=0)
