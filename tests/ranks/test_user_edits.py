"""What user code does to parameters between the steps: kept, drawn as in one process, or refused, never lost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.engine_support import Net, largest_difference, made
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy, Zero
from meshbolt.errors import UnsupportedError
from meshbolt.testing import run_ranks

STAGES = [0, 1, 2, 3]
BOUND = 0.2


class Task(pl.LightningModule):
    """A net in float64; where it is edited, its subclasses say."""

    def __init__(self) -> None:
        super().__init__()
        self.net = made(Net)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.net(batch[0]).square().mean()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def clamp(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data.clamp_(-BOUND, BOUND)


class AtTheEnd(Task):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.clamp()
        return loss


class BeforeBackward(Task):
    def on_before_backward(self, loss: Tensor) -> None:
        self.clamp()


class BeforeZeroGrad(Task):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.clamp()


class AfterBackward(Task):
    def on_after_backward(self) -> None:
        self.clamp()


class BeforeStep(Task):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.clamp()


class Validating(Task):
    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.loss(batch)
        self.clamp()


class DrawsAgain(Task):
    """Layers and parameters that get new values when they are sharded already."""

    def on_train_start(self) -> None:
        torch.manual_seed(5)
        nn.init.normal_(self.net.into.weight, std=0.1)
        self.net.out.reset_parameters()
        nn.init.trunc_normal_(self.net.blocks[0].up.weight, std=0.1)
        with torch.no_grad():
            self.net.blocks[1].down.weight.add_(torch.randn_like(self.net.blocks[1].down.weight), alpha=0.01)
            self.net.blocks[2].up.bias.bernoulli_(0.5).mul_(0.1)


def fit(task: type[Task], strategy: Any, window: int, devices: int) -> Task:
    """Train on data that are the same on every rank."""
    module = task()
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 48, dtype=torch.float64).view(8, 6)), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=4,
        accumulate_grad_batches=window,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, data)
    return module


def compare(task: type[Task], zero: Zero, window: int) -> float:
    """Return how far training on ranks ends from training in one process."""
    reference = fit(task, pl.strategies.SingleDeviceStrategy("cpu"), window, 1)
    module = fit(task, MeshStrategy(zero=zero), window, 2)
    return largest_difference(module.net, reference.net)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(
    "task", [AtTheEnd, full(BeforeBackward), full(BeforeZeroGrad), AfterBackward, full(BeforeStep), full(Validating)]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_are_clamped_in_place_stay_so(task: type[Task], window: int, stage: int) -> None:
    assert max(run_ranks(compare, 2, task, Zero(stage=stage), window)) < 1e-12


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_that_are_drawn_after_sharding_are_those_of_one_process(stage: int) -> None:
    assert max(run_ranks(compare, 2, DrawsAgain, Zero(stage=stage), 1)) < 1e-12


class Assigns(Task):
    """Gives a parameter other data by assignment."""

    def __init__(self, hook: str, place: str) -> None:
        super().__init__()
        self.place = place
        setattr(self, hook, self.assign)

    def assign(self, *_: Any) -> None:
        parameter = self.net.get_parameter(self.place)
        parameter.data = parameter.data * 0.5

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.loss(batch)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("place", ["into.weight", "blocks.1.up.weight"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_data_given_by_assignment_are_refused_by_name(place: str, hook: str, stage: int) -> None:
    make: Callable[[], Task] = functools.partial(Assigns, hook, place)

    def train() -> str:
        with pytest.raises(UnsupportedError) as refused:
            fit(make, MeshStrategy(zero=stage), 1, 2)  # type: ignore[arg-type]
        return str(refused.value)

    for message in run_ranks(train, 2):
        assert f"'net.{place}' was given other data by assignment" in message
