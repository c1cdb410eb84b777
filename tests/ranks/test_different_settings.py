"""Ranks that were told different things say so on every rank, before they train; they do not hang or part in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelPruning
from tests.ranks.test_bad_input import fit, never_trains
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer
from torch import nn

from meshbolt import ConfigError, MeshStrategy, Recompute, TopologyError, UnsupportedError, Zero
from meshbolt.fabric import MeshStrategy as FabricMeshStrategy
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE


def mine(*by_rank: Any) -> Any:
    return by_rank[dist.get_rank() % len(by_rank)]


def fp16(scale: float) -> Any:
    return MeshStrategy(zero=2, precision_plugin=MixedPrecision("16-mixed", "cpu", init_scale=scale))


def in_fabric() -> None:
    Fabric(strategy=FabricMeshStrategy(zero=mine(1, 2)), accelerator="cpu", devices=2).launch()


CASES: dict[str, tuple[int, Callable[[], None], str]] = {
    "stages that train differently": (2, lambda: fit(mine("zero1", "zero2")), r"zero\.stage is \[1, 2\]"),
    "no shards on one rank": (2, lambda: fit(mine("zero0", "zero1")), r"zero\.stage is \[0, 1\]"),
    "copies": (
        4,
        lambda: fit(MeshStrategy(zero=Zero(3, replicate=mine(1, 2)))),
        r"zero\.replicate is \[1, 2, 1, 2\]",
    ),
    "units": (
        2,
        lambda: fit(MeshStrategy(zero=Zero(3, unit=mine("Linear", "auto")))),
        r"zero\.unit is \['Linear', 'auto'\]",
    ),
    "recompute": (
        2,
        lambda: fit(MeshStrategy(recompute=Recompute("full", mine(1, 2)))),
        r"recompute\.every is \[1, 2\]",
    ),
    "precision": (
        2,
        lambda: fit(precision=mine("32-true", "bf16-mixed")),
        r"precision\.flag is \['32-true', 'bf16-mixed'\]",
    ),
    "a loss scale": (2, lambda: fit(fp16(mine(1024.0, 2048.0))), r"precision\.current_scale is \[1024\.0, 2048\.0\]"),
    "windows": (
        2,
        lambda: fit(accumulate_grad_batches=mine(1, 2)),
        r"Trainer\(accumulate_grad_batches\) is \[1, 2\]",
    ),
    "Fabric": (2, in_fabric, r"zero\.stage is \[1, 2\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_with_different_settings_are_refused_before_training(case: str) -> None:
    ranks, attempt, match = CASES[case]

    messages = run_ranks_expecting(never_trains(attempt), ranks, error=TopologyError, match=match, timeout=10)

    assert len(messages) == ranks


def with_variable(name: str, *by_rank: str) -> None:
    os.environ[name] = mine(*by_rank)
    fit()


@pytest.mark.parametrize(("name", "row"), [("MESHBOLT_DEBUG", "debug"), ("MESHBOLT_FAST_PATH", "fast_path")])
def test_ranks_with_different_switches_are_refused_before_training(name: str, row: str) -> None:
    attempt = never_trains(lambda: with_variable(name, "0", "1"))

    run_ranks_expecting(attempt, 2, error=TopologyError, match=rf"{row} is \[False, True\]", timeout=10)


def with_callback_on_one_rank() -> None:
    fit(callbacks=mine([], [ModelPruning("l1_unstructured", amount=0.5)]))


ON_ONE_RANK: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "a malformed switch": (lambda: with_variable("MESHBOLT_DEBUG", "1", "yes"), ConfigError, "MESHBOLT_DEBUG='yes'"),
    "a callback": (with_callback_on_one_rank, UnsupportedError, "ModelPruning"),
}


@pytest.mark.parametrize("case", ON_ONE_RANK)
def test_what_one_rank_finds_wrong_is_raised_by_all(case: str) -> None:
    attempt, error, match = ON_ONE_RANK[case]

    run_ranks_expecting(never_trains(attempt), 2, error=error, match=match, timeout=10)


class Other(nn.Linear):
    """A layer with the parameters of another class."""


def other_classes() -> None:
    module = Regressor()
    kind = mine(nn.Linear, Other)
    module.inp, module.head = kind(7, 10), kind(10, 1)
    fit(MeshStrategy(zero=Zero(3, unit=["Linear"])), module)


def test_modules_that_differ_in_their_classes_only_are_refused() -> None:
    run_ranks_expecting(
        never_trains(other_classes), 2, error=TopologyError, match="Ranks gather different units: .*head", timeout=10
    )


def second_fit() -> str:
    owner, module = trainer("zero2", max_epochs=1), Regressor()
    owner.fit(module, batches(), batches())
    owner.fit_loop.max_epochs = mine(2, 3)
    with pytest.raises(TopologyError, match=r"Trainer\(max_epochs\) is \[2, 3\]") as raised:
        owner.fit(module, batches(), batches())
    return str(raised.value)


def test_flags_that_were_changed_on_one_rank_are_refused_by_the_next_fit() -> None:
    first, second = run_ranks(second_fit, 2, timeout=15)

    assert first == second
