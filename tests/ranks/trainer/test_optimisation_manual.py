"""Manual optimisation through the Trainer, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.ranks.trainer.optimisation_support import (
    Batch,
    Block,
    Net,
    assert_fits_as_alone,
    hsdp,
    whole,
)
from tests.rows import full
from torch import Tensor, nn

from meshbolt.testing import run_ranks


class Manual(Net):
    """One optimizer, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        # The next forward of the same batch sees the step, here and in nested calls.
        self.log("after", self.loss(batch).detach(), on_step=False, on_epoch=True, sync_dist=True)
        self.log("again", F.mse_loss(self(batch[0]).detach(), batch[1]), on_step=False, on_epoch=True, sync_dist=True)


class TwoStepsPerBatch(Manual):
    """Several steps within one batch, each from the weights that the one before left."""

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Windows(Manual):
    """A window of two batches, by hand; the first is inside `strategy.accumulate()` where there is one."""

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers()
        if index % 2 == 0:
            optimizer.zero_grad()
            if hasattr(self.trainer.strategy, "accumulate"):
                with self.trainer.strategy.accumulate():
                    self.manual_backward(self.loss(batch) / 2)
            else:
                self.manual_backward(self.loss(batch) / 2)
            return
        self.manual_backward(self.loss(batch) / 2)
        optimizer.step()


class PlainWindows(Manual):
    """A window of two batches without a word to the strategy: every backward is taken for the window's last."""

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


class TwoLosses(Manual):
    """One forward, two backwards over the same graph, then one step."""

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        hidden = self.into(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        self.manual_backward(F.mse_loss(self.out(hidden) * self.scale, batch[1]), retain_graph=True)
        self.manual_backward(hidden.square().mean() + self.shift.square().sum())
        optimizer.step()


class Clipped(Manual):
    """Clipping by hand, by norm and by value in turn; the log has the norm."""

    def training_step(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        algorithm, value = (("norm", 0.3), ("value", 0.05))[index % 2]
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
        largest = max(whole(p.grad).abs().max() for p in self.parameters_of_optimizer())
        self.seen.append(largest)
        optimizer.step()

    def parameters_of_optimizer(self) -> list[nn.Parameter]:
        return [p for group in self.optimizers().param_groups for p in group["params"]]


class Scheduled(Manual):
    """A scheduler stepped by hand."""

    def training_step(self, batch: Batch, index: int) -> None:
        super().training_step(batch, index)
        self.lr_schedulers().step()
        self.seen.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.RMSprop(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7)]


@pytest.mark.parametrize(
    "kind", [full(Manual), TwoStepsPerBatch, Windows, full(PlainWindows), TwoLosses, full(Clipped), Scheduled]
)
def test_manual_optimisation_fits_as_one_process(kind: type[Manual]) -> None:
    run_ranks(assert_fits_as_alone, 2, kind, timeout=60)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(10, 6)

    def forward(self, noise: Tensor) -> Tensor:
        for block in self.blocks:
            noise = block(noise)
        return self.out(noise)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.gain = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x) * self.gain


class Gan(Net):
    """Two modules, two optimizers: each trains on a loss that goes through both, with the other one toggled off."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("into", "blocks", "out", "scale", "shift"):
            delattr(self, name)
        self.automatic_optimization = False
        self.generator, self.discriminator = Generator(), Discriminator()

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: Batch, index: int) -> None:
        real = batch[0]
        noise = torch.cat([real, real[:, :4]], dim=1)
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.discriminator_is_off()
        self.generator_step(first, noise)
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        self.discriminator_step(second, real, noise)
        self.untoggle_optimizer(second)

    def discriminator_is_off(self) -> None:
        self.seen.append([p.requires_grad for p in self.discriminator.parameters()])

    def generator_step(self, optimizer: Any, noise: Tensor) -> None:
        score = self.discriminator(self(noise))
        loss = F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("generator", loss, sync_dist=True)

    def discriminator_step(self, optimizer: Any, real: Tensor, noise: Tensor) -> None:
        truth, fake = self.discriminator(real), self.discriminator(self(noise).detach())
        loss = F.softplus(-truth).mean() + F.softplus(fake).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("discriminator", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.9))
        return first, torch.optim.Adam(self.discriminator.parameters(), lr=1e-2, betas=(0.5, 0.9))


class OneForward(Gan):
    """What is generated once serves both steps; the first backward has to leave the graph for the second."""

    def training_step(self, batch: Batch, index: int) -> None:
        real = batch[0]
        first, second = self.optimizers()
        fake = self(torch.cat([real, real[:, :4]], dim=1))
        truth = F.softplus(-self.discriminator(real)).mean()
        second.zero_grad()
        self.manual_backward(truth + F.softplus(self.discriminator(fake.detach())).mean())
        # Both losses go through the generator's one graph.
        first.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean(), retain_graph=True)
        self.manual_backward(0.1 * fake.square().mean())
        first.step()
        second.step()


class WeightClipping(Gan):
    """Weights of the discriminator are clamped by hand after its step, as Wasserstein GANs do."""

    def discriminator_step(self, optimizer: Any, real: Tensor, noise: Tensor) -> None:
        super().discriminator_step(optimizer, real, noise)
        for parameter in self.discriminator.parameters():
            parameter.data.clamp_(-0.2, 0.2)


@pytest.mark.parametrize("kind", [Gan, OneForward, WeightClipping])
def test_two_modules_with_two_optimizers_fit_as_one_process(kind: type[Gan]) -> None:
    run_ranks(assert_fits_as_alone, 2, kind, timeout=60)


def test_two_copies_of_the_shards_train_by_hand_as_one_process() -> None:
    run_ranks(both_kinds_on_copies, 4, timeout=60)


def both_kinds_on_copies() -> None:
    for kind in (Windows, Gan):
        assert_fits_as_alone(kind, (hsdp(1), hsdp(2), hsdp(3)), max_epochs=1)
