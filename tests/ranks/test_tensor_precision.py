"""16 bits under tensor parallelism: one decision on overflow for all ranks. (`tests/parity` has the steps themselves.)"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.tensor_support import PLAN, Net, loader, trainer
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshbolt import MeshStrategy, TensorParallel, Zero
from meshbolt.compat import whole_of
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks

TP = TensorParallel(2, plan=PLAN)


class Trained(Net):
    def training_step(self, batch: Any, _index: int) -> Tensor:
        return (self(batch[0]).float() - batch[1].unsqueeze(1) / 8).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.03, momentum=0.9)


def fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", init_scale=256.0)


# Overflow -------------------------------------------------------------------------------------------------------------

BAD = 2  # the step in which gradients overflow


def _hurt(parameter: nn.Parameter) -> None:
    gradient = parameter.grad
    assert gradient is not None
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    if local.numel():
        local.view(-1)[0] = float("inf")


class Overflowing(Trained):
    """The gradient of one parameter overflows on one rank, in the part that this rank alone has."""

    name, rank = "", 0

    def on_after_backward(self) -> None:
        if self.trainer.global_step == BAD and dist.get_rank() == self.rank and not self.hurt:
            self.hurt = True
            _hurt(self.get_parameter(self.name))

    hurt = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append([_whole(p) for p in self.parameters()])

    def on_train_end(self) -> None:
        self.seen.append([_whole(p) for p in self.parameters()])


def _whole(parameter: nn.Parameter) -> Tensor:
    return (whole_of(parameter) if isinstance(parameter, DTensor) else parameter).detach().clone()


def overflow(zero: Any, name: str, rank: int) -> tuple[Any, float, int]:
    torch.manual_seed(7)
    module = Overflowing()
    module.name, module.rank = name, rank
    strategy = MeshStrategy(zero=zero, tensor_parallel=TP)
    owner = trainer(strategy, plugins=[fp16()], gradient_clip_val=0.5)
    owner.fit(module, loader(20, batch_size=2))
    scaler = owner.strategy.precision_plugin.loss_scaler
    return module.seen, scaler.current_scale, scaler.num_skipped


CASES = [
    (0, "blocks.0.up.weight", 3),
    (2, "blocks.0.up.weight", 3),
    (2, "blocks.1.down.weight", 0),
    (1, "blocks.1.down.bias", 2),
    full(3, "blocks.0.up.bias", 1),
    full(Zero(2, replicate=2), "blocks.0.up.weight", 1),
]


@pytest.mark.parametrize(("zero", "name", "rank"), CASES)
def test_an_overflow_in_one_ranks_part_skips_the_step_on_all(zero: Any, name: str, rank: int) -> None:
    for seen, scale, skipped in run_ranks(overflow, 4, zero, name, rank):
        assert (scale, skipped) == (128.0, 1)
        changed = [
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in itertools.pairwise(seen)
        ]
        assert changed == [index != BAD for index in range(len(changed))]
        assert all(bool(torch.isfinite(p).all()) for p in seen[-1])
        assert len(seen) == 6
