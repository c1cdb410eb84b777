"""Checkpoints that are written while training goes on: what they hold, when they are whole, and who hears of failures."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tests.ranks.trainer.background_support import At, before_writing, full_disk_on, saver_of, slow_writer, strategy
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, strategy_of, trainer, weights
from tests.rows import full
from torch import Tensor

from meshbolt import CheckpointError, Zero
from meshbolt.checkpoint import background, is_checkpoint
from meshbolt.plugins import MixedPrecision
from meshbolt.strategies import saving
from meshbolt.testing import RankFailure, run_ranks

pytestmark = [*ADVICE, pytest.mark.filterwarnings("ignore:The dirpath has changed")]


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir()) if folder.exists() else []


def nobody_writes() -> bool:
    return not any("saving" in thread.name for thread in threading.enumerate())


# What is saved ----------------------------------------------------------------------------------------------------------


class Dropping(Regressor):
    """Draws other random numbers on every rank."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)

    def on_fit_start(self) -> None:
        torch.manual_seed(dist.get_rank())


def state_of(owner: pl.Trainer) -> dict[str, Tensor]:
    """Return weights, optimizer state, schedulers, loss scale and progress, whole and on every rank."""
    module = owner.lightning_module
    found = {f"weight {name}": value for name, value in weights(module).items()}
    with strategy_of(owner).gathered(module, optimizer=owner.optimizers[0]) as state:
        for name, values in state.items():
            found |= {f"{key} {name}": torch.as_tensor(value).clone() for key, value in values.items()}
    scheduler = owner.lr_scheduler_configs[0].scheduler.state_dict()
    found["scheduler"] = torch.tensor([scheduler["last_epoch"], *scheduler["_last_lr"]], dtype=torch.float64)
    found["scaling"] = torch.tensor([float(value) for value in owner.precision_plugin.state_dict().values()])
    found["progress"] = torch.tensor([owner.global_step, owner.current_epoch])
    return found


def fit_and_save_slowly(path: Path, zero: Any, half: bool) -> dict[str, Any]:
    """Save in the middle of an epoch; the writer begins when four more steps are taken."""
    seen: dict[str, Any] = {}
    four_more = threading.Event()
    before_writing(lambda _: seen.update(waited=four_more.wait(20)))

    def save(owner: pl.Trainer) -> None:
        owner.save_checkpoint(path)
        seen["state"], seen["random"] = state_of(owner), torch.get_rng_state()

    def release(_owner: pl.Trainer) -> None:
        seen["early"] = is_checkpoint(path)
        four_more.set()

    plugin = {"plugins": [MixedPrecision("16-mixed", "cpu", init_scale=64.0, growth_interval=2)]} if half else {}
    owner = trainer(strategy(zero), callbacks=[At(3, do=save), At(7, do=release)], max_epochs=5, **plugin)
    owner.fit(Dropping(), batches())
    return {**seen, "late": state_of(owner), "whole": is_checkpoint(path), "quiet": nobody_writes()}


def resumed_state(path: Path, zero: Any, half: bool) -> dict[str, Tensor]:
    seen = {}

    class Begin(pl.Callback):
        def on_train_start(self, owner: pl.Trainer, _module: pl.LightningModule) -> None:
            seen.update(state_of(owner))
            owner.should_stop = True

    plugin = {"plugins": [MixedPrecision("16-mixed", "cpu", init_scale=64.0, growth_interval=2)]} if half else {}
    owner = trainer(strategy(zero), callbacks=[Begin()], max_epochs=5, **plugin)
    owner.fit(Dropping(), batches(), ckpt_path=path)
    return seen


@pytest.mark.parametrize(
    ("ranks", "zero", "half"),
    [full(2, 0, False), (2, 2, True), (2, 3, False), full(4, Zero(3, replicate=2), False)],
    ids=str,
)
def test_what_loads_is_the_state_at_the_call_whatever_ran_meanwhile(
    tmp_path: Path, ranks: int, zero: Any, half: bool
) -> None:
    saved = run_ranks(fit_and_save_slowly, ranks, tmp_path / "a.ckpt", zero, half)
    loaded = run_ranks(resumed_state, ranks, tmp_path / "a.ckpt", zero, half)
    for rank, found in zip(saved, loaded, strict=True):
        assert rank["waited"]
        assert not rank["early"]
        assert rank["whole"]
        assert rank["quiet"]
        assert rank["state"].keys() == found.keys() == rank["late"].keys()
        assert [key for key, value in rank["state"].items() if not torch.equal(value, found[key])] == []
        changed = [key for key, value in rank["state"].items() if not torch.equal(value, rank["late"][key])]
        assert len(changed) > len(found) / 2


def fit_epochs(folder: Path, epochs: int, path: Path | None) -> dict[str, Any]:
    pl.seed_everything(0, workers=True, verbose=False)
    slow_writer(0.3)
    keeping = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    owner = trainer(strategy(), max_epochs=epochs, callbacks=[keeping])
    owner.fit(Dropping(), batches(), ckpt_path=path)
    return {**state_of(owner), "drawn next": torch.rand(4)}


def test_a_run_that_resumes_from_it_is_bit_for_bit_the_one_that_went_on(tmp_path: Path) -> None:
    through = run_ranks(fit_epochs, 2, tmp_path / "through", 4, None)
    resumed = run_ranks(fit_epochs, 2, tmp_path / "resumed", 4, tmp_path / "through/epoch=1.ckpt")
    for ours, expected in zip(resumed, through, strict=True):
        assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []


# When it is there -------------------------------------------------------------------------------------------------------


def save_last(path: Path) -> list[bool]:
    slow_writer(0.5)
    seen = []

    def save(owner: pl.Trainer) -> None:
        owner.save_checkpoint(path)
        seen.append(is_checkpoint(path))

    owner = trainer(strategy(), callbacks=[At(8, do=save)])
    owner.fit(Regressor(), batches())
    seen += [is_checkpoint(path), nobody_writes()]
    # Nothing goes on that could be held up: what is saved now is there when the call returns.
    owner.save_checkpoint(path.with_name("b.ckpt"))
    return [*seen, is_checkpoint(path.with_name("b.ckpt")), not saver_of(owner)._copies._buffers]


def test_the_end_of_fit_waits_for_the_checkpoint(tmp_path: Path) -> None:
    assert run_ranks(save_last, 2, tmp_path / "a.ckpt") == [[False, True, True, True, True]] * 2


SELECTED = ("best two of one name", "link to the latest")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "best two": {"filename": "{epoch}", "monitor": "val", "save_top_k": 2},
    "best two of one name": {"filename": "best", "monitor": "val", "save_top_k": 2},
    "latest": {"filename": "{step}", "save_top_k": 1},
    "latest of one name": {"filename": "same", "save_top_k": 1},
    "all and last": {"filename": "{epoch}", "save_top_k": -1, "save_last": True},
    "all of one name": {"filename": "same", "save_top_k": -1},
    "link": {"filename": "{epoch}", "monitor": "val", "mode": "max", "save_top_k": 1, "save_last": "link"},
    "link to the latest": {"filename": "{step}", "save_top_k": 1, "save_last": "link", "every_n_train_steps": 1},
    "last only": {"save_top_k": 0, "save_last": True, "every_n_train_steps": 1},
}


def kept(folder: Path, options: dict[str, Any], in_background: bool) -> dict[str, Any]:
    keeping = ModelCheckpoint(folder, **options)
    if in_background:
        slow_writer(0.1)
    owner = trainer(strategy() if in_background else "zero3", max_epochs=4, callbacks=[keeping])
    owner.fit(Regressor(), batches(), batches())
    dist.barrier()  # what rank 0 deletes last
    state = keeping.state_dict()
    paths = {key: os.path.relpath(state[key], folder) for key in ("best_model_path", "last_model_path") if state[key]}
    best = sorted((os.path.relpath(path, folder), float(score)) for path, score in keeping.best_k_models.items())
    loaded = {}
    for name in names_in(folder):
        again = trainer("zero3")
        again.validate(module := Regressor(), batches(), ckpt_path=folder / name, verbose=False)
        loaded[name] = [float(value.double().sum()) for value in weights(module).values()]
    links = {name: str((folder / name).readlink()) for name in names_in(folder) if (folder / name).is_symlink()}
    untouched = {"file_exists", "_link_checkpoint"}.isdisjoint(vars(keeping))
    return {"paths": paths, "best": best, "loaded": loaded, "links": links, "untouched": untouched}


@pytest.mark.parametrize(
    "name", [name if name in SELECTED else pytest.param(name, marks=pytest.mark.full) for name in CONFIGURATIONS]
)
def test_model_checkpoint_leaves_what_it_leaves_without_it(tmp_path: Path, name: str) -> None:
    expected = run_ranks(kept, 2, tmp_path / "at once", CONFIGURATIONS[name], False)
    found = run_ranks(kept, 2, tmp_path / "background", CONFIGURATIONS[name], True)
    assert found == expected
    assert found[0]["loaded"]
    assert found[0]["untouched"]


def watched(folder: Path, options: dict[str, Any]) -> list[Any]:
    """Look, whenever a writer begins and after every step, at what a crash would leave."""
    seen: list[tuple[str, bool, bool]] = []

    def look(moment: str) -> None:
        whole = [place for place in folder.glob("*.ckpt") if is_checkpoint(place)]
        last = folder / "last.ckpt"
        seen.append((moment, bool(whole), is_checkpoint(last) or not os.path.lexists(last)))

    def write_slowly(_path: Path) -> None:
        look("begin")
        time.sleep(0.05)
        look("write")

    before_writing(write_slowly)
    keeping = ModelCheckpoint(folder, "{step}", save_top_k=1, every_n_train_steps=1, **options)
    owner = trainer(strategy(), callbacks=[keeping, At(*range(9), do=lambda _: look("step"))])
    owner.fit(Regressor(), batches())
    return seen


@pytest.mark.parametrize("options", [full({}), {"save_last": "link"}, full({"save_last": True})], ids=str)
def test_at_no_moment_is_there_no_checkpoint_or_a_link_that_leads_nowhere(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    for seen in run_ranks(watched, 2, tmp_path, options):
        assert len(seen) > 20
        first = next(index for index, (_, whole, _) in enumerate(seen) if whole)
        assert first < 8
        assert all(whole for _, whole, _ in seen[first:])
        assert all(sound for _, _, sound in seen)


def delete_while_writing(folder: Path) -> None:
    slow_writer(0.2)

    def save_and_delete(owner: pl.Trainer) -> None:
        path = folder / f"{owner.global_step}.ckpt"
        owner.save_checkpoint(path)
        owner.strategy.remove_checkpoint(path)
        assert not path.exists()
        if owner.global_step == 4:
            owner.save_checkpoint(path)

    owner = trainer(strategy(), callbacks=[At(2, 4, do=save_and_delete)])
    owner.fit(Regressor(), batches())


def test_a_checkpoint_that_is_deleted_while_it_is_written_is_gone_and_its_name_is_free(tmp_path: Path) -> None:
    run_ranks(delete_while_writing, 2, tmp_path)
    assert names_in(tmp_path) == ["4.ckpt"]
    assert is_checkpoint(tmp_path / "4.ckpt")


# Failures ---------------------------------------------------------------------------------------------------------------


def fail_in_the_middle(folder: Path, accumulate: int) -> tuple[str, int]:
    full_disk_on(1)
    told = threading.Event()

    def hold(owner: pl.Trainer) -> None:
        while not saver_of(owner).failed:
            told.wait(0.01)

    save_once = At(2, do=lambda owner: saver_of(owner).pending or owner.save_checkpoint(folder / "a.ckpt"))
    owner = trainer(
        strategy(), callbacks=[save_once, At(3, do=hold)], max_epochs=20, accumulate_grad_batches=accumulate
    )
    with pytest.raises(CheckpointError) as raised:
        owner.fit(Regressor(), batches())
    return str(raised.value), owner.global_step


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_error_of_the_writer_is_raised_by_all_ranks_at_the_same_of_the_next_steps(
    tmp_path: Path, accumulate: int
) -> None:
    first, second = run_ranks(fail_in_the_middle, 2, tmp_path, accumulate)
    assert first == second
    said, step = first
    assert "a.ckpt' was not saved" in said
    assert "rank 1: file __1_0.distcp: OSError: [Errno 28] No space left on device" in said
    # Known after step 3; rank 0 finds it before the next window, and all act before the one after.
    assert step == 4
    assert names_in(tmp_path) == []


def fail_and_learn_it_late(folder: Path, late: int) -> tuple[str, int]:
    full_disk_on(1)
    original = background.save_directory

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        finally:
            time.sleep(0.6 * (dist.get_rank() == late))

    background.save_directory = save
    save_once = At(2, do=lambda owner: owner.save_checkpoint(folder / "a.ckpt"))
    owner = trainer(strategy(), callbacks=[save_once], max_epochs=500)
    with pytest.raises(CheckpointError) as raised:
        owner.fit(Regressor(), batches())
    return str(raised.value), owner.global_step


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_learns_of_the_error_later_raises_it_at_the_same_step(tmp_path: Path, late: int) -> None:
    first, second = run_ranks(fail_and_learn_it_late, 2, tmp_path, late)
    assert first == second
    assert "No space left on device" in first[0]


def fail_late(folder: Path, at: str) -> tuple[str, int]:
    full_disk_on(0, after_saves=1)

    def save(owner: pl.Trainer) -> None:
        owner.save_checkpoint(folder / f"{owner.global_step}.ckpt")

    def wait_for_failure(owner: pl.Trainer) -> None:
        if at == "the next save":
            while not saver_of(owner).failed:
                time.sleep(0.01)
            save(owner)

    steps = (7, 8) if at == "the end of fit" else (1, 2)
    owner = trainer(strategy(), callbacks=[At(*steps, do=save), At(2, do=wait_for_failure)])
    with pytest.raises(CheckpointError) as raised:
        owner.fit(Regressor(), batches())
    return str(raised.value), owner.global_step


@pytest.mark.parametrize("at", ["the end of fit", "the next save"])
def test_an_error_is_raised_at_the_latest_by_the_next_save_or_the_end_of_fit(tmp_path: Path, at: str) -> None:
    first, second = run_ranks(fail_late, 2, tmp_path, at)
    assert first == second
    saves = ("7.ckpt", "8.ckpt") if at == "the end of fit" else ("1.ckpt", "2.ckpt")
    assert f"{saves[1]}' was not saved" in first[0]
    assert first[1] == (8 if at == "the end of fit" else 2)
    assert names_in(tmp_path) == [saves[0]]


def fail_the_third(folder: Path, last: Any) -> None:
    slow_writer(0.1)
    full_disk_on(1, after_saves=2)
    keeping = ModelCheckpoint(folder, "{step}", save_top_k=1, every_n_train_steps=1, save_last=last)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer(strategy(), callbacks=[keeping]).fit(Regressor(), batches())


def test_nothing_is_deleted_or_linked_in_favour_of_a_checkpoint_that_could_not_be_written(tmp_path: Path) -> None:
    run_ranks(fail_the_third, 2, tmp_path, "link")
    assert names_in(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    assert str((tmp_path / "last.ckpt").readlink()) == "step=2.ckpt"


def fail_to_delete(folder: Path) -> str:
    def refuse(path: str) -> None:
        raise CheckpointError(f"{Path(path).name} cannot be removed")

    saving.remove_directory = refuse
    slow_writer(0.1)
    keeping = ModelCheckpoint(folder, "{step}", save_top_k=1, every_n_train_steps=4)
    with pytest.raises(CheckpointError) as raised:
        trainer(strategy(), callbacks=[keeping]).fit(Regressor(), batches())
    return str(raised.value)


def test_a_deletion_that_fails_on_the_first_rank_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(fail_to_delete, 2, tmp_path)
    assert first == second
    assert "step=8.ckpt' was saved, but what was to follow it failed: rank 0: step=4.ckpt cannot be removed" in first
    assert is_checkpoint(tmp_path / "step=8.ckpt")


# Exceptions and signals in training ------------------------------------------------------------------------------------


class Failing(Regressor):
    """Fails at step 5, on the ranks it is told to, while a checkpoint is being written."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.global_step == 5 and self.global_rank in self.ranks:
            assert self.trainer.strategy._saving._saver.pending  # type: ignore[attr-defined]
            raise ValueError(f"rank {self.global_rank} had enough")
        return super().training_step(batch, index)


def fail_while_writing(folder: Path, ranks: tuple[int, ...], disk: int | None) -> list[Any]:
    slow_writer(0.5)
    if disk is not None:
        full_disk_on(disk)
    savers = [
        ModelCheckpoint(folder / "model", "{step}", every_n_train_steps=5, save_on_exception=True),
        OnExceptionCheckpoint(folder / "exception"),
    ]
    owner = trainer(strategy(timeout=timedelta(seconds=10)), callbacks=savers, max_epochs=3)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        owner.fit(Failing(ranks), batches())
    return [str(raised.value), nobody_writes()]


def test_ranks_that_fail_together_finish_what_they_write_and_save_what_they_have(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(fail_while_writing, 2, tmp_path, (0, 1), None)):
        assert found == [f"rank {rank} had enough", True]
    assert names_in(tmp_path / "model") == ["step=5.ckpt"]
    assert is_checkpoint(tmp_path / "model/step=5.ckpt")
    assert is_checkpoint(tmp_path / "exception/on_exception.ckpt")


def test_an_exception_in_training_is_seen_where_the_writer_fails_as_well(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(fail_while_writing, 2, tmp_path, (0, 1), 1)):
        assert found == [f"rank {rank} had enough", True]
    assert names_in(tmp_path / "model") == names_in(tmp_path / "exception") == []


def test_a_rank_that_fails_alone_leaves_the_checkpoint_whole_and_nobody_hanging(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as raised:
        run_ranks(lambda: [fail_while_writing(tmp_path, (1,), None), leave()], 2)
    other, failed = raised.value.outcomes
    assert "left" in failed.message
    assert other.kind == "raised"
    assert is_checkpoint(tmp_path / "model/step=5.ckpt")
    assert names_in(tmp_path / "exception") == []


def leave() -> None:
    raise RuntimeError("left")


class Terminated(Regressor):
    """Gets SIGTERM on one rank while a checkpoint is being written."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.global_step == 3 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, index)


def terminate_while_writing(folder: Path) -> tuple[int, list[str]]:
    slow_writer(0.5)
    savers = [ModelCheckpoint(folder, "{step}", every_n_train_steps=3), OnExceptionCheckpoint(folder)]
    owner = trainer(strategy(), callbacks=savers, max_epochs=3)
    with pytest.raises(SIGTERMException):
        owner.fit(Terminated(), batches())
    return owner.global_step, [name for name in names_in(folder) if is_checkpoint(folder / name)]


def test_a_terminated_job_finishes_what_it_writes(tmp_path: Path) -> None:
    first, second = run_ranks(terminate_while_writing, 2, tmp_path)
    assert first == second
    assert 4 <= first[0] <= 6
    assert first[1][0] == "on_exception.ckpt"
    assert first[1][1] in ("step=3.ckpt", "step=6.ckpt")


class Notified(Regressor):
    """Gets SLURM's signal on one rank while a checkpoint is being written."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.global_step == 3 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return super().training_step(batch, index)


def run_out_of_time(folder: Path) -> None:
    slow_writer(0.5)
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"SLURM_NTASKS": size, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}
    os.environ |= {"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "training", "SLURM_NTASKS_PER_NODE": size}
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR2)
    keeping = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=3)
    owner = trainer(strategy(), callbacks=[keeping], plugins=[environment], default_root_dir=folder)
    owner.fit(Notified(), batches())


def test_a_job_is_put_into_the_queue_again_when_its_checkpoint_is_whole(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f"#!/bin/sh\nls {tmp_path}/*/manifest.json {tmp_path}/saved/*/manifest.json > {tmp_path}/seen\n"
    )
    scontrol.chmod(0o755)
    run_ranks(run_out_of_time, 2, tmp_path)
    seen = [Path(line).parent.name for line in (tmp_path / "seen").read_text().split()]
    # All act on the signal some steps after it came; whatever was being written then is whole as well.
    assert seen in (["hpc_ckpt_1.ckpt", "step=3.ckpt"], ["hpc_ckpt_1.ckpt", "step=6.ckpt"])
