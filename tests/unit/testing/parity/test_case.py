"""A comparison as it is asked for: what is refused, and which samples a rank sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from meshbolt import MeshStrategy
from meshbolt.errors import ConfigError
from meshbolt.plugins import MixedPrecision
from meshbolt.tensor import TensorParallel
from meshbolt.testing.parity.case import Case


def case(**changed: Any) -> Case:
    arguments: dict[str, Any] = {"module": nn.Identity, "data": list(range(60)), "strategy": "zero2", "ranks": 2}
    return Case(**{**arguments, **changed})


def test_batches_come_by_window_then_by_batch_then_by_rank() -> None:
    asked = case(ranks=3, steps=2, accumulate_grad_batches=2)
    assert [[asked.batch(index, rank) for rank in range(3)] for index in range(4)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9, 10, 11],
    ]


def test_samples_are_divided_so_that_every_one_is_seen_once() -> None:
    asked = case(data=TensorDataset(torch.arange(24)), ranks=2, steps=3, batch_size=4)
    seen = torch.cat([asked.batch(index, rank)[0] for index in range(3) for rank in range(2)])
    assert sorted(seen.tolist()) == list(range(24))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ranks": 0}, "ranks=0"),
        ({"steps": 0, "batch_size": -1}, "steps=0, batch_size=-1"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"loop": "raw"}, "loop='raw'"),
        ({"gradient_clip_algorithm": "size"}, "gradient_clip_algorithm='size'"),
        ({"steps": 31}, "31 steps of 1 batches on 2 ranks need 62 batches, and data has 60"),
        ({"data": TensorDataset(torch.zeros(39)), "steps": 5}, "need 40 samples, and data has 39"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_values(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        case(**changed)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bf16-mixt' is not a precision"):
        case(precision="bf16-mixt").plugin()


def test_float16_goes_through_meshbolts_plugin_since_lightning_rewrites_the_flag_on_a_cpu() -> None:
    plugin = case(precision="16-mixed").plugin()
    assert isinstance(plugin, MixedPrecision)
    assert plugin.precision == "16-mixed"
    assert case(precision="16-mixed").precision_arguments().keys() == {"plugins"}
    assert case(precision="bf16-mixed").precision_arguments() == {"precision": "bf16-mixed"}


def test_a_strategy_is_a_name_or_arguments_or_a_function() -> None:
    assert case(strategy="zero1").make_strategy(dict) == "zero1"
    assert case(strategy={"zero": 1}).make_strategy(dict) == {"zero": 1}
    made = MeshStrategy(zero=2)
    assert case(strategy=lambda: made).make_strategy(dict) is made


@pytest.mark.parametrize(
    ("strategy", "sharing"),
    [
        ("zero1", 1),
        ({"zero": 1}, 1),
        ({"tensor_parallel": 2}, 2),
        ({"tensor_parallel": TensorParallel(2)}, 2),
        ({"tensor_parallel": TensorParallel("node")}, 4),
        ("tensor_parallel", 4),
        (lambda: MeshStrategy(tensor_parallel=2), 2),
    ],
)
def test_ranks_that_share_layers_see_the_same_samples(strategy: Any, sharing: int) -> None:
    asked = case(strategy=strategy, ranks=4)
    assert (asked.sharing, asked.data_ranks) == (sharing, 4 // sharing)
    assert [asked.batch(1, rank) for rank in range(4 // sharing)] == list(range(4 // sharing, 8 // sharing))


def test_ranks_that_cannot_share_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 ranks are to see the same samples, which 3 ranks cannot do"):
        case(strategy={"tensor_parallel": 2}, ranks=3)
