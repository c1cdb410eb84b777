"""Modules that every stage keeps train on ranks as in one process, in every schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from tests.unit.pipeline.test_replicate import ROWS, made, trained

from meshbolt.pipeline import SCHEDULES, Pipeline, emulate
from meshbolt.testing import run_ranks

CPU = torch.device("cpu")
BATCHES = torch.randint(11, (4, 3, 5), generator=torch.Generator().manual_seed(1))
# The one with running statistics, and two stages on each rank.
SELECTED = {(2, "interleaved_1f1b")}


def on_rank(row: int, schedule: str, cuts: tuple[str, ...]) -> dict[str, Any]:
    """Return gradients and buffers of what a rank holds."""
    forward, replicate, _ = ROWS[row]
    net, _ = made(forward)
    group = dist.group.WORLD
    pipeline = Pipeline(net, cuts, schedule=schedule, microbatches=4, group=group, device=CPU, replicate=replicate)
    for step in range(2):  # the second adds to the first one's gradients
        pipeline.step(net, list(BATCHES), weights=[0.25] * 4, loss_of=lambda loss: loss, seed=step)
    pipeline.close()
    return trained(net)


@pytest.mark.parametrize(
    ("row", "schedule"),
    [
        (row, schedule) if (row, schedule) in SELECTED else full(row, schedule)
        for row in range(len(ROWS))
        for schedule in SCHEDULES
    ],
)
def test_ranks_that_keep_a_module_train_as_one_process(row: int, schedule: str) -> None:
    cuts = ("layers.2",) if SCHEDULES[schedule].single else ("layers.1", "layers.2", "layers.3")
    found = run_ranks(on_rank, 2, row, schedule, cuts, timeout=60)
    forward, _, kept = ROWS[row]
    net, _ = made(forward)
    for step in range(2):
        steps = [lambda batch=batch: net(batch) for batch in BATCHES]  # type: ignore[misc]
        emulate(net, steps, (), loss_of=lambda loss: loss / 4, seed=step)
    expected = trained(net)
    assert {name for rank in found for name in rank} == expected.keys()
    for rank in found:
        assert f"{kept}.grad" in rank
        torch.testing.assert_close(rank, {name: expected[name] for name in rank}, rtol=0.0, atol=1e-12)
