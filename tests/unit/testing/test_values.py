"""Values travel between processes as bytes: equal, compact, or refused by name."""

from __future__ import annotations

import threading
from collections import OrderedDict

import pytest
import torch

from meshbolt.testing.values import dump, load


def test_nested_tensors_arrive_equal_in_dtype_and_shape():
    value = {"a": [torch.arange(6).reshape(2, 3).t(), (torch.tensor(1.5, dtype=torch.bfloat16), None)], "n": 3}
    arrived = load(dump(value))
    assert torch.equal(arrived["a"][0], value["a"][0])
    assert arrived["a"][1][0].dtype is torch.bfloat16
    assert arrived["a"][1][0] == 1.5
    assert arrived["n"] == 3


def test_a_tensor_with_a_graph_arrives_as_its_values():
    weight = torch.nn.Parameter(torch.ones(2))
    arrived = load(dump(OrderedDict(grown=weight * 3, weight=weight)))
    assert torch.equal(arrived["grown"], torch.full((2,), 3.0))
    assert not arrived["grown"].requires_grad


def test_a_small_view_does_not_drag_its_storage_along():
    assert len(dump(torch.zeros(1_000_000)[:3])) < 10_000


def test_shapes_without_values_travel_too():
    assert load(dump(torch.empty(3, 4, device="meta"))).shape == (3, 4)


def test_what_cannot_be_pickled_is_refused_by_name():
    with pytest.raises(TypeError, match=r"a value of type dict cannot travel between processes: .*lock"):
        dump({"lock": threading.Lock()})
