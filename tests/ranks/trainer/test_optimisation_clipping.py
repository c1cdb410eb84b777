"""Clipping, norms and hooks on gradients through the Trainer, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import grad_norm
from tests.ranks.trainer.optimisation_support import (
    STAGES,
    Net,
    assert_fits_as_alone,
    fitted,
    hsdp,
    made,
)
from tests.rows import full
from torch import Tensor, nn

import meshbolt
from meshbolt.testing import run_ranks, run_ranks_expecting


class Norms(Net):
    """Logs, in one process, what the strategy logs by itself: the norm before clipping."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if all(type(gradient) is Tensor for gradient in gradients) and not hasattr(self.trainer.strategy, "grad_norm"):
            self.log("grad_norm", nn.utils.get_total_norm(gradients).float())


def clipped_both_ways() -> None:
    for stages in (STAGES, (hsdp(1), hsdp(3))) if dist.get_world_size() == 4 else (STAGES,):
        expected = assert_fits_as_alone(Norms, stages, gradient_clip_val=0.2, accumulate_grad_batches=2, count=3)
        assert expected["metric grad_norm"] > 0.3, "clipping has nothing to do"
    assert_fits_as_alone(Net, ("zero0", "zero2"), gradient_clip_val=0.02, gradient_clip_algorithm="value")


@pytest.mark.parametrize("ranks", [2, full(4)])
def test_the_flags_clip_as_in_one_process_and_the_norm_is_logged(ranks: int) -> None:
    run_ranks(clipped_both_ways, ranks, timeout=60)


class OwnClipping(Net):
    """Clips every other step, with values of its own."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.seen.append((gradient_clip_val, gradient_clip_algorithm))
        if self.global_step % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


class FlaggedClipping(Net):
    """Clips by the values of the Trainer's flags, in every other step."""

    def configure_gradient_clipping(self, optimizer: Any, **flags: Any) -> None:
        if self.global_step % 2:
            self.clip_gradients(optimizer, **flags)


class OwnClippingByTorch(Net):
    """Clips with torch's function: its norm of sharded gradients is that of all ranks."""

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        self.seen.append(nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1))


def test_a_modules_own_clipping_clips_as_in_one_process() -> None:
    run_ranks(own_clipping, 2, timeout=60)


def own_clipping() -> None:
    assert_fits_as_alone(OwnClipping)
    assert_fits_as_alone(FlaggedClipping, ("zero1",), gradient_clip_val=0.3)
    assert_fits_as_alone(OwnClippingByTorch, ("zero0", "zero1", "zero3"))


class LightningNorms(Net):
    """Logs Lightning's own norms of all gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, norm_type=2))


def log_lightnings_norms() -> None:
    fitted(made(LightningNorms), "zero2")


def test_lightnings_grad_norm_is_refused_with_its_replacement() -> None:
    """torch cannot make a list of numbers of sharded ones; it says so in words that help nobody."""
    run_ranks_expecting(log_lightnings_norms, 2, error=meshbolt.UnsupportedError, match=r"strategy\.grad_norm")


class OwnNorms(Net):
    """Logs norms by the strategy, or in one process by Lightning's function."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not hasattr(self.trainer.strategy, "grad_norm"):
            norms = grad_norm(self, norm_type=3)
            self.seen += [norms["grad_3.0_norm_total"], norms["grad_3.0_norm/out.weight"], norms["grad_3.0_norm/scale"]]
            return
        norm = self.trainer.strategy.grad_norm
        self.seen += [norm(norm_type=3), nn.utils.get_total_norm([self.out.weight.grad], 3), self.scale.grad.norm(3)]
        assert torch.equal(norm(self), norm())
        assert norm(self.out) < norm(self)


def test_the_strategys_grad_norm_is_that_of_one_process() -> None:
    run_ranks(assert_fits_as_alone, 2, OwnNorms, timeout=60)
    run_ranks(norms_on_copies, 4, timeout=60)


def norms_on_copies() -> None:
    assert_fits_as_alone(OwnNorms, (hsdp(2),), max_epochs=1)


class Hooked(Net):
    """Hooks that change gradients after they were reduced, and count."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(("into.weight", "blocks.1.up.weight", "scale"), 0)
        for name in self.counts:
            self.get_parameter(name).register_post_accumulate_grad_hook(lambda p, name=name: self.hook(p, name))

    def hook(self, parameter: nn.Parameter, name: str) -> None:
        self.counts[name] += 1
        parameter.grad.clamp_(-0.05, 0.05)


def count_hooks() -> dict[str, dict[str, int]]:
    counts = {}
    for strategy in STAGES:
        module = made(Hooked)
        fitted(module, strategy, count=4, max_epochs=1, accumulate_grad_batches=2)
        counts[strategy] = module.counts
    return counts


def test_hooks_after_accumulation_run_once_for_each_reduction() -> None:
    """4 batches in 2 windows: stages 0 and 1 reduce once a window, 2 and 3 with every batch; whole ones once a window."""
    for counts in run_ranks(count_hooks, 2):
        for strategy, times in (("zero0", 2), ("zero1", 2), ("zero2", 4), ("zero3", 4)):
            assert counts[strategy] == {"into.weight": times, "blocks.1.up.weight": times, "scale": 2}, strategy


def test_hooks_after_accumulation_see_the_gradient_of_one_process() -> None:
    run_ranks(assert_fits_as_alone, 2, Hooked, timeout=60)


class EarlyHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].up.weight.register_hook(lambda gradient: gradient)


def fit_with_an_early_hook() -> None:
    fitted(made(EarlyHook), "zero3")


def test_hooks_that_would_never_run_are_refused() -> None:
    run_ranks_expecting(
        fit_with_an_early_hook,
        2,
        error=meshbolt.UnsupportedError,
        match=r"'blocks\.1\.up\.weight'.*register_post_accumulate",
    )
