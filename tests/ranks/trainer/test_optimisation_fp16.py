"""Loss scaling through the Trainer: one rank's overflow is everybody's, and a skipped step leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.optimisation_support import Batch, Net, Strategy, fitted, hsdp, whole
from torch import Tensor

from meshbolt.errors import UnsupportedError
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks, run_ranks_expecting

BAD = 2  # the batch, or window, in which the gradients of one rank overflow


class Scaled(Net):
    """A module that notes all that a step may change, before each step and after."""

    manual = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = not self.manual
        self.notes: list[dict[str, Any]] = []

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        window = index // max(1, self.trainer.accumulate_grad_batches)
        loss = self.loss((batch[0].float(), batch[1].float()))
        loss = loss * (1e38 if window == BAD and dist.get_rank() == dist.get_world_size() - 1 else 1.0)
        if not self.manual:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5)
        optimizer.step()
        self.lr_schedulers().step()
        return None

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        optimizer = self.optimizers().optimizer
        self.notes.append(
            {
                "parameters": [whole(p) for p in self.parameters()],
                "moments": [whole(v) for state in optimizer.state.values() for v in state.values()],
                "rate": optimizer.param_groups[0]["lr"],
                "scale": self.trainer.precision_plugin.loss_scaler.current_scale,
                "scheduler": self.lr_schedulers().last_epoch,
            }
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ScaledByHand(Scaled):
    manual = True


def notes_of(kind: type[Scaled], strategy: Strategy, window: int) -> tuple[list[Any], int]:
    torch.manual_seed(7)
    module = kind()
    plugin = MixedPrecision("16-mixed", "cpu", init_scale=256.0, growth_interval=1000)
    clip = {} if kind.manual else {"gradient_clip_val": 0.5}
    trainer = fitted(
        module, strategy, count=5 * window, max_epochs=1, plugins=[plugin], accumulate_grad_batches=window, **clip
    )
    return module.notes[::window], trainer.precision_plugin.loss_scaler.num_skipped


def same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def one_rank_overflows(kind: type[Scaled], strategy: Strategy, window: int) -> list[float]:
    notes, num_skipped = notes_of(kind, strategy, window)
    assert num_skipped == 1
    before, after = notes[BAD], notes[BAD + 1]
    assert same(before["parameters"], after["parameters"])
    assert same(before["moments"], after["moments"])
    assert (before["scale"], after["scale"]) == (256.0, 128.0)
    if not kind.manual:
        assert (before["rate"], before["scheduler"]) == (after["rate"], after["scheduler"])
    for earlier, later in ((0, 1), (1, 2), (3, 4)):
        assert not same(notes[earlier]["parameters"], notes[later]["parameters"])
    assert all(bool(torch.isfinite(p).all()) for p in notes[-1]["parameters"])
    return [float(p.double().sum()) for p in notes[-1]["parameters"]]


@pytest.mark.parametrize("kind", [Scaled, ScaledByHand])
def test_an_overflow_on_one_rank_skips_the_step_on_all(kind: type[Scaled]) -> None:
    sums = [run_ranks(one_rank_overflows, 2, kind, stage, 1, timeout=60) for stage in ("zero0", "zero2", "zero3")]
    for by_rank in sums:
        assert by_rank[0] == by_rank[1]


def test_an_overflow_in_one_copy_of_the_shards_skips_the_step_in_both() -> None:
    by_rank = run_ranks(one_rank_overflows, 4, Scaled, hsdp(1), 2, timeout=60)
    assert all(sums == by_rank[0] for sums in by_rank)


class Continues(ScaledByHand):
    """Goes on after its step, skipped or not, in the same training_step: with a forward that needs the root."""

    def training_step(self, batch: Batch, index: int) -> None:
        super().training_step(batch, index)
        self.seen.append(float(self.loss((batch[0].float(), batch[1].float())).detach()))


def goes_on() -> None:
    for stage in ("zero1", "zero3"):
        torch.manual_seed(7)
        module = Continues()
        fitted(module, stage, count=4, max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", init_scale=256.0)])
        assert len(module.seen) == 4


def test_a_step_that_was_skipped_by_hand_leaves_the_module_usable() -> None:
    run_ranks(goes_on, 2, timeout=60)


class SkipsBatches(Net):
    """Returns nothing for one batch, which Lightning allows on one rank."""

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        return None if index == 1 else self.loss((batch[0].float(), batch[1].float()))

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        self.seen.append(float(self.trainer.callback_metrics["grad_norm"]))


def skip_a_batch() -> None:
    norms = []
    for plugins in ([MixedPrecision("16-mixed", "cpu", init_scale=256.0)], []):
        torch.manual_seed(7)
        module = SkipsBatches()
        fitted(module, "zero2", count=3, max_epochs=1, plugins=plugins, gradient_clip_val=0.1)
        norms.append(torch.tensor(module.seen))
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.:UserWarning")
def test_gradients_after_a_batch_without_loss_are_unscaled_as_ever() -> None:
    run_ranks(skip_a_batch, 1)


def skip_a_batch_alone() -> None:
    torch.manual_seed(7)
    fitted(SkipsBatches(), "zero2", count=3, max_epochs=1, gradient_clip_val=0.1)


def test_a_batch_without_loss_is_refused_where_other_ranks_would_wait() -> None:
    run_ranks_expecting(
        skip_a_batch_alone, 2, error=UnsupportedError, match=r"returned None on rank \d of 2.*0\.0 \* loss"
    )
