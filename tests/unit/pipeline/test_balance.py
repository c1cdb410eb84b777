"""Stages are as equal as units allow, with what comes before the first and after the last one counted."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshbolt.demos import ByteGPT
from meshbolt.errors import ConfigError
from meshbolt.pipeline import balanced, choose_cuts

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=3, max_size=8), st.integers(0, 40), st.integers(1, 4))
def test_no_other_choice_has_a_shorter_longest_stage(work: list[int], tail: int, stages: int) -> None:
    starts = list(itertools.accumulate(work))
    end = starts[-1] + tail

    def longest(chosen: tuple[int, ...]) -> float:
        edges = [0, *(starts[index] for index in chosen), end]
        return max(b - a for a, b in itertools.pairwise(edges))

    chosen = balanced(starts, end, stages)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == stages - 1
    assert longest(tuple(chosen)) == min(map(longest, itertools.combinations(range(len(starts)), stages - 1)))


class Uneven(nn.Module):
    """Six equal layers and a head that is as much work as all of them."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6))
        self.head = nn.Linear(64, head)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize(("head", "cuts"), [(1, ("layers.3",)), (64 * 7, ("head",)), (64 * 2, ("layers.4",))])
def test_the_head_counts(head: int, cuts: tuple[str, ...]) -> None:
    module = Uneven(head)
    assert choose_cuts(module, lambda: module(torch.ones(8, 64)), 2, device=CPU) == cuts


def test_a_place_that_cannot_be_cut_is_passed_over() -> None:
    class Skipping(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                if number == 1:
                    early = x.relu()
                x = layer(x) + (early if number == 4 else 0)  # which layers.2 to layers.4 do not get
            return self.head(x).square().mean()

    module = Skipping(1)
    assert choose_cuts(module, lambda: module(torch.ones(8, 64)), 2, device=CPU) == ("layers.5",)
    with pytest.raises(ConfigError, match=r"cannot be cut into 5 stages: 3 of its units.*\n  layers\.\d: "):
        choose_cuts(module, lambda: module(torch.ones(8, 64)), 5, device=CPU)


def test_more_stages_than_units_are_refused() -> None:
    module = ByteGPT(dim=16, num_layers=2, num_heads=2, max_length=8)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ConfigError, match="ByteGPT cannot be cut into 9 stages: 5 of its units can begin one"):
        choose_cuts(module, lambda: module.training_step((tokens, tokens), 0), 9, device=CPU)
