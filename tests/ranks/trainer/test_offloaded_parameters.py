"""Parameters that lie in host memory or in a file: who looks at them, changes them, saves them and reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.test_offload import PLACES, WARNING, Net, fit
from tests.rows import full

from meshbolt import MeshStrategy, Offload, Recompute
from meshbolt.callbacks import ExponentialMovingAverage
from meshbolt.compat import local_tensor
from meshbolt.engine import offloaded
from meshbolt.errors import ConfigError, StorageError
from meshbolt.testing import run_ranks

pytestmark = pytest.mark.filterwarnings(WARNING)


def offload_of(place: str | None, path: str, **more: Any) -> Offload | None:
    if place is None:
        return None
    chosen = PLACES[place]
    return Offload(**chosen, **({"path": path} if "nvme" in chosen.values() else {}), **more)  # type: ignore[arg-type]


def train(place: str | None, path: str, steps: int, save: str, load: str | None) -> list[torch.Tensor]:
    """Train, from a checkpoint where one is given, save another, and return this rank's parts of the parameters."""
    more = {"ckpt_path": load} if load else {}
    trainer, found = fit(Net(fused=True), offload_of(place, path), zero=3, steps=steps, **more)
    trainer.save_checkpoint(save)
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [("infinity", "cpu"), (None, "infinity"), full("infinity", "both"), full("hosted", "infinity"), full("both", None)],
)
def test_checkpoints_go_from_any_place_to_any_other(first: str | None, second: str | None, tmp_path: Path) -> None:
    path, half, whole, end = str(tmp_path), str(tmp_path / "half"), str(tmp_path / "whole"), str(tmp_path / "end")
    expected = run_ranks(train, 2, None, path, 6, whole, None, timeout=60)
    run_ranks(train, 2, first, path, 3, half, None, timeout=60)
    found = run_ranks(train, 2, second, path, 6, end, half, timeout=60)
    assert all(torch.equal(*pair) for rank in zip(found, expected, strict=True) for pair in zip(*rank, strict=True))


class Changes(pl.Callback):
    """Changes parameters in every way there is: shards in place, whole ones, and those of the root between two batches."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == 1:
            with torch.no_grad():
                for parameter in module.blocks.parameters():  # type: ignore[union-attr]
                    parameter.mul_(0.9)
        if step == 2:
            with trainer.strategy.gathered(module.blocks[1]), torch.no_grad():  # type: ignore[attr-defined, index]
                module.blocks[1].up.weight[:3].fill_(0.01)  # type: ignore[index, union-attr]
        if step == 3:
            with trainer.strategy.gathered(module, optimizer=trainer.optimizers[0]) as state:  # type: ignore[attr-defined]
                for values in state.values():
                    values["exp_avg"].mul_(0.5)


class ChangesBetween(pl.Callback):
    """Changes shards between the forward and the backward pass."""

    def on_before_zero_grad(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            with torch.no_grad():
                for parameter in module.blocks[2].parameters():  # type: ignore[index, union-attr]
                    parameter.data.mul_(0.7)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        with torch.no_grad():
            torch._foreach_mul_([local_tensor(p) for p in module.parameters()], 0.5)


class ChangesItself(Net):
    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if index == 2:
            with torch.no_grad():
                self.unused.weight.fill_(0.25)
                self.tiny[3].weight.clamp_(-0.1, 0.1)
        return super().training_step(batch, index)


def changing(place: str | None, path: str, overlap: bool) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0" if overlap else "1")
        offload = offload_of(place, path, overlap=overlap)
        return fit(ChangesItself(fused=True), offload, zero=3, steps=6, callbacks=[Changes(), ChangesBetween()])[1]


@pytest.mark.parametrize(
    ("place", "overlap"), [("infinity", False), ("infinity", True), full("both", True), full("hosted", False)]
)
def test_what_somebody_changes_is_trained_on(place: str, overlap: bool, tmp_path: Path) -> None:
    expected, found = (run_ranks(changing, 2, each, str(tmp_path), overlap, timeout=60) for each in (None, place))
    assert all(torch.equal(*pair) for rank in zip(found, expected, strict=True) for pair in zip(*rank, strict=True))


def averaging(place: str | None, path: str) -> tuple[list[torch.Tensor], list[float], list[torch.Tensor]]:
    """Train with an average of weights and with validation, test, train on, and return what came of it."""
    module = Net(fused=True)
    average = ExponentialMovingAverage(decay=0.5)
    trainer, found = fit(
        module, offload_of(place, path), zero=3, callbacks=[average], limit_val_batches=2, val_check_interval=2
    )
    losses = [float(trainer.callback_metrics["val"])]
    trainer.fit_loop.epoch_loop.max_steps = 6
    loader = torch.utils.data.DataLoader(torch.ones(8, 16), batch_size=4)  # type: ignore[arg-type]
    losses += [trainer.validate(module, loader, verbose=False)[0]["val"]]
    trainer.fit(module, loader, loader)
    again = [local_tensor(p).detach().clone() for p in trainer.strategy.engine.parameters_by_name.values()]  # type: ignore[attr-defined]
    return found, losses, again


@pytest.mark.parametrize("place", ["infinity", full("both")])
def test_averages_validation_and_a_second_fit(place: str, tmp_path: Path) -> None:
    expected, found = (run_ranks(averaging, 2, each, str(tmp_path), timeout=60) for each in (None, place))
    for (first, losses, second), (own_first, own_losses, own_second) in zip(expected, found, strict=True):
        assert losses == own_losses
        for pair in zip([*first, *second], [*own_first, *own_second], strict=True):
            assert torch.equal(*pair)


def reading(path: str) -> tuple[int, int, int, float]:
    """Train, and return how much of how much was read in a step, and how many units were waited for."""
    module = Net(fused=True)
    steps: list[tuple[int, int]] = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            file = trainer.strategy.engine._hosted.file  # type: ignore[attr-defined]
            steps.append((file.traffic.read_bytes, file.traffic.written_bytes))

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0")
        trainer, _ = fit(module, offload_of("infinity", path), zero=3, steps=6, callbacks=[Notes()])
    file = trainer.strategy.engine._hosted.file  # type: ignore[attr-defined]
    root = file._units["the root"].num_bytes + file._units["blocks.2"].num_bytes
    return steps[-1][0] - steps[-2][0], steps[-1][1] - steps[-2][1], file.num_bytes, root


def test_each_unit_is_read_twice_a_step_and_what_stays_gathered_once(tmp_path: Path) -> None:
    for read, written, size, root in run_ranks(reading, 2, str(tmp_path), timeout=60):
        # The root and the last block stay gathered between forward and backward.
        assert read == 2 * size - root
        assert 0 < written <= size  # what is frozen is never written, nor what no batch uses


def recomputing(place: str | None, path: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    strategy = MeshStrategy(zero=3, offload=offload_of(place, path), recompute=Recompute("full"))
    data = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=3)  # type: ignore[arg-type]
    trainer.fit(Net(fused=True), loader, loader)
    return [local_tensor(p).detach().clone() for p in strategy.engine.parameters_by_name.values()]


@pytest.mark.full
def test_with_activations_computed_again(tmp_path: Path) -> None:
    expected, found = (run_ranks(recomputing, 2, each, str(tmp_path), timeout=60) for each in (None, "infinity"))
    assert all(torch.equal(*pair) for rank in zip(found, expected, strict=True) for pair in zip(*rank, strict=True))


def returning(place: dict[str, Any] | None, spare: int) -> tuple[list[torch.Tensor], list[int]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(offloaded, "spare_bytes", lambda *_, **__: spare)
        offload = None if place is None else Offload(**place, fraction="auto")
        trainer, found = fit(Net(fused=True), offload, zero=2, precision="16-mixed", steps=5)
    engine = trainer.strategy.engine  # type: ignore[attr-defined]
    away = [each.away_bytes for each in engine._offloaded._by_optimizer.values()]
    return found, away


@pytest.mark.parametrize("spare", [0, 3000, full(10**9)])
def test_auto_brings_back_what_fits(spare: int, tmp_path: Path) -> None:
    place = {"optimizer": "nvme", "path": str(tmp_path)}
    expected, found = (run_ranks(returning, 2, each, spare, timeout=60) for each in (None, place))
    whole = run_ranks(returning, 2, place, 0, timeout=60)
    for (own, away), (others, _), (_, all_away) in zip(found, expected, whole, strict=True):
        assert all(torch.equal(*pair) for pair in zip(own, others, strict=True))
        assert all_away[0] - spare <= away[0] if spare < 10**9 else away[0] == 0
        assert (away[0] < all_away[0]) == (spare > 0)


def test_parameters_elsewhere_need_stage_3() -> None:
    with pytest.raises(ConfigError, match=r"parameters='cpu'\) with zero=2.*Use zero=3"):
        MeshStrategy(zero=2, offload=Offload("cpu", parameters="cpu"))


def test_the_preset_needs_its_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESHBOLT_NVME_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"MESHBOLT_NVME_PATH.*not set"):
        pl.Trainer(strategy="zero_infinity", accelerator="cpu", devices=1)


def preset(_: str) -> str:
    trainer = pl.Trainer(
        strategy="zero_infinity",
        accelerator="cpu",
        devices=2,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    loader = torch.utils.data.DataLoader(torch.ones(8, 16), batch_size=2)
    trainer.fit(Net(fused=True), loader, loader)  # type: ignore[arg-type]
    file = trainer.strategy.engine._hosted.file  # type: ignore[attr-defined]
    return f"{file.num_bytes > 0} {Path(file.file.path).parent}"


def test_the_preset_takes_its_directory_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHBOLT_NVME_PATH", str(tmp_path))
    assert run_ranks(preset, 2, "", timeout=60) == [f"True {tmp_path}"] * 2
    assert list(tmp_path.iterdir()) == []


def without_room(path: str) -> str:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("meshbolt.offload.room.disk_of", _nearly_full)
        try:
            fit(Net(), offload_of("infinity", path), zero=3)
        except StorageError as error:
            return str(error)
    return "trained"


def _nearly_full(folder: str) -> Any:
    from meshbolt.offload.scratch import Disk

    return Disk(str(folder), "ext4", 1000, 10**9)


def test_parameters_without_room_are_refused_before_training(tmp_path: Path) -> None:
    for said in run_ranks(without_room, 2, str(tmp_path), timeout=60):
        assert re.match(r"offload: the files of 2 ranks on .* need .*, and their disk has 1000 B free", said), said
