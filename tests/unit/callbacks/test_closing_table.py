from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
import torch
from tests.unit.callbacks.support import Module, tokens, trainer

from meshbolt.callbacks import ClosingTable
from meshbolt.callbacks.closing_table import Laps, peak_memory_bytes

CPU = torch.device("cpu")


def table(output: str) -> Mapping[str, str]:
    """Return the rows of the table at the end of an output."""
    rows = output.rpartition("this run\n")[2].splitlines()
    return {row[2:].split("  ")[0]: row.rpartition("  ")[2] for row in rows}


def test_the_table_tells_strategy_ranks_steps_speed_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(callbacks=[ClosingTable()], enable_progress_bar=False).fit(Module(), tokens(6), tokens(1))
    rows = table(capsys.readouterr().out)

    assert rows["strategy"] == "SingleDeviceStrategy"
    assert rows["ranks"] == "1 × cpu"
    assert rows["precision"] == "32-true"
    assert rows["steps"] == "6"
    assert rows["step time, median"].endswith("ms")
    assert float(rows["tokens/s, all ranks"].replace(",", "")) > 0
    assert "mean" in rows["peak memory of a rank (process)"]


def test_a_step_is_a_whole_window_and_a_slow_validation_is_not_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            time.sleep(0.05)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            time.sleep(1.0)

    options = {"accumulate_grad_batches": 2, "val_check_interval": 4, "num_sanity_val_steps": 0}
    fitting = trainer(callbacks=[ClosingTable()], enable_progress_bar=False, **options)
    fitting.fit(Slow(), tokens(12), tokens(1))
    rows = table(capsys.readouterr().out)
    step_seconds = float(rows["step time, median"].removesuffix(" ms")) / 1e3

    assert rows["steps"] == "6"
    assert 0.1 <= step_seconds < 0.6, "two batches, and no validation"
    # 2 batches of 10 tokens in each step; the speed is that of the median step.
    assert float(rows["tokens/s, all ranks"].replace(",", "")) == pytest.approx(20 / step_seconds, rel=0.05)


def test_a_validation_after_every_step_leaves_the_steps_measured(capsys: pytest.CaptureFixture[str]) -> None:
    fitting = trainer(callbacks=[ClosingTable()], enable_progress_bar=False, val_check_interval=1)
    fitting.fit(Module(), tokens(3), tokens(1))
    rows = table(capsys.readouterr().out)

    assert rows["step time, median"].endswith("ms")
    assert "tokens/s, all ranks" in rows


def test_a_fit_without_a_step_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(callbacks=[ClosingTable()], enable_progress_bar=False, max_steps=0).fit(Module(), tokens(1), tokens(1))
    rows = table(capsys.readouterr().out)

    assert rows["step time, median"] == "no step was taken"
    assert "tokens/s, all ranks" not in rows


def test_a_pause_ends_one_lap_and_begins_another() -> None:
    laps = Laps(CPU)
    laps.stamp()
    laps.stamp()
    laps.pause()
    time.sleep(0.2)
    laps.stamp()
    laps.stamp()
    seconds = laps.seconds()

    assert len(seconds) == 2
    assert max(seconds) < 0.2


def test_peak_memory_counts_what_was_freed_again() -> None:
    before = peak_memory_bytes(CPU)
    held = bytearray(200 * 2**20)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    del held

    assert peak_memory_bytes(CPU) - before > 100 * 2**20
