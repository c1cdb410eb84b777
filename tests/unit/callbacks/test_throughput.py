"""`ThroughputMonitor` in one process: hand counts, formulas, and bad input. Plans are in tests/ranks/trainer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.unit.callbacks.support import Module, tokens, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from meshbolt.callbacks import ThroughputMonitor
from meshbolt.demos import ByteGPT
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Record, read_records

STEP = 0.02
# Embedding 10 x 4, then Linear(4, 1): for each token, 4 weights, twice forwards and four times backwards.
PER_TOKEN = 6 * 4


class Slow(Module):
    """Takes its time."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(STEP)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        time.sleep(10 * STEP)


class Ends(pl.Callback):
    """Takes the time at the end of each batch, and of validation."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.trained_seconds: list[float] = []  # the same without validation before it
        self.validation_seconds = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())
        self.trained_seconds.append(self.ends[-1] - self.validation_seconds)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation_seconds += time.perf_counter() - self._since


def fit(
    tmp_path: Path, module: pl.LightningModule, loader: Any, monitor: ThroughputMonitor, **options: Any
) -> tuple[list[Record], Ends]:
    ends = Ends()
    fitting = trainer(
        callbacks=[monitor, ends],
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **options,
    )
    fitting.fit(module, loader, tokens(1))
    return list(read_records(tmp_path / "meshbolt_records")), ends


def value(record: Record, name: str) -> Any:
    return record["values"][f"throughput/{name}"]


def total(records: list[Record], rate: str) -> float:
    """Return what a rate comes to over all steps of the records."""
    return sum(value(each, rate) * value(each, "step_seconds") * each["steps"] for each in records)


def test_rates_times_time_are_what_was_trained_on_and_no_step_is_missing(tmp_path: Path) -> None:
    records, ends = fit(tmp_path, Slow(), tokens(8), ThroughputMonitor(every=4))

    assert [(each["step"], each["steps"]) for each in records] == [(3, 2), (4, 1), (8, 4)]
    assert total(records, "samples_per_second") == pytest.approx(7 * 2), "all but the first step"
    assert total(records, "tokens_per_second") == pytest.approx(7 * 10)
    seconds = sum(value(each, "step_seconds") * each["steps"] for each in records)
    assert seconds == pytest.approx(ends.ends[-1] - ends.ends[0], rel=0.05)


def test_a_step_is_its_whole_window_and_validation_in_its_middle_is_not_in_it(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "val_check_interval": 4}
    records, ends = fit(tmp_path, Slow(), tokens(12), ThroughputMonitor(every=1), **options)

    assert [(each["step"], each["steps"]) for each in records] == [(2, 1), (3, 1), (4, 1)]
    assert total(records, "samples_per_second") == pytest.approx(3 * 6)
    assert total(records, "tokens_per_second") == pytest.approx(3 * 30)
    seconds = sum(value(each, "step_seconds") * each["steps"] for each in records)
    assert seconds >= 9 * STEP
    assert ends.validation_seconds > 0.5
    for each, begun, ended in zip(records, ends.trained_seconds[2::3], ends.trained_seconds[5::3], strict=False):
        assert value(each, "step_seconds") < ended - begun + 5 * STEP, "a validation takes more than ten"


def test_uneven_batches_count_what_they_hold(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.arange(11 * 5).reshape(11, 5) % 10), batch_size=4)
    records, _ = fit(tmp_path, Module(), loader, ThroughputMonitor(every=100, peak_flops=1e9), max_epochs=2)

    # Batches of 4, 4 and 3 samples, twice; the first one is left out.
    assert total(records, "samples_per_second") == pytest.approx(18)
    assert total(records, "tokens_per_second") == pytest.approx(90)
    assert total(records, "total_teraflops_per_second") == pytest.approx(90 * PER_TOKEN / 1e12)


def test_the_time_of_a_step_is_told_apart(tmp_path: Path) -> None:
    class Late(Dataset[Tensor]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Tensor:
            time.sleep(STEP)
            return torch.arange(5)

    class Steps(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            time.sleep(2 * STEP)
            return self.out(self.embedding(batch)).square().mean()

        def on_before_backward(self, loss: Tensor) -> None:
            time.sleep(3 * STEP)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            time.sleep(4 * STEP)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            time.sleep(5 * STEP)

    records, _ = fit(tmp_path, Steps(), DataLoader(Late(), batch_size=2), ThroughputMonitor(every=6))
    last = records[-1]
    expected = {"data_wait": 2, "forward": 2, "backward": 3, "compute": 5, "optimizer": 4, "other": 5}
    for part, steps in expected.items():
        assert steps * STEP <= value(last, f"{part}_seconds") < (steps + 1) * STEP, part
    parts = ("data_wait", "compute", "exposed_communication", "optimizer", "offload_wait", "other")
    assert sum(value(last, f"{part}_seconds") for part in parts) == pytest.approx(value(last, "step_seconds"))


def test_a_pass_behind_an_update_is_no_part_of_the_optimizer(tmp_path: Path) -> None:
    class TwoUpdates(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            for steps in (1, 6):
                time.sleep(steps * STEP)
                loss = self.out(self.embedding(batch[0])).square().mean()
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            time.sleep(2 * STEP)

    monitor = ThroughputMonitor(every=6, flops=lambda _: 1.0)
    records, _ = fit(tmp_path, TwoUpdates(), tokens(6), monitor)
    assert [(each["step"], each["steps"]) for each in records] == [(6, 2), (12, 3)]
    assert value(records[-1], "forward_seconds") >= 7 * STEP
    assert 4 * STEP <= value(records[-1], "optimizer_seconds") < 8 * STEP, "and not 10"


def test_mfu_is_what_the_formula_says_over_the_time_and_the_peak(tmp_path: Path) -> None:
    dim, layers, length, batch, steps = 32, 3, 64, 4, 6
    module = ByteGPT(dim=dim, num_layers=layers, num_heads=2, max_length=length)
    inputs = torch.randint(0, 256, (batch * steps, length))
    monitor = ThroughputMonitor(every=100, peak_flops=2e10)
    loader = DataLoader(TensorDataset(inputs, inputs), batch_size=batch)
    records, ends = fit(tmp_path, module, loader, monitor, limit_val_batches=0)

    weights = layers * 12 * dim**2 + dim * 256
    per_token = 6 * weights + 12 * layers * dim * length
    causal = 6 * weights + 6 * layers * dim * length
    seconds = ends.ends[-1] - ends.ends[0]
    of_peak = (steps - 1) * batch * length / seconds / 2e10
    counts = sum(each["steps"] * value(each, "step_seconds") for each in records)
    measured = {
        name: sum(value(each, name) * each["steps"] * value(each, "step_seconds") for each in records) / counts
        for name in ("mfu", "mfu_causal", "hfu")
    }
    assert measured["mfu"] == pytest.approx(per_token * of_peak, rel=0.02)
    assert measured["mfu_causal"] == pytest.approx(causal * of_peak, rel=0.02)
    # Fused attention computes its scores again.
    assert measured["hfu"] == pytest.approx((per_token + 2 * layers * dim * length) * of_peak, rel=0.02)
    assert value(records[-1], "step_teraflop") == pytest.approx(per_token * batch * length / 1e12)
    assert value(records[-1], "peak_source") == "peak_flops= of ThroughputMonitor"


def test_a_fit_of_two_steps_is_logged_at_its_end_and_of_one_not_at_all(tmp_path: Path) -> None:
    monitor = ThroughputMonitor()
    records, _ = fit(tmp_path, Module(), tokens(2), monitor)
    assert [(each["step"], each["steps"]) for each in records] == [(2, 1)]
    assert monitor.latest == records[-1]["values"]

    with pytest.raises(ConfigError, match="no records"):
        fit(tmp_path / "one", Module(), tokens(1), ThroughputMonitor())
    assert list((tmp_path / "one").rglob("*.jsonl")) == []


def test_tokens_are_counted_as_the_user_says(tmp_path: Path) -> None:
    records, _ = fit(tmp_path, Module(), tokens(4), ThroughputMonitor(tokens=lambda batch: 3 * len(batch[0])))
    assert total(records, "tokens_per_second") == pytest.approx(3 * 3 * 2)


def test_batches_that_are_no_text_have_samples_alone(tmp_path: Path) -> None:
    class Floats(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.out(batch[0]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Do nothing."""

    loader = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2)
    records, _ = fit(tmp_path, Floats(), loader, ThroughputMonitor())
    assert value(records[-1], "tokens_per_second") is None
    assert total(records, "samples_per_second") == pytest.approx(6)


def test_without_a_peak_no_utilisation_is_shown(tmp_path: Path) -> None:
    records, _ = fit(tmp_path, Module(), tokens(4), ThroughputMonitor())
    names = ("mfu", "mfu_causal", "hfu", "peak_teraflops_per_second", "peak_source")
    assert [value(records[-1], name) for name in names] == [None] * 5
    assert value(records[-1], "device_teraflops_per_second") > 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"window": 0}, "window=0"),
        ({"window": True}, "window=True"),
        ({"peak_flops": 0}, "peak_flops=0"),
        ({"peak_flops": -1e12}, "989e12"),
        ({"every": 0}, "every=0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ThroughputMonitor(**settings)


def test_two_monitors_of_one_kind_are_refused(tmp_path: Path) -> None:
    fitting = trainer(callbacks=[ThroughputMonitor(), ThroughputMonitor(every=2)], default_root_dir=tmp_path)
    with pytest.raises(ConfigError, match="2 callbacks of ThroughputMonitor"):
        fitting.fit(Module(), tokens(2), tokens(1))


def test_an_error_in_a_step_leaves_nothing_of_the_monitor_behind(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    wait = vars(torch.distributed.Work)["wait"]
    fitting = trainer(callbacks=[ThroughputMonitor()], enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="enough"):
        fitting.fit(Fails(), tokens(4), tokens(1))
    assert vars(torch.distributed.Work)["wait"] is wait
    assert "start" not in vars(fitting.profiler)


def test_the_users_profiler_hears_all_that_it_would(tmp_path: Path) -> None:
    with_monitor, without = (
        trainer(
            callbacks=callbacks, profiler="simple", enable_progress_bar=False, default_root_dir=tmp_path, max_steps=2
        )
        for callbacks in ([ThroughputMonitor()], [])
    )
    for fitting in (with_monitor, without):
        fitting.fit(Module(), tokens(4), tokens(1))
    heard = set(with_monitor.profiler.recorded_durations)
    assert set(without.profiler.recorded_durations) <= heard
    assert any(action.endswith("train_dataloader_next") for action in heard)
