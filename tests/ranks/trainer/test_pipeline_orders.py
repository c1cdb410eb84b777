"""Schedules with data parallelism, where the pass that reduces gradients is not the same for all of them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.rows import full
from torch import Tensor, nn

from meshbolt import PipelineParallel, Zero
from meshbolt.testing import assert_parity

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(pl.LightningModule):
    """Blocks between an embedding and a head, which may be frozen, so that the outermost unit trains nothing."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.embed.requires_grad_(not frozen)
        self.head.requires_grad_(not frozen)
        self.double()

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, WIDTH, generator=generator, dtype=torch.float64) for _ in range(8)]


ROWS = [
    ("looped_bfs", 2, True),
    ("looped_bfs", 1, False),
    ("zbv", Zero(2, replicate=2), False),
    full("looped_bfs", 3, True),
    full("interleaved_1f1b", 2, True),
    full("interleaved_zero_bubble", 3, True),
    full("dualpipev", 2, True),
    full("zbv", Zero(3, replicate=2), True),
]


@pytest.mark.parametrize("aligned", [True, full(False)])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("schedule", "zero", "frozen"), ROWS)
def test_a_schedule_with_data_parallelism_trains_as_one_process(
    schedule: str, zero: int | Zero, frozen: bool, window: int, aligned: bool
) -> None:
    setting = PipelineParallel(2, schedule=schedule, microbatches=4, align_reductions=aligned)
    strategy = {"zero": zero, "pipeline_parallel": setting}
    steps = 4 // window
    print(
        assert_parity(
            lambda: Net(frozen), data(), strategy, ranks=4, steps=steps, accumulate_grad_batches=window, timeout=60
        )
    )
