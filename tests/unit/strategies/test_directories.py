from __future__ import annotations

import torch
from torch import nn

from meshbolt.config import Settings, resolve
from meshbolt.precision import precision_policy
from meshbolt.strategies.directories import _owner, _random_state_for, left_out_of

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


def random_state_for(coordinate: int, *, ranks: int, saved: list[str]) -> tuple[str, bool]:
    plan = resolve(Settings(), world_size=ranks, precision=precision_policy("32-true"), device_type="cpu")
    return _random_state_for(coordinate, saved, plan=plan)


def test_a_rank_takes_its_own_random_state_where_as_many_have_saved_and_the_first_otherwise() -> None:
    saved = ["random.0.torch", "random.1.torch", "random.own", "state_dict.random.2.torch"]
    assert random_state_for(1, ranks=2, saved=saved) == ("random.1.", True)
    assert random_state_for(1, ranks=4, saved=saved) == ("random.0.", False)
    assert random_state_for(0, ranks=1, saved=saved) == ("random.0.", False)
    assert random_state_for(0, ranks=2, saved=["state_dict.weight"]) == ("", False)


def test_what_was_left_out_is_known_by_key_and_nothing_by_default() -> None:
    assert left_out_of("model", {"left_out": {"model": ["a", "b"]}}) == {"a", "b"}
    assert left_out_of("other", {"left_out": {"model": ["a"]}}) == set()
    assert left_out_of("model", {}) == set()
