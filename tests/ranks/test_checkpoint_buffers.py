"""Buffers that follow each rank's own batches: a run that resumes on as many ranks has them as they were, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.ranks.engine_support import batch, loss_of, made
from tests.ranks.trainer.background_support import At, slow_writer
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import meshbolt
from meshbolt import Checkpoint, CheckpointError, MeshStrategy, Zero
from meshbolt.checkpoint import saved_tensors
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.strategies import directories
from meshbolt.testing import run_ranks

pytestmark = ADVICE

Values = dict[str, Tensor]
OF_RANK_1 = [f"running_{name}" for name in ("mean", "var")]


def buffers(module: nn.Module) -> Values:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def same(ours: Values, theirs: Values) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def stored_apart(path: Path) -> list[str]:
    return sorted(key for key in saved_tensors(path) if key.startswith("meshbolt.buffers."))


# The Trainer ------------------------------------------------------------------------------------------------------------


class Normalised(Regressor):
    """Statistics of each rank's own batches, beside a buffer that is the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7)
        self.register_buffer("alike", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Look(pl.Callback):
    """Takes the buffers when training or validation starts, and runs what it is told after three steps."""

    def __init__(self) -> None:
        self.seen: list[Values] = []

    def on_train_start(self, _: pl.Trainer, module: pl.LightningModule) -> None:
        self.seen.append(buffers(module))

    def on_validation_start(self, _: pl.Trainer, module: pl.LightningModule) -> None:
        self.seen.append(buffers(module))


def fit(load: Path | None = None, *, save: Path | None = None, zero: Any = 2, **policy: bool) -> tuple[Values, Values]:
    """Return the buffers when the checkpoint was loaded or saved, and those at the end of training."""
    seen, module, look = [], Normalised(), Look()

    def save_now(owner: pl.Trainer) -> None:
        seen.append(buffers(module))
        owner.save_checkpoint(save)  # type: ignore[arg-type]

    strategy = MeshStrategy(zero=zero, checkpoint=Checkpoint(**policy))
    callbacks = [look] if save is None else [At(3, do=save_now)]
    trainer(strategy, callbacks=callbacks).fit(module, batches(), ckpt_path=load)
    return (seen or look.seen)[0], buffers(module)


def stop_and_go_on(path: Path, zero: Any, asynchronous: bool) -> Values:
    if asynchronous:
        slow_writer(0.3)  # the run goes on meanwhile
    saved, end = fit(save=path, zero=zero, asynchronous=asynchronous)
    loaded, end_again = fit(path, zero=zero, asynchronous=asynchronous)
    assert same(loaded, saved)
    assert same(end_again, end)
    assert not same(saved, end)
    return saved


@pytest.mark.parametrize(
    ("zero", "asynchronous"), [(0, False), (3, False), (3, True), (Zero(stage=2, replicate=2), False)]
)
def test_each_rank_of_a_trainer_gets_its_own_back_and_ends_as_if_it_had_not_stopped(
    tmp_path: Path, zero: Any, asynchronous: bool
) -> None:
    first, second = run_ranks(stop_and_go_on, 2, tmp_path / "a.ckpt", zero, asynchronous)
    assert not torch.equal(first["norm.running_mean"], second["norm.running_mean"])
    # What agrees on all ranks, as the count of batches does, is stored once.
    assert stored_apart(tmp_path / "a.ckpt") == [f"meshbolt.buffers.1.state_dict.norm.{name}" for name in OF_RANK_1]


def save_one(path: Path) -> Values:
    return fit(save=path)[0]


def load_one(path: Path) -> Values:
    return fit(path)[0]


def evaluate(path: Path) -> Values:
    look = Look()
    trainer("zero3", callbacks=[look]).validate(Normalised(), batches(), ckpt_path=path, verbose=False)
    return look.seen[0]


@pytest.mark.parametrize(("saving", "loading"), [(2, 3), (2, 1), (1, 2)])
def test_another_number_of_ranks_has_those_of_rank_0(tmp_path: Path, saving: int, loading: int) -> None:
    saved = run_ranks(save_one, saving, tmp_path / "a.ckpt")
    assert all(same(values, saved[0]) for values in run_ranks(load_one, loading, tmp_path / "a.ckpt"))


def test_a_validation_on_as_many_ranks_has_those_of_each_rank(tmp_path: Path) -> None:
    saved = run_ranks(save_one, 2, tmp_path / "a.ckpt")
    assert all(map(same, run_ranks(evaluate, 2, tmp_path / "a.ckpt"), saved))


def save_in_a_window(path: Path) -> tuple[Values, Values]:
    held, module = [], Normalised()

    def save_now(owner: pl.Trainer) -> None:
        held.append(buffers(module))
        owner.save_checkpoint(path)

    # At the end of the first window, and again after the first batch of the second one.
    trainer("zero3", callbacks=[At(1, do=save_now)], accumulate_grad_batches=2, max_epochs=1).fit(module, batches())
    then, now = held
    return then, now


def resume_in_a_window(path: Path) -> Values:
    look = Look()
    trainer("zero1", callbacks=[look], accumulate_grad_batches=2, max_epochs=1).fit(
        Normalised(), batches(), ckpt_path=path
    )
    return look.seen[0]


def test_in_a_window_a_run_resumes_with_those_of_its_beginning_and_everyone_else_reads_those_of_then(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.ckpt"
    saved = run_ranks(save_in_a_window, 2, path)
    assert not any(same(then, now) for then, now in saved)
    assert all(same(ours, then) for ours, (then, _) in zip(run_ranks(resume_in_a_window, 2, path), saved, strict=True))
    assert all(same(ours, saved[0][0]) for ours in run_ranks(resume_in_a_window, 3, path))
    assert all(same(ours, now) for ours, (_, now) in zip(run_ranks(evaluate, 2, path), saved, strict=True))
    assert same(buffers(meshbolt.load_from_checkpoint(Normalised, path)), saved[0][1])


class Endless(IterableDataset[Any]):
    """A stream without a length, of which Lightning loads a batch ahead."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches(24))


class CountsBatches(Normalised):
    """Notes how many batches the statistics have seen before each one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen.append(int(self.norm.num_batches_tracked))
        return super().training_step(batch, index)


def first_count_when_resumed(path: Path, hook: str) -> int:
    def save(owner: pl.Trainer, _module: Any, *rest: Any) -> None:
        if rest[-1] == 2:
            owner.save_checkpoint(path)

    saver = pl.callbacks.LambdaCallback(**{hook: save})
    options = {"accumulate_grad_batches": 2, "max_epochs": 1, "limit_train_batches": 6}
    stream = DataLoader(Endless(), batch_size=None)
    trainer("zero2", callbacks=[saver], **options).fit(CountsBatches(), stream)
    again = CountsBatches()
    trainer("zero2", **options).fit(again, stream, ckpt_path=path)
    return again.seen[0]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_those_of_a_windows_beginning_are_not_those_of_when_its_batch_was_loaded(tmp_path: Path, hook: str) -> None:
    assert run_ranks(first_count_when_resumed, 2, tmp_path / "a.ckpt", hook) == [2, 2]


class Alike(Regressor):
    """A buffer that is the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alike", torch.arange(3.0))


def save_alike(path: Path) -> None:
    save = At(3, do=lambda owner: owner.save_checkpoint(path))
    trainer("zero0", callbacks=[save]).fit(Alike(), batches())


def test_nothing_more_is_stored_where_all_ranks_agree(tmp_path: Path) -> None:
    run_ranks(save_alike, 2, tmp_path / "a.ckpt")
    assert stored_apart(tmp_path / "a.ckpt") == []


def fail_on_rank_1(path: Path) -> str:
    def unreadable(_: Tensor) -> bytes:
        raise RuntimeError("the device is gone")

    if dist.get_rank() == 1:
        directories._digest = unreadable
    with pytest.raises(CheckpointError) as raised:
        save_one(path)
    return str(raised.value)


def test_buffers_that_one_rank_cannot_read_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_rank_1, 2, tmp_path / "a.ckpt")
    assert first == second
    assert "was not saved" in first
    assert "rank 1: RuntimeError: the device is gone" in first
    assert list(tmp_path.iterdir()) == []


# Fabric -----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Statistics of each rank's own batches."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.into(x)))


class Run:
    """A loop over a module that is sharded, and another, of which each rank has all."""

    def __init__(self, *, zero: int, asynchronous: bool) -> None:
        strategy = FabricStrategy(zero=zero, checkpoint=Checkpoint(asynchronous=asynchronous))
        self.fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
        self.fabric.launch()
        self.module, self.beside = made(Net), made(lambda: nn.BatchNorm1d(6))
        self.model, self.optimizer = self.fabric.setup(
            self.module, torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "beside": self.beside, "optimizer": self.optimizer}

    @property
    def buffers(self) -> Values:
        return buffers(self.module) | {f"beside.{name}": value for name, value in buffers(self.beside).items()}

    def steps(self, numbers: range) -> None:
        for number in numbers:
            self.beside(batch(number, self.fabric.global_rank)[0])
            self.fabric.backward(loss_of(self.model, batch(number, self.fabric.global_rank)))
            self.optimizer.step()
            self.optimizer.zero_grad()


def save_and_load(path: Path, asynchronous: bool) -> Values:
    if asynchronous:
        slow_writer(0.3)
    run = Run(zero=3, asynchronous=asynchronous)
    run.steps(range(3))
    saved = run.buffers
    run.fabric.save(path, run.state)
    run.steps(range(3, 6))
    end = run.buffers
    run.fabric.strategy.wait_for_checkpoint()  # type: ignore[attr-defined]
    assert not same(saved, end)

    again = Run(zero=2, asynchronous=asynchronous)
    again.fabric.load(path, again.state)
    assert same(again.buffers, saved)
    return saved


@pytest.mark.parametrize("asynchronous", [False, True])
def test_each_rank_of_fabric_gets_its_own_back(tmp_path: Path, asynchronous: bool) -> None:
    first, second = run_ranks(save_and_load, 2, tmp_path / "a.ckpt", asynchronous)
    for name in ("norm.running_mean", "beside.running_mean"):
        assert not torch.equal(first[name], second[name])
    keys = [f"meshbolt.buffers.1.{owner}{name}" for owner in ("beside.", "model.norm.") for name in OF_RANK_1]
    assert stored_apart(tmp_path / "a.ckpt") == keys


def save_filtered(path: Path) -> None:
    run = Run(zero=1, asynchronous=False)
    run.steps(range(2))
    keep: dict[str, Callable[[str, Any], bool]] = {"model": lambda name, _: "running" not in name}
    run.fabric.save(path, {"model": run.model}, filter=keep)


def test_what_a_filter_leaves_out_is_not_stored_apart_either(tmp_path: Path) -> None:
    run_ranks(save_filtered, 2, tmp_path / "a.ckpt")
    assert stored_apart(tmp_path / "a.ckpt") == []
