from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from meshbolt.engine.state import (
    MARKER,
    empty_like_saved,
    join_tensors,
    load_optimizer_state,
    markers,
    optimizer_state,
    split_tensors,
)
from meshbolt.errors import CheckpointError

LEAVES = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.integers(0, 5).map(lambda n: torch.full((2,), n)))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc.", min_size=1, max_size=3), inner, max_size=3),
    ),
    max_leaves=10,
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# A busy machine is slow, not wrong.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), TREES, max_size=4))
def test_a_tree_that_was_split_is_joined_to_what_it_was(tree: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    skeleton = split_tensors(tree, "state", tensors)
    assert same(join_tensors(skeleton, tensors), tree)


def test_tensors_lie_under_the_path_that_leads_to_them() -> None:
    tensors: dict[str, torch.Tensor] = {}
    tree = {"a": [torch.zeros(1), {"b": torch.ones(2)}], "c": 3}
    skeleton = split_tensors(tree, "state", tensors)
    assert list(tensors) == ["state.a.0", "state.a.1.b"]
    assert skeleton == {"a": [{MARKER: "state.a.0"}, {"b": {MARKER: "state.a.1.b"}}], "c": 3}
    assert markers(skeleton) == ["state.a.0", "state.a.1.b"]


def test_a_marker_without_its_tensor_is_an_error_that_names_it() -> None:
    with pytest.raises(CheckpointError, match=r"'state\.gone'"):
        join_tensors({"x": {MARKER: "state.gone"}}, {})


def made(*shapes: tuple[int, ...]) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return torch.optim.AdamW(params, lr=0.1), {parameter: f"p{index}" for index, parameter in enumerate(params)}


def test_state_is_keyed_by_name_and_comes_back() -> None:
    optimizer, names = made((2,), (3,))
    for parameter in names:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer_state(optimizer, names)
    assert set(saved["state"]) == {"p0", "p1"}
    assert saved["param_groups"][0]["params"] == ["p0", "p1"]
    other, others_names = made((2,), (3,))
    other.param_groups[0]["lr"] = 7.0
    load_optimizer_state(other, saved, others_names)
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["params"] == list(others_names)
    for parameter, name in others_names.items():
        assert torch.equal(other.state[parameter]["exp_avg"], saved["state"][name]["exp_avg"])


def test_a_fresh_optimizer_has_no_state_and_gets_none() -> None:
    optimizer, names = made((2,))
    assert optimizer_state(optimizer, names)["state"] == {}
    assert len(optimizer.state) == 0


def test_groups_that_differ_are_refused_with_the_difference() -> None:
    optimizer, names = made((2,), (3,))
    saved = optimizer_state(optimizer, names)
    other, others_names = made((2,))
    with pytest.raises(
        CheckpointError, match=r"groups of \[2\] parameters, this run's has \[1\].*only there: \['p1'\]"
    ):
        load_optimizer_state(other, saved, others_names)


def test_room_for_a_saved_tensor_has_its_shape_and_dtype() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    for shape in (torch.Size([2, 3]), torch.Size([])):
        room = empty_like_saved(shape, torch.float64, parameter)
        assert (room.shape, room.dtype) == (shape, torch.float64)
    assert empty_like_saved(torch.Size([4]), torch.int64, None).shape == (4,)
