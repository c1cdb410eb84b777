from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from meshbolt import Checkpoint
from meshbolt.strategies.attendance import Attendance
from meshbolt.strategies.failures import Failures
from meshbolt.strategies.launcher import DirectLauncher, asked_weights_only
from meshbolt.strategies.saving import Saving


def fit_impl(model: Any, train: Any = None, ckpt_path: Any = None, weights_only: bool | None = None) -> str:
    return f"{model} {weights_only}"


@pytest.mark.parametrize("asked", [True, False, None])
def test_what_the_user_asked_for_is_found_however_it_is_passed(asked: bool | None) -> None:
    assert asked_weights_only(fit_impl, ("model", None, None, asked), {}) is asked
    assert asked_weights_only(fit_impl, ("model",), {"weights_only": asked}) is asked
    assert asked_weights_only(fit_impl, ("model",), {}) is None


def test_a_function_without_the_argument_asks_for_nothing() -> None:
    assert asked_weights_only(lambda model: model, ("model",), {}) is None


def test_the_direct_launcher_tells_what_was_asked_and_runs_the_function_here() -> None:
    told: list[bool | None] = []
    failures = Failures(Attendance(timeout=timedelta(seconds=1)), Saving(Checkpoint(), None))
    launcher = DirectLauncher(told.append, failures)

    assert launcher.launch(fit_impl, "model", weights_only=False) == "model False"
    assert told == [False]
    assert launcher.is_interactive_compatible
    launcher.kill(15)
