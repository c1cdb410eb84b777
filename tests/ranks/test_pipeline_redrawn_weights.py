"""Weights that a hook draws anew on the ranks of a pipeline: the numbers of one process, and the same for a weight of several."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.test_pipeline_checkpoint_trainer import Model
from tests.ranks.test_pipeline_whole_weights import LIMIT, PLANS, Values, data_of, trainer_of, values_of
from tests.ranks.trainer.loops_support import ADVICE
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshbolt.compat import whole_of
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.testing import run_ranks

pytestmark = [*ADVICE, pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")]


def again(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def by_init(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for number, parameter in enumerate(module.parameters()):
        if number % 2:
            nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def with_noise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.01)
        parameter.mul_(torch.rand_like(parameter))


WAYS = {"again": again, "by init": by_init, "with noise": with_noise}


class Redraws(pl.Callback):
    def __init__(self, way: str) -> None:
        self.way = way

    def on_train_batch_start(self, owner: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if owner.global_step == 1:
            torch.manual_seed(3)
            WAYS[self.way](module)


def train(name: str | None, way: str) -> tuple[Values, Tensor | None]:
    """Return all weights, and the shared one as this rank has it, if it does."""
    torch.manual_seed(5)
    if name is None:
        dist.destroy_process_group()
    owner, module = trainer_of(name, callbacks=[Redraws(way)], max_steps=2), Model().double()
    owner.fit(module, data_of(name))
    weight, found = module.head.weight, values_of(owner)
    if held_elsewhere(weight):
        return found, None
    return found, whole_of(weight) if isinstance(weight, DTensor) else weight.detach()


@functools.cache
def reference(way: str) -> Values:
    ((found, _),) = run_ranks(train, 1, None, way)
    return found


@pytest.mark.parametrize("name", ["pp2", full("pp2 dp2"), full("pp2 tp2"), full("pp4")])
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_drawn_anew_are_those_of_one_process(name: str, way: str) -> None:
    expected = reference(way)
    for found, shared in run_ranks(train, PLANS[name][0], name, way):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0.0, atol=LIMIT, msg=f"{key}: {{}}".format)
        if shared is not None:
            torch.testing.assert_close(shared, expected["head.weight"], rtol=0.0, atol=LIMIT)
