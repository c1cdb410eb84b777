"""The arithmetic of the loss scale, against torch's scaler and a recorded DeepSpeed run; no processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbolt.errors import CheckpointError, ConfigError, MeshboltError
from meshbolt.precision.loss_scale import LossScaler

OVERFLOW, OK = True, False


def scales_after(scaler: LossScaler, overflows: list[bool]) -> list[float]:
    """Take one step for each flag, and return the scale after each."""
    return list(_steps(scaler, overflows))


def _steps(scaler: LossScaler, overflows: list[bool]) -> Iterator[float]:
    for overflow in overflows:
        scaler.unscale_([torch.tensor([1.0, math.inf if overflow else 1.0])])
        assert scaler.decide() is not overflow
        scaler.update()
        yield scaler.current_scale


def scales_of_torch(scaler: torch.amp.GradScaler, overflows: list[bool]) -> list[float]:
    """Take the same steps with torch's scaler."""
    scales = []
    for overflow in overflows:
        weight = torch.nn.Parameter(torch.zeros(1))
        scaler.scale(weight.sum() * (math.inf if overflow else 1.0)).backward()
        scaler.step(torch.optim.SGD([weight]))
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_hysteresis_two_follows_the_recorded_deepspeed_run() -> None:
    scaler = LossScaler(init_scale=256, growth_interval=2, hysteresis=2)
    flags = [OVERFLOW, OVERFLOW, *[OK] * 5, OVERFLOW, *[OK] * 3]
    assert scales_after(scaler, flags) == [256, 128, 128, 128, 256, 256, 512, 512, 512, 512, 1024]


def test_once_lowered_the_scale_falls_with_every_overflow_until_it_grows() -> None:
    scaler = LossScaler(init_scale=256, growth_interval=2, hysteresis=2)
    assert scales_after(scaler, [OVERFLOW] * 4) == [256, 128, 64, 32]
    assert scales_after(scaler, [OK] * 3 + [OVERFLOW]) == [32, 32, 64, 64]


def test_consecutive_hysteresis_lowers_the_scale_only_for_overflows_in_a_row() -> None:
    scaler = LossScaler(init_scale=256, growth_interval=100, hysteresis=2, consecutive_hysteresis=True)
    assert scales_after(scaler, [OVERFLOW, OK] * 8) == [256.0] * 16
    assert scales_after(scaler, [OVERFLOW, OVERFLOW, OK, OVERFLOW, OVERFLOW]) == [256, 128, 128, 128, 64]


def test_without_consecutive_hysteresis_the_same_overflows_add_up() -> None:
    scaler = LossScaler(init_scale=256, growth_interval=100, hysteresis=2)
    assert scales_after(scaler, [OVERFLOW, OK, OVERFLOW, OK]) == [256, 256, 128, 128]


@settings(deadline=None)  # a busy machine is no failure
@given(
    overflows=st.lists(st.booleans(), max_size=40),
    interval=st.integers(1, 5),
    start=st.sampled_from([1.0, 256.0, 65536.0, 2.0**126]),
)
def test_by_default_the_scale_follows_torch_step_by_step(overflows: list[bool], interval: int, start: float) -> None:
    ours = LossScaler(init_scale=start, growth_interval=interval, min_scale=2.0**-60)
    torchs = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=interval)
    assert scales_after(ours, overflows) == scales_of_torch(torchs, overflows)
    assert ours.state_dict().items() >= torchs.state_dict().items()


def test_a_clean_step_divides_exactly_and_keeps_every_gradient_where_it_is() -> None:
    true = [torch.tensor([1e-30, -3.3, 7.0]), torch.zeros(0), torch.tensor([1 / 3], dtype=torch.float64)]
    scaler = LossScaler(init_scale=2.0**16)
    scaled = [gradient * 2.0**16 for gradient in true]
    scaler.unscale_(scaled)
    assert scaler.decide()
    for ours, expected in zip(scaled, true, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_bad_number_among_many_skips_the_step(bad: float, dtype: torch.dtype) -> None:
    gradients = [torch.ones(5), torch.ones(7, dtype=torch.float64), torch.ones(9, dtype=dtype), torch.ones(0)]
    gradients[2][8] = bad
    scaler = LossScaler()
    scaler.unscale_(gradients)
    assert not scaler.decide()


def test_an_optimizer_without_gradients_may_step() -> None:
    scaler = LossScaler()
    scaler.unscale_([])
    assert scaler.decide()


def test_each_optimizer_is_skipped_for_its_own_overflow_and_the_scale_falls_once() -> None:
    scaler = LossScaler(init_scale=1024)
    scaler.unscale_([torch.tensor(math.inf)], owner="a")
    scaler.unscale_([torch.tensor(math.nan)], owner="b")
    scaler.unscale_([torch.tensor(1024.0)], owner="c")
    assert [scaler.decide(owner=owner) for owner in "cab"] == [True, False, False]
    scaler.update()
    assert scaler.current_scale == 512
    assert scaler.num_skipped == 1


def test_dividing_the_gradients_of_one_optimizer_twice_in_a_step_is_refused() -> None:
    scaler = LossScaler()
    scaler.unscale_([torch.ones(1)], owner="a")
    with pytest.raises(MeshboltError, match="twice in one step"):
        scaler.unscale_([torch.ones(1)], owner="a")
    scaler.decide(owner="a")
    with pytest.raises(MeshboltError, match="twice in one step"):
        scaler.unscale_([torch.ones(1)], owner="a")
    scaler.update()
    scaler.unscale_([torch.ones(1)], owner="a")


def test_an_optimizer_that_was_clipped_early_keeps_its_division_through_the_update_of_another() -> None:
    """A GAN clips both optimizers and then steps them in turn, each with an update of its own."""
    scaler = LossScaler(init_scale=4)
    early = torch.tensor([8.0])
    scaler.unscale_([early], owner="early")
    scaler.unscale_([torch.tensor(math.inf)], owner="other")
    scaler.decide(owner="other")
    scaler.update()
    assert scaler.is_unscaled(owner="early")
    assert not scaler.is_unscaled(owner="other")
    assert scaler.decide(owner="early")
    assert early.item() == 2


def test_calls_out_of_order_are_our_own_mistakes() -> None:
    scaler = LossScaler()
    with pytest.raises(AssertionError, match="unscale_"):
        scaler.decide()
    with pytest.raises(AssertionError, match="decide"):
        scaler.update()


def test_float16_gradients_are_refused_before_any_is_divided() -> None:
    fine = torch.full((1,), 65536.0)
    with pytest.raises(ConfigError, match=r"float16.*float32"):
        LossScaler().unscale_([fine, torch.ones(1, dtype=torch.float16)])
    assert fine.item() == 65536


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_a_scaled_loss_never_overflows_the_dtype_of_the_loss(dtype: torch.dtype, scaled: torch.dtype) -> None:
    loss = LossScaler(init_scale=2.0**16).scale(torch.tensor(2.0, dtype=dtype))
    assert loss.dtype is scaled
    assert loss.item() == 2.0**17


def test_the_scale_reaches_the_gradients_of_the_loss() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = LossScaler(init_scale=8)
    scaler.scale(weight.sum()).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3,), 8.0))


def test_at_the_minimum_the_scale_holds_and_one_warning_says_so() -> None:
    scaler = LossScaler(init_scale=8, min_scale=3)
    assert scales_after(scaler, [OVERFLOW, OVERFLOW]) == [4, 3]
    with pytest.warns(UserWarning, match=r"minimum, 3: the step was skipped.*bf16-mixed") as caught:
        assert scales_after(scaler, [OVERFLOW]) == [3]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scales_after(scaler, [OVERFLOW, OVERFLOW]) == [3, 3]
    assert scaler.num_skipped == 5


def test_the_scale_stays_finite_however_long_the_run_is_clean() -> None:
    scaler = LossScaler(init_scale=2.0**120, growth_interval=1)
    assert max(scales_after(scaler, [OK] * 20)) == 2.0**127


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
@pytest.mark.parametrize("taken", range(9))
def test_a_resumed_scaler_continues_as_the_uninterrupted_one(hysteresis: int, taken: int) -> None:
    settings: dict[str, Any] = {"init_scale": 256, "growth_interval": 2, "hysteresis": hysteresis}
    flags = [OVERFLOW, OK, OVERFLOW, OK, OK, OK, OVERFLOW, OVERFLOW, OK, OK, OK, OVERFLOW]
    whole = LossScaler(**settings)
    scales = scales_after(whole, flags)
    first, second = LossScaler(**settings), LossScaler(**settings)
    scales_after(first, flags[:taken])
    second.load_state_dict(first.state_dict())
    assert scales_after(second, flags[taken:]) == scales[taken:]
    assert second.state_dict() == whole.state_dict()


def test_torch_and_we_read_each_others_state() -> None:
    ours = LossScaler(init_scale=1024, growth_interval=3)
    scales_after(ours, [OVERFLOW, OK, OK])
    torchs = torch.amp.GradScaler("cpu")
    torchs.load_state_dict(ours.state_dict())
    assert scales_of_torch(torchs, [OK]) == [1024]
    back = LossScaler(growth_interval=3)
    back.load_state_dict(torchs.state_dict())
    assert scales_after(back, [OK, OK, OK]) == [1024, 1024, 2048]


def test_the_settings_of_the_running_program_win_over_those_of_a_checkpoint() -> None:
    saved = LossScaler(init_scale=4, growth_interval=7, hysteresis=9).state_dict()
    scaler = LossScaler(init_scale=64, growth_interval=1, hysteresis=2, min_scale=16)
    scaler.load_state_dict(saved)
    assert scaler.current_scale == 16, "never below this program's minimum"
    assert scaler.growth_interval == 1
    assert scales_after(scaler, [OK, OK, OVERFLOW, OVERFLOW]) == [16, 32, 32, 16]


@pytest.mark.parametrize("state", [{}, {"scale": 2.0}])
def test_a_state_without_a_scale_says_that_its_run_did_not_scale(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"_growth_tracker.*did not scale its loss"):
        LossScaler().load_state_dict(state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_scale": math.inf},
        {"init_scale": math.nan},
        {"init_scale": 0.5},
        {"min_scale": 0.0},
        {"growth_interval": 0},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"hysteresis": 0},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_named_with_its_value(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        LossScaler(**wrong)
