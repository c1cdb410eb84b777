"""`ThroughputMonitor` under every plan: it logs what a hand counts, and communicates one small sum for each log."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.rows import full
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from meshbolt import MeshStrategy
from meshbolt.callbacks import ThroughputMonitor
from meshbolt.callbacks.monitoring import Monitor
from meshbolt.compat import TorchDispatchMode
from meshbolt.demos import ByteGPT
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Record, read_records
from meshbolt.testing import run_ranks

DIM, LAYERS, LENGTH, BATCH, STEPS = 16, 4, 16, 4, 5
PEAK = 1e10
# For each token: matrix products of the blocks and the head, and attention over all pairs, forwards and twice that backwards.
PER_TOKEN = 6 * (LAYERS * 12 * DIM**2 + DIM * 256) + 12 * LAYERS * DIM * LENGTH
LATE_SECONDS = 0.15


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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.collectives.__enter__()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.collectives.__exit__(None, None, None)


class Late(ByteGPT):
    """On rank 1, takes longer."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            time.sleep(LATE_SECONDS)
        return super().training_step(batch, batch_idx)


class SlowOnOneRank(Dataset[tuple[Tensor, Tensor]]):
    """On rank 1, samples are long in coming."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if torch.distributed.get_rank() == 1:
            time.sleep(LATE_SECONDS / BATCH)
        return self.inputs[index], self.inputs[index]


def fit(
    directory: str, ranks: int, settings: dict[str, Any], options: dict[str, Any], callbacks: list[pl.Callback]
) -> None:
    kind, data = options.pop("module", ByteGPT), options.pop("data", lambda inputs: TensorDataset(inputs, inputs))
    windows = options.get("accumulate_grad_batches", 1)
    torch.manual_seed(1)
    inputs = torch.randint(0, 256, (BATCH * windows * STEPS * ranks, LENGTH))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=MeshStrategy(**settings),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=directory,
        callbacks=callbacks,
        **options,
    )
    module = kind(dim=DIM, num_layers=LAYERS, num_heads=2, max_length=LENGTH)
    loader = DataLoader(data(inputs), batch_size=BATCH)
    trainer.fit(module, loader, DataLoader(TensorDataset(inputs[:8], inputs[:8]), batch_size=BATCH))


def monitored(directory: str, ranks: int, settings: dict[str, Any], options: dict[str, Any]) -> list[Record]:
    monitor = ThroughputMonitor(every=2, peak_flops=PEAK)
    fit(directory, ranks, settings, options, [monitor])
    torch.distributed.barrier()
    return list(read_records(Path(directory) / "meshbolt_records"))


def value(record: Record, name: str) -> Any:
    return record["values"][f"throughput/{name}"]


ROWS = [
    pytest.param(2, {"zero": 2}, {}, id="dp2"),
    pytest.param(2, {"zero": 0, "tensor_parallel": 2}, {}, id="tp2"),
    pytest.param(2, {"zero": 0, "pipeline_parallel": 2}, {}, id="pp2"),
    pytest.param(2, {"zero": 3}, {"accumulate_grad_batches": 3, "val_check_interval": 4}, id="dp2-accumulation3"),
    full(2, {"zero": 1, "recompute": "full"}, {}, id="dp2-recompute"),
    full(2, {"zero": 1, "offload": "cpu"}, {}, id="dp2-offload"),
    full(4, {"zero": 1, "tensor_parallel": 2}, {}, id="dp2-tp2"),
    full(4, {"zero": 1, "tensor_parallel": 2, "pipeline_parallel": 2}, {"accumulate_grad_batches": 3}, id="tp2-pp2"),
]


@pytest.mark.parametrize(("ranks", "settings", "options"), ROWS)
def test_rates_and_operations_are_what_a_hand_counts(
    tmp_path: Path, ranks: int, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    records = run_ranks(monitored, ranks, str(tmp_path), ranks, settings, options)[0]
    sharing = settings.get("tensor_parallel", 1) * settings.get("pipeline_parallel", 1)
    samples = BATCH * options.get("accumulate_grad_batches", 1)
    by_step: dict[int, list[Record]] = {}
    for record in records:
        by_step.setdefault(record["step"], []).append(record)

    assert {step: each[0]["steps"] for step, each in by_step.items()} == {2: 1, 3: 1, 4: 1, 5: 1}
    for each in by_step.values():
        assert [record["rank"] for record in sorted(each, key=lambda record: record["rank"])] == list(range(ranks))
        assert all(record["values"] == each[0]["values"] for record in each if record["rank"] == each[0]["rank"])
        first = each[0]
        # Each rank took its own time for its part of the samples.
        rate = sum(samples / record["own"]["step_seconds"] / sharing for record in each)
        assert value(first, "samples_per_second") == pytest.approx(rate)
        assert value(first, "tokens_per_second") == pytest.approx(rate * LENGTH)
        assert value(first, "device_tokens_per_second") == pytest.approx(rate * LENGTH / ranks)
        assert value(first, "total_teraflops_per_second") == pytest.approx(rate * LENGTH * PER_TOKEN / 1e12)
        assert value(first, "mfu") == pytest.approx(rate * LENGTH * PER_TOKEN / ranks / PEAK)
        assert value(first, "step_teraflop") == pytest.approx(ranks // sharing * samples * LENGTH * PER_TOKEN / 1e12)
        assert value(first, "hfu") > value(first, "mfu") > value(first, "mfu_causal")
        assert 0 < value(first, "exposed_communication_seconds") < value(first, "step_seconds")
        assert (value(first, "forward_seconds") is None) == ("pipeline_parallel" in settings)
    is_recomputed = value(records[0], "hfu") > 1.2 * value(records[0], "mfu")
    assert is_recomputed == ("recompute" in settings)


def with_and_without(directory: str, settings: dict[str, Any]) -> list[Counter[str]]:
    counts = []
    for monitors in ([], [ThroughputMonitor(every=100)]):
        counting = WhileTraining()
        fit(directory, 2, settings, {"limit_val_batches": 0}, [*monitors, counting])
        counts.append(counting.collectives.counts)
    return counts


def test_nothing_is_communicated_but_one_small_sum_for_each_log(tmp_path: Path) -> None:
    for without, with_monitor in run_ranks(with_and_without, 2, str(tmp_path), {"zero": 2}):
        assert without
        # After the third step and at the end.
        assert with_monitor - without == {"c10d.allreduce_": 2}
        assert without - with_monitor == {}


def test_what_ranks_wait_for_a_late_one_is_not_taken_for_computation(tmp_path: Path) -> None:
    records = run_ranks(monitored, 2, str(tmp_path), 2, {"zero": 2}, {"module": Late})[0]
    by_rank = {rank: [each for each in records if each["rank"] == rank] for rank in range(2)}
    exposed = [[each["own"]["exposed_seconds"] for each in by_rank[rank]] for rank in range(2)]

    assert statistics.median(exposed[0]) > 0.8 * LATE_SECONDS
    assert statistics.median(exposed[1]) < 0.5 * LATE_SECONDS
    assert value(records[0], "exposed_communication_seconds") == pytest.approx((exposed[0][0] + exposed[1][0]) / 2)


@pytest.mark.parametrize("settings", [{"zero": 2}, full({"zero": 0, "pipeline_parallel": 2})])
def test_a_rank_waits_for_its_own_data_and_the_others_for_the_rank(tmp_path: Path, settings: dict[str, Any]) -> None:
    records = run_ranks(monitored, 2, str(tmp_path), 2, settings, {"data": SlowOnOneRank})[0]
    data, ranks = (
        [statistics.median(each["own"][name] for each in records if each["rank"] == rank) for rank in range(2)]
        for name in ("data_wait_seconds", "exposed_seconds")
    )
    assert data[1] > 0.9 * LATE_SECONDS > 0.5 * LATE_SECONDS > data[0]
    assert ranks[0] > 0.7 * LATE_SECONDS > 0.5 * LATE_SECONDS > ranks[1]


def fit_twice(directory: str) -> list[float]:
    torch.manual_seed(1)
    inputs = torch.randint(0, 256, (8 * BATCH, LENGTH))
    loader = DataLoader(TensorDataset(inputs, inputs), batch_size=BATCH)
    module, found = ByteGPT(dim=DIM, num_layers=LAYERS, num_heads=2, max_length=LENGTH), []
    monitor = ThroughputMonitor()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=MeshStrategy(zero=0, tensor_parallel=2),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=directory,
        callbacks=[monitor],
    )
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, loader, loader)
        found.append(monitor.latest["throughput/step_teraflop"])
    return found


@pytest.mark.full
def test_a_second_fit_of_a_module_that_is_divided_by_now_counts_the_same(tmp_path: Path) -> None:
    expected = BATCH * LENGTH * PER_TOKEN / 1e12
    assert run_ranks(fit_twice, 2, str(tmp_path)) == [pytest.approx([expected] * 2)] * 2


class Plain(Monitor):
    """A monitor that logs nothing."""

    kind = "throughput"


def refused(directory: str) -> str:
    place = Path(directory)

    class OneCannot(Plain):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            if trainer.global_rank == 1:
                (place / "records" / "rank_1.jsonl").mkdir(parents=True)
            trainer.strategy.barrier()
            super().setup(trainer, pl_module, stage)

    with pytest.raises(ConfigError) as error:
        fit(directory, 2, {"zero": 2}, {}, [OneCannot(directory=place / "records")])
    return str(error.value)


def test_records_that_one_rank_cannot_write_stop_all_of_them(tmp_path: Path) -> None:
    for said in run_ranks(refused, 2, str(tmp_path)):
        assert "rank_1.jsonl" in said
        assert "rank 1 may write to" in said
