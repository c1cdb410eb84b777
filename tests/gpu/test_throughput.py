"""`ThroughputMonitor` on a GPU: times of its stream, and nothing waits for it; nor for any other monitor."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy
from meshbolt.callbacks import CommunicationMonitor, MemoryMonitor, RankMonitor, ThroughputMonitor
from meshbolt.demos import ByteGPT
from meshbolt.monitoring import Record, read_records
from meshbolt.monitoring.peaks import find_peak
from meshbolt.testing import needs

pytestmark = needs(gpus=1)

DIM, LAYERS, LENGTH, BATCH, STEPS = 256, 4, 256, 16, 12
PER_TOKEN = 6 * (LAYERS * 12 * DIM**2 + DIM * 256) + 12 * LAYERS * DIM * LENGTH


class Ends(pl.Callback):
    """Takes the time when the device has ended a step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def fit(directory: Path, callbacks: list[pl.Callback]) -> None:
    torch.manual_seed(1)
    inputs = torch.randint(0, 256, (BATCH * STEPS, LENGTH))
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        strategy=MeshStrategy(zero=2),
        precision="bf16-mixed",
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=callbacks,
    )
    module = ByteGPT(dim=DIM, num_layers=LAYERS, num_heads=4, max_length=LENGTH)
    trainer.fit(module, DataLoader(TensorDataset(inputs, inputs), batch_size=BATCH))


def value(record: Record, name: str) -> Any:
    return record["values"][f"throughput/{name}"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_times_are_those_of_the_device_and_the_peak_is_found_by_its_name(tmp_path: Path) -> None:
    ends = Ends()
    fit(tmp_path, [ThroughputMonitor(every=100), ends])
    records = list(read_records(tmp_path / "meshbolt_records"))
    seconds = sum(value(each, "step_seconds") * each["steps"] for each in records)

    assert sum(each["steps"] for each in records) == STEPS - 1
    assert seconds == pytest.approx(ends.ends[-1] - ends.ends[0], rel=0.1)
    last = records[-1]
    assert value(last, "step_teraflop") == pytest.approx(BATCH * LENGTH * PER_TOKEN / 1e12)
    parts = ("data_wait", "compute", "exposed_communication", "optimizer", "offload_wait", "other")
    assert sum(value(last, f"{part}_seconds") or 0 for part in parts) == pytest.approx(
        value(last, "step_seconds"), rel=0.01
    )
    peak = find_peak(torch.cuda.get_device_name(), "bfloat16")
    assert (value(last, "mfu") is None) == (peak is None)
    if peak is not None:
        assert value(last, "mfu") == pytest.approx(
            value(last, "device_teraflops_per_second") / (peak.flops_per_second / 1e12)
        )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("monitors", "most"),
    [
        # At the end of the run, for the last step: each of those that read events of the device.
        ((ThroughputMonitor,), 1),
        ((ThroughputMonitor, MemoryMonitor, RankMonitor, CommunicationMonitor), 2),
    ],
    ids=["throughput", "all"],
)
def test_the_host_waits_for_the_device_no_more_often_than_without(
    tmp_path: Path, monitors: tuple[Callable[..., pl.Callback], ...], most: int
) -> None:
    def waits(callbacks: list[pl.Callback]) -> Counter[str]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
            fit(tmp_path, callbacks)
        return Counter(event.name for event in measured.events() if "Synchronize" in event.name)

    fit(tmp_path, [])  # what is done once in a process
    without, with_monitors = waits([]), waits([monitor(every=2) for monitor in monitors])
    assert (with_monitors - without).total() <= most, (with_monitors, without)
