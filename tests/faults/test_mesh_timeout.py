"""A rank that is stuck: those that wait for it along an axis of the mesh give up after the strategy's timeout."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy, Zero
from meshbolt.mesh import MeshAxis, MeshShape, build_mesh
from meshbolt.testing import RankFailure, run_ranks

# Each waits for a timeout, many seconds.
pytestmark = pytest.mark.full

SECONDS = 1.0
STUCK_SECONDS = 60
SHAPE = MeshShape(dp_replicate=2, dp_shard=2)


def outcomes_of(fn: Any, *args: Any) -> list[str]:
    """Return how each of four ranks ended; the default group waits much longer than an axis is to wait."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(fn, 4, *args, timeout=STUCK_SECONDS)
    return [one.message if one.raised(RuntimeError) else one.kind for one in failure.value.outcomes]


def wait_along(axis: MeshAxis) -> None:
    mesh = build_mesh(SHAPE, device_type="cpu", timeout=timedelta(seconds=SECONDS))
    dist.barrier()
    if dist.get_rank() == 3:
        time.sleep(STUCK_SECONDS)
    dist.all_reduce(torch.ones(1), group=mesh.get_group(axis.value))


@pytest.mark.parametrize(("axis", "peer"), [(MeshAxis.DP_REPLICATE, 1), (MeshAxis.DP_SHARD, 2)])
def test_a_collective_along_an_axis_gives_up_in_time_where_a_rank_is_stuck(axis: MeshAxis, peer: int) -> None:
    began = time.monotonic()
    ends = outcomes_of(wait_along, axis)

    assert "Timed out waiting 1000ms" in ends[peer]
    assert ends[3] == "stopped"
    assert time.monotonic() - began < 20


def test_the_timeout_of_a_group_that_somebody_else_made_is_left_alone() -> None:
    def wait_in_both() -> float:
        build_mesh(MeshShape(dp_replicate=1, dp_shard=2), device_type="cpu", timeout=timedelta(seconds=0.2))
        if dist.get_rank() == 1:
            time.sleep(1)
        dist.all_reduce(torch.ones(1))
        return 1.0

    assert run_ranks(wait_in_both, 2) == [1.0, 1.0]


class Stuck(pl.LightningModule):
    """Rank 3 does not come back from its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if index == 1 and self.global_rank == 3:
            time.sleep(STUCK_SECONDS)
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(debug: bool) -> None:
    os.environ["MESHBOLT_DEBUG"] = str(int(debug))
    strategy = MeshStrategy(zero=Zero(stage=2, replicate=2), timeout=timedelta(seconds=SECONDS))
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=4,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Stuck(), DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=2))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("debug", [False, True])
def test_a_fit_in_which_a_rank_is_stuck_ends_after_the_timeout_of_the_strategy(debug: bool) -> None:
    began = time.monotonic()
    ends = outcomes_of(train, debug)

    assert any("Timed out waiting 1000ms" in end for end in ends)
    assert ends[3] == "stopped"
    assert time.monotonic() - began < 25
