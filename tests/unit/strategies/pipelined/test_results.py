"""What steps return for microbatches is what one step returns for the whole batch."""

from __future__ import annotations

import dataclasses
import pickle
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from meshbolt.pipeline import split_batch
from meshbolt.strategies.pipelined.results import detached, join_results, placed

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: Tensor
    names: list[str]


@dataclasses.dataclass
class Counted:
    x: Tensor
    count: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.x)


def same(one: Any, other: Any) -> bool:
    """Return whether two results are equal in every value, class and dtype."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, (dict, BatchEncoding)):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return same(vars(one), vars(other))
    return bool(one == other)


X = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)


@pytest.mark.parametrize(
    "whole",
    [
        X,
        {"x": X, "y": [X, (X, None)]},
        OrderedDict(b=X, a=X + 1),
        Pair(X, "word"),
        (X, [X]),
        ["a", "b", "c", "d", "e"],
        {"names": ["a", "b", "c", "d", "e"], "numbers": [1, 2, 3, 4, 5]},
        BatchEncoding({"input_ids": X, "mask": X > 3}),
        CausalLMOutput(logits=X, hidden_states=(X, X + 1)),
        Frozen(X, ["a", "b", "c", "d", "e"]),
        None,
        {"constant": torch.tensor([1, 2, 3, 4, 5, 6, 7]), "flag": True, "name": "run"},
        X.to(torch.bfloat16),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_what_was_divided_is_whole_again(whole: Any, count: int) -> None:
    parts = split_batch((X, whole), count)
    sizes = [len(part[0]) for part in parts]

    assert same(join_results([part[1] for part in parts], sizes), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_averaged_by_samples_in_their_own_dtype(dtype: torch.dtype) -> None:
    losses = [torch.tensor(value, dtype=dtype) for value in (1.0, 2.0, 6.0)]

    joined = join_results([{"loss": loss} for loss in losses], [2, 2, 1])

    assert same(joined, {"loss": torch.tensor(2.4, dtype=dtype)})
    assert same(join_results(losses, [1, 1, 1]), torch.tensor(3.0, dtype=dtype))


@pytest.mark.parametrize("value", [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float16), 0.1, torch.tensor([0.1])])
def test_equal_values_stay_as_they_are_bit_for_bit(value: Any) -> None:
    copies = [value.clone() if isinstance(value, Tensor) else float(str(value)) for _ in range(3)]

    assert same(join_results(copies, [3, 3, 2]), value)


def test_floats_that_differ_are_averaged() -> None:
    assert join_results([1.0, 4.0], [2, 1]) == 2.0
    assert torch.isnan(join_results([torch.tensor(1.0), torch.tensor(float("nan"))], [2, 1]))


@pytest.mark.parametrize(
    "values",
    [
        [torch.tensor(3), torch.tensor(4)],  # counts: nothing says whether they add up
        [3, 4],
        ["a", "b"],
        [True, False],
        [None, 1.0],
        [torch.zeros(3, 5), torch.zeros(3, 6)],  # neither samples nor equal
        [torch.zeros(2, 5), torch.zeros(2, 6)],  # samples, of different lengths
        [(1,), (1, 2)],
        [1, 1.5],
        [X[:2], "word"],
    ],
)
def test_what_has_no_common_form_is_a_value_for_each_microbatch(values: list[Any]) -> None:
    assert same(join_results(values, [2, 2]), values)


def test_lists_have_an_item_per_sample_unless_they_hold_outputs_for_all_samples() -> None:
    found = [[{"boxes": torch.zeros(count, 4)} for count in counts] for counts in ((3, 0), (1, 5), (4,))]
    assert same(join_results(found, [2, 2, 1]), [item for each in found for item in each])

    outputs = [[X[:2], X[:2] + 1], [X[2:4], X[2:4] + 1]]
    assert same(join_results(outputs, [2, 2]), [X[:4], X[:4] + 1])


def test_keys_that_some_microbatches_lack_are_joined_over_those_that_have_them() -> None:
    joined = join_results([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0), "aux": torch.tensor(5.0)}], [1, 1])

    assert same(joined, {"loss": torch.tensor(1.5), "aux": torch.tensor(5.0)})


def test_classes_are_kept_where_they_take_what_is_joined() -> None:
    maker = defaultdict(list, x=X[:2])
    assert join_results([maker, defaultdict(list, x=X[2:])], [2, 3]).default_factory is list
    assert maker["x"] is not None
    assert len(maker["x"]) == 2

    counted = join_results([Counted(X[:2]), Counted(X[2:4])], [2, 2])
    assert torch.equal(counted.x, X[:4])
    assert counted.count == 2  # not made again: what stands in each is taken

    output = join_results([CausalLMOutput(loss=torch.tensor(value), logits=X[:1]) for value in (1.0, 2.0)], [1, 1])
    assert output.loss == output["loss"] == 1.5
    assert len(output.logits) == 2


def test_arrays_are_joined_as_tensors_are() -> None:
    assert same(
        join_results([np.ones((2, 3)), np.zeros((1, 3))], [2, 1]), np.concatenate([np.ones((2, 3)), np.zeros((1, 3))])
    )
    assert join_results([np.array(1.0), np.array(4.0)], [2, 1]) == 2.0
    assert same(join_results([np.array(["a", "b"]), np.array(["c"])], [2, 1]), np.array(["a", "b", "c"]))
    counts = [np.array([3, 4, 5]), np.array([3, 4, 6])]
    assert same(join_results(counts, [2, 1]), counts)


@pytest.mark.parametrize("make", [dict, lambda **items: Pair(**{"first": items["a"], "second": items["b"]})])
def test_results_are_made_ready_to_be_sent(make: Any) -> None:
    weight = torch.ones(2, requires_grad=True)
    result = [make(a=weight * 2, b=(Frozen(weight * 3, ["x"]), "y"))]

    sent = pickle.loads(pickle.dumps(detached(result)))

    assert type(sent[0]) is type(result[0])
    inside = list(sent[0].values()) if isinstance(sent[0], dict) else list(sent[0])
    assert not inside[0].requires_grad
    assert torch.equal(inside[0], torch.full((2,), 2.0))
    assert inside[1][0].loss.device.type == "cpu"
    assert result[0][0 if isinstance(result[0], tuple) else "a"].requires_grad  # the step's own is untouched
    assert placed(sent, "meta")[0][0 if isinstance(sent[0], tuple) else "a"].device.type == "meta"
