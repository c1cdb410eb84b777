"""Automatic optimisation through the Trainer, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ranks.trainer.optimisation_support import SHARDED, STAGES, Batch, Net, assert_fits_as_alone, hsdp
from torch import Tensor

import meshbolt
from meshbolt.testing import run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_stage_fits_as_one_process(ranks: int) -> None:
    run_ranks(assert_fits_as_alone, ranks, Net, timeout=60)


def windows_of_every_kind() -> None:
    strategies = (*SHARDED, hsdp(1), hsdp(2), hsdp(3))
    # Windows of 3 batches in an epoch of 4: the second is short, and Lightning still divides by 3.
    expected = assert_fits_as_alone(Net, strategies, count=4, accumulate_grad_batches=3)
    assert expected["steps"] == 4


def test_accumulation_with_a_short_last_window_fits_as_one_process() -> None:
    run_ranks(windows_of_every_kind, 4, timeout=60)


class Groups(Net):
    """Two groups of parameters that differ in everything, and a scheduler that takes a step with every batch."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append([group["lr"] for group in self.optimizers().param_groups])
        return super().training_step(batch, index)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "lr": 0.02, "weight_decay": 0.3}, {"params": others, "betas": (0.5, 0.9)}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.01], total_steps=8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class PerEpoch(Groups):
    """A scheduler that takes a step with every epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.3)]


class Plateau(Groups):
    """A scheduler that looks at a logged metric."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def rates_change(kind: type[Groups]) -> None:
    expected = assert_fits_as_alone(kind, STAGES, count=2, max_epochs=4)
    rates = [rates for name, rates in expected.items() if name.startswith("seen")]
    assert len(rates) == 8
    assert rates[0] != rates[-1]


@pytest.mark.parametrize("kind", [Groups, PerEpoch, Plateau])
def test_groups_and_schedulers_set_the_rates_of_one_process(kind: type[Groups]) -> None:
    run_ranks(rates_change, 2, kind, timeout=60)


class OneEmptyStep(Net):
    """A step whose loss depends on a part of the module, and one that depends on another."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss if index != 1 else self.blocks[1](self.into(batch[0])).square().mean()


def test_layers_that_a_step_does_not_use_keep_still_as_in_one_process() -> None:
    run_ranks(assert_fits_as_alone, 2, OneEmptyStep, timeout=60)


class OwnHooks(Net):
    """Every hook around the optimizer's step that a module may take over."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.seen.append("zero")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.seen.append("backward")
        (2 * loss).backward(*args, **kwargs)

    def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
        self.seen.append("step")
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (index + 1)
        optimizer.step(closure=closure)

    def optimizer_zero_grad(self, epoch: int, index: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def on_after_backward(self) -> None:
        # The sum of a sharded gradient is a number of all ranks.
        self.seen.append(sum(p.grad.sum() for p in self.parameters() if p.dim() and p.grad is not None))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)


def test_hooks_that_a_module_takes_over_do_what_they_do_in_one_process() -> None:
    run_ranks(assert_fits_as_alone, 2, OwnHooks, timeout=60)


class CallsFromHooks(Net):
    """Calls itself from hooks, with gradients on, and changes weights there: nothing of it goes through training_step."""

    def probe(self) -> None:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
        self.seen.append(self(x).detach().sum())
        self.seen.append(self.shift.detach().sum())

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        self.probe()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.probe()

    def on_train_epoch_end(self) -> None:
        self.probe()
        with torch.no_grad():
            self.into.weight.mul_(0.5)
            self.blocks[1].up.weight.clamp_(-0.1, 0.1)
        self.probe()


def calls_from_hooks() -> None:
    assert_fits_as_alone(CallsFromHooks)
    assert_fits_as_alone(CallsFromHooks, accumulate_grad_batches=2)


def test_a_module_that_calls_itself_from_hooks_fits_as_one_process() -> None:
    run_ranks(calls_from_hooks, 2, timeout=60)


class EditsItself(Net):
    """Normalises weights at the start of each step, and clamps others after each batch."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        with torch.no_grad():
            self.into.weight.copy_(self.into.weight / self.into.weight.norm())
            self.blocks[0].down.weight.mul_(0.9)
        return super().training_step(batch, index)

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        for parameter in (self.shift, self.blocks[2].up.bias, self.out.weight):
            parameter.data.clamp_(-0.2, 0.2)


def edits_itself() -> None:
    assert_fits_as_alone(EditsItself)
    assert_fits_as_alone(EditsItself, accumulate_grad_batches=2)


def test_weights_that_a_module_changes_by_hand_stay_changed() -> None:
    run_ranks(edits_itself, 2, timeout=60)


class Looks(Net):
    """Reads whole parameters and the norm of the gradients before its forward and after it."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        strategy = self.trainer.strategy
        if not isinstance(strategy, meshbolt.MeshStrategy):
            return super().training_step(batch, index)
        with strategy.gathered(self.into):
            assert self.into.weight.shape == (10, 6)
        if index % 2 == 0:
            strategy.grad_norm()
        loss = super().training_step(batch, index)
        with strategy.gathered(self.blocks[1]):
            assert self.blocks[1].up.weight.shape == (13, 10)
        return loss + 0 * self.shift.sum()


def looks() -> None:
    assert_fits_as_alone(Looks, accumulate_grad_batches=2, count=6)


def test_whole_parameters_and_norms_can_be_read_inside_of_a_step() -> None:
    run_ranks(looks, 2, timeout=60)
