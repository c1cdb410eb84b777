"""Divided layers that are called, or made, in ways of their own."""

from __future__ import annotations

import types
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt.errors import ConfigError
from meshbolt.tensor import TensorParallel
from meshbolt.testing import assert_parity

WIDTH = 8
PLAN = {"up": "colwise", "down": "rowwise"}


class Task(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class ByKeyword(Task):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(input=F.gelu(self.up(input=x)))


class Patched(Task):
    """Forwards that somebody has put in the place of the layers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.up.forward = types.MethodType(lambda layer, x: 2 * F.linear(x, layer.weight, layer.bias), self.up)
        self.down.forward = types.MethodType(lambda layer, x: F.linear(x, 3 * layer.weight, layer.bias), self.down)


class LowRank(nn.Linear):
    """What fine-tuning adds to a layer, in a subclass."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.first, self.second = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.second(self.first(input))


class Adapted(Task):
    def __init__(self) -> None:
        super().__init__()
        self.up = LowRank(WIDTH, 4 * WIDTH)


class Twice(Task):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + super().forward(x))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("task", [ByKeyword, Patched, Adapted, Twice])
def test_layers_that_are_called_in_ways_of_their_own_train_as_in_one_process(task: Any) -> None:
    strategy = {"zero": 1, "tensor_parallel": TensorParallel(2, plan=PLAN)}
    assert_parity(task, batches(), strategy, ranks=2, steps=3, precision="64-true")


@pytest.mark.parametrize("plan", ["traced", PLAN])
def test_what_is_called_by_keyword_is_followed(plan: Any) -> None:
    strategy = {"zero": 1, "tensor_parallel": TensorParallel(2, plan=plan)}
    assert_parity(ByKeyword, batches(), strategy, ranks=2, steps=3, precision="64-true")


class Normed(Task):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(self.up)


def test_weights_that_are_computed_are_refused_by_name_on_every_rank() -> None:
    strategy = {"zero": 1, "tensor_parallel": TensorParallel(2, plan=PLAN)}
    with pytest.raises(ConfigError, match=r"'colwise' is not for 'up'.*computed from other parameters"):
        assert_parity(Normed, batches(), strategy, ranks=2, steps=3, precision="64-true")
