"""If these fail, a run is told that its memory holds something else than it does, or gets no advice where it is too little."""

from __future__ import annotations

import ctypes
import itertools
import json
import resource
import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from torch import Tensor, nn

from meshbolt import MeshStrategy, Offload
from meshbolt.callbacks import MemoryMonitor
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Record, find_metric, read_records
from meshbolt.monitoring.heap import Heap
from meshbolt.monitoring.memory import process_bytes
from meshbolt.testing import run_ranks

MIB = 2**20
WIDTH, BLOCKS = 64, 3
BLOCK_BYTES = 2 * WIDTH * WIDTH * 4  # two layers in float32
MODEL_BYTES = BLOCKS * BLOCK_BYTES + WIDTH * WIDTH * 4  # and one of the root
pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(pl.LightningModule):
    """Blocks that are units, a layer of the root, and a buffer."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS, optimizer: str = "AdamW", **options: Any) -> None:
        super().__init__()
        self.width, self.count, self.optimizer, self.options = width, blocks, optimizer, options
        self.blocks: nn.ModuleList | None = None
        self.extra: list[Any] = []
        self.register_buffer("shift", torch.zeros(width))

    def configure_model(self) -> None:
        if self.blocks is None:
            self.blocks = nn.ModuleList(Block(self.width) for _ in range(self.count))
            self.head = nn.Linear(self.width, self.width, bias=False)

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        for block in self.blocks or ():
            batch = block(batch)
        return (self.head(batch) + self.shift).square().mean()

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=1e-2, **self.options)


def fit(module: Net, folder: str, *, zero: int = 2, batch: int = 2, every: int = 1, **settings: Any) -> pl.Trainer:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    rows = torch.randn(16 * batch, module.width)
    # Ranks of a pipeline see the same samples.
    loader = torch.utils.data.DataLoader(rows if "strategy" in settings else rows[rank::ranks], batch_size=batch)
    offload = settings.pop("offload", None)
    trainer = pl.Trainer(
        strategy=settings.pop("strategy", None) or MeshStrategy(zero=zero, offload=offload),
        accelerator="cpu",
        devices=ranks,
        max_epochs=-1,
        callbacks=[settings.pop("monitor", None) or MemoryMonitor(every=every, directory=folder)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **{"max_steps": 3, **settings},
    )
    trainer.fit(module, loader)
    return trainer


def of_ranks(folder: Path) -> list[Record]:
    """Return what each rank has said of itself."""
    found = [record for record in read_records(folder) if "memory/used_bytes" in record["values"]]
    assert all(find_metric(name) for record in found for name in record["values"])
    return found


def train(
    folder: str, zero: int, window: int, optimizer: str, options: dict[str, Any], places: dict[str, str] | None
) -> None:
    offload = None
    if places is not None:
        offload = Offload(**places, **({"path": folder} if "nvme" in places.values() else {}))  # type: ignore[arg-type]
    fit(Net(optimizer=optimizer, **options), folder, zero=zero, accumulate_grad_batches=window, offload=offload)


OPTIMIZERS = {"AdamW": ("AdamW", {"fused": True}, 2), "SGD": ("SGD", {}, 0), "momentum": ("SGD", {"momentum": 0.9}, 1)}
QUICK = {(0, 1, "AdamW", 1), (1, 3, "AdamW", 2), (2, 3, "momentum", 2), (3, 1, "AdamW", 2), (0, 3, "SGD", 2)}
ROWS = list(itertools.product((0, 1, 2, 3), (1, 3), OPTIMIZERS, (1, 2)))


@pytest.mark.parametrize(("zero", "window", "kind", "ranks"), [row if row in QUICK else full(*row) for row in ROWS])
def test_categories_are_those_of_the_stage_to_the_byte(
    zero: int, window: int, kind: str, ranks: int, tmp_path: Path
) -> None:
    name, options, moments = OPTIMIZERS[kind]
    run_ranks(train, ranks, str(tmp_path), zero, window, name, options, None, timeout=60)
    records = of_ranks(tmp_path)
    assert sorted((each["rank"], each["step"]) for each in records) == [
        (rank, step) for rank in range(ranks) for step in (1, 2, 3)
    ]
    shard = MODEL_BYTES // (1 if zero == 0 else ranks)
    steps = 4 * (2 * BLOCKS + 1) if name == "AdamW" else 0  # a number for each parameter
    for values in (each["values"] for each in records):
        assert values["memory/parameters_bytes"] == shard
        assert values["memory/optimizer_bytes"] == moments * shard + steps
        assert values["memory/buffers_bytes"] == WIDTH * 4
        assert values["memory/gradients_bytes"] == (MODEL_BYTES if zero < 2 and window > 1 else shard)
        # In stage 3 units have been freed, and the root has not.
        gathered = MODEL_BYTES - BLOCKS * BLOCK_BYTES if zero == 3 else MODEL_BYTES
        assert values["memory/gathered_bytes"] == gathered


@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_offloaded_state_is_where_it_lies(place: str, tmp_path: Path) -> None:
    run_ranks(train, 2, str(tmp_path), 3, 1, "AdamW", {"fused": True}, {"optimizer": place}, timeout=60)
    # Columns of each unit are rounded up to whole pages in a file; a buffer has the largest unit, and there are three.
    state, largest = MODEL_BYTES, BLOCK_BYTES
    for values in (each["values"] for each in of_ranks(tmp_path)):
        steps = 4 * (2 * BLOCKS + 1)
        if place == "cpu":
            assert values["memory/optimizer_bytes"] == state + steps
            assert "memory/file_optimizer_bytes" not in values
        else:
            assert values["memory/file_optimizer_bytes"] == state
            assert values["memory/optimizer_bytes"] == 3 * largest + steps


def test_parameters_in_a_file_are_not_in_memory(tmp_path: Path) -> None:
    places = {"parameters": "nvme", "optimizer": "nvme"}
    run_ranks(train, 2, str(tmp_path), 3, 1, "AdamW", {"fused": True}, places, timeout=60)
    for values in (each["values"] for each in of_ranks(tmp_path)):
        assert values["memory/file_parameters_bytes"] == MODEL_BYTES // 2
        assert 0 < values["memory/parameters_bytes"] <= 3 * BLOCK_BYTES  # what is read ahead
        assert values["memory/file_optimizer_bytes"] >= 3 * MODEL_BYTES // 2  # with a copy to update


def in_stages(folder: str) -> int:
    trainer = fit(Net(), folder, strategy=MeshStrategy(zero=1, pipeline_parallel=2), batch=64)
    own = trainer.strategy.engine.parameters_by_name.values()  # type: ignore[attr-defined]
    return sum(p.numel() * 4 for p in own if not held_elsewhere(p))


@pytest.mark.parametrize("ranks", [2, full(4)])
def test_a_stage_has_its_own_part_gathered_for_the_whole_step(ranks: int, tmp_path: Path) -> None:
    sizes = run_ranks(in_stages, ranks, str(tmp_path), timeout=60)
    assert sum(sizes) == MODEL_BYTES * ranks // 2
    for record in of_ranks(tmp_path):
        values, own = record["values"], sizes[record["rank"]]
        assert values["memory/parameters_bytes"] == own * 2 // ranks
        # Those of microbatches add up whole, which may be seen or not where most is in use.
        assert own * 2 // ranks <= values["memory/gradients_bytes"] <= own
        # With one rank for each stage nothing is shared, and nothing gathered.
        assert values["memory/gathered_bytes"] == (own if ranks == 4 else 0)


def few_activations(folder: str, zero: int) -> None:
    fit(Net(fused=True), folder, zero=zero, batch=256, max_steps=6)


@pytest.mark.parametrize("zero", [3, full(0)])
def test_activations_of_a_small_model_are_counted_on_a_cpu_too(zero: int, tmp_path: Path) -> None:
    if Heap().allocated_bytes() is None:
        pytest.skip("this C library does not say what is allocated")
    run_ranks(few_activations, 2, str(tmp_path), zero)
    # Of each block its input, but for the batch's own, and what is between its layers; the head's input, and the loss's.
    expected = (2 * BLOCKS + 1) * 256 * WIDTH * 4
    for rank in range(2):
        sizes = [each["values"]["memory/activations_bytes"] for each in of_ranks(tmp_path) if each["rank"] == rank]
        # The first step sets up libraries; in the others, some KiB of other objects come and go.
        assert statistics.median(sizes[1:]) == pytest.approx(expected, rel=0.1)


def grown(folder: str, zero: int, place: str | None) -> int:
    # Freed memory goes back to the system at once, else it counts as used.
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)
    libc.mallopt(-1, 65536)
    loader = torch.randn(8, 1024)
    base = process_bytes()
    offload = None if place is None else Offload(place, path=folder)
    fit(Net(width=1024, blocks=12, fused=True), folder, zero=zero, batch=8, every=3, offload=offload)
    return base - loader.nbytes


@pytest.mark.parametrize(("zero", "place"), [(3, None), full(0, None), full(1, None), full(2, None), full(2, "nvme")])
def test_categories_add_up_to_what_the_process_has_grown_by(zero: int, place: str | None, tmp_path: Path) -> None:
    bases = run_ranks(grown, 2, str(tmp_path), zero, place, timeout=120)
    for record in of_ranks(tmp_path):
        values = record["values"]
        names = ("parameters", "gradients", "optimizer", "buffers", *(("gathered",) if zero == 0 else ()))
        held = sum(values[f"memory/{name}_bytes"] for name in names)
        held -= values["memory/gathered_bytes"] if zero == 0 else 0  # freed after the step
        growth = values["memory/used_bytes"] - bases[record["rank"]]
        assert held >= 100 * MIB
        assert held == pytest.approx(growth, rel=0.05)


class Phases(Net):
    """Takes much memory for an instant, in one of the phases."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def much(self) -> None:
        # More in the first step, which is no other one's peak.
        torch.ones((128 if self.trainer.global_step == 0 else 64) * MIB // 4)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if self.phase == "forward":
            self.much()
        loss = super().training_step(batch, index)
        if self.phase == "backward":
            loss.register_hook(lambda _: self.much())
        return loss

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        if self.phase == "optimizer":
            self.much()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.phase == "between":
            self.extra = [torch.ones(64 * MIB // 4)]
            self.extra.clear()


def peaks(folder: str, phase: str) -> None:
    fit(Phases(phase), folder)


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_a_peak_is_that_of_its_own_step_and_has_its_phase(phase: str, tmp_path: Path) -> None:
    run_ranks(peaks, 1, str(tmp_path), phase)
    for number, values in enumerate(each["values"] for each in of_ranks(tmp_path)):
        assert values["memory/step_peak_phase"] == values["memory/peak_phase"] == phase
        taken = (128 if number == 0 else 64) * MIB
        # The process may grow by itself between the peak and the end of the step: by 8 MiB in a whole suite.
        assert taken - 16 * MIB <= values["memory/step_peak_bytes"] - values["memory/used_bytes"] <= taken + 16 * MIB
        assert values["memory/step_peak_bytes"] <= values["memory/peak_bytes"]


def uneven(folder: str) -> None:
    module = Net()
    if dist.get_rank() == 1:
        module.extra = [torch.ones(64 * MIB // 4)]
    fit(module, folder, every=2, max_steps=4)


def test_ranks_are_compared_by_one_of_them(tmp_path: Path) -> None:
    run_ranks(uneven, 2, str(tmp_path))
    compared = [each for each in read_records(tmp_path) if "memory/peak_most_rank" in each["values"]]
    assert [(each["rank"], each["step"]) for each in compared] == [(0, 2), (0, 4)]
    for values in (each["values"] for each in compared):
        assert values["memory/peak_most_rank"] == 1
        assert values["memory/used_most_bytes"] - values["memory/used_least_bytes"] >= 50 * MIB
        mean = (values["memory/used_most_bytes"] + values["memory/used_least_bytes"]) / 2
        assert values["memory/used_mean_bytes"] == mean


class TooMuch(Net):
    """Asks for more than there is, in a step, in a unit's forward or in the backward pass."""

    def __init__(self, where: str, limited: bool) -> None:
        super().__init__()
        self.where, self.limited = where, limited

    def take(self, *_: Any) -> None:
        if self.trainer.global_step == 1:
            if self.limited:
                resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
                self.extra.extend(torch.ones(MIB) for _ in range(10**5))
            self.extra.append(torch.empty(2**55, dtype=torch.uint8))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if self.where == "unit" and self.trainer.global_step == 1:
            assert self.blocks is not None
            self.blocks[1].up.register_forward_pre_hook(self.take)
        loss = super().training_step(batch, index)
        if self.where == "backward":
            loss.register_hook(self.take)
        return loss


def out_of_memory(folder: str, where: str, limited: bool) -> str:
    if limited:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 600 * MIB, used + 600 * MIB))
    with pytest.raises(RuntimeError, match="allocate") as raised:
        fit(TooMuch(where, limited), folder, zero=2, batch=4)
    return str(raised.value)


@pytest.mark.parametrize(("where", "limited"), [("unit", False), ("backward", False), ("backward", True)])
def test_a_rank_without_memory_says_where_who_holds_it_and_what_to_try(
    where: str, limited: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    errors = run_ranks(out_of_memory, 2, str(tmp_path), where, limited, timeout=60)
    assert all("you tried to allocate" in error for error in errors)
    said = "".join(capfd.readouterr())
    phase = "the forward pass, in blocks.1" if where == "unit" else "the backward pass"
    for rank in range(2):
        assert f"rank {rank} has run out of memory in step 1, in {phase}: " in said
    assert "more were asked for" in said
    assert ("ulimit -v" in said) == limited
    assert "held: parameters" in said
    assert "blocks.0: " in said
    assert "what to try" in said
    assert "zero=3" in said
    events = [each for each in read_records(tmp_path) if each["kind"] == "event"]
    assert {each["values"]["what"] for each in events} == {"out_of_memory"}
    assert len(events) == 2
    picture = json.loads((tmp_path / "memory_rank_1_step_1.json").read_text())
    assert picture["bytes"]["device"]["parameters"] == MODEL_BYTES // 2
    assert set(picture["modules"]) >= {"blocks.0", "blocks.1", "blocks.2", "head"}


class Asking(Net):
    def on_train_batch_end(self, *_: Any) -> None:
        monitor: Any = self.trainer.callbacks[0]  # type: ignore[attr-defined]
        self.extra.append(monitor.snapshot())


def asked(folder: str) -> list[str]:
    module = Asking()
    monitor = MemoryMonitor(directory=folder)
    with pytest.raises(ValueError, match="outside of training"):
        monitor.snapshot()
    fit(module, folder, monitor=monitor)
    return [str(path) for path in module.extra]


def test_a_snapshot_on_demand_is_a_table_by_module(tmp_path: Path) -> None:
    (paths,) = run_ranks(asked, 1, str(tmp_path))
    assert len(set(paths)) == 3
    picture = json.loads(Path(paths[-1]).read_text())
    assert picture["modules"]["blocks.2"]["parameters"] == BLOCK_BYTES
    assert picture["modules"]["blocks.2"]["optimizer"] == 2 * BLOCK_BYTES + 2 * 4
    assert picture["phase"] == "between"


class Unfinished(Net):
    """Says how far a fit has come."""

    def configure_model(self) -> None:
        super().configure_model()
        self.extra.append("configure_model")


def on_another_strategy(folder: str) -> list[Any]:
    module = Unfinished()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[MemoryMonitor(directory=folder)],
        logger=False,
        max_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ConfigError, match=r"SingleDeviceStrategy.*strategy='zero2'"):
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, WIDTH)))  # type: ignore[arg-type]
    return module.extra


def test_another_strategy_is_refused_before_the_model_is_made(tmp_path: Path) -> None:
    assert run_ranks(on_another_strategy, 1, str(tmp_path / "records")) == [[]]
    assert not (tmp_path / "records").exists()
