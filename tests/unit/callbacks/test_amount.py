from __future__ import annotations

from typing import Any

import pytest
import torch

from meshbolt.callbacks.amount import Amount, amount_in


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
