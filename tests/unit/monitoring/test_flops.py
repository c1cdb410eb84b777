from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from meshbolt.errors import UnsupportedError
from meshbolt.monitoring.flops import CountFlops, Flops

BATCH, HEADS, LENGTH, FEATURES = 2, 3, 16, 8
ATTENTION = 4 * BATCH * HEADS * LENGTH * LENGTH * FEATURES


def counted(forward: Any) -> Flops:
    with CountFlops() as counter:
        loss = forward().sum()
        counter.in_backward = True
        loss.backward()
    return counter.counted


def test_a_linear_layer_takes_two_operations_forwards_and_four_backwards_for_each_weight() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(11, 5, requires_grad=True)
    assert counted(lambda: layer(x)) == Flops(model=6 * 35 * 11, model_causal=6 * 35 * 11, hardware=6 * 35 * 11)


def test_what_needs_no_gradient_takes_none() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(11, 5)
    assert counted(lambda: layer(x)).model == 4 * 35 * 11


def test_convolutions_are_counted_as_torch_does() -> None:
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    with FlopCounterMode(display=False) as torchs:
        layer(x).sum().backward()
    assert counted(lambda: layer(x)).model == torchs.get_total_flops() > 0


def attend(**options: Any) -> Any:
    query, key, value = (torch.randn(BATCH, HEADS, LENGTH, FEATURES, requires_grad=True) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(query, key, value, **options)


def test_attention_is_counted_whole_and_with_half_of_the_pairs_where_it_is_causal() -> None:
    # The hardware computes the scores once more for the backward pass.
    again = ATTENTION / 2
    assert counted(attend()) == Flops(model=3 * ATTENTION, model_causal=3 * ATTENTION, hardware=3 * ATTENTION + again)
    assert counted(attend(is_causal=True)) == Flops(
        model=3 * ATTENTION, model_causal=1.5 * ATTENTION, hardware=3 * ATTENTION + again
    )


def test_attention_that_is_written_out_takes_the_same_for_the_model() -> None:
    query, key, value = (torch.randn(BATCH, HEADS, LENGTH, FEATURES, requires_grad=True) for _ in range(3))
    written = counted(lambda: (query @ key.transpose(-2, -1)).softmax(-1) @ value)
    assert written == Flops(model=3 * ATTENTION, model_causal=3 * ATTENTION, hardware=3 * ATTENTION)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_is_the_hardwares_alone(reentrant: bool) -> None:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    x = torch.randn(11, 5, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        return second(first(x)).square()

    plain = counted(lambda: run(x))
    with set_checkpoint_early_stop(False):
        again = counted(lambda: checkpoint(run, x, use_reentrant=reentrant))
    assert again.model == plain.model == plain.hardware == 12 * 25 * 11
    assert again.hardware == plain.hardware + 4 * 25 * 11


def test_a_step_that_communicates_is_refused_and_not_run() -> None:
    with CountFlops(), pytest.raises(UnsupportedError, match="communicates by itself"):
        torch.ops._c10d_functional.all_reduce(torch.ones(2), "sum", "no group")


def test_operations_add_up() -> None:
    one = Flops(model=1, model_causal=2, hardware=3)
    assert one + one == one * 2 == Flops(model=2, model_causal=4, hardware=6)
