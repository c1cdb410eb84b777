"""If these fail, a run with offloading is told to move other bytes than it does, or hides that it waits for a disk."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from tests.rows import full
from torch import Tensor, nn

from meshbolt import MeshStrategy, Offload
from meshbolt.callbacks import OffloadMonitor
from meshbolt.monitoring import find_metric, read_records
from meshbolt.offload import SystemCalls
from meshbolt.testing import run_ranks

WIDTH, BLOCKS, STEPS = 32, 3, 3
# Two moments in float32. Each unit's part of a rank is a whole number of pages, on one rank and on two.
UNIT_BYTES = WIDTH * WIDTH * 4 * 2
STATE_BYTES = (BLOCKS + 1) * UNIT_BYTES
MANY = 12  # units whose disk is slow
DELAY = 0.01  # of each transfer between the disk and memory, in seconds
pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class Net(pl.LightningModule):
    """Blocks that are units, and a layer of the root."""

    def __init__(self, blocks: int = BLOCKS, *, seconds: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head, self.seconds = nn.Linear(WIDTH, WIDTH, bias=False), seconds

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        time.sleep(self.seconds)  # as long as a batch takes
        for block in self.blocks:
            batch = block(batch)
        return self.head(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def fit(
    module: Net, offload: dict[str, Any], monitor: OffloadMonitor, *, zero: int = 2, window: int = 1, **settings: Any
) -> pl.Trainer:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    data = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(data[rank::ranks].contiguous(), batch_size=2)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        strategy=MeshStrategy(zero=zero, offload=Offload(**offload)),
        accelerator="cpu",
        devices=ranks,
        accumulate_grad_batches=window,
        max_epochs=-1,
        callbacks=[monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **{"max_steps": STEPS, "logger": False, **settings},
    )
    trainer.fit(module, loader)
    return trainer


def recorded(place: dict[str, Any], zero: int, window: int, folder: str) -> dict[str, Any]:
    offload = {**place, **({"path": folder} if "nvme" in place.values() else {})}
    trainer = fit(Net(), offload, OffloadMonitor(every=1, directory=folder), zero=zero, window=window)
    assert trainer.global_step == STEPS
    return trainer.strategy.engine.offload_traffic().state.__dict__  # type: ignore[attr-defined, no-any-return]


PLACES = {
    "cpu": ({"optimizer": "cpu"}, 0.0),
    "half": ({"optimizer": "cpu", "fraction": 0.5}, 0.0),
    "nvme": ({"optimizer": "nvme"}, 1.0),
    "half nvme": ({"optimizer": "nvme", "fraction": 0.5}, 0.5),
}
QUICK = {("cpu", 1, 1, 2), ("nvme", 2, 3, 2), ("half nvme", 3, 1, 2), ("nvme", 3, 3, 1)}
ROWS = list(itertools.product(PLACES, (1, 2, 3), (1, 3), (1, 2)))


@pytest.mark.parametrize(("place", "zero", "window", "ranks"), [row if row in QUICK else full(*row) for row in ROWS])
def test_a_step_moves_the_bytes_of_the_states_own_size(
    place: str, zero: int, window: int, ranks: int, tmp_path: Path
) -> None:
    setting, in_file = PLACES[place]
    run_ranks(recorded, ranks, setting, zero, window, str(tmp_path), timeout=60)
    steps = [record for record in read_records(tmp_path) if record["kind"] == "offload"]
    assert sorted((each["rank"], each["step"]) for each in steps) == [
        (rank, step) for rank in range(ranks) for step in range(1, STEPS + 1)
    ]
    for values in (each["values"] for each in steps):
        assert values["offload/updated_bytes"] == STATE_BYTES / ranks
        assert values.get("offload/state_read_bytes", 0) == in_file * STATE_BYTES / ranks
        assert values.get("offload/state_written_bytes", 0) == in_file * STATE_BYTES / ranks
        assert "offload/state_to_host_bytes" not in values  # a CPU's memory is the host's
        assert all(find_metric(name) for name in values)
        assert 0 < values["offload/step_wait_seconds"] <= values["offload/not_hidden_seconds"]


class SlowDisk(SystemCalls):
    """Takes its time."""

    is_slow = False

    def read(self, fd: int, into: memoryview, offset: int) -> int:
        time.sleep(DELAY if SlowDisk.is_slow else 0)
        return super().read(fd, into, offset)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        time.sleep(DELAY if SlowDisk.is_slow else 0)
        return super().write(fd, data, offset)


def waited_for(overlap: bool, folder: str) -> tuple[float, float]:
    """Return what is not hidden of a step with a slow disk, and what of all work was."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0")
        patched.setattr("meshbolt.offload.files.SystemCalls", SlowDisk)
        patched.setattr("meshbolt.offload.files.find_library", lambda: None)  # system calls are slow here
        patched.setattr(SlowDisk, "is_slow", True)
        monitor = OffloadMonitor(every=1, directory=folder)
        # A batch takes longer than the disk, where something can be hidden under it.
        module = Net(MANY - 1, seconds=1.5 * 2 * MANY * DELAY if overlap else 0.0)
        # The last step has nothing behind it that could hide it.
        offload = {"optimizer": "nvme", "path": folder, "overlap": overlap}
        trainer = fit(module, offload, monitor, max_steps=2 * STEPS)
        moved = trainer.strategy.engine.offload_traffic()  # type: ignore[attr-defined]
    assert moved.state.written.num_bytes == 2 * STEPS * MANY * UNIT_BYTES / dist.get_world_size()
    return moved.not_hidden_seconds / (2 * STEPS), moved.hidden_fraction


def test_time_that_a_slow_disk_takes_is_counted_where_nothing_hides_it(tmp_path: Path) -> None:
    # Four threads at most move a block of each unit in and out; of two units that is done beside the rest of the step.
    disk_seconds = 2 * (MANY - 2) / 4 * DELAY
    for seconds, hidden in run_ranks(waited_for, 2, False, str(tmp_path), timeout=60):
        assert seconds >= disk_seconds
        assert hidden < 0.1
    for seconds, hidden in run_ranks(waited_for, 2, True, str(tmp_path), timeout=60):
        assert seconds < disk_seconds
        assert hidden > 0.5


def traced(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0")
        monitor = OffloadMonitor(every=2, directory=folder, trace_steps=(1, 2))
        offload = {"optimizer": "nvme", "path": folder, "overlap": True}
        fit(Net(), offload, monitor, window=3, max_steps=6, logger=CSVLogger(folder), log_every_n_steps=1)


def test_a_trace_has_what_ran_in_its_steps_and_loggers_hear_of_the_rest(tmp_path: Path) -> None:
    run_ranks(traced, 2, str(tmp_path), timeout=60)
    for rank in range(2):
        events = json.loads((tmp_path / f"offload_trace_rank_{rank}.json").read_text())["traceEvents"]
        spans = [event for event in events if event["ph"] == "X"]
        named = [span["name"] for span in spans if span["cat"] == "step"]
        assert [named.count(name) for name in ("forward", "backward", "optimizer step")] == [7, 6, 2]
        assert sum(span["cat"] == "updates" for span in spans) >= 2 * (BLOCKS + 1)
        assert {span["cat"] for span in spans} >= {"file: read", "file: write"}
        assert all(span["dur"] >= 0 and span["pid"] == rank for span in spans)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "offload/state_read_bytes" in rows[0].split(",")
    assert len(rows) == 1 + 3


def refused(folder: str) -> str:
    with pytest.raises(ValueError, match="nothing is"):
        fit(Net(), {}, OffloadMonitor(directory=folder))
    return "refused"


def test_nothing_to_measure_is_said(tmp_path: Path) -> None:
    assert run_ranks(refused, 1, str(tmp_path)) == ["refused"]
