"""The reference itself: what it computes can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from meshbolt.testing.parity.simulated import SimulatedRanks


class Line(nn.Module):
    """A product with a weight, a buffer that counts calls, and a random number."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.weight * x).sum()


def simulated(
    module: nn.Module, *, ranks: int = 2, used: Callable[[nn.Parameter], torch.dtype] | None = None
) -> SimulatedRanks:
    used_dtype = used if used is not None else (lambda parameter: parameter.dtype)
    return SimulatedRanks(
        module, ranks=ranks, seed=torch.manual_seed, used_dtype=used_dtype, sharded=set(module.parameters())
    )


def one_batch(module: Line, ranks: SimulatedRanks, inputs: list[float], *, last: bool, rounded: bool = False) -> None:
    ranks.new_batch()
    for rank, x in enumerate(inputs):
        with ranks.playing(rank):
            module(torch.tensor([x])).backward()
    ranks.reduce(last=last, rounded=rounded)


def test_the_gradient_is_the_mean_over_ranks_and_the_sum_over_the_window() -> None:
    module = Line(torch.float64)
    ranks = simulated(module)
    one_batch(module, ranks, [1.0, 3.0], last=False)
    assert module.weight.grad is None
    one_batch(module, ranks, [5.0, 7.0], last=True)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [2.0 + 6.0]


def test_a_rank_without_a_gradient_counts_as_zero_and_none_at_all_stays_none() -> None:
    module = Line(torch.float64)
    ranks = simulated(module)
    ranks.new_batch()
    with ranks.playing(1):
        module(torch.tensor([4.0])).backward()
    ranks.reduce(last=True, rounded=False)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [2.0]
    module.weight.grad = None
    ranks.new_batch()
    ranks.reduce(last=True, rounded=False)
    assert module.weight.grad is None


def test_every_rank_has_buffers_and_random_numbers_of_its_own_and_the_parameters_come_back() -> None:
    module = Line(torch.float64)
    weight, ranks = module.weight, simulated(module)
    ranks.new_batch()
    drawn: list[list[float]] = [[], []]
    for rank in (0, 1, 1, 0):
        with ranks.playing(rank):
            assert module.weight is not weight
            module(torch.ones(1))
            drawn[rank].append(torch.rand(()).item())
    assert module.weight is weight
    assert [dict(ranks.buffers(rank))["calls"].item() for rank in (0, 1)] == [2.0, 2.0]
    for rank in (0, 1):
        torch.manual_seed(rank)
        assert drawn[rank] == [torch.rand(()).item(), torch.rand(()).item()]


def test_sixteen_bit_gradients_are_averaged_in_float32() -> None:
    module = Line(torch.float32)
    ranks = simulated(module, used=lambda _: torch.bfloat16)
    # 256 + 1 needs nine bits, and bfloat16 has eight.
    one_batch(module, ranks, [256.0, 1.0], last=True)
    assert module.weight.grad is not None
    assert module.weight.grad.dtype is torch.float32
    assert module.weight.grad.tolist() == [128.5]


@pytest.mark.parametrize(("rounded", "expected"), [(False, 130.0), (True, 128.0)])
def test_a_window_of_bfloat16_gradients_is_rounded_at_its_end_or_with_every_batch(
    rounded: bool, expected: float
) -> None:
    module = Line(torch.bfloat16)
    ranks = simulated(module)
    # A mean of 128 and twice 0.5: bfloat16 keeps steps of 1 there, and rounds halves to the even neighbour.
    one_batch(module, ranks, [128.0, 128.0], last=False, rounded=rounded)
    for index in range(3):
        one_batch(module, ranks, [0.5, 0.5], last=index == 2, rounded=rounded)
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [expected]
