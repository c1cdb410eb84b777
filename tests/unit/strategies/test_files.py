from __future__ import annotations

import pytest
import torch
from torch import nn

from meshbolt import CheckpointError, UnsupportedError
from meshbolt.strategies.files import load_optimizer_states

WEIGHT = nn.Parameter(torch.zeros(2))
NAMES = {WEIGHT: "weight"}


def state(key: object) -> dict[str, object]:
    group = {"params": ["weight"], "lr": 0.5, "momentum": 0.0, "dampening": 0, "weight_decay": 0, "nesterov": False}
    return {"state": {key: {"momentum_buffer": torch.ones(2)}}, "param_groups": [group]}


def test_every_optimizer_gets_its_state() -> None:
    optimizer = torch.optim.SGD([WEIGHT], lr=0.1)

    load_optimizer_states([optimizer], [state("weight")], NAMES)

    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(optimizer.state[WEIGHT]["momentum_buffer"], torch.ones(2))


def test_another_number_of_optimizers_is_refused_with_both_numbers() -> None:
    with pytest.raises(CheckpointError, match="2 optimizers, this run has 1"):
        load_optimizer_states([torch.optim.SGD([WEIGHT])], [state("weight"), state("weight")], NAMES)


def test_state_by_number_is_refused_with_the_way_to_take_the_weights() -> None:
    with pytest.raises(UnsupportedError, match="load_from_checkpoint"):
        load_optimizer_states([torch.optim.SGD([WEIGHT])], [state(0)], NAMES)
