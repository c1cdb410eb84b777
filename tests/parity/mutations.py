"""Modules that train wrongly on several ranks, and rightly in one process: each has one fault that parity must find."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from tests.parity import models
from torch import Tensor, nn


def _on_several_ranks() -> bool:
    return dist.get_world_size() > 1


class RoundedMoments(models.Task):
    """Keeps the optimizer's moments in bfloat16."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        if _on_several_ranks():
            optimizer.register_step_post_hook(_round_state)
        return optimizer


def _round_state(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() > 0:
                value.copy_(value.bfloat16())


class GradientTwice(models.Task):
    """Counts the gradient of one parameter of one element twice."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # A callback's hook runs first and notes the gradients, so that this shows in what is done with them.
        if _on_several_ranks():
            self.network.scale.grad.mul_(2)


class LossTwice(models.Task):
    """Counts the gradient of one batch twice, though its loss is reported once."""

    def training_step(self, batch: models.Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = super().training_step(batch, batch_idx)["loss"]
        twice = _on_several_ranks() and batch_idx == 1
        return {"loss": loss + (loss - loss.detach() if twice else 0)}


class BatchLost(models.Task):
    """Loses the gradient of the second batch, on one rank or on all, though its loss is reported."""

    ranks = range(8)

    def training_step(self, batch: models.Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = super().training_step(batch, batch_idx)["loss"]
        lost = _on_several_ranks() and batch_idx == 1 and dist.get_rank() in self.ranks
        return {"loss": loss.detach() + 0 * loss if lost else loss}


class BatchLostOnOneRank(BatchLost):
    """Loses the gradient of one batch on one rank."""

    ranks = range(1, 2)


class GradientNotReduced(models.Task):
    """Uses a rank's own gradient of a parameter where the mean over the ranks belongs."""

    def on_after_backward(self) -> None:
        if _on_several_ranks():
            self.network.scale.grad.mul_(1 + 1e-3 * dist.get_rank())


class LateStart(models.Task):
    """Starts from other weights, by a little, in one element."""

    def on_fit_start(self) -> None:
        if _on_several_ranks():
            with torch.no_grad():
                self.bias.add_(1e-5)


class LastRateDoubled(models.Task):
    """Changes the learning rate after the last step, so that no parameter and no loss shows it."""

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if _on_several_ranks() and batch_idx + 1 == self.trainer.num_training_batches:
            self.trainer.optimizers[0].param_groups[0]["lr"] *= 2


class StatisticsOfRankZero(models.Task):
    """Takes BatchNorm's statistics of rank 0, as DistributedDataParallel does with the buffers of a module."""

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        if _on_several_ranks():
            for buffer in _statistics(self):
                dist.broadcast(buffer, src=0)


class SameDropout(models.Task):
    """Draws the same dropout masks on every rank."""

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        if _on_several_ranks():
            torch.manual_seed(batch_idx)


def _statistics(module: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in module.buffers() if buffer.is_floating_point())
