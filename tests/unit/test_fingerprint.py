from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meshbolt.fingerprint import fingerprint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]
BLOCK = 1 << 16  # elements that are looked at together


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2 * BLOCK + 7,)], ids=str)
def test_a_bit_anywhere_makes_another_number(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = drawn(dtype, *shape)
    before = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == before
    content = tensor.view(-1).view(torch.uint8)
    for place in {0, len(content) // 2, len(content) - 1}:
        for bit in (0, 7):
            content[place] ^= 1 << bit
            assert fingerprint(tensor) != before, (place, bit)
            content[place] ^= 1 << bit
    assert fingerprint(tensor) == before


def test_values_that_change_places_make_another_number() -> None:
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert fingerprint(mask) != fingerprint(1 - mask)
    long = drawn(torch.float32, 2 * BLOCK)
    assert fingerprint(long) != fingerprint(long.roll(BLOCK))
    assert fingerprint(long) != fingerprint(-long)


def test_strides_do_not_count_and_nothing_has_a_number_too() -> None:
    tensor = drawn(torch.float32, 4, 6)
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous())
    assert fingerprint(torch.empty(0, 3)) == fingerprint(torch.empty(0))
    odd = drawn(torch.bfloat16, 9)
    assert fingerprint(odd[1:]) == fingerprint(odd[1:])
    assert fingerprint(odd[1:]) != fingerprint(odd[:-1])


def test_the_generator_of_the_program_is_left_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    fingerprint(torch.ones(3))
    assert torch.equal(torch.rand(2), expected)
