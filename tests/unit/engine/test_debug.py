"""If these fail, batches that differ pass for the same ones, or the same ones do not."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from meshbolt.engine.debug import _content, tensors_in

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    name: str


def test_tensors_are_found_in_whatever_a_loader_yields() -> None:
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    batch = {"a": [one, Pair(two, "text")], "b": (Record(three, "text"), 3, None), "c": Record}
    assert [tensor.numel() for tensor in tensors_in(batch)] == [1, 2, 3]


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.complex64,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (0,), (1025, 1031)])
def test_the_number_of_a_batch_depends_on_its_values_only(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    assert _content([tensor]) == _content([tensor.clone()])
    assert -(2**63) <= _content([tensor]) < 2**63
    if tensor.dim() == 2:
        assert _content([tensor]) == _content([tensor.t().contiguous().t()])
    if tensor.numel() > 1:
        offset = torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[1:].reshape(shape)
        assert _content([tensor]) == _content([offset]), "the same, from the middle of other memory"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [2, 9, 1024])
def test_one_element_more_or_less_changes_it_wherever_it_is(dtype: torch.dtype, elements: int) -> None:
    tensor = torch.arange(elements).remainder(2).to(dtype)
    numbers = {_content([tensor])}
    for index in range(elements):
        changed = tensor.clone()
        changed[index] = changed[index] == 0
        numbers.add(_content([changed]))
    assert len(numbers) == elements + 1


def test_the_order_of_samples_and_of_tensors_counts() -> None:
    x = torch.arange(12.0).view(4, 3)
    orders = {_content([x[torch.randperm(4, generator=torch.Generator().manual_seed(seed))]]) for seed in range(5)}
    assert len(orders) > 3
    assert _content([x, x + 1]) != _content([x + 1, x])
