"""A job whose time is up: saved between two steps, at the same one on all ranks, and resumed from there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, difference, trainer, weights
from torch import Tensor

from meshbolt.testing import run_ranks

pytestmark = ADVICE


def in_a_job(folder: Path, **options: Any) -> pl.Trainer:
    """Return a Trainer of a rank that SLURM has started."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}
    os.environ |= {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "training", "SLURM_NTASKS_PER_NODE": size}
    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR2)
    return trainer("zero3", plugins=[environment], default_root_dir=folder, accumulate_grad_batches=2, **options)


class Notified(Regressor):
    """Gets the signal on one rank, in the middle of a forward and of a window."""

    def __init__(self, *, at: int | None) -> None:
        super().__init__()
        self.at = at
        self.steps_seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        half = super().forward(x)
        if self.training and len(self.steps_seen) == self.at and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return half

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.steps_seen.append(self.global_step)
        return super().training_step(batch, index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = len(self.steps_seen)
        self.saved = weights(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded_batches = checkpoint["batches"]


def run_out_of_time(folder: Path) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    module, owner = Notified(at=1), in_a_job(folder)
    before = signal.getsignal(signal.SIGUSR2)
    owner.fit(module, batches())
    assert signal.getsignal(signal.SIGUSR2) == before
    return {"saved": module.saved, "steps": owner.global_step}


def requeued(folder: Path) -> dict[str, Any]:
    module, owner = Notified(at=None), in_a_job(folder)
    begun: dict[str, Tensor] = {}

    class Begin(pl.Callback):
        def on_train_start(self, owner: pl.Trainer, module: pl.LightningModule) -> None:
            begun.update(weights(module), step=torch.tensor(owner.global_step))

    owner.callbacks.append(Begin())
    owner.fit(module, batches())
    return {"begun": begun, "batches": module.loaded_batches, "steps": owner.global_step}


def test_a_requeued_job_goes_on_where_the_signal_let_it_save(tmp_path: Path) -> None:
    first = run_ranks(run_out_of_time, 2, tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["hpc_ckpt_1.ckpt"]
    second = run_ranks(requeued, 2, tmp_path)

    for out_of_time, resumed in zip(first, second, strict=True):
        assert out_of_time["steps"] == resumed["steps"] == 4
        # Notified in the first window, rank 1 tells in the second; rank 0 finds it there or in the next.
        assert resumed["batches"] == 2 * int(resumed["begun"]["step"])
        assert int(resumed["begun"].pop("step")) in (2, 3)
        assert difference(resumed["begun"], out_of_time["saved"]) == 0


class Terminated(Regressor):
    """Gets SIGTERM at step 5: in the forward on rank 0, after the step on rank 1."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = set(ranks)

    def forward(self, x: Tensor) -> Tensor:
        self.terminate(0)
        return super().forward(x)

    def on_train_batch_end(self, *_: Any) -> None:
        self.terminate(1)

    def terminate(self, rank: int) -> None:
        if self.training and self.global_step == 5 and self.global_rank == rank and rank in self.ranks:
            self.ranks.remove(rank)
            os.kill(os.getpid(), signal.SIGTERM)


def terminated(folder: Path, ranks: tuple[int, ...]) -> tuple[int, list[str]]:
    owner = trainer("zero3", max_epochs=3, callbacks=[OnExceptionCheckpoint(folder)])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        owner.fit(Terminated(ranks), batches())
    assert signal.getsignal(signal.SIGTERM) == before
    return owner.global_step, [place.name for place in folder.iterdir()]


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)], ids=str)
def test_a_terminated_job_ends_at_the_same_step_on_all_ranks_and_can_be_saved(
    tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    first, second = run_ranks(terminated, 2, tmp_path, ranks)

    assert first == second
    assert 6 <= first[0] <= 8
    assert first[1] == ["on_exception.ckpt"]


def terminated_alone() -> int:
    owner = trainer("zero3", max_epochs=3)
    with pytest.raises(SIGTERMException):
        owner.fit(Terminated((0,)), batches())
    return owner.global_step


def test_a_single_rank_ends_before_its_next_step() -> None:
    assert run_ranks(terminated_alone, 1) == [6]


class OwnHandler(pl.Callback):
    """A handler of the user's own, on one rank."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            signal.signal(signal.SIGTERM, lambda *_: None)


def with_a_handler_on_one_rank() -> int:
    owner = trainer("zero2", max_epochs=1, callbacks=[OwnHandler()])
    owner.fit(Regressor(), batches())
    return owner.global_step


def test_a_handler_of_the_users_on_one_rank_keeps_no_rank_waiting() -> None:
    first, second = run_ranks(with_a_handler_on_one_rank, 2, timeout=20)
    assert first == second > 0
