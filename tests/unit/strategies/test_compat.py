"""What is touched of Lightning's private parts is there, in every version that is supported."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from meshbolt.strategies import compat


def quiet(**options: object) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **options)  # type: ignore[arg-type]


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)


def test_every_name_is_there() -> None:
    assert {name for name in compat.__all__ if not hasattr(compat, name)} == set()


def test_the_precision_flag_is_read_from_the_trainer() -> None:
    assert compat.asked_precision(quiet()) == "32-true"
    assert compat.asked_precision(quiet(precision="bf16-mixed")) == "bf16-mixed"
    assert compat.asked_precision(quiet(precision=64)) == "64-true"


def test_an_interval_of_time_between_validations_is_read_from_the_trainer() -> None:
    assert compat.time_between_validations(quiet()) is None
    assert compat.time_between_validations(quiet(val_check_interval=0.5)) is None
    assert compat.time_between_validations(quiet(val_check_interval=timedelta(minutes=2))) == 120


def test_the_trainer_of_a_module_is_found_where_there_is_one() -> None:
    module, trainer = Module(), quiet()
    assert compat.trainer_of(None) is None
    assert compat.trainer_of(module) is None

    module.trainer = trainer
    assert compat.trainer_of(module) is trainer


def test_a_compiled_module_is_told_from_a_plain_one() -> None:
    module = Module()
    assert not compat.is_compiled(module)
    assert not compat.is_compiled(None)

    # What Lightning does with a module that torch.compile was given.
    module._compiler_ctx = {"compiler": "dynamo"}
    assert compat.is_compiled(module)


def test_the_optimizer_is_found_inside_the_wrapper_that_users_see() -> None:
    plain = torch.optim.SGD(Module().parameters(), lr=1.0)

    assert compat.plain_optimizer(pl.core.optimizer.LightningOptimizer(plain)) is plain
    assert compat.plain_optimizer(plain) is plain


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_the_backend_is_the_one_of_the_device(device: str, backend: str) -> None:
    assert compat.default_backend(torch.device(device)) == backend
    assert not compat.ranks_are_connected()


def count_of(trainer: pl.Trainer, **counters: int) -> compat.BatchCount:
    """Return the count of a loop with these counters, the same ones of the epoch and in all."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for tracker in (progress.current, progress.total):
        vars(tracker).update(counters)
    return compat.BatchCount(trainer)


def test_batches_are_counted_alike_at_the_end_of_one_and_between_two() -> None:
    at_end = count_of(quiet(), ready=5, started=5, processed=5, completed=4)
    between = count_of(quiet(), ready=5, started=5, processed=5, completed=5)
    inside = count_of(quiet(), ready=6, started=6, processed=5, completed=5)
    assert [count.done for count in (at_end, between, inside)] == [5, 5, 5]
    assert [count.is_inside_a_batch for count in (at_end, between, inside)] == [False, False, True]
    assert count_of(quiet(), ready=0, started=0, processed=0, completed=0).done == 0


def test_a_count_goes_back_in_the_epoch_and_in_all() -> None:
    trainer = quiet()
    count = count_of(trainer, ready=5, started=5, processed=5, completed=4)
    progress = trainer.fit_loop.epoch_loop.batch_progress
    progress.is_last_batch = True
    assert count.epoch_is_done
    progress.total.ready = progress.total.started = progress.total.processed = 15
    progress.total.completed = 14
    count.go_back_to(3)
    assert (count.done, count.epoch_is_done) == (3, False)
    assert vars(progress.current) == {"ready": 3, "started": 3, "processed": 3, "completed": 3}
    assert vars(progress.total) == {"ready": 13, "started": 13, "processed": 13, "completed": 13}


def test_a_count_that_is_there_already_is_left_as_it_is() -> None:
    trainer = quiet()
    count = count_of(trainer, ready=5, started=5, processed=5, completed=4)
    count.go_back_to(5)
    assert trainer.fit_loop.epoch_loop.batch_progress.current.completed == 4


def test_a_file_is_looked_for_where_a_model_checkpoint_saves(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path)
    assert compat.file_is_there(callback, str(tmp_path))
    assert not compat.file_is_there(callback, str(tmp_path / "a.ckpt"))


def test_a_model_checkpoint_makes_its_link_as_it_is_told_and_then_as_before(tmp_path: Path) -> None:
    made: list[tuple[str, str]] = []
    callback = ModelCheckpoint(tmp_path, save_last="link")
    callback._last_checkpoint_saved = str(tmp_path / "a.ckpt")
    before = callback._link_checkpoint
    compat.link_instead(callback, lambda path, to: made.append((path, to)))
    callback._save_last_checkpoint(quiet(), {"epoch": torch.tensor(0), "step": torch.tensor(0)})
    assert made == [(str(tmp_path / "last.ckpt"), str(tmp_path / "a.ckpt"))]

    compat.link_instead(callback, None)
    assert callback._link_checkpoint is before
