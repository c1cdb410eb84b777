from __future__ import annotations

import torch
from torch import nn

from meshbolt.strategies.directories import _owner

BODY, HEAD, BIAS = (nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (3, 2), (3,)))
NAMES = {"body.weight": BODY, "weight": HEAD, "body.weight.bias": BIAS}


def owner(key: str, *shape: int, prefix: str = "") -> nn.Parameter | None:
    return _owner(key, torch.Size(shape), {prefix: NAMES})


def test_a_tensor_belongs_to_the_parameter_whose_name_ends_its_key_or_stands_before_the_last_part() -> None:
    assert owner("average.weights.body.weight", 3, 2) is BODY
    assert owner("optimizer_states.0.state.body.weight.exp_avg", 3, 2) is BODY
    assert owner("optimizer_states.0.state.weight.exp_avg", 3, 2) is HEAD
    assert owner("state.body.weight.bias.exp_avg", 3) is BIAS


def test_a_tensor_of_another_shape_name_or_part_of_the_tree_belongs_to_none() -> None:
    assert owner("state.body.weight.step") is None
    assert owner("state.body.weight.exp_avg", 2, 3) is None
    assert owner("state.tail.exp_avg", 3, 2) is None
    assert owner("state.body.weight.exp_avg", 3, 2, prefix="optimizer") is None
