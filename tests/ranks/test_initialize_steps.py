"""The engine of `initialize` where a step is not like others: gradients that are not finite, a scheduler that is told where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks.initialize_support import Net, batch, config, made, said, train, whole
from tests.rows import full

from meshbolt import ConfigError, deepspeed
from meshbolt.testing import run_ranks

BF16 = {"bf16": {"enabled": True}}
UNCHECKED, CHECKED = ({"bf16": {"enabled": True, "check_grad_overflow": each}} for each in (False, True))


def spoil(engine: Any, value: float) -> None:
    """Take a step with a loss that is not finite on rank 1."""
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    x, y = batch(2, dist.get_rank(), dtype=dtype)
    engine.backward(F.mse_loss(engine(x), y) * (value if dist.get_rank() == 1 else 1.0))
    engine.step()


def not_finite(stages: tuple[int, ...], clip: float, block: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if block else torch.float32
    for stage in stages:
        engine = made(Net(), config=config(stage, clip=clip, **block))
        train(engine, range(2), dtype=dtype)
        before, rates = whole(engine), engine.get_lr()
        spoil(engine, math.nan)
        torch.testing.assert_close(whole(engine), before, rtol=0, atol=0)
        assert (engine.skipped_steps, engine.global_steps, engine.was_step_applied()) == (1, 3, False)
        assert (engine.get_global_grad_norm(), engine.get_lr()) == (math.inf, rates)
        train(engine, range(3, 4), dtype=dtype)
        assert engine.was_step_applied()
        assert engine.get_lr() != rates
        assert math.isfinite(engine.get_global_grad_norm())


@pytest.mark.parametrize(
    ("stages", "clip", "block"),
    [((1, 3), 0.3, {}), ((2,), 0.0, BF16), full((1, 2, 3), 0.0, {}), full((0, 1, 2, 3), 0.3, BF16)],
)
def test_gradients_that_are_not_finite_on_one_rank_skip_the_update_of_all(
    stages: tuple[int, ...], clip: float, block: dict[str, Any]
) -> None:
    run_ranks(not_finite, 2, stages, clip, block, timeout=60)


def not_checked() -> None:
    for stage, block, words in (
        (0, {}, ""),
        (1, UNCHECKED, "skips no update"),
        (1, CHECKED, "step() skips (an update"),
    ):
        with said() as output:
            engine = deepspeed.initialize(model=Net(), config=config(stage, **block))[0]
        assert dist.get_rank() == 1 or words in output.getvalue()
        spoil(engine, math.inf)
        is_skipped = block is CHECKED
        assert (engine.skipped_steps, engine.was_step_applied()) == (int(is_skipped), not is_skipped)
        assert all(value.isfinite().all() for value in whole(engine).values()) is is_skipped


def test_no_update_is_skipped_in_float32_at_stage_0_or_where_the_file_says_so() -> None:
    run_ranks(not_checked, 2, timeout=60)


def told_where() -> None:
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 10, "warmup_type": "linear"}}
    engine = made(Net(), config=config(1, scheduler=schedule))
    assert engine.lr_scheduler.last_batch_iteration == -1
    x, y = batch(0, dist.get_rank())
    engine.backward(F.mse_loss(engine(x), y))
    before = whole(engine)
    with pytest.raises(ConfigError, match=r"WarmupLR does not take that: .*'epochs'"):
        engine.step(lr_kwargs={"epochs": 7})
    torch.testing.assert_close(whole(engine), before, rtol=0, atol=0)
    engine.step(lr_kwargs={"last_batch_iteration": 7})
    assert (engine.lr_scheduler.last_batch_iteration, engine.get_lr()) == (7, pytest.approx([0.007]))
    train(engine, range(1))
    assert engine.get_lr() == pytest.approx([0.008])


def test_the_scheduler_goes_where_it_is_told_and_what_it_does_not_take_is_refused_before_the_update() -> None:
    run_ranks(told_where, 2, timeout=60)
