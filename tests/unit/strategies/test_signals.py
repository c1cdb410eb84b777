from __future__ import annotations

import signal

import lightning.pytorch as pl
import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from meshbolt.strategies.signals import Signals


@pytest.mark.parametrize(
    "environment",
    [LightningEnvironment(), None, SLURMEnvironment(auto_requeue=False, requeue_signal=signal.SIGUSR2)],
    ids=["no cluster", "nothing", "no requeue"],
)
def test_outside_of_a_job_that_requeues_itself_its_signal_is_left_alone(environment: object) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.cluster_environment = environment

    Signals(trainer, number=1)

    assert signal.getsignal(signal.SIGUSR2) == before
