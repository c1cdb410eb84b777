"""Lightning's own callbacks on a sharded module: equal to one process, or refused by name."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.model_summary import summarize
from tests.ranks.trainer.loops_support import (
    ADVICE,
    BATCH,
    Regressor,
    alone,
    batches,
    difference,
    in_order,
    metrics,
    trainer,
    weights,
)
from torch import Tensor, nn

from meshbolt import Checkpoint, MeshStrategy, UnsupportedError
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE
Make = Callable[..., pl.Trainer]


class Unfreezing(Regressor):
    """A module with a backbone, as BackboneFinetuning asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.blocks = self.blocks, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.backbone:
            x = x + block(x)
        return self.head(x) * self.scale + self.extra.sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


CALLBACKS: dict[str, Callable[[], pl.Callback]] = {
    "finetuning": lambda: BackboneFinetuning(2, lambda epoch: 1.5, backbone_initial_ratio_lr=0.1),
    "accumulation": lambda: GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}),
}


def fit_twice(make: Make, batch_size: int, which: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Fit three epochs, save, and go on to five in a new Trainer."""
    found: dict[str, Any] = {}
    for epochs in (3, 5):
        pl.seed_everything(0, verbose=False)
        # In float64 before Lightning reads weights into it, which it does before it changes the dtype.
        module = (Unfreezing() if which == "finetuning" else Regressor()).double()
        owner = make(max_epochs=epochs, callbacks=[CALLBACKS[which]()], precision="64-true", **options)
        path = folder / "three.ckpt" if epochs == 5 else None
        owner.fit(module, in_order(batch_size=batch_size), batches(batch_size=batch_size), ckpt_path=path)
        if path is None:
            owner.save_checkpoint(folder / "three.ckpt")
        found[f"steps {epochs}"], found[f"val {epochs}"] = owner.global_step, metrics(owner)["val"]
        found[f"weights {epochs}"] = weights(module)
    return found


@pytest.mark.parametrize("which", CALLBACKS)
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_finetuning_and_scheduled_accumulation_are_those_of_one_process_also_resumed(
    tmp_path: Path, strategy: str, which: str
) -> None:
    (tmp_path / "alone").mkdir()
    ours = run_ranks(fit_twice, 2, trainer, BATCH, which, tmp_path, {"strategy": strategy})
    (theirs,) = run_ranks(fit_twice, 1, alone, 2 * BATCH, which, tmp_path / "alone", {})

    for rank in ours:
        for epochs in (3, 5):
            assert rank[f"steps {epochs}"] == theirs[f"steps {epochs}"]
            assert rank[f"val {epochs}"] == pytest.approx(theirs[f"val {epochs}"], rel=1e-12)
            assert difference(rank[f"weights {epochs}"], theirs[f"weights {epochs}"]) <= 1e-12


def monitored(make: Make, folder: Path, options: dict[str, Any]) -> list[dict[str, str]]:
    callbacks = [LearningRateMonitor(logging_interval="step", log_momentum=True), DeviceStatsMonitor(cpu_stats=True)]
    owner = make(callbacks=callbacks, logger=CSVLogger(folder), log_every_n_steps=1, **options)
    owner.fit(Regressor(), batches(batch_size=6 // owner.world_size), batches())
    return (
        list(csv.DictReader((folder / "lightning_logs/version_0/metrics.csv").open())) if owner.is_global_zero else []
    )


def test_learning_rates_and_device_statistics_are_logged_as_in_one_process(tmp_path: Path) -> None:
    ours, _ = run_ranks(monitored, 2, trainer, tmp_path / "ours", {"strategy": "zero2"})
    (theirs,) = run_ranks(monitored, 1, alone, tmp_path / "theirs", {})

    for name in ("lr-AdamW", "lr-AdamW-momentum"):
        assert [row[name] for row in ours if row[name]] == [row[name] for row in theirs if row[name]] != []
    assert ours[0].keys() == theirs[0].keys()
    assert any("cpu_vm_percent" in name and ours[0][name] for name in ours[0])


class Slow(Regressor):
    def training_step(self, batch: Any, index: int) -> Tensor:
        time.sleep(0.05 + 0.05 * self.global_rank)
        return super().training_step(batch, index)


def timed() -> list[int]:
    steps = []
    for options in ({"max_time": timedelta(seconds=0.6)}, {"callbacks": [Timer(timedelta(seconds=0.6))]}):
        owner = trainer("zero3", max_epochs=100, **options)
        owner.fit(Slow(), batches(), batches())
        steps.append(owner.global_step)
    return steps


def test_a_time_limit_ends_all_ranks_at_the_same_step() -> None:
    first, second = run_ranks(timed, 2)

    assert first == second
    assert all(0 < steps < 30 for steps in first)


class OnMeta(Regressor):
    """Builds its layers in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = self.blocks = self.head = None
        del self.scale, self.extra

    def configure_model(self) -> None:
        if self.head is None:
            self.inp, self.head = nn.Linear(7, 10), nn.Linear(10, 1)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 13), nn.Linear(13, 10)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def summaries() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in range(4):
        for kind in (Regressor, OnMeta):
            module = kind()
            module.example_input_array = torch.zeros(2, 7)
            owner = trainer(MeshStrategy(zero=stage), enable_model_summary=True, fast_dev_run=1)
            owner.fit(module, batches(), batches())
            summary = summarize(module)
            found[f"{kind.__name__} {stage}"] = (
                summary.total_parameters,
                summary.trainable_parameters,
                dict(zip(summary.layer_names, summary.param_nums, strict=True)),
                dict(zip(summary.layer_names, summary.out_sizes, strict=True)),
            )
    return found


def test_the_model_summary_has_true_totals_under_every_stage() -> None:
    blocks = 3 * (10 * 13 + 13 + 13 * 10 + 10)
    of_layers = {"inp": 80, "blocks": blocks, "head": 11}
    for found in run_ranks(summaries, 2):
        for stage in range(4):
            total, trainable, layers, sizes = found[f"Regressor {stage}"]
            assert total == trainable == blocks + 80 + 11 + 4
            assert layers == of_layers
            assert sizes["head"] == [2, 1]
            assert found[f"OnMeta {stage}"][0] == blocks + 80 + 11
            assert found[f"OnMeta {stage}"][2] == of_layers


def learning_rate_found(make: Make, batch_size: int, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module = Regressor()
    owner = make(precision="64-true", default_root_dir=folder, max_epochs=3, **options)
    data = in_order(batch_size=batch_size)
    finder = Tuner(owner).lr_find(module, data, num_training=12, min_lr=1e-4, max_lr=1e-1)
    before = weights(module)
    owner.fit(module, data)
    return {
        "rates": finder.results["lr"],
        "losses": finder.results["loss"],
        "suggestion": finder.suggestion(skip_begin=1),
        "untouched": before,
        "weights": weights(module),
    }


@pytest.mark.parametrize("checkpoint", [Checkpoint(), Checkpoint(load_weights_only=True)])
def test_the_learning_rate_finder_leaves_the_module_untouched_and_finds_a_rate(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    (tmp_path / "alone").mkdir()
    strategy = MeshStrategy(zero=3, checkpoint=checkpoint)
    ours = run_ranks(learning_rate_found, 2, trainer, BATCH, tmp_path, {"strategy": strategy})
    (theirs,) = run_ranks(learning_rate_found, 1, alone, 2 * BATCH, tmp_path / "alone", {})

    for rank in ours:
        assert rank["rates"] == theirs["rates"]
        assert 1e-4 < rank["suggestion"] < 1e-1
        assert difference(rank["untouched"], theirs["untouched"]) == 0
        assert difference(rank["weights"], theirs["weights"]) <= 1e-12
    assert [place.name for place in tmp_path.iterdir()] == ["alone"]


def find_batch_size() -> None:
    module = Regressor()
    module.batch_size = 2
    Tuner(trainer("zero2")).scale_batch_size(module, batches())


def test_the_batch_size_finder_is_refused_by_lightning_itself() -> None:
    run_ranks_expecting(find_batch_size, 2, error=ValueError, match="not supported with distributed strategies")


def validate_by_the_clock() -> None:
    trainer("zero2", val_check_interval=timedelta(seconds=1)).fit(Regressor(), batches(), batches())


def test_validation_by_the_clock_is_refused_with_a_remedy() -> None:
    run_ranks_expecting(validate_by_the_clock, 2, error=UnsupportedError, match="number of batches")
