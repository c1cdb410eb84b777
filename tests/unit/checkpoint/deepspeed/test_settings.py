"""Settings of DeepSpeed's optimizers as torch's have them, and the loss scale as ours counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshbolt.checkpoint.deepspeed.settings import LossScale, loss_scale_of, optimizer_of
from meshbolt.precision import LossScaler


def test_deepspeeds_own_adam_becomes_torchs() -> None:
    """Its fused Adam counts steps in the group, and has a setting that torch's has not."""
    group = {
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "bias_correction": True,
        "step": 4,
        "params": ["a"],
    }
    made = optimizer_of({"a": {"exp_avg": torch.ones(2)}}, [group], {})
    assert made["state"]["a"]["step"].equal(torch.tensor(4.0))
    assert made["param_groups"] == [
        {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": ["a"], "amsgrad": False}
    ]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    assert set(optimizer.defaults) - set(made["param_groups"][0]) <= {
        *("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
    }


def test_its_adam_for_cpus_counts_steps_as_a_number_and_torchs_takes_a_tensor() -> None:
    made = optimizer_of({0: {"step": 7, "exp_avg": torch.ones(2)}}, [{"lr": 0.1, "params": [0]}], {})
    assert made["state"][0]["step"].equal(torch.tensor(7.0))


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("Adam", {}, "AdamW"),
        ("Adam", {"adam_w_mode": False}, "Adam"),
        ("AdamW", {"adam_w_mode": False}, "AdamW"),
        ("Lion", {}, None),
        (None, {}, None),
    ],
)
def test_the_class_is_said_where_the_json_says_it(
    kind: str | None, params: dict[str, Any], expected: str | None
) -> None:
    config = {"optimizer": {"type": kind, "params": params}} if kind else {}
    assert optimizer_of({}, [], config).get("class") == expected


def test_a_static_scale_of_one_is_none() -> None:
    assert loss_scale_of(None) is None
    assert loss_scale_of({"cur_scale": 1.0, "dynamic_loss_scale": False}) is None
    static = loss_scale_of({"cur_scale": 128.0, "dynamic_loss_scale": False})
    assert static is not None
    assert (static.scale, static.is_dynamic) == (128.0, False)


def deepspeeds(events: list[bool], *, window: int, hysteresis: int) -> list[LossScale]:
    """Return DeepSpeed's dynamic scaler after each step, by its rules, of which the events say whether it overflowed."""
    scale, last, left, seen = 256.0, -1, hysteresis, []
    for step, overflowed in enumerate(events):
        if overflowed:
            if left == 1 or hysteresis == 1:
                scale = max(scale / 2, 1.0)
            else:
                left -= 1
            last = step
        elif step - last - 1 > 0 and (step - last - 1) % window == 0:
            left, scale = hysteresis, scale * 2
        seen.append(
            LossScale(
                scale=scale,
                is_dynamic=True,
                iteration=step + 1,
                last_overflow=last,
                window=window,
                hysteresis=hysteresis,
                hysteresis_left=left,
            )
        )
    return seen


@pytest.mark.parametrize("stop", range(11))
def test_our_scaler_goes_on_as_deepspeeds_would(stop: int) -> None:
    events = [True, True, False, False, False, False, False, True, False, False, False, False]
    theirs = deepspeeds(events, window=2, hysteresis=2)
    ours = LossScaler(init_scale=256.0, growth_interval=2, hysteresis=2)
    ours.load_state_dict(theirs[stop].as_state())
    for event, expected in zip(events[stop + 1 :], theirs[stop + 1 :], strict=True):
        gradient = torch.tensor([float("inf") if event else 1.0])
        ours.unscale_([gradient])
        ours.decide()
        ours.update()
        assert ours.current_scale == expected.scale
