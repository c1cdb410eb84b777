from __future__ import annotations

import signal

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from meshbolt.strategies.requeue import Requeue


@pytest.mark.parametrize(
    "environment",
    [LightningEnvironment(), None, SLURMEnvironment(auto_requeue=False, requeue_signal=signal.SIGUSR2)],
    ids=["no cluster", "nothing", "no requeue"],
)
def test_outside_of_a_job_that_requeues_itself_signals_are_left_alone(environment: object) -> None:
    before = signal.getsignal(signal.SIGUSR2)

    requeue = Requeue(environment, group=None)

    assert signal.getsignal(signal.SIGUSR2) == before
    requeue.before_window(None, 0)  # type: ignore[arg-type]
