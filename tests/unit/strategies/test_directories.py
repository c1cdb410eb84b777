from __future__ import annotations

import pytest
import torch
from torch import nn

from meshbolt.config import Settings, resolve
from meshbolt.pipeline.taint import Foreign
from meshbolt.precision import precision_policy
from meshbolt.strategies.directories import (
    _digest,
    _owner,
    _random_state_for,
    _trained_elsewhere,
    buffers_of,
    left_out_of,
)

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


def test_state_of_any_shape_belongs_to_a_parameter_that_another_stage_holds_and_to_no_other() -> None:
    foreign = nn.Parameter(Foreign().like(BODY, device=torch.device("cpu")))
    parameters = {"optimizer.": {"weight": foreign, "bias": BIAS}, "other.": {"weight": HEAD}}
    key = "optimizer.state.weight.step"
    assert _trained_elsewhere(key, "weight", parameters) is foreign
    assert _trained_elsewhere(key, None, parameters) is None
    assert _trained_elsewhere("optimizer.state.bias.step", "bias", parameters) is None
    assert _trained_elsewhere("other.state.weight.step", "weight", parameters) is None


def random_state_for(coordinate: int, *, ranks: int, saved: list[str]) -> tuple[str, bool]:
    plan = resolve(Settings(), world_size=ranks, precision=precision_policy("32-true"), device_type="cpu")
    return _random_state_for(coordinate, saved, plan=plan)


def test_a_rank_takes_its_own_random_state_where_as_many_have_saved_and_the_first_otherwise() -> None:
    saved = [
        "meshbolt.random.0.torch",
        "meshbolt.random.1.torch",
        "random.2.torch",
        "state_dict.meshbolt.random.2.torch",
    ]
    assert random_state_for(1, ranks=2, saved=saved) == ("meshbolt.random.1.", True)
    assert random_state_for(1, ranks=4, saved=saved) == ("meshbolt.random.0.", False)
    assert random_state_for(0, ranks=1, saved=saved) == ("meshbolt.random.0.", False)
    assert random_state_for(0, ranks=2, saved=["state_dict.weight"]) == ("", False)


def test_what_was_left_out_is_known_by_key_and_nothing_by_default() -> None:
    assert left_out_of("model", {"left_out": {"model": ["a", "b"]}}) == {"a", "b"}
    assert left_out_of("other", {"left_out": {"model": ["a"]}}) == set()
    assert left_out_of("model", {}) == set()


def test_buffers_are_what_is_no_parameter_of_any_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    module[2].weight = module[0].weight
    state = module.state_dict()
    names = {f"model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert buffers_of(module, state, key="model") == names
    assert buffers_of(module, {"1.running_var": state["1.running_var"]}, key="model") == {"model.1.running_var"}


NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.tensor(True), torch.tensor(False)),
        (torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0078125, dtype=torch.bfloat16)),
        (torch.zeros(0), torch.zeros(0, 2)),
    ],
)
def test_buffers_differ_in_any_bit_shape_or_dtype(one: torch.Tensor, other: torch.Tensor) -> None:
    assert _digest(one) != _digest(other)
    assert _digest(one) == _digest(one.clone())


def test_buffers_of_the_same_values_agree_however_they_lie_in_memory() -> None:
    assert _digest(torch.tensor([1.0, NAN])) == _digest(torch.tensor([1.0, NAN]))
    assert _digest(torch.arange(6.0).view(2, 3).t()) == _digest(torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
