"""What has an item for each sample is divided, whatever it is made of; what only looks like it is not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from meshbolt.pipeline import split_batch
from meshbolt.pipeline.microbatch import signature_of

X = torch.arange(8).reshape(4, 2)
NAMES = ["a", "b", "c", "d"]


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    names: list[str]
    made: int = dataclasses.field(default=3, init=False)


@pytest.mark.parametrize(
    "items",
    [
        tuple(NAMES),
        NAMES,
        np.arange(4),
        [torch.tensor(index) for index in range(4)],
        [{"boxes": torch.zeros(index, 4)} for index in range(4)],
        [torch.zeros(index + 1) for index in range(4)],
        [[1], [2, 3], [], [4]],
    ],
    ids=["tuple of names", "list of names", "array", "numbers", "targets", "ragged", "lists"],
)
def test_items_of_samples_go_with_their_samples(items: Any) -> None:
    parts = split_batch((X, items), 2)
    assert [len(part[1]) for part in parts] == [2, 2]
    assert all(type(part[1]) is type(items) for part in parts)
    again = [item for part in parts for item in part[1]]
    assert all(mine is other or mine == other for mine, other in zip(again, items, strict=True))


def test_as_many_tensors_as_samples_are_those_of_a_batch() -> None:
    x = torch.arange(2)
    assert [[each.tolist() for each in part] for part in split_batch([x, x + 2], 2)] == [[[0], [2]], [[1], [3]]]
    parts = split_batch(({"x": x}, {"y": x + 2}), 2)
    assert [(part[0]["x"].tolist(), part[1]["y"].tolist()) for part in parts] == [([0], [2]), ([1], [3])]


def test_what_has_another_length_goes_into_every_part() -> None:
    parts = split_batch({"x": X, "weights": torch.ones(3), "name": "run"}, 2)
    assert all(len(part["weights"]) == 3 and part["name"] == "run" for part in parts)


def test_mappings_and_dataclasses_keep_their_form() -> None:
    batch = defaultdict(int, x=X)
    part = split_batch(batch, 2)[0]
    assert type(part) is defaultdict
    assert part["missing"] == 0
    made = split_batch(Batch(X, NAMES), 2)[1]
    assert made.names == ["c", "d"]
    assert made.made == 3


def test_names_of_samples_do_not_make_another_form() -> None:
    assert signature_of((X, NAMES)) == signature_of((X, ["e", "f", "g", "h"]))
    assert signature_of((X, NAMES)) != signature_of((X, NAMES[:3]))
    assert signature_of({"x": X, "kind": "a"}) != signature_of({"x": X, "kind": "b"})
