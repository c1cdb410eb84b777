"""`assert_parity` as a user calls it: on a module of their own, in every form the arguments may take."""

from __future__ import annotations

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from meshbolt import MeshStrategy, Zero
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import ParityError, assert_parity

Pair = tuple[Tensor, Tensor]


class Regression(pl.LightningModule):
    """Draws from all generators, clips by itself, logs, and scales its batches as a user may."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 1))

    def on_after_batch_transfer(self, batch: Pair, dataloader_idx: int) -> Pair:
        x, y = batch
        return x * torch.rand(()), y

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        x, y = batch
        noise = random.random() + np.random.rand()
        loss = ((self.layers(x) * noise - y) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **_: object) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plain(Regression):
    """What a Fabric loop can run, and the Trainer can clip."""

    on_after_batch_transfer = pl.LightningModule.on_after_batch_transfer
    configure_gradient_clipping = pl.LightningModule.configure_gradient_clipping

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Faulty(Plain):
    """Adds to its loss on the second rank."""

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + dist.get_rank() * self.layers[0].bias.sum()


class Manual(Plain):
    """Optimizes manually."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Pair, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]


def samples(count: int = 80) -> Dataset[Pair]:  # type: ignore[type-var]
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


def batches(count: int = 30) -> list[Pair]:
    x = torch.randn(count, 4, 3, generator=torch.Generator().manual_seed(0))
    return list(zip(x, x.sum(2, keepdim=True), strict=True))


def test_a_module_trains_under_a_preset_as_in_one_process() -> None:
    report = assert_parity(Regression(), samples(), "zero3", ranks=2)
    assert {c.quantity: c.count for c in report.comparisons} == {
        "initial": 4,
        "losses": 10,
        "gradients": 20,
        "parameters": 4,
        "optimizer_state": 12,
        "settings": 9,
        "buffers": 0,
    }


def test_the_module_the_generators_and_the_data_are_left_as_they_were() -> None:
    module, data = Regression(), batches()
    before = [p.detach().clone() for p in module.parameters()], torch.get_rng_state(), [x.clone() for x, _ in data]
    assert_parity(module, data, "zero1", ranks=2)
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before[0], strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(torch.equal(x, old) for (x, _), old in zip(data, before[2], strict=True))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "strategy", [{"zero": Zero(stage=2)}, lambda: MeshStrategy(zero=2)], ids=["arguments", "function"]
)
def test_a_strategy_may_be_arguments_or_a_function(strategy: object) -> None:
    assert_parity(Regression, batches(), strategy, ranks=2, steps=2)  # type: ignore[arg-type]


def test_windows_clipping_and_precision_are_given_as_to_the_trainer() -> None:
    assert_parity(
        Plain,
        batches(),
        "zero2",
        ranks=2,
        steps=3,
        accumulate_grad_batches=2,
        precision="16-mixed",
        gradient_clip_val=0.01,
        gradient_clip_algorithm="value",
    )


def test_a_precision_may_be_a_function_that_makes_a_plugin() -> None:
    plugin = lambda: MixedPrecision("bf16-mixed", "cpu", autocast=False)  # noqa: E731
    assert_parity(Plain, batches(), "zero2", ranks=2, precision=plugin)


@pytest.mark.parametrize("data", [samples(), batches()], ids=["samples", "batches"])
def test_a_fabric_loop_is_compared_too(data: object) -> None:
    assert_parity(Plain, data, "zero2", ranks=2, loop="fabric", gradient_clip_val=0.1)  # type: ignore[arg-type]


def test_a_fault_is_an_assertion_error_that_names_what_differs_first() -> None:
    with pytest.raises(ParityError, match=r"losses: batch 0 on rank 1: .* instead of") as caught:
        assert_parity(Faulty, batches(), "zero2", ranks=2)
    assert isinstance(caught.value, AssertionError)
    assert "strategy='zero2' on 2 ranks with precision='32-true' in a trainer loop" in str(caught.value)


def test_a_module_that_optimizes_manually_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Manual optimizes manually"):
        assert_parity(Manual(), batches(), "zero2", ranks=2)


def test_a_fabric_loop_refuses_schedulers() -> None:
    with pytest.raises(ConfigError, match="Fabric loop is compared with a single optimizer"):
        assert_parity(Regression, batches(), "zero2", ranks=2, loop="fabric")


def test_too_little_data_is_refused_before_a_rank_starts() -> None:
    with pytest.raises(ConfigError, match="need 40 samples, and data has 39"):
        assert_parity(Plain, samples(39), "zero2", ranks=2)


def test_another_strategy_than_meshbolts_is_refused() -> None:
    with pytest.raises(ConfigError, match="DDPStrategy is not a MeshStrategy"):
        assert_parity(Plain, batches(), "ddp", ranks=2)
