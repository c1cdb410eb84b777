"""`MemoryMonitor` and `OffloadMonitor` on a GPU: what its allocator has, what its copies move, and nothing waits for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy
from meshbolt.callbacks import MemoryMonitor, OffloadMonitor
from meshbolt.demos import ByteGPT
from meshbolt.monitoring import read_records
from meshbolt.testing import needs

pytestmark = [needs(gpus=1), pytest.mark.filterwarnings("ignore:.*does not have many workers")]
LENGTH, BATCH, STEPS = 128, 8, 6


class Greedy(ByteGPT):
    """Asks for more than any GPU has, in the fourth step."""

    def on_before_backward(self, loss: torch.Tensor) -> None:
        if self.trainer.global_step == 3:
            torch.empty(2**45, dtype=torch.uint8, device=self.device)


def fit(folder: Path, callbacks: list[pl.Callback], *, kind: type[ByteGPT] = ByteGPT, **strategy: Any) -> ByteGPT:
    torch.manual_seed(1)
    inputs = torch.randint(0, 256, (BATCH * STEPS, LENGTH))
    module = kind(dim=256, num_layers=4, num_heads=4, max_length=LENGTH)
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        strategy=MeshStrategy(**{"zero": 2, **strategy}),
        max_steps=STEPS,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, inputs), batch_size=BATCH))
    return module


def records(folder: Path, kind: str, name: str) -> list[dict[str, Any]]:
    found = read_records(folder / "meshbolt_records")
    return [each["values"] for each in found if each["kind"] == kind and f"{kind}/{name}" in each["values"]]


def parameter_bytes(module: ByteGPT) -> int:
    return sum(parameter.numel() * 4 for parameter in module.parameters())


def test_categories_add_up_to_what_the_allocator_has(tmp_path: Path) -> None:
    module = fit(tmp_path, [MemoryMonitor(every=2)])
    for values in records(tmp_path, "memory", "parameters_bytes"):
        size = parameter_bytes(module)
        assert values["memory/parameters_bytes"] == pytest.approx(size, rel=0.01)
        assert values["memory/gradients_bytes"] == pytest.approx(size, rel=0.01)
        assert values["memory/optimizer_bytes"] == pytest.approx(2 * size, rel=0.01)
        assert values["memory/gathered_bytes"] == pytest.approx(size, rel=0.01)
        # Besides the model there is a batch, and what cuBLAS takes for itself.
        assert 0 <= values["memory/other_bytes"] <= 128 * 2**20
        assert values["memory/step_peak_phase"] in ("forward", "backward", "optimizer")
        assert values["memory/used_bytes"] < values["memory/step_peak_bytes"] <= values["memory/reserved_bytes"]
        assert values["memory/activations_bytes"] > 0
        assert values["memory/host_used_bytes"] > 0


def test_state_in_host_memory_is_not_on_the_device(tmp_path: Path) -> None:
    module = fit(tmp_path, [MemoryMonitor(every=2)], offload="cpu")
    for values in records(tmp_path, "memory", "parameters_bytes"):
        # With a copy of the parameters; and beside them buffers for copies.
        assert values["memory/host_optimizer_bytes"] >= 3 * parameter_bytes(module)
        assert values["memory/optimizer_bytes"] <= 2 * parameter_bytes(module)


def test_a_gpu_without_memory_gives_advice_and_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, [MemoryMonitor(every=2)], kind=Greedy)
    said = capsys.readouterr().err
    assert "rank 0 has run out of memory in step 3" in said
    assert "32768.00 GiB more were asked for" in said
    assert "offload='cpu'" in said
    picture = tmp_path / "meshbolt_records" / "memory_rank_0_step_3.json"
    assert json.loads(picture.read_text())["bytes"]["device"]["parameters"] > 0
    assert picture.with_suffix(".pickle").stat().st_size > 0


def test_copies_have_the_bytes_of_gradients_and_parameters(tmp_path: Path) -> None:
    module = fit(tmp_path, [OffloadMonitor(every=2, trace_steps=(2, 3))], offload="cpu")
    found = records(tmp_path, "offload", "state_to_host_bytes")
    assert len(found) == STEPS // 2
    # All of it in a run, where parameters begin at multiples of 64 bytes; updates may end after the log of their step.
    for name in ("to_host", "to_device"):
        moved = sum(values[f"offload/state_{name}_bytes"] for values in found) / len(found)
        assert moved == pytest.approx(parameter_bytes(module), rel=0.25)
        assert found[-1][f"offload/state_{name}_bytes_per_second"] > 1e9
    spans = json.loads((tmp_path / "meshbolt_records" / "offload_trace_rank_0.json").read_text())["traceEvents"]
    lanes = {span["cat"] for span in spans if span["ph"] == "X"}
    assert lanes >= {"step", "updates", "to the host", "to the device"}


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_the_host_waits_for_the_device_no_more_often_than_without(offload: str | None, tmp_path: Path) -> None:
    def waits(callbacks: list[pl.Callback]) -> Counter[str]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
            fit(tmp_path, callbacks, offload=offload)
        return Counter(event.name for event in measured.events() if "Synchronize" in event.name)

    monitors: list[pl.Callback] = [MemoryMonitor(every=2)]
    if offload is not None:
        monitors.append(OffloadMonitor(every=2))
    fit(tmp_path, [], offload=offload)  # what is done once in a process
    without, with_monitors = waits([]), waits(monitors)
    # At the end of the run, for what is under way.
    assert (with_monitors - without).total() <= 2, (with_monitors, without)
