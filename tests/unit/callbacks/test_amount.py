from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from meshbolt.callbacks.amount import Amount, amount_in, tensors_in
from meshbolt.callbacks.look import form_of


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(4, 7, dtype=torch.int64), Amount(28, "tokens")),
        ((torch.zeros(4, 7, dtype=torch.int32), torch.zeros(4)), Amount(28, "tokens")),
        ({"input_ids": torch.zeros(2, 5, dtype=torch.int64), "labels": torch.zeros(2)}, Amount(10, "tokens")),
        ([torch.zeros(3, 8, 8), torch.zeros(3, dtype=torch.int64)], Amount(3, "samples")),
        ({"names": ["a", "b"], "x": torch.zeros(6, 2)}, Amount(6, "samples")),
        (torch.zeros(5, 9, dtype=torch.bool), Amount(5, "samples")),
    ],
)
def test_whole_numbers_in_two_dimensions_are_tokens_and_all_else_samples(batch: Any, expected: Amount) -> None:
    assert amount_in(batch) == expected


@pytest.mark.parametrize("batch", [None, "text", ["a", "b"], {}, torch.tensor(3)])
def test_a_batch_without_a_tensor_that_has_samples_is_not_counted(batch: Any) -> None:
    assert amount_in(batch) is None


@dataclass
class Batch:
    words: torch.Tensor
    targets: list[torch.Tensor]


def test_tensors_are_found_in_whatever_holds_them() -> None:
    tensors = [torch.zeros(2, n + 1) for n in range(4)]
    batch = UserDict(first=tensors[0], rest=Batch(tensors[1], [tensors[2]]), last=({"x": tensors[3]}, "text"))
    assert [each is other for each, other in zip(tensors_in(batch), tensors, strict=True)] == [True] * 4
    assert form_of(batch) == tuple(((2, n + 1), torch.float32) for n in range(4))
