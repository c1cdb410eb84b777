"""Ranks that use different parameters in one backward are told so; those that lack the same gradients go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from tests.ranks.engine_support import engine_of
from tests.rows import full
from torch import Tensor, nn

from meshbolt.engine import Engine
from meshbolt.errors import TopologyError
from meshbolt.testing import RankFailure, run_ranks, run_ranks_expecting


class Block(nn.Module):
    """Two layers of equal size, of which a batch may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, way: str) -> Tensor:
        if "l" in way:
            x = self.left(x)
        return self.right(x) if "r" in way else x


class Net(nn.Module):
    """Blocks, each a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, ways: list[str]) -> Tensor:
        for block, way in zip(self.blocks, ways, strict=True):
            if way:
                x = block(x, way)
        return x


def step(engine: Engine, optimizer: torch.optim.Optimizer, ways: list[str]) -> None:
    torch.manual_seed(dist.get_rank())
    loss = engine.call(lambda x: engine.module(x, ways).square().mean(), torch.randn(2, 4, dtype=torch.float64))
    with engine.backward(loss) as prepared:
        prepared.backward()
    engine.step(optimizer)
    optimizer.zero_grad()


def train(stage: int, steps: list[Callable[[int], list[str]]]) -> None:
    torch.manual_seed(3)
    module = Net().double()
    engine = engine_of(module, stage)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for ways in steps:
        step(engine, optimizer, ways(dist.get_rank()))


ALL = ["lr", "lr", "lr"]
MATCH = r"different parameters in one backward: rank \d has no gradient .* 'blocks\.0\.(left|right)\.weight'.*, and 1 of the 2"


@pytest.mark.parametrize("stage", [0, full(1), full(2), 3])
def test_ranks_that_use_different_parameters_are_told(stage: int) -> None:
    steps = [lambda _: ALL, lambda rank: ["l" if rank else "r", "lr", "lr"]]
    run_ranks_expecting(train, 2, stage, steps, error=TopologyError, match=MATCH, timeout=30)


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 3])
def test_a_change_on_one_rank_alone_ends_the_run(stage: int) -> None:
    steps = [lambda _: ["l", "lr", "lr"], lambda rank: ["r" if rank else "l", "lr", "lr"]]
    with pytest.raises(RankFailure, match=MATCH):
        run_ranks(train, 2, stage, steps, timeout=60)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_all_ranks_leave_out_may_change_from_step_to_step(stage: int) -> None:
    steps = [ALL, ["l", "lr", "lr"], ["r", "", "lr"], ["r", "", "lr"], ALL, ["", "lr", "l"]]
    run_ranks(train, 2, stage, [lambda _, ways=ways: ways for ways in steps], timeout=30)
