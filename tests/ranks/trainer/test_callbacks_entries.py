"""Calls of the module, its parts and its generate() from every hook, and whole parameters to read and to change."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.loops_support import (
    ADVICE,
    BATCH,
    Regressor,
    alone,
    batches,
    difference,
    in_order,
    strategy_of,
    trainer,
    weights,
    whole,
)
from torch import Tensor, nn

from meshbolt.testing import run_ranks

pytestmark = ADVICE
SAMPLE = torch.linspace(-1, 1, 14).reshape(2, 7)


class Body(nn.Module):
    """A model inside the LightningModule, with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(7, 7)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 7)) for _ in range(3))
        self.norm = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)

    def generate(self, x: Tensor, *, steps: int) -> Tensor:
        for _ in range(steps):
            x = self(x).tanh()
        return x


HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_optimizer_step",
    "on_after_backward",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "on_test_start",
    "on_test_epoch_end",
    "on_predict_end",
)


class Generating(pl.LightningModule):
    """Calls itself, its body and parts of it from every hook."""

    def __init__(self, *, calls: bool) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(7, 1)
        self.calls = calls
        self.heard: dict[str, dict[str, Tensor]] = {}
        self.reference: dict[str, dict[str, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def generate(self, x: Tensor) -> Tensor:
        return self.head(self.body.generate(x, steps=2))

    def training_step(self, batch: Any, _index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    validation_step = test_step = training_step

    def predict_step(self, batch: Any, _index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def answers(self) -> dict[str, Tensor]:
        asked = {
            "unit": self.body.blocks[1](SAMPLE),
            "forward": self(SAMPLE),
            "generate": self.generate(SAMPLE),
            "body": self.body(SAMPLE),
            "body generate": self.body.generate(SAMPLE, steps=3),
            "part of the root": self.body.norm(self.body.inp(SAMPLE)),
        }
        return {name: answer.detach().clone() for name, answer in asked.items()}

    def listen(self, hook: str) -> None:
        if self.calls and hook not in self.heard:
            self.heard[hook] = self.answers()
            plain = Generating(calls=False)
            plain.load_state_dict({name: whole(value) for name, value in self.state_dict().items()})
            self.reference[hook] = plain.answers()


def _hook(name: str) -> Any:
    def called(self: Generating, *_: Any) -> None:
        self.listen(name)

    return called


for hook_name in HOOKS:
    setattr(Generating, hook_name, _hook(hook_name))


def everything(strategy: str, calls: bool) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module = Generating(calls=calls)
    owner = trainer(strategy, accumulate_grad_batches=2, num_sanity_val_steps=0, gradient_clip_val=1.0)
    owner.fit(module, batches(), batches())
    owner.test(module, batches(), verbose=False)
    owner.predict(module, batches())
    module.listen("after all")
    return {"heard": module.heard, "reference": module.reference, "weights": weights(module)}


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_calls_from_every_hook_answer_as_whole_weights_do_and_do_not_disturb_training(strategy: str) -> None:
    calling = run_ranks(everything, 2, strategy, True)
    silent = run_ranks(everything, 2, strategy, False)

    for rank in calling:
        assert rank["heard"].keys() == {*HOOKS, "after all"}
        apart = {hook: difference(rank["heard"][hook], rank["reference"][hook]) for hook in rank["heard"]}
        assert {hook: value for hook, value in apart.items() if value > 1e-6} == {}
        assert difference(rank["weights"], silent[0]["weights"]) == 0


class Editing(Regressor):
    """Changes whole weights and whole optimizer state once, after the first epoch."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch > 0:
            return
        optimizer = self.optimizers(use_pl_optimizer=True)
        if self.trainer.world_size == 1:
            state = {name: self.optimizers().state[p] for name, p in self.named_parameters()}
            self.edit(state)
            return
        with strategy_of(self.trainer).gathered(self, optimizer=optimizer) as state:
            assert self.head.weight.shape == (1, 10)
            self.edit(state)
            if self.global_rank == 1:
                with torch.no_grad():
                    self.head.bias.fill_(1e6)  # what rank 0 has made of it counts
                    self.scale.fill_(7.0)

    @torch.no_grad()
    def edit(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.head.weight[:, ::2] = 0.25
        self.scale.fill_(0.5)
        self.blocks[1][0].weight.copy_(self.blocks[1][0].weight.sort(dim=0).values)
        state["blocks.0.0.weight"]["exp_avg"].copy_(state["blocks.0.0.weight"]["exp_avg"].flip(0))
        state["head.bias"]["exp_avg_sq"].fill_(4.0)


def edited(make: Any, batch_size: int, options: dict[str, Any]) -> dict[str, Tensor]:
    pl.seed_everything(0, verbose=False)
    module = Editing()
    make(precision="64-true", max_epochs=3, **options).fit(module, in_order(batch_size=batch_size))
    return weights(module)


@pytest.mark.parametrize("strategy", ["zero0", "zero2", "zero3"])
def test_whole_weights_and_optimizer_state_are_changed_as_in_one_process(strategy: str) -> None:
    ours = run_ranks(edited, 2, trainer, BATCH, {"strategy": strategy})
    (theirs,) = run_ranks(edited, 1, alone, 2 * BATCH, {})

    for rank in ours:
        assert difference(rank, theirs) <= 1e-12
