"""Trees with tensors in them, taken apart and put together."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from meshbolt.checkpoint.tree import MARKER, join_tensors, markers, split_tensors
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
    try:
        skeleton = split_tensors(tree, "state", tensors)
    except CheckpointError:
        reject()  # keys with dots, of which two lead to one path
    assert same(join_tensors(skeleton, tensors), tree)


@pytest.mark.parametrize(
    "tree", [{"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}, {0: torch.zeros(1), "0": torch.ones(1)}]
)
def test_two_tensors_of_one_path_are_refused_by_it(tree: dict[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"path 'state\.(a\.b|0)'"):
        split_tensors(tree, "state", {})


def test_a_mapping_that_only_code_can_build_becomes_a_dict_also_an_empty_one() -> None:
    tree = {"empty": defaultdict(list), "full": defaultdict(list, {"a": [1]}), "counted": Counter(a=2)}
    found = split_tensors(tree, "state", {})
    assert [type(value) for value in found.values()] == [dict, dict, Counter]
    assert found == {"empty": {}, "full": {"a": [1]}, "counted": Counter(a=2)}


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
