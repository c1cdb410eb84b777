"""`CommunicationMonitor` under every plan: what it counts is what the plan sends."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy
from meshbolt.callbacks import CommunicationMonitor
from meshbolt.demos import ByteGPT
from meshbolt.monitoring import Record, read_records
from meshbolt.testing import run_ranks

DIM, LAYERS, LENGTH, BATCH, STEPS = 16, 4, 16, 4, 5
LATE_SECONDS = 0.1
OPTIONS = {"dim": DIM, "num_layers": LAYERS, "num_heads": 2, "max_length": LENGTH}
ALL_BYTES = 4 * sum(parameter.numel() for parameter in ByteGPT(**OPTIONS).parameters())
ACTIVATION_BYTES = 4 * BATCH * LENGTH * DIM


class Late(ByteGPT):
    """On rank 1, takes longer."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_rank == 1:
            time.sleep(LATE_SECONDS)
        return super().training_step(batch, batch_idx)


def fit(
    directory: str,
    ranks: int,
    settings: dict[str, Any],
    *,
    callbacks: list[pl.Callback],
    kind: Any = ByteGPT,
    **options: Any,
) -> None:
    torch.manual_seed(1)
    windows = options.get("accumulate_grad_batches", 1)
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
    loaders = [DataLoader(TensorDataset(x, x), batch_size=BATCH) for x in (inputs, inputs[: BATCH * ranks])]
    trainer.fit(kind(**OPTIONS), *loaders)


def monitored(directory: str, ranks: int, settings: dict[str, Any], options: dict[str, Any]) -> list[Record]:
    fit(directory, ranks, settings, callbacks=[CommunicationMonitor(every=2)], **options)
    dist.barrier()
    return list(read_records(Path(directory) / "meshbolt_records"))


def by_row(records: list[Record], *, rank: int = 0) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        for row in record["rows"] if record["rank"] == rank else ():
            found.setdefault((row["axis"], row["collective"]), []).append({**row, "steps": record["steps"]})
    return found


# Bytes of a step. An exchange that reduces leaves out what a rank keeps: half, of two ranks.
ROWS = [
    pytest.param(
        2,
        {"zero": 2},
        {},
        {("dp_shard", "all_gather"): ALL_BYTES, ("dp_shard", "all_to_all"): ALL_BYTES // 2},
        id="zero2",
    ),
    pytest.param(
        2,
        {"zero": 2},
        {"accumulate_grad_batches": 2, "val_check_interval": 4},
        {("dp_shard", "all_gather"): ALL_BYTES, ("dp_shard", "all_to_all"): ALL_BYTES},
        id="zero2-accumulation2-validation",
    ),
    pytest.param(
        2,
        {"zero": 0, "pipeline_parallel": 2},
        {},
        {("pp", "send"): ACTIVATION_BYTES, ("pp", "recv"): ACTIVATION_BYTES},
        id="pp2",
    ),
    full(
        4,
        {"zero": 1, "tensor_parallel": 2},
        {},
        {("tp", "all_gather"): None, ("dp_shard", "all_gather"): None},
        id="dp2-tp2",
    ),
]


@pytest.mark.parametrize(("ranks", "settings", "options", "expected"), ROWS)
def test_bytes_of_a_step_are_those_of_the_plan(
    tmp_path: Path,
    ranks: int,
    settings: dict[str, Any],
    options: dict[str, Any],
    expected: dict[tuple[str, str], int | None],
) -> None:
    records = run_ranks(monitored, ranks, str(tmp_path), ranks, settings, options)[0]
    assert [record["steps"] for record in records if record["rank"] == 0] == [2, 2, 1]
    rows = by_row(records)
    for name, num_bytes in expected.items():
        for row in rows[name]:
            if num_bytes is not None:
                # And a few of those with which ranks agree on their loaders.
                assert 0 <= row["bytes"] - num_bytes * row["steps"] < 200 * row["steps"], name
            assert row["bytes_per_second"] > 0
            assert row["ceiling_bytes_per_second"] > 0
            assert 0 <= row["exposed_seconds"] <= row["seconds"]
    for record in records:
        axes = {row["axis"] for row in record["rows"]}
        total = sum(record["values"][f"communication/{axis}_bytes"] for axis in axes)
        assert record["values"]["communication/step_bytes"] == pytest.approx(total)


def test_what_ranks_wait_for_a_late_one_is_seen_where_they_wait(tmp_path: Path) -> None:
    records = run_ranks(monitored, 2, str(tmp_path), 2, {"zero": 2}, {"kind": Late})[0]
    waits = [
        statistics.median(
            record["values"]["communication/dp_shard_exposed_seconds"] for record in records if record["rank"] == rank
        )
        for rank in range(2)
    ]
    assert waits[0] > 0.8 * LATE_SECONDS
    assert waits[1] < 0.5 * LATE_SECONDS


class Recorded(pl.Callback):
    """Compares what a monitor counts in a step with what torch records of it."""

    def __init__(self, monitor: CommunicationMonitor) -> None:
        self.monitor, self.of_torch, self.counted = monitor, Counter[str](), Counter[str]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 3:
            self.last = entries()[-1]["record_id"]
            self.monitor._run.table.take()  # type: ignore[union-attr]

    def on_train_batch_end(self, *args: Any) -> None:
        if args[4] == 3:
            later = [each for each in entries() if each["record_id"] > self.last]
            self.of_torch = Counter(each["profiling_name"].partition(":")[2] for each in later)
            rows = self.monitor._run.table.rows  # type: ignore[union-attr]
            self.counted = sum((Counter({name: row.calls}) for (_, name), row in rows.items()), Counter())


def entries() -> list[dict[str, Any]]:
    import json

    from torch._C import _distributed_c10d as private

    return sorted(json.loads(private._dump_fr_trace_json())["entries"], key=lambda each: each["record_id"])


def compared(directory: str, settings: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    monitor = CommunicationMonitor(every=100, ceiling=False)
    recorded = Recorded(monitor)
    fit(directory, 2, settings, callbacks=[monitor, recorded], gradient_clip_val=1.0)
    return recorded.of_torch, recorded.counted


@pytest.mark.parametrize("settings", [{"zero": 2}, full({"zero": 0, "tensor_parallel": 2})])
def test_no_collective_is_missed(tmp_path: Path, settings: dict[str, Any]) -> None:
    if not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):
        pytest.skip("this version of torch records no collectives of gloo")
    for of_torch, counted in run_ranks(compared, 2, str(tmp_path), settings):
        assert of_torch == counted
        assert counted.total() > 5


def alone(directory: str) -> None:
    fit(directory, 1, {"zero": 2}, callbacks=[CommunicationMonitor(every=2)])


def test_alone_there_is_nothing_to_log(tmp_path: Path) -> None:
    run_ranks(alone, 1, str(tmp_path))
    assert not list(tmp_path.rglob("*.jsonl"))
