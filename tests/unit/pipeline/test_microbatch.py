"""Batches of every form are divided along their samples, and come together again as they were."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from meshbolt.errors import ConfigError
from meshbolt.pipeline import batch_size, part_sizes, split_batch

Pair = namedtuple("Pair", ["x", "y"])
X = torch.arange(14).view(7, 2)


@dataclass
class Record:
    x: torch.Tensor
    name: str = "a"


class Encoding(UserDict[str, Any]):
    """As Hugging Face's `BatchEncoding` is one."""


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        (X, lambda part: part),
        ([X, X + 1], lambda part: part[0]),
        ((X, [X]), lambda part: part[1][0]),
        ({"a": {"b": X}}, lambda part: part["a"]["b"]),
        (OrderedDict(a=X), lambda part: part["a"]),
        (Pair(X, X), lambda part: part.y),
        (Record(X), lambda part: part.x),
        (Encoding(a=X), lambda part: part["a"]),
    ],
)
def test_a_batch_is_divided_as_equally_as_can_be_and_keeps_its_form(batch: Any, read: Any) -> None:
    parts = split_batch(batch, 4)
    assert [len(read(part)) for part in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([read(part) for part in parts]), X)
    assert {type(part) for part in parts} == {type(batch)}


def test_what_has_no_samples_goes_into_every_part() -> None:
    mask = torch.ones(3, 3)
    parts = split_batch({"x": X, "mask": mask, "scale": torch.tensor(2.0), "names": list("abcdefg"), "kind": "text"}, 2)
    assert [part["names"] for part in parts] == [["a", "b", "c", "d"], ["e", "f", "g"]]
    assert all(part["mask"] is mask and part["scale"] == 2.0 and part["kind"] == "text" for part in parts)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"7 samples cannot be divided into 8 microbatches.*microbatches=7"):
        split_batch(X, 8)


@pytest.mark.parametrize("batch", [{"name": "a"}, torch.tensor(1.0), None])
def test_a_batch_without_samples_is_refused(batch: Any) -> None:
    with pytest.raises(ConfigError, match="holds no tensor with a dim for its samples"):
        split_batch(batch, 2)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ({"weights": torch.ones(3), "x": X, "y": torch.zeros(7)}, 7),
        ({"temperature": torch.ones(1), "x": X}, 7),
        ({"weights": torch.ones(3), "x": X}, 7),
        ({"bank": torch.ones(3), "x": torch.zeros(7)}, 3),
        ({"x": X, "bank": torch.ones(100, 2)}, 7),
        ((torch.tensor(0.5), torch.ones(1), [X, torch.zeros(7)]), 7),
        ((torch.zeros(7, 3, 4, 4), [{"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)}] * 7), 7),
        ({"x": X, "mask": torch.ones(3, 3), "prior": torch.ones(3), "y": torch.zeros(7)}, 7),
    ],
    ids=["class weights", "a number", "most dims", "first", "a bank", "nested", "targets", "as many"],
)
def test_samples_are_counted_by_what_most_tensors_share(batch: Any, samples: int) -> None:
    assert batch_size(batch) == samples


def test_what_comes_before_the_samples_is_not_divided() -> None:
    weights = torch.ones(3)
    parts = split_batch({"weights": weights, "x": X, "y": X[:, 0]}, 3)
    assert all(part["weights"] is weights for part in parts)
    # A part may have as many samples as there are weights: its size does not come from its tensors.
    assert [len(part["x"]) for part in parts] == part_sizes(7, 3) == [3, 2, 2]
