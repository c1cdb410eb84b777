"""All monitors of one Trainer: they share a small sum for each step that is logged, one count of steps, and a row of a logger."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader

from meshbolt import MeshStrategy
from meshbolt.callbacks import (
    CommunicationMonitor,
    MemoryMonitor,
    OffloadMonitor,
    RankMonitor,
    RunReport,
    ThroughputMonitor,
    Watchdog,
)
from meshbolt.compat import TorchDispatchMode
from meshbolt.monitoring import Record, read_records
from meshbolt.testing import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:The floating-point operations of training_step are not known",
)
RANKS, BATCH, WIDTH = 2, 2, 8
INTERVALS = {"throughput": 2, "ranks": 3, "memory": 4}


class CountCollectives(TorchDispatchMode):
    """Counts what goes to other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


class WhileTraining(pl.Callback):
    """Counts collectives from the first step to the last."""

    def __init__(self) -> None:
        self.collectives = CountCollectives()

    def on_train_start(self, *_: Any) -> None:
        self.collectives.__enter__()

    def on_train_end(self, *_: Any) -> None:
        self.collectives.__exit__(None, None, None)


class Two(pl.LightningModule):
    """Two networks with an optimizer each, which step as they are told.

    Args:
        updates: of each network in a batch that updates; None: Lightning's one of both together.
        window: batches between two of these.
        optimizers: 2, or 1 for both.
    """

    def __init__(self, updates: int | None = None, *, window: int = 1, optimizers: int = 2) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.updates, self.window, self.count = updates, window, optimizers
        self.automatic_optimization = updates is None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.second(self.first(batch)).square().mean()
        if self.updates is None:
            return loss
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        steps = (index + 1) % self.window == 0
        for number in range(self.updates if steps else 1):
            loss = loss if number == 0 else self.second(self.first(batch)).square().mean()
            self.manual_backward(loss)
            for optimizer in optimizers if steps else ():
                optimizer.step()
                optimizer.zero_grad()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        if self.updates is None or self.count == 1:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return [torch.optim.SGD(each.parameters(), lr=0.1) for each in (self.first, self.second)]


def fit(
    folder: str, callbacks: list[pl.Callback], *, batches: int, module: Two | None = None, **options: Any
) -> pl.Trainer:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": RANKS,
            "strategy": MeshStrategy(zero=2),
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": callbacks,
            **options,
        }
    )
    trainer.fit(module or Two(), DataLoader(torch.randn(RANKS * BATCH * batches, WIDTH), batch_size=BATCH))  # type: ignore[arg-type]
    return trainer


def all_monitors(folder: str, **intervals: int) -> list[pl.Callback]:
    every = {"throughput": 2, "ranks": 2, "memory": 2, **intervals}
    return [
        RankMonitor(every=every["ranks"], warn=100, directory=folder),
        MemoryMonitor(every=every["memory"], directory=folder),
        CommunicationMonitor(every=2, directory=folder),
        RunReport(f"{folder}/report.html", directory=folder),
        ThroughputMonitor(every=every["throughput"], directory=folder),
        Watchdog(),
    ]


def with_and_without(folder: str, intervals: dict[str, int], batches: int) -> list[Counter[str]]:
    counts = []
    for monitors in ([], all_monitors(folder, **intervals)):
        counting = WhileTraining()
        fit(folder, [*monitors, counting], batches=batches)
        counts.append(counting.collectives.counts)
    dist.barrier()
    return counts


def steps_of(records: list[Record], kind: str, *, rank: int = 0) -> list[int]:
    """Return the steps after which a rank has logged that all ranks know of."""
    key = "memory/used_least_bytes"
    own = [each for each in records if each["kind"] == kind and each["rank"] == rank]
    return [each["step"] for each in own if kind != "memory" or key in each["values"]]


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        # Rates are also logged after the third step, and at the end.
        ({}, {"throughput": [2, 3, 4, 6, 8, 10, 12, 13], "ranks": range(2, 13, 2), "memory": range(2, 13, 2)}),
        (INTERVALS, {"throughput": [2, 3, 4, 6, 8, 10, 12, 13], "ranks": [3, 6, 9, 12], "memory": [4, 8, 12]}),
    ],
    ids=["equal", "different"],
)
def test_monitors_that_log_the_same_step_share_one_sum_and_nothing_else_is_communicated(
    tmp_path: Path, intervals: dict[str, int], expected: dict[str, Any]
) -> None:
    results = run_ranks(with_and_without, RANKS, str(tmp_path), intervals, 13)
    records = list(read_records(tmp_path))
    for kind, steps in expected.items():
        assert steps_of(records, kind) == list(steps), kind
    logged = set().union(*map(set, expected.values()))
    for without, with_monitors in results:
        assert without
        assert with_monitors - without == {"c10d.allreduce_": len(logged)}
        assert without - with_monitors == {}


def logged_rows(folder: str) -> None:
    fit(folder, all_monitors(folder), batches=7, logger=CSVLogger(folder, name="csv", version=0), log_every_n_steps=7)


def test_a_logger_hears_of_each_step_once(tmp_path: Path) -> None:
    run_ranks(logged_rows, RANKS, str(tmp_path))
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Lightning counts from 0.
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 5, 6]
    for row in rows:
        is_due = int(row["step"]) % 2 == 1
        assert row["throughput/step_seconds"]
        for name in ("memory/used_bytes", "memory/used_most_bytes", "ranks/slowest_rank"):
            assert bool(row[name]) == is_due, name


KINDS = [
    # How the module steps, batches of a step, and by how many updates Lightning's global_step grows in it.
    pytest.param({}, {"accumulate_grad_batches": 3}, 3, 1, id="automatic-accumulation3"),
    pytest.param({"updates": 1, "optimizers": 1}, {}, 1, 1, id="manual"),
    pytest.param({"updates": 1}, {}, 1, 2, id="manual-two-optimizers"),
    full({"updates": 1, "optimizers": 1, "window": 2}, {}, 2, 1, id="manual-each-second-batch"),
    full({"updates": 3, "optimizers": 1}, {}, 1, 3, id="manual-three-updates"),
    pytest.param({"updates": 2, "window": 3}, {}, 3, 4, id="manual-two-updates-of-two-optimizers-each-third-batch"),
]


def counted(folder: str, module: dict[str, Any], options: dict[str, Any], batches: int) -> None:
    fit(folder, all_monitors(folder), batches=batches, module=Two(**module), **options)


@pytest.mark.parametrize(("module", "options", "batches", "updates"), KINDS)
def test_a_step_is_the_batches_from_one_update_to_the_next_for_every_monitor(
    tmp_path: Path, module: dict[str, Any], options: dict[str, Any], batches: int, updates: int
) -> None:
    steps = 5
    run_ranks(counted, RANKS, str(tmp_path), module, options, steps * batches)
    records = [each for each in read_records(tmp_path) if each["rank"] == 0]

    assert [(each["step"], each["steps"]) for each in records if each["kind"] == "throughput"] == [
        (number * updates, 1) for number in (2, 3, 4, 5)
    ]
    rates = [
        BATCH * batches / each["own"]["step_seconds"] for each in read_records(tmp_path) if each["kind"] == "throughput"
    ]
    said = [each["values"]["throughput/samples_per_second"] for each in records if each["kind"] == "throughput"]
    assert sum(said) == pytest.approx(sum(rates))
    assert [(each["step"], each["steps"]) for each in records if each["kind"] == "communication"] == [
        (2 * updates, 2),
        (4 * updates, 2),
        (5 * updates, 1),
    ]
    for kind in ("ranks", "memory"):
        assert steps_of(records, kind) == [2 * updates, 4 * updates], kind


def resumed(folder: str) -> None:
    """Train on from a checkpoint of an odd number of steps."""
    checkpoint = f"{folder}/after.ckpt"
    fit(folder, [], batches=5, module=Two(1)).save_checkpoint(checkpoint)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=MeshStrategy(zero=2),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RankMonitor(every=2, warn=100, directory=f"{folder}/records")],
    )
    loader = DataLoader(torch.randn(RANKS * BATCH * 5, WIDTH), batch_size=BATCH)
    trainer.fit(Two(1), loader, ckpt_path=checkpoint)  # type: ignore[arg-type]


def test_steps_before_a_resume_are_counted_and_not_updates(tmp_path: Path) -> None:
    run_ranks(resumed, RANKS, str(tmp_path))
    # Ten steps in all, of two updates each, of which the second five are measured, and the first of these is left out.
    assert steps_of(list(read_records(tmp_path / "records")), "ranks") == [16, 20]


def failing_and_again(folder: str) -> list[int]:
    """A fit that ends by an error in the middle of an interval, and one after it."""

    class Fails(Two):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if index == 3:
                raise RuntimeError("enough")
            return super().training_step(batch, index)

    monitors = all_monitors(folder)
    with pytest.raises(RuntimeError, match="enough"):
        fit(folder, monitors, batches=6, module=Fails())
    fit(folder, monitors, batches=6)
    return [each.steps_taken for each in monitors if hasattr(each, "steps_taken")]


def test_a_fit_that_failed_leaves_nothing_to_the_next_one(tmp_path: Path) -> None:
    for taken in run_ranks(failing_and_again, RANKS, str(tmp_path)):
        assert taken == [6] * 5


def offloaded(folder: str) -> None:
    monitor = OffloadMonitor(every=2, directory=folder)
    fit(folder, [monitor], batches=4, module=Two(1), strategy=MeshStrategy(zero=2, offload="cpu"))


@pytest.mark.full
def test_what_offloading_moves_is_that_of_such_a_step(tmp_path: Path) -> None:
    run_ranks(offloaded, RANKS, str(tmp_path))
    records = [each for each in read_records(tmp_path) if each["rank"] == 0]
    assert [(each["step"], each["steps"]) for each in records] == [(4, 2), (8, 2)]
