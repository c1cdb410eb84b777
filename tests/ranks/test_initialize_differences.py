"""Ranks that give `initialize` different settings say so on every rank; they do not hang or part in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.initialize_support import Net, config, made

from meshbolt import ConfigError, TopologyError, deepspeed
from meshbolt.testing import run_ranks, run_ranks_expecting


def mine(*by_rank: Any) -> Any:
    return by_rank[dist.get_rank()]


def rates() -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"lr": mine(0.01, 0.02)}}}


def warmup(steps: int) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": steps}}}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=mine(0.1, 0.2))


def failing(parameters: Any) -> torch.optim.Optimizer:
    if dist.get_rank() == 1:
        raise ValueError("no learning rate")
    return torch.optim.SGD(parameters, lr=0.1)


def scheduler(optimizer: torch.optim.Optimizer) -> Any:
    kinds = mine(torch.optim.lr_scheduler.ConstantLR, torch.optim.lr_scheduler.LinearLR)
    return kinds(optimizer, 1.0)


def overflow() -> dict[str, Any]:
    return {"bf16": {"enabled": True, "check_grad_overflow": mine(True, False)}}


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a rate": (lambda: config(2, **rates()), TopologyError, r"optimizer\.params\.lr is \[0\.01, 0\.02\]"),
    "a clip": (lambda: config(2, clip=mine(0.0, 0.1)), TopologyError, r"gradient_clipping is \[0\.0, 0\.1\]"),
    "windows": (lambda: config(2, window=mine(2, 3)), TopologyError, r"train_batch_size is \[12, 18\]"),
    "a warm-up": (lambda: config(2, **warmup(mine(4, 8))), TopologyError, r"warmup_num_steps is \[4, 8\]"),
    "a stage": (lambda: config(mine(1, 3)), TopologyError, r"zero_optimization\.stage is \[1, 3\]"),
    "skipped steps": (lambda: config(1, **overflow()), TopologyError, r"check_grad_overflow is \[True, False\]"),
    "an unknown key": (
        lambda: config(2, **mine({}, {"gradient_cliping": 1.0})),
        ConfigError,
        "gradient_cliping",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_differ_are_refused_on_every_rank(case: str) -> None:
    block, error, match = CASES[case]

    messages = run_ranks_expecting(lambda: made(Net(), config=block()), 2, error=error, match=match, timeout=10)

    assert len(messages) == 2


OBJECTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a rate": ({"optimizer": sgd}, TopologyError, r"param_groups\[0\]\['lr'\] is \[0\.1, 0\.2\]"),
    "an error": ({"optimizer": failing}, ValueError, "no learning rate"),
    "a scheduler": ({"lr_scheduler": scheduler}, TopologyError, r"lr_scheduler is \['ConstantLR', 'LinearLR'\]"),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_optimizers_and_schedulers_that_differ_are_refused_on_every_rank(case: str) -> None:
    given, error, match = OBJECTS[case]

    run_ranks_expecting(lambda: made(Net(), config=config(1), **given), 2, error=error, match=match, timeout=10)


def alike() -> None:
    place = {"enabled": True, "output_path": f"runs/{dist.get_rank()}"}
    engine = made(Net(), config=config(1, tensorboard=place, steps_per_print=mine(1, 10)))
    assert isinstance(engine.lr_scheduler, deepspeed.WarmupLR)


def test_what_has_no_effect_may_differ() -> None:
    run_ranks(alike, 2, timeout=10)
