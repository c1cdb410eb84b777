"""A GAN: two modules, two optimizers, manual optimisation. The LightningModule is an ordinary one.

    python examples/gan.py

The generator learns to draw points of a circle.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import meshbolt  # noqa: F401  (registers the names zero0 ... zero3)


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


class CircleGAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = perceptron(8, 2)
        self.discriminator = perceptron(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        draw, judge = self.optimizers()
        fake = self.generator(torch.randn(len(real), 8, device=self.device))

        self.toggle_optimizer(draw)
        fooled = F.softplus(-self.discriminator(fake)).mean()
        draw.zero_grad()
        self.manual_backward(fooled)
        draw.step()
        self.untoggle_optimizer(draw)

        self.toggle_optimizer(judge)
        told_apart = (F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))).mean()
        judge.zero_grad()
        self.manual_backward(told_apart)
        judge.step()
        self.untoggle_optimizer(judge)

        self.log("radius", fake.detach().norm(dim=1).mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
            torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
        ]


def main() -> None:
    pl.seed_everything(1, verbose=False)
    angles = 2 * torch.pi * torch.rand(4096)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    trainer = pl.Trainer(
        strategy="zero2",
        accelerator="cpu",
        devices=2,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CircleGAN(), DataLoader(TensorDataset(circle), batch_size=64, shuffle=True))
    radius = float(trainer.callback_metrics["radius"])
    if trainer.is_global_zero:
        print(f"mean distance of the generated points from the centre: {radius:.3f} (the circle's radius is 1)")


if __name__ == "__main__":
    main()
